"""One timer for all requests in flight, which finds those that have run for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ._backend import logger

if TYPE_CHECKING:
    from ._backend import EventLoop


class Sweepable(Protocol):
    pen: dict[Sweepable, None] | None
    """Where it waits; `Sweep` sets it, and whoever is done before takes itself out."""

    def arm(self) -> None:
        """Called once, between one and two intervals after `Sweep.add`."""


class Sweep:
    """Two pens, and a timer that moves everyone on by one: adding costs a tenth of what a timer of one's own does.

    The timer runs while anyone waits, so it may outlive the last request by one interval.
    """

    def __init__(self, loop: EventLoop, interval: float) -> None:
        self._loop = loop
        self._interval = interval
        self.young: dict[Sweepable, None] = {}
        self._old: dict[Sweepable, None] = {}
        self.is_wound = False

    def add(self, item: Sweepable) -> None:
        self.young[item] = None
        item.pen = self.young
        if not self.is_wound:
            self.wind()

    def wind(self) -> None:
        self.is_wound = True
        self._loop.call_at(self._loop.time() + self._interval, self._tick)

    def _tick(self) -> None:
        due, self._old, self.young = self._old, self.young, {}
        if self._old:
            self.wind()
        else:
            self.is_wound = False
        while due:
            # One by one: arming one may end another that is due.
            item = next(iter(due))
            del due[item]
            item.pen = None
            try:
                item.arm()
            except Exception:
                logger.exception("a request could not be listened to")


def sweep_of(loop: EventLoop, interval: float) -> Sweep:
    """The loop's own sweep of that interval."""
    sweep: Sweep | None = loop.extras.get(interval)
    if sweep is None:
        sweep = loop.extras[interval] = Sweep(loop, interval)
    return sweep
