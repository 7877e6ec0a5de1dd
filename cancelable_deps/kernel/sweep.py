"""One timer for all requests in flight, which finds the requests that have run for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .log import logger

if TYPE_CHECKING:
    from .loops.base import EventLoop


class Sweepable(Protocol):
    """An item of a `Sweep`, such as a request."""

    pen: dict[Sweepable, None] | None
    """The collection in which the item waits. `Sweep` sets it; an item that ends earlier removes itself from it."""

    def arm(self) -> None:
        """Act on the time that has passed: called once, between one and two intervals after `Sweep.add`."""


class Watched(Protocol):
    """An object that a `Sweep` calls at the end of an interval."""

    def look(self) -> bool:
        """Do the work of this interval, and return whether to be called at the end of the next one too."""
        ...


class Sweep:
    """Two generations of items, and one timer: at each tick the old items are due, and the young ones become old.

    Adding an item costs a tenth of a timer of its own. The timer runs while any item waits, so it may outlive the last
    request by one interval.
    """

    def __init__(self, loop: EventLoop, interval: float) -> None:
        self._loop = loop
        self._interval = interval
        self.young: dict[Sweepable, None] = {}
        self._old: dict[Sweepable, None] = {}
        self._watched: list[Watched] = []
        self.is_wound = False

    def add(self, item: Sweepable) -> None:
        """Call ``item.arm()`` once, between one and two intervals from now."""
        self.young[item] = None
        item.pen = self.young
        if not self.is_wound:
            self.wind()

    def watch(self, watched: Watched) -> None:
        """Call ``watched.look()`` within an interval from now, and at every tick as long as it returns true."""
        self._watched.append(watched)
        if not self.is_wound:
            self.wind()

    def wind(self) -> None:
        """Start the timer for one interval."""
        self.is_wound = True
        self._loop.call_at(self._loop.time() + self._interval, self.tick)

    def tick(self) -> None:
        """End an interval: arm the items that are due, and start the next interval if there is anything to wait for."""
        due, self._old, self.young = self._old, self.young, {}
        # First, because they are about deadlines, and arming requests may take a while.
        self._let_look()
        if self._old or self.young or self._watched:
            self.wind()
        else:
            self.is_wound = False
        for item in list(due):
            # One by one, because arming one item may end another that is due.
            if item in due:
                del due[item]
                self._arm(item)

    def _let_look(self) -> None:
        watched, self._watched = self._watched, []
        for one in watched:
            try:
                if one.look():
                    self._watched.append(one)
            except Exception:
                logger.exception("the timeouts of a queue could not be checked")

    def _arm(self, item: Sweepable) -> None:
        item.pen = None
        try:
            item.arm()
        except Exception:
            logger.exception("listening for the disconnect of a request's client could not be started")


def sweep_of(loop: EventLoop, interval: float) -> Sweep:
    """Return the sweep of ``loop`` with that interval, in seconds; it is created on the first call."""
    sweep: Sweep | None = loop.extras.get(interval)
    if sweep is None:
        sweep = loop.extras[interval] = Sweep(loop, interval)
    return sweep
