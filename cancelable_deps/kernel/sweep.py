"""One timer for all that is to be looked after at intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .log import logger

if TYPE_CHECKING:
    from .loops.base import EventLoop


class Watched(Protocol):
    """Something that is to be looked after at intervals, for a while."""

    def look(self) -> bool:
        """Called at the end of an interval. Returns whether to be called at the end of the next one as well."""
        ...


class Sweep:
    """A timer that runs as long as it has something to look after, so it may outlive that by one interval."""

    def __init__(self, loop: EventLoop, interval: float) -> None:
        self._loop = loop
        self._interval = interval
        self._watched: list[Watched] = []
        self._is_running = False

    def watch(self, watched: Watched) -> None:
        """Call ``watched.look()`` within an interval from now, and for as long as it says so."""
        self._watched.append(watched)
        if not self._is_running:
            self._start()

    def _start(self) -> None:
        self._is_running = True
        self._loop.call_at(self._loop.time() + self._interval, self.tick)

    def tick(self) -> None:
        """Called by the loop at the end of each interval."""
        watched, self._watched = self._watched, []
        for each in watched:
            try:
                if each.look():
                    self._watched.append(each)
            except Exception:
                logger.exception("a sweep could not be made")
        if self._watched:
            self._start()
        else:
            self._is_running = False


def sweep_of(loop: EventLoop, interval: float) -> Sweep:
    """Return the loop's own sweep of that interval."""
    sweep: Sweep | None = loop.extras.get(interval)
    if sweep is None:
        sweep = loop.extras[interval] = Sweep(loop, interval)
    return sweep
