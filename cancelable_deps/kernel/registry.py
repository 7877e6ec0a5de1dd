"""What all that runs in an event loop has in common, be it requests or detached work: who is told of it, and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import Sized

O = TypeVar("O")


class Registry(Generic[O]):
    """A collection whose members leave it when they end.

    :ivar observers: the objects that are told of each member, such as the shutdown.
    """

    def __init__(self, members: Sized) -> None:
        self.observers: tuple[O, ...] = ()
        self._members = members
        self._empty: anyio.Event | None = None

    def observe(self, observer: O) -> None:
        """Tell an observer of each member from now on."""
        self.observers += (observer,)

    def unobserve(self, observer: Any) -> None:
        """Tell an observer nothing any more."""
        self.observers = tuple(other for other in self.observers if other is not observer)

    def note_removal(self) -> None:
        """Wake those up that wait for the last member, if that has just left."""
        if self._empty is not None and not self._members:
            self._empty.set()

    async def wait_empty(self) -> None:
        """Wait until no member is left."""
        while self._members:
            # Several applications of one loop may wait here.
            if self._empty is None or self._empty.is_set():
                self._empty = anyio.Event()
            await self._empty.wait()
