"""An ordered collection: a tuple while it is small, to save memory, and a dictionary when it is large, to save time."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")

_FEW = 8

# A dictionary with one entry needs three times the memory of a tuple with one, and most requests have one or two
# members in each collection.
Members = tuple[T, ...] | dict[T, None]


def with_one_more(members: Members[T], member: T) -> Members[T]:
    """Return ``members`` with ``member``. The result replaces ``members``, which may have been changed."""
    if isinstance(members, tuple):
        if len(members) < _FEW:
            return (*members, member)
        members = dict.fromkeys(members)
    members[member] = None
    return members


def without(members: Members[T], member: T) -> Members[T]:
    """Return ``members`` without ``member``. The result replaces ``members``, which may have been changed."""
    if isinstance(members, tuple):
        return tuple(other for other in members if other is not member)
    members.pop(member, None)
    return members or ()
