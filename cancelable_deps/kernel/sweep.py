"""One timer for all requests in flight, which finds those that have run for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .log import logger

if TYPE_CHECKING:
    from .loops.base import EventLoop


class Sweepable(Protocol):
    pen: dict[Sweepable, None] | None
    """Where it waits; `Sweep` sets it, and whoever is done before takes itself out."""

    def arm(self) -> None:
        """Called once, between one and two intervals after `Sweep.add`."""


class Watched(Protocol):
    """Somebody who has something to look after every interval."""

    def look(self) -> bool:
        """Called at the end of the interval; whether at that of the next as well."""
        ...


class Sweep:
    """Two pens, and a timer that moves everyone on by one: adding costs a tenth of what a timer of one's own does.

    The timer runs while anyone waits, so it may outlive the last request by one interval.
    """

    def __init__(self, loop: EventLoop, interval: float) -> None:
        self._loop = loop
        self._interval = interval
        self.young: dict[Sweepable, None] = {}
        self._old: dict[Sweepable, None] = {}
        self._watched: list[Watched] = []
        self.is_wound = False

    def add(self, item: Sweepable) -> None:
        self.young[item] = None
        item.pen = self.young
        if not self.is_wound:
            self.wind()

    def watch(self, watched: Watched) -> None:
        """Let it look within an interval from now, and as long as it likes."""
        self._watched.append(watched)
        if not self.is_wound:
            self.wind()

    def wind(self) -> None:
        self.is_wound = True
        self._loop.call_at(self._loop.time() + self._interval, self.tick)

    def tick(self) -> None:
        due, self._old, self.young = self._old, self.young, {}
        # First: they look after deadlines, and what makes a request listen may take a while.
        self._let_look()
        if self._old or self.young or self._watched:
            self.wind()
        else:
            self.is_wound = False
        for item in list(due):
            # One by one: arming one may end another that is due.
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
                logger.exception("a sweep could not be made")

    def _arm(self, item: Sweepable) -> None:
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
