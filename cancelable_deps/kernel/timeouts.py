"""Who has a limit waits in the line of that limit, with one timer of the event loop for all who stand in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .log import logger
from .sweep import sweep_of

if TYPE_CHECKING:
    from .loops.base import EventLoop, Timer

# How long a line goes without a timer of its own. Most who come are gone by then, and a timer that ends with each of
# them, to start with the next, is what a line is there to avoid. It is what the loop's sweep of requests takes by
# default, so that one timer serves both.
_NEW = 0.005

# So long before its deadline each gets a timer of its own: what is due in one pass of the loop happens in its order only
# if each has one when the pass begins. A sleep that ends before the limit then wins, and one that ends after it loses,
# though the loop was blocked past both; for longer than that, and whoever is overdue is told when somebody looks.
CLOSE = 0.1


class Waiting(Protocol):
    """Somebody with a deadline."""

    timeout_queue: TimeoutQueue | None
    """Where it waits. Whoever is done before its time leaves."""

    def time_is_up(self, now: float) -> None:
        """Called once, in the event loop, when it has been taken out of its line."""


class TimeoutQueue:
    """Equal limits end in the order in which they began, so the first to come is the first to be due.

    Somebody looks some time before the deadline of the first: the loop's sweep while the first is new, from then on a
    timer. The timer ends with the last who waits, and the line with it; so the lines of a loop are those in use.

    One whose deadline is close has a line to itself, with a timer that goes off at that very moment.
    """

    __slots__ = ("_ahead", "_limit", "_loop", "looked_at_by", "timer", "waiting")

    def __init__(self, loop: EventLoop, limit: float, ahead: float = CLOSE) -> None:
        self._loop = loop
        self._limit = limit
        self._ahead = ahead
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
        """Take out those whose time comes; whether the sweep is to come again."""
        return self._look(self._loop.time())

    def tick(self) -> None:
        assert self.looked_at_by is not None
        self.timer = None
        # uvloop counts in milliseconds, and its timers may go off half of one early.
        if self._look(max(self._loop.time(), self.looked_at_by)):
            sweep_of(self._loop, _NEW).watch(self)

    def _look(self, now: float) -> bool:
        close = []
        for item, deadline in self.waiting.items():
            if deadline - self._ahead > now:
                break
            close.append(item)
        for item in close:
            # One of them may have ended another.
            if (due := self.waiting.pop(item, None)) is None:
                continue
            if due > now and self._ahead:
                item.timeout_queue = wait_alone(self._loop, item, due)
            else:
                item.timeout_queue = None
                _tell(item, now)
        return self._go_on(now)

    def _go_on(self, now: float) -> bool:
        """See to it that somebody looks in time for the first; whether the sweep is to."""
        for first in self.waiting.values():
            by = first - self._ahead
            # It began so long before its deadline.
            if self._ahead and by > now + _NEW and first - self._limit > now - _NEW:
                self.looked_at_by = now + _NEW
                return True
            self.looked_at_by = by
            self.timer = self._loop.call_at(by, self.tick)
            return False
        self.end()
        return False

    def end(self) -> None:
        """The last who waited has left: nobody need look any more."""
        self.looked_at_by = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self._loop.timeout_queues.get(self._limit) is self:
            del self._loop.timeout_queues[self._limit]


def _tell(item: Waiting, now: float) -> None:
    try:
        item.time_is_up(now)
    except Exception:
        # Or those behind it would wait for ever.
        logger.exception("a timeout could not be acted on")


def new_queue(loop: EventLoop, limit: float) -> TimeoutQueue:
    """The line for `limit`, which there is not yet."""
    queue = loop.timeout_queues[limit] = TimeoutQueue(loop, limit)
    return queue


def wait_alone(loop: EventLoop, item: Waiting, deadline: float) -> TimeoutQueue:
    """Let ``item`` wait for ``deadline`` with a timer of its own."""
    queue = TimeoutQueue(loop, 0.0, 0.0)
    queue.waiting[item] = queue.looked_at_by = deadline
    queue.timer = loop.call_at(deadline, queue.tick)
    return queue


def wait_belatedly(loop: EventLoop, limit: float, item: Waiting, deadline: float) -> TimeoutQueue:
    """Let ``item``, which began some time ago, wait for ``deadline``; alone if that is close or others came in between."""
    if deadline - loop.time() <= CLOSE:
        return wait_alone(loop, item, deadline)
    queue = loop.timeout_queues.get(limit)
    if queue is None:
        queue = new_queue(loop, limit)
    elif queue.waiting:
        if deadline < next(reversed(queue.waiting.values())):
            return wait_alone(loop, item, deadline)
    elif queue.looked_at_by is not None and deadline - CLOSE < queue.looked_at_by:
        return wait_alone(loop, item, deadline)
    queue.waiting[item] = deadline
    if queue.looked_at_by is None:
        queue.begin()
    return queue
