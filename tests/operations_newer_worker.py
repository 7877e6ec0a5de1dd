"""A worker of a newer version, in a process of its own: it adds fields to all that others read, and knows more kinds."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

import anyio

from cancelable_deps.operations import entries
from cancelable_deps.operations.redis import layout, store

from . import operations_worker

VERSION = entries.VERSION + 1
MORE = {"priority": 7, "trace": {"id": "x", "flags": [1, None]}}


def newer(encoded: bytes) -> bytes:
    """The entry as the newer version writes it."""
    fields = json.loads(encoded)
    data = fields["data"]
    for part in [data, *data.get("answers", ()), *parts_of(data)]:
        part.update(MORE)
    if "identity" in data:
        data["identity"].append("more")
    return json.dumps({**fields, "v": VERSION, "urgency": 3, **MORE}).encode()


def parts_of(data: Any) -> list[dict[str, Any]]:
    """The operations that an entry tells of, and their progress."""
    found = []
    for name, value in data.items():
        if name in ("operation", "progress") and value is not None:
            found.append(value)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                found += parts_of(part)
    return found


class NewerEntry(entries.Entry):
    def encoded(self) -> bytes:
        return newer(super().encoded())


def with_more(fields: Mapping[str, Any]) -> list[str]:
    return as_pairs({**fields, **({"priority": 7} if "created" in fields else {})})


def identity_with_more(identity: Any) -> str:
    return json.dumps({**identity._asdict(), **MORE})


as_pairs = layout.as_pairs


def main() -> None:
    entries.VERSION = VERSION  # type: ignore[misc]
    sys.modules["cancelable_deps.operations.exchange"].Entry = NewerEntry  # type: ignore[attr-defined]
    vars(store).update(as_pairs=with_more, identity_text=identity_with_more)  # pyright: ignore[reportAttributeAccessIssue]
    url, lease, result_ttl, backend = sys.argv[1:]
    anyio.run(operations_worker.main, url, float(lease), float(result_ttl), backend=backend)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    main()
