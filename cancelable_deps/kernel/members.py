"""Few or many objects in the order in which they came; small while they are few, and cheap to change when they are many."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")

_FEW = 8

# A dictionary of one takes three times what a tuple of one does, and most requests have one or two of what stands here.
Members = tuple[T, ...] | dict[T, None]


def with_one_more(members: Members[T], member: T) -> Members[T]:
    """Return ``members`` and ``member``; to be put in the place of ``members``, which may be changed."""
    if isinstance(members, tuple):
        if len(members) < _FEW:
            return (*members, member)
        members = dict.fromkeys(members)
    members[member] = None
    return members


def without(members: Members[T], member: T) -> Members[T]:
    """As `with_one_more`, for one that leaves."""
    if isinstance(members, tuple):
        return tuple(other for other in members if other is not member)
    members.pop(member, None)
    return members or ()
