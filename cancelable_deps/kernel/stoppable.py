"""The cancellation of a block: by its token, its deadline or the block around it; once, and from the inside out."""

from __future__ import annotations

import math
from threading import RLock
from typing import TYPE_CHECKING, Any, Final

from .members import Members, with_one_more, without
from .reasons import CancelationReason
from .timed import Timed
from .token import CancelationToken, Cause, telling_everybody

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio import CancelScope

    from .loops.base import MemberScope, PoliteScope, Timer
    from .token import Listener

# One that can be taken twice, because a signal handler may ask for a token while its own thread makes one.
_making: Final = RLock()


class Stoppable(Timed):
    """Work that is stopped with the blocks inside of it when its token is cancelled."""

    cleanup_grace: float
    grace: float | None = None
    """The block's own ``cleanup_grace``; without one, that of the settings holds."""

    parent: Any = None
    """The block around this one in the same task, or around the thread in which this one is entered."""

    children: Members[Stoppable] = ()
    is_only_marked = False
    """Whether the block around this one delivers the cancellation, and this one only has the cause and callbacks."""

    group_scope: CancelScope | None = None
    member_scopes: dict[object, MemberScope] | None = None
    told_by_parent: Listener | None = None
    """The listener that tells a block in a thread that the block around the thread was cancelled."""

    _token: CancelationToken | None = None
    _has_fired = False
    _is_deferred = False
    _late_call: tuple[float, Callable[[], object], Timer] | None = None
    """The time of the last call by `call_after_grace`, the function, and the timer."""

    @property
    def token(self) -> CancelationToken:
        """The block's own token. Made when it is first asked for; most blocks are left before that."""
        token = self._token
        if token is None:
            made = CancelationToken()
            if self.ended is None:
                made.listen(self)
            # Two threads may come at the same time.
            with _making:
                token = self._token
                if token is None:
                    token = self._token = made
        return token

    @property
    def cause(self) -> Cause | None:
        token = self._token
        return None if token is None else token.cause

    @property
    def deadline(self) -> float:
        """The deadline on the loop's clock, or that of a block around this one, if that is earlier."""
        return self.own_deadline if self.parent is None else min(self.own_deadline, self.parent.deadline)

    def begun_scope(self) -> PoliteScope | None:
        """Return the scope of an open block, which is entered now if it has not been."""
        raise NotImplementedError

    @property
    def task(self) -> object:
        """The task in which the block is open; ``None`` if it is not."""
        raise NotImplementedError

    def timeout_cause(self) -> Cause:
        limit = "" if self.timeout is None else f" after {self.timeout:g} seconds"
        return Cause(CancelationReason.TIMEOUT, f"Timed out{limit}")

    def cancel_for_timeout(self, cause: Cause) -> None:
        self.token.cancel_because(cause)

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None:
        """Act on a cancellation of a token that the block listens to."""
        if token is not self._token:
            self.token.cancel_because(cause)
        elif self.loop is not None and not self.loop.is_running_here():
            self.loop.call_from_thread(self.fire, cause)
        else:
            self.fire(cause)
            if self.loop is not None:
                self.loop.wake()

    def fire(self, cause: Cause) -> None:
        """Stop the block, which has been cancelled. Later calls have no effect."""
        scope = self.begun_scope()
        if scope is None or self._has_fired:
            return
        self._has_fired = True
        if any(child.answers(cause) for child in self.open_children()):
            # The innermost block of a task raises the error; a second delivery would interrupt its cleanup.
            self._is_deferred = True
            return
        with telling_everybody():
            # First: a member scope further in checks whether its block is cancelled when the cancellation reaches it.
            self.mark_children(scope)
            self.deliver(scope, cause)

    def fire_at_last(self) -> None:
        """Deliver the cancellation that was deferred."""
        if self.scope is not None and self.cause is not None:
            self.deliver(self.scope, self.cause)

    def deliver(self, scope: PoliteScope, cause: Cause) -> None:
        if not self.is_only_marked:
            scope.cancel_politely(str(cause))
        if self.group_scope is not None:
            # A child that stands in a shield just now would otherwise not be reached before the body has cleaned up.
            self.group_scope.cancel()

    def open_children(self) -> list[Stoppable]:
        # A copy, because blocks in threads are entered and left while another thread cancels.
        return list(self.children)

    def answers(self, cause: Cause) -> bool:
        """Return whether this block, or one inside of it, raises the error of ``cause``."""
        return self.cause is cause or any(child.answers(cause) for child in self.open_children())

    def mark(self, message: str) -> None:
        """Record that the block around this one was cancelled, whose scope encloses the scopes of this one."""
        self.is_only_marked = True
        # First: a child that listens to our token would take the cause for its own, and deliver it a second time.
        self.mark_children(self.scope)
        self.token.cancel_nowait(CancelationReason.PARENT, message)

    def mark_children(self, scope: PoliteScope | None) -> None:
        for child in self.open_children():
            inner = child.begun_scope()
            # A child in a shield is finished first, and has its own limits until then.
            if scope is None or inner is None or scope.reaches(inner):
                child.mark(f"The enclosing {self!r}")

    def hold(self) -> None:
        """Keep every cancellation of the block from its task until `resume`."""
        scope = self.begun_scope()
        if scope is not None:
            scope.hold()

    def resume(self) -> None:
        if self.scope is not None:
            self.scope.resume()

    def link_to(self, parent: Stoppable) -> None:
        self.parent = parent
        parent.children = with_one_more(parent.children, self)

    def leave_parents(self, answered: bool) -> None:
        """Remove this block, which has been left, from its parent; let the blocks around it act on a deferred cause."""
        parent = self.parent
        if parent.children:
            parent.children = without(parent.children, self)
        while parent is not None:
            parent.stop_what_is_left(answered)
            parent = parent.parent

    def stop_what_is_left(self, answered: bool) -> None:
        """Act on a deferred cause, if the block that was to raise its error has been left, and no other will."""
        cause = self.cause
        if not self._is_deferred or cause is None or any(child.answers(cause) for child in self.open_children()):
            return
        self._is_deferred = False
        if not answered:
            self.fire_at_last()
        elif self.loop is not None:
            # Code that catches the error and continues here has the time of a cleanup.
            self.call_after_grace(self.fire_at_last)

    def call_after_grace(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` when the time of a cleanup has passed, if the block is still open then."""
        assert self.loop is not None
        self._call_late(self.loop.time() + self.cleanup_grace, callback)

    def _call_late(self, when: float, callback: Callable[[], object]) -> None:
        assert self.loop is not None
        self._late_call = (when, callback, self.loop.call_at(when, callback))

    def drop_late_call(self) -> None:
        """Prevent the call by `call_after_grace`."""
        if self._late_call is not None:
            self._late_call[-1].cancel()
            self._late_call = None

    def shorten_grace(self, grace: float) -> None:
        """Give the cleanup of this block, and of the work inside that a cancellation reaches, at most ``grace`` seconds.

        May be called in any thread, before or after a cancellation. A cleanup that runs now has ``grace`` seconds from
        now; with 0 its next ``await`` is cancelled. Never lengthens a grace. Without effect if the block has been left.
        A block in a worker thread, whose cleanup nothing interrupts, only keeps the limit.
        """
        loop = self.loop
        if self.ended is not None:
            return
        if loop is not None and not loop.is_running_here():
            loop.call_from_thread(self.shorten_grace, grace)
            return
        self.grace = min(self.cleanup_grace, grace)
        scope, cause = self.scope, self.cause
        if scope is not None:
            scope.shorten_grace(grace)
        for member in list((self.member_scopes or {}).values()):
            member.shorten_grace(grace)
        for child in self.open_children():
            inner = child.scope
            is_reached = scope is None or inner is None or scope.reaches(inner)
            # A child in a shield has its own limits until that ends, unless it has been cancelled for the same cause.
            if is_reached or (cause is not None and child.answers(cause)):
                child.shorten_grace(grace)
        if loop is not None:
            self._shorten_late_call(loop.time() + grace)
            loop.wake()

    def _shorten_late_call(self, by: float) -> None:
        if self._late_call is not None and by < self._late_call[0]:
            callback = self._late_call[1]
            self.drop_late_call()
            self._call_late(by, callback)

    def stop_timers(self) -> None:
        if self.timeout_queue is not None:
            self.leave_queue()
        if self._late_call is not None:
            self.drop_late_call()

    def check(self) -> None:
        """Raise the error of the cause if this block, or one around it, is cancelled or past its deadline."""
        if self.own_deadline < math.inf and self.loop is not None and self.loop.time() >= self.own_deadline:
            self.expire()
        cause = self.cause
        if cause is not None:
            error = cause.error()
            self.is_told(cause, error)
            raise error
        if self.parent is not None:
            self.parent.check()

    def is_told(self, cause: Cause, error: BaseException | None) -> None:
        """Note that the running task has the error, or is about to get it: its cleanup must not be cancelled."""
        loop = self.loop
        if loop is None or not loop.is_running_here():
            return
        task = loop.current_task()
        if task is None:
            return
        self.take_for_delivered(cause, task)
        if error is not None:
            loop.scopes.tell(loop, error)

    def take_for_delivered(self, cause: Cause, task: object) -> None:
        member = None if self.member_scopes is None else self.member_scopes.get(task)
        if member is not None and self.cause is cause:
            member.take_for_delivered()
        block: Stoppable | None = self
        while block is not None and not block.is_open:
            block = block.parent
        if block is None or block.task is not task:
            return
        while block is not None:
            scope = block.begun_scope()
            if scope is not None and block.cause is cause:
                scope.take_for_delivered()
            block = block.parent
