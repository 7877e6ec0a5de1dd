"""The entries that workers exchange: JSON with a version, of which unknown kinds and fields are ignored."""

from __future__ import annotations

import json
import secrets
from typing import Any, Final, NamedTuple

from ..kernel.log import logger

VERSION: Final = 1


class Entry(NamedTuple):
    """A message to one worker, or to all."""

    kind: str
    id: str
    sender: str
    at: float
    """Seconds since the epoch, by the clock of the sender."""

    data: dict[str, Any]
    to: str | None = None
    """The worker whose mail it is; ``None`` if it is for all."""

    def encoded(self) -> bytes:
        """Return the entry as bytes."""
        fields: dict[str, Any] = {
            "v": VERSION,
            "kind": self.kind,
            "id": self.id,
            "from": self.sender,
            "at": self.at,
            "data": self.data,
        }
        if self.to is not None:
            fields["to"] = self.to
        return json.dumps(fields, separators=(",", ":")).encode()


def new_entry_id() -> str:
    """Return an id for an entry."""
    return secrets.token_urlsafe(9)


def decoded(data: bytes) -> Entry | None:
    """Return the entry; ``None`` if it is none, or of a version that says to be read by newer ones only.

    A newer version may add fields and kinds. One that changes the meaning of what there is announces so by ``"least"``,
    the oldest version that may read it.
    """
    try:
        fields = json.loads(data)
        if not isinstance(fields, dict) or int(fields.get("least", 1)) > VERSION:
            return None
        body = fields["data"]
        if not isinstance(body, dict):
            return None
        return Entry(
            str(fields["kind"]), str(fields["id"]), str(fields["from"]), float(fields["at"]), body, fields.get("to")
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        logger.warning("an entry of the operations cannot be read, and is ignored: %.100r", data)
        return None
