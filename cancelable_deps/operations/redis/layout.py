"""The names of keys, all under one hash tag so that a cluster has them in one slot, and the form of values."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from ..backend import Identity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..backend import Fields

_PREFIX: Final = re.compile(r"[A-Za-z0-9._~:/-]{1,64}")
MOST_OF_ALL: Final = 10_000
MOST_OF_OWNER: Final = 1000
"""So many records can be listed: of all owners together, and of one."""

RECORD: Final = "record"
KEY: Final = "key"


class Names:
    """The names of keys. What others have chosen stands at the end, so that no two of them are the same."""

    def __init__(self, prefix: str) -> None:
        start = f"{{{prefix}}}:"
        self._start = start
        self.log = f"{start}log"
        self.workers = f"{start}workers"
        self.identities = f"{start}identities"
        self.since = f"{start}since"
        self.generations = f"{start}gen"

    def inbox(self, worker: str) -> str:
        """Return the name of the stream of a worker's mail."""
        return f"{self._start}in:{worker}"

    def held(self, worker: str) -> str:
        """Return the name of the set of what a worker holds: records that have not ended, and places of keys."""
        return f"{self._start}held:{worker}"

    def tombstone(self, worker: str) -> str:
        """Return the name of the key that says that a worker was taken for dead."""
        return f"{self._start}dead:{worker}"

    def record(self, id: str) -> str:
        """Return the name of the hash of a record."""
        return f"{self._start}op:{id}"

    def result(self, id: str) -> str:
        """Return the name of the string of a result."""
        return f"{self._start}result:{id}"

    def indexes(self, owner: str | None) -> list[str]:
        """Return the names of the indexes that a record is in: that of all, and that of its owner."""
        return self.index(None) if owner is None else [*self.index(None), *self.index(owner)]

    def index(self, owner: str | None) -> list[str]:
        """Return the names of an index and of its times of expiry."""
        if owner is None:
            return [f"{self._start}all", f"{self._start}until"]
        return [f"{self._start}owner:{owner}", f"{self._start}owner-until:{owner}"]

    def places(self, key: str) -> list[str]:
        """Return the names of the holders of a key, and of those that wait for it."""
        return [f"{self._start}key:{key}", f"{self._start}wait:{key}"]


def checked_prefix(prefix: str) -> str:
    """Return a prefix of keys.

    :raises TypeError: if it is no string.
    :raises ValueError: if it has other characters, or too many.
    """
    if not isinstance(prefix, str):
        raise TypeError(f"prefix is a string, not {prefix!r}")
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(f"prefix has 1 to 64 of the characters A-Z a-z 0-9 . _ ~ : / - and not {prefix!r}")
    return prefix


def held_record(id: str) -> str:
    """Return the member of a worker's set that stands for a record."""
    return _encoded([RECORD, id])


def held_place(key: str, id: str) -> str:
    """Return the member of a worker's set that stands for a place of a key."""
    return _encoded([KEY, key, id])


def held_of(member: str) -> list[str]:
    """Return what a member of a worker's set stands for: a kind and its names."""
    found: list[str] = json.loads(member)
    return found


def as_pairs(fields: Mapping[str, Any]) -> list[str]:
    """Return fields as names and values, without those that are ``None``."""
    return [text for name, value in fields.items() if value is not None for text in (name, encoded(value))]


def encoded(value: Any) -> str:
    """Return the value of a field as it is kept."""
    return _encoded(value)


def fields_of(pairs: Sequence[str]) -> Fields:
    """Return the fields of names and values."""
    return {name: json.loads(value) for name, value in zip(pairs[::2], pairs[1::2], strict=True)}


def identity_text(identity: Identity) -> str:
    """Return an identity as it is kept. A newer version may add fields."""
    return _encoded(identity._asdict())


def identities_of(texts: Iterable[str]) -> list[Identity]:
    """Return the identities that can be read."""
    found = []
    for each in texts:
        fields = json.loads(each) if each else {}
        if fields.keys() >= set(Identity._fields):
            found.append(Identity(**{name: fields[name] for name in Identity._fields}))
    return found


# Made once: `json.dumps` makes one for each call that has its own separators.
_encoded: Final = json.JSONEncoder(separators=(",", ":")).encode
