"""The requests in flight of one event loop, divided into young and old ones by ``listen_after``."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import WeakSet

from ..kernel.log import logger
from ..kernel.registry import Registry
from ..kernel.settings import settings
from ..kernel.sweep import sweep_of

if TYPE_CHECKING:
    from ..kernel.loops.base import EventLoop


# A set that one thread iterates over must not grow in another.
_lock: Final = Lock()


class Young(Protocol):
    """A request that has run for less than ``listen_after`` seconds, or the block of its first door."""

    started: float

    def grow_old(self) -> None:
        """Start listening. Called once, in the event loop, when the request has run for ``listen_after`` seconds."""


class Observer(Protocol):
    """An object that is told of every old request, such as the shutdown."""

    def request_is_old(self, request: Any) -> None:
        """Note that ``request`` has joined `InFlight.requests`."""

    def request_ended(self, request: Any) -> None:
        """Note that ``request`` has left `InFlight.requests`, or has ended before with an ``operation`` of its own."""


class InFlight(Registry[Observer]):
    """The requests in flight of one event loop.

    Most are over before they are ``listen_after`` seconds old, and cost two changes of a dictionary.

    :ivar young: the requests that are younger, in the order of their arrival. A request is added by
        `add_young`, and removes itself.
    :ivar requests: the states of the older ones, until they and their background work have ended.
    """

    def __init__(self, loop: EventLoop) -> None:
        self.young: dict[Young, None] = {}
        self.requests: dict[Any, None] = {}
        super().__init__(self.requests)
        self.is_looked_after = False
        self.loop = loop
        settings.observers.add(self)

    def settings_changed(self) -> None:
        """Have the next request looked after at the interval of then; the sweep so far sees to those that are here."""
        self.is_looked_after = False

    def add_young(self, request: Young) -> None:
        """Add a request that has just arrived."""
        self.young[request] = None
        if not self.is_looked_after:
            self.begin()

    def begin(self) -> None:
        """Start the sweep, which calls `look` as long as there are young requests."""
        self.is_looked_after = True
        sweep_of(self.loop, settings.listen_after).watch(self)

    def look(self) -> bool:
        """Let the requests grow old that have run for ``listen_after`` seconds. Called by the sweep."""
        latest = self.loop.time() - settings.listen_after
        due: list[Young] = []
        for request in self.young:
            if request.started > latest:
                break
            due.append(request)
        for request in due:
            # One request that grows old may end another.
            if request in self.young:
                del self.young[request]
                _grow_old(request)
        self.is_looked_after = bool(self.young)
        return self.is_looked_after

    def add(self, request: Any) -> None:
        """Add an old request, and tell the observers."""
        self.requests[request] = None
        for observer in self.observers:
            observer.request_is_old(request)

    def remove(self, request: Any) -> None:
        """Remove a request that has ended, and tell the observers."""
        self.requests.pop(request, None)
        self.tell_end(request)
        self.note_removal()

    def tell_end(self, request: Any) -> None:
        """Tell the observers that ``request`` has ended."""
        for observer in self.observers:
            observer.request_ended(request)


def _grow_old(request: Young) -> None:
    try:
        request.grow_old()
    except Exception:
        # The requests after this one must grow old all the same: they could never be stopped otherwise.
        logger.exception("a request cannot be cancelled when its client leaves: listening for that failed")


_everywhere: Final[WeakSet[InFlight]] = WeakSet()


def in_flight_of(loop: EventLoop) -> InFlight:
    """Return the requests in flight of ``loop``."""
    in_flight: InFlight | None = loop.in_flight
    if in_flight is None:
        in_flight = loop.in_flight = InFlight(loop)
        with _lock:
            _everywhere.add(in_flight)
    return in_flight


def in_flight_everywhere() -> list[InFlight]:
    """Return the requests in flight of each event loop of this process. May be called in any thread."""
    with _lock:
        return list(_everywhere)
