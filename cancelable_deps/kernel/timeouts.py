"""Queues of deadlines: all blocks with the same limit wait in one queue, with one timer of the event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .log import logger
from .sweep import sweep_of

if TYPE_CHECKING:
    from .loops.base import EventLoop, Timer

# The seconds that a queue has no timer of its own, because most blocks have ended by then: queues exist to avoid the
# cost of a timer that ends with each block and starts with the next. It is the default interval of the loop's sweep
# of requests, so that one timer serves both.
_NEW = 0.005

# The seconds before its deadline at which each item gets a timer of its own. Timers that are due in one pass of the
# loop run in the order of their times only if each exists when the pass begins. Then a sleep that ends before the
# limit wins, and a sleep that ends after it loses, even if the loop was blocked past both. If the loop is blocked for
# longer than this, an overdue item is stopped when the queue is next looked at.
CLOSE = 0.1


class Waiting(Protocol):
    """An item with a deadline, such as a block."""

    timeout_queue: TimeoutQueue | None
    """The queue in which the item waits. An item that ends before its deadline removes itself."""

    def time_is_up(self, now: float) -> None:
        """Act on the deadline. Called once, in the event loop, when the item has been removed from its queue."""


class TimeoutQueue:
    """The items with one limit, in the order in which they began, which is the order of their deadlines.

    The queue is looked at some time before the first deadline: by the loop's sweep while the first item is new, then by
    a timer. When the last item leaves, the timer ends and the loop forgets the queue, so a loop has only queues in use.

    An item whose deadline is close has a queue of its own, with a timer for the exact deadline.
    """

    __slots__ = ("_ahead", "_limit", "_loop", "looked_at_by", "timer", "waiting")

    def __init__(self, loop: EventLoop, limit: float, ahead: float = CLOSE) -> None:
        self._loop = loop
        self._limit = limit
        self._ahead = ahead
        self.timer: Timer | None = None
        self.looked_at_by: float | None = None
        """The latest time at which the sweep or the timer looks at the queue; ``None`` if neither does."""
        self.waiting: dict[Waiting, float] = {}
        """The items and their deadlines, in order. The deadlines are copies, because an item that moves its own would
        delay the items behind it."""

    def begin(self) -> None:
        """Start the sweep or the timer, as the first item has been added."""
        if self._go_on(self._loop.time()):
            sweep_of(self._loop, _NEW).watch(self)

    def look(self) -> bool:
        """Remove the items whose deadlines are close, and return whether the sweep is to call this again."""
        return self._look(self._loop.time())

    def tick(self) -> None:
        """Do the same as `look`, when the timer has ended."""
        assert self.looked_at_by is not None
        self.timer = None
        # uvloop counts in milliseconds, and its timers may end half a millisecond early.
        if self._look(max(self._loop.time(), self.looked_at_by)):
            sweep_of(self._loop, _NEW).watch(self)

    def _look(self, now: float) -> bool:
        close = []
        for item, deadline in self.waiting.items():
            if deadline - self._ahead > now:
                break
            close.append(item)
        for item in close:
            # One item may have ended another.
            if (due := self.waiting.pop(item, None)) is None:
                continue
            if due > now and self._ahead:
                item.timeout_queue = wait_alone(self._loop, item, due)
            else:
                item.timeout_queue = None
                _tell(item, now)
        return self._go_on(now)

    def _go_on(self, now: float) -> bool:
        """Arrange that the sweep or a timer looks in time for the first item; return whether it is the sweep."""
        for first in self.waiting.values():
            by = first - self._ahead
            # `first - self._limit` is when the first item began: the sweep looks while that item is new.
            if self._ahead and by > now + _NEW and first - self._limit > now - _NEW:
                self.looked_at_by = now + _NEW
                return True
            self.looked_at_by = by
            self.timer = self._loop.call_at(by, self.tick)
            return False
        self.end()
        return False

    def end(self) -> None:
        """Stop the timer, as the last item has left."""
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
        # The items behind it would wait for ever otherwise.
        logger.exception("a timeout could not be acted on")


def new_queue(loop: EventLoop, limit: float) -> TimeoutQueue:
    """Return a new queue for ``limit``, for which the loop has none yet."""
    queue = loop.timeout_queues[limit] = TimeoutQueue(loop, limit)
    return queue


def wait_alone(loop: EventLoop, item: Waiting, deadline: float) -> TimeoutQueue:
    """Return a queue in which ``item`` waits for ``deadline`` alone, with a timer of its own."""
    queue = TimeoutQueue(loop, 0.0, 0.0)
    queue.waiting[item] = queue.looked_at_by = deadline
    queue.timer = loop.call_at(deadline, queue.tick)
    return queue


def wait_belatedly(loop: EventLoop, limit: float, item: Waiting, deadline: float) -> TimeoutQueue:
    """Return a queue in which ``item``, which began some time ago, waits for ``deadline``.

    The item waits alone if its deadline is close, or if it would break the order of the queue of its limit.
    """
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
