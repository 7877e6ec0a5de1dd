"""The requests of one event loop: those that have just come, and those that have run for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import anyio

from ..kernel.log import logger
from ..kernel.settings import settings
from ..kernel.sweep import sweep_of

if TYPE_CHECKING:
    from ..kernel.loops.base import EventLoop


class Young(Protocol):
    """A request that has just come, or the block of the door that it came in by."""

    started: float

    def grow_old(self) -> None:
        """Called once, in the event loop, when ``listen_after`` seconds are over."""


class Observer(Protocol):
    """Something that is to know of every request that has run for a while."""

    def request_is_old(self, request: Any) -> None:
        """Called for each, when it joins `InFlight.requests`."""


class InFlight:
    """Who is here. Most requests are over before they have run for ``listen_after`` seconds, and cost two changes of a
    dictionary.

    :ivar young: those that have not, in the order in which they came. They enter by ``in_flight.young[self] = None``,
        and `begin` if nobody looks after them; they leave by themselves.
    :ivar requests: the states of those that have, until they have ended, with their background work.
    :ivar observers: the shutdown, and whoever else is to know of each.
    """

    def __init__(self, loop: EventLoop) -> None:
        self.young: dict[Young, None] = {}
        self.requests: dict[Any, None] = {}
        self.observers: tuple[Observer, ...] = ()
        self.is_looked_after = False
        self._loop = loop
        self._empty: anyio.Event | None = None
        settings.observers.add(self)

    def settings_changed(self) -> None:
        """Have the next request looked after at the interval of then; the sweep so far sees to those that are here."""
        self.is_looked_after = False

    def begin(self) -> None:
        """Look after the young ones from now on, as long as there are any."""
        self.is_looked_after = True
        sweep_of(self._loop, settings.listen_after).watch(self)

    def look(self) -> bool:
        """Let those grow old whose time has come; called by the sweep."""
        latest = self._loop.time() - settings.listen_after
        due: list[Young] = []
        for request in self.young:
            if request.started > latest:
                break
            due.append(request)
        for request in due:
            # One that grows old may end another that is due.
            if request in self.young:
                del self.young[request]
                _grow_old(request)
        self.is_looked_after = bool(self.young)
        return self.is_looked_after

    def add(self, request: Any) -> None:
        """Know a request that has run for a while."""
        self.requests[request] = None
        for observer in self.observers:
            observer.request_is_old(request)

    def remove(self, request: Any) -> None:
        """Forget a request that has ended."""
        self.requests.pop(request, None)
        if self._empty is not None and not self.requests:
            self._empty.set()

    async def wait_empty(self) -> None:
        """Wait until no request is left that has run for a while."""
        while self.requests:
            # Each application of the loop may wait here.
            if self._empty is None or self._empty.is_set():
                self._empty = anyio.Event()
            await self._empty.wait()


def _grow_old(request: Young) -> None:
    try:
        request.grow_old()
    except Exception:
        # Or those after it could never be stopped.
        logger.exception("a request cannot be cancelled when its client leaves: listening for that failed")


def in_flight_of(loop: EventLoop) -> InFlight:
    """Return the requests of ``loop``."""
    in_flight: InFlight | None = loop.in_flight
    if in_flight is None:
        in_flight = loop.in_flight = InFlight(loop)
    return in_flight
