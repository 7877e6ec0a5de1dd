"""Who has a limit waits in the line of that limit, with one timer of the event loop for all who stand in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ._backend import logger
from ._sweep import sweep_of

if TYPE_CHECKING:
    from ._backend import EventLoop, Timer

# How long a line goes without a timer of its own. Most who come are gone by then, and a timer that ends with each of
# them, to start with the next, is what a line is there to avoid. It is what the loop's sweep of requests takes by
# default, so that one timer serves both.
_NEW = 0.005


class Waiting(Protocol):
    """Somebody with a deadline."""

    def time_is_up(self, now: float) -> None:
        """Called once, in the event loop; whoever is done before leaves the line."""


class Line:
    """Equal limits end in the order in which they began, so the first to come is the first to be due.

    Somebody looks at the deadline of the first at the latest: the loop's sweep while the first is new, from then on a
    timer. All who are overdue at that moment are told in that same pass of the loop, so before whatever is due after
    them: a timer that is made for one who is overdue comes a pass later.

    The timer ends with the last who waits, and the line with it; so the lines of a loop are those in use.
    """

    __slots__ = ("_limit", "_loop", "looked_at_by", "timer", "waiting")

    def __init__(self, loop: EventLoop, limit: float) -> None:
        self._loop = loop
        self._limit = limit
        self.timer: Timer | None = None
        self.looked_at_by: float | None = None
        """When the sweep or the timer looks at the latest; ``None`` if neither does."""
        self.waiting: dict[Waiting, float] = {}
        """Their deadlines, in order. Not asked of themselves: one that moves its own would hold up those behind it."""

    def begin(self) -> None:
        """The first has come."""
        if self._go_on(self._loop.time()):
            sweep_of(self._loop, _NEW).watch(self)

    def look(self) -> bool:
        """Tell those who are overdue; whether the sweep is to come again."""
        return self._look(self._loop.time())

    def _tick(self) -> None:
        assert self.looked_at_by is not None
        self.timer = None
        # uvloop counts in milliseconds, and its timers may go off half of one early.
        if self._look(max(self._loop.time(), self.looked_at_by)):
            sweep_of(self._loop, _NEW).watch(self)

    def _look(self, now: float) -> bool:
        due = []
        for item, deadline in self.waiting.items():
            if deadline > now:
                break
            due.append(item)
        for item in due:
            # One of them may have ended another.
            if self.waiting.pop(item, None) is not None:
                _tell(item, now)
        return self._go_on(now)

    def _go_on(self, now: float) -> bool:
        """See to it that somebody looks at the deadline of the first; whether the sweep is to."""
        for first in self.waiting.values():
            # It began so long before its deadline.
            if first > now + _NEW and first - self._limit > now - _NEW:
                self.looked_at_by = now + _NEW
                return True
            self.looked_at_by = first
            self.timer = self._loop.call_at(first, self._tick)
            return False
        self.end()
        return False

    def end(self) -> None:
        """The last who waited has left: nobody need look any more."""
        self.looked_at_by = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self._loop.lines.get(self._limit) is self:
            del self._loop.lines[self._limit]


def _tell(item: Waiting, now: float) -> None:
    try:
        item.time_is_up(now)
    except Exception:
        # Or those behind it would wait for ever.
        logger.exception("a timeout could not be acted on")


def new_line(loop: EventLoop, limit: float) -> Line:
    """The line for `limit`, which there is not yet."""
    line = loop.lines[limit] = Line(loop, limit)
    return line


def wait_belatedly(loop: EventLoop, limit: float, item: Waiting, deadline: float) -> Line:
    """Let ``item``, which began some time ago, wait for ``deadline`` until it leaves the line that is returned.

    If others began in between, that is one of its own.
    """
    line = loop.lines.get(limit)
    if line is None:
        line = new_line(loop, limit)
    elif line.waiting:
        if deadline < next(reversed(line.waiting.values())):
            line = Line(loop, limit)
    elif line.looked_at_by is not None and deadline < line.looked_at_by:
        line = Line(loop, limit)
    line.waiting[item] = deadline
    if line.looked_at_by is None:
        line.begin()
    return line
