"""The deadline of a block: when it takes effect, and how it is moved."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .timeouts import CLOSE, new_queue, wait_alone, wait_belatedly

if TYPE_CHECKING:
    from .loops.base import EventLoop, PoliteScope
    from .timeouts import TimeoutQueue
    from .token import Cause


class Timed:
    """Work that may have a deadline. A subclass implements the effect of the deadline in `cancel_for_timeout`, and says
    why in `timeout_cause`."""

    # Class attributes are the defaults that most blocks never change: each attribute that is written costs a request.
    timeout: float | None = None
    """The seconds from entering the block to its deadline."""

    own_deadline: float = math.inf
    """The deadline on the clock of the loop, regardless of enclosing blocks."""

    timeout_queue: TimeoutQueue | None = None
    """The queue in which the block waits for its deadline."""

    started: float = math.nan
    ended: float | None = None
    loop: EventLoop | None = None
    scope: PoliteScope | None = None

    @property
    def cause(self) -> Cause | None:
        raise NotImplementedError

    @property
    def is_open(self) -> bool:
        raise NotImplementedError

    @property
    def elapsed(self) -> float:
        """The seconds from entering the block until now, or until it was left; 0 before it is entered."""
        if self.loop is None:
            return 0.0
        return (self.loop.time() if self.ended is None else self.ended) - self.started

    def timeout_cause(self) -> Cause:
        """Return the cause of a cancellation because the deadline has passed."""
        raise NotImplementedError

    def cancel_for_timeout(self, cause: Cause) -> None:
        """Cancel the work because its deadline has passed."""
        raise NotImplementedError

    def wait_for_deadline(self, loop: EventLoop, timeout: float) -> None:
        """Start to wait for the deadline, when the block is entered."""
        if timeout <= CLOSE:
            self.timeout_queue = wait_alone(loop, self, self.own_deadline)
            return
        queue = self.timeout_queue = loop.timeout_queues.get(timeout) or new_queue(loop, timeout)
        queue.waiting[self] = self.own_deadline
        if queue.looked_at_by is None:
            queue.begin()

    def leave_queue(self) -> None:
        """Stop waiting for the deadline."""
        queue = self.timeout_queue
        if queue is not None:
            self.timeout_queue = None
            queue.waiting.pop(self, None)
            if queue.timer is not None and not queue.waiting:
                queue.end()

    def time_is_up(self, now: float) -> None:
        """Cancel the work if its deadline has passed. Called by the timeout queue."""
        # The deadline may have been moved by a thread whose call has not reached the loop yet: it will wait again.
        if self.own_deadline <= now:
            self.expire()

    def expire(self) -> None:
        """Cancel the work, as its deadline has passed."""
        self.cancel_for_timeout(self.timeout_cause())

    def rearm(self) -> None:
        """Wait for the deadline as it is now, if the block is open and not cancelled."""
        if self.timeout_queue is not None:
            self.leave_queue()
        loop, scope = self.loop, self.scope
        if scope is not None:
            scope.move_deadline(self.own_deadline)
        elif not self.is_open:
            return
        if self.timeout is None or loop is None or self.own_deadline == math.inf or self.cause is not None:
            return
        if self.own_deadline <= loop.time():
            # A timer would act one pass of the loop later, when the work may be done.
            self.expire()
        else:
            self.timeout_queue = wait_belatedly(loop, self.timeout, self, self.own_deadline)

    def move_own_deadline(self, by: float) -> bool:
        """Move the deadline ``by`` seconds, and return whether it was moved. May be called in any thread."""
        assert self.timeout is not None
        self.timeout += by
        loop = self.loop
        if loop is not None:
            self.own_deadline += by
            if loop.is_running_here() and loop.current_task() is not None:
                self.rearm()
            else:
                loop.call_from_thread(self.rearm)
        return True
