"""The mechanics of a block: entering and leaving."""

from __future__ import annotations

import math
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, NoReturn

from .callbacks import Observed
from .errors import CancelationError, ParentCancelation
from .foreign import is_anothers
from .loops.current import current_loop
from .settings import settings
from .unwrap import taken_apart

if TYPE_CHECKING:
    from weakref import ref

    from .condition import Condition
    from .loops.base import EventLoop, PoliteScope
    from .shields import OwnerOfClient
    from .token import CancelationToken, Cause

current: ContextVar[Block | None] = ContextVar("cancelable_deps.current", default=None)
"""The innermost block around the caller."""


class Block(Observed):
    """A block of work, which is entered once in one task or thread. `Cancelable` is its public interface.

    ``enter`` and ``leave`` do not await, so that every door can call them around its own ``await``. If `is_unsettled`
    is true after ``leave``, the caller awaits ``settle``.
    """

    # Class attributes are the defaults that most blocks never change: each attribute that is written costs a request.
    name: str | None = None
    upstream: CancelationToken | None = None
    """A token that was given to the block, and that other blocks may share."""

    condition: Condition | None = None
    face: ref[Any] | None = None
    """The `Cancelable` of this block, if there is one."""

    kind = "Cancelable"
    may_begin_late = False
    """Whether the scope may be entered later than the block, on an event loop that can do that."""

    advice_on_second_entry = "Make another one for another block, or share a CancelationToken between several."
    lends_itself = False
    """Whether a streaming response has entered the block around a generator, which may enter it a second time."""

    delivered_at: float | None = None
    """When the work has received the cancellation, on the clock of the loop. Known once the block is left with an error."""

    operation: Any = None
    """The background or tracked work that runs in this block."""

    is_unsettled = False
    """Whether `settle` is to be awaited, after the block has been left."""

    takes_groups_apart = True
    """Whether an ``ExceptionGroup`` of the application with an ``HTTPException`` leaves the block as that exception."""

    has_task_group = False
    _inner: Block | None = None
    late_task: object = None
    """The task in which the block is open, as long as it has no scope."""

    outside: Token[Block | None]

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        state = "not entered" if self.loop is None else "active" if self.is_open else "left"
        return f"<{self.kind}{name} {self.cause or state}>"

    @property
    def is_open(self) -> bool:
        return self.scope is not None or self.late_task is not None

    @property
    def task(self) -> object:
        if self.late_task is not None:
            return self.late_task
        return None if self.scope is None else self.scope.task

    @property
    def cleanup_grace(self) -> float:  # type: ignore[override]
        return settings.cleanup_grace if self.grace is None else self.grace

    @property
    def owner_of_client(self) -> OwnerOfClient | None:
        """The request that this block, or one around it in the same task, belongs to."""
        return None if self.parent is None else self.parent.owner_of_client

    def prepare_for_thread(self) -> None:
        """Prepare to be entered in a thread, where a root token that is made later is noticed too late."""

    def home(self) -> EventLoop | None:
        """Return the event loop in which this block is cancelled, if it is entered in a thread."""
        return None

    def enter(self, loop: EventLoop | None = None) -> None:
        """Open the block in the running task.

        :raises CancelationError: if it was cancelled before, :exc:`RuntimeError` if it was entered before.
        """
        if self.loop is not None:
            if self.lends_itself:
                return self._enter_inner()
            raise self.entered_before()
        loop = self.loop = current_loop() if loop is None else loop
        self.started = loop.time()
        timeout = self.timeout
        if timeout is not None:
            self.own_deadline = self.started + timeout
        if self.upstream is not None:
            self.upstream.listen(self)
        if timeout == 0:
            self.expire()
        parent = current.get()
        if self._token is not None and self._token.cause is not None:
            self.refuse(parent, self._token.cause)
        if parent is not None and parent.runs_in(loop.current_task()):
            self.link_to(parent)
        self.outside = current.set(self)
        if self.may_begin_late and loop.task_without_scope is not None:
            self.late_task = loop.task_without_scope()
        if self.late_task is None:
            self.begin(loop)
        self.watch(loop)
        if timeout is not None and self.own_deadline < math.inf:
            # From here on, with a scope or without: the loop may be blocked until the deadline.
            self.wait_for_deadline(loop, timeout)

    def entered_before(self) -> RuntimeError:
        return RuntimeError(
            f"{self!r} was entered before: a Cancelable serves one block. {self.advice_on_second_entry}"
        )

    def _enter_inner(self) -> None:
        self.lends_itself = False
        inner = self._inner = Block()
        inner.upstream, inner.grace = self.token, self.grace
        inner.enter()

    def refuse(self, parent: Block | None, cause: Cause) -> NoReturn:
        """Raise the error of a block that was cancelled before it was entered."""
        self.unlisten()
        self.ended = self.started
        self.note(cause)
        error = cause.error()
        if parent is not None:
            parent.is_told(cause, error)
        raise error

    def runs_in(self, task: object) -> bool:
        """Return whether a cancellation of this block reaches ``task`` first."""
        return self.task is task

    def begun_scope(self) -> PoliteScope | None:
        if self.scope is None and self.late_task is not None and self.loop is not None:
            self.begin(self.loop)
        return self.scope

    def begin(self, loop: EventLoop) -> None:
        """Enter the scope of the block, which may be open already."""
        task, late = self.late_task, None
        if task is not None:
            parent = self.parent
            # The scope of a block around this one in the same task is entered first.
            outer = None if parent is None or parent.task is not task else parent.begun_scope()
            late = (task, outer)
        self.scope = loop.scopes.polite_scope(loop, self.cleanup_grace)
        self.scope.begin(self.own_deadline, late)
        self.late_task = None

    def watch(self, loop: EventLoop) -> None:
        """Start the sources that can stop the block while it is open."""
        if self.condition is not None:
            self.condition.start(self.cancel_nowait, loop)

    def unwatch(self) -> None:
        if self.condition is not None:
            self.condition.stop()

    def cancel_nowait(self, reason: Any, message: str | None = None) -> bool:
        return self.ended is None and self.token.cancel_nowait(reason, message)

    def leave(self, exc: BaseException | None) -> BaseException | None:
        """Close the block, and return the exception that should leave it: ``exc``, unless that is to be replaced."""
        assert self.loop is not None
        if self._inner is not None:
            inner, self._inner = self._inner, None
            return inner.leave(exc)
        scope, self.scope = self.scope, None
        self.late_task = None
        self.ended = self.loop.time()
        if self.timeout_queue is not None:
            self.leave_queue()
        if self._token is not None or self.upstream is not None:
            self.unlisten()
        current.reset(self.outside)
        del self.outside
        self.unwatch()
        outcome = self.end(scope, exc)
        self.is_unsettled = self.has_to_settle()
        if self.parent is not None or outcome is not None:
            self._tell_others(outcome, scope is not None and scope.is_delivered)
        if not self.is_unsettled:
            self.let_go()
        return outcome

    def leave_undisturbed(self) -> None:
        """Close a block that is alone in its task, has no token and no scope, and was left without an exception."""
        assert self.loop is not None
        self.late_task = None
        self.ended = self.loop.time()
        if self.timeout_queue is not None:
            self.leave_queue()
        current.reset(self.outside)
        del self.outside

    def _tell_others(self, outcome: BaseException | None, is_delivered: bool) -> None:
        assert self.loop is not None
        is_error = isinstance(outcome, CancelationError)
        if self.parent is not None:
            self.leave_parents(is_error or is_delivered)
            if is_error and self.cause is not None:
                self.parent.take_for_delivered(self.cause, self.loop.current_task())
        if outcome is not None and (is_error or is_delivered):
            self.loop.scopes.tell(self.loop, outcome)

    def unlisten(self) -> None:
        if self._token is not None:
            self._token.unlisten(self)
            for callback in self.callbacks:
                self._token.unlisten(callback)
        if self.callbacks:
            self.callbacks = ()  # They refer to this block: reference cycles.
        if self.upstream is not None:
            self.upstream.unlisten(self)

    def let_go(self) -> None:
        """Drop the references to the objects that the block served, because it has been left for good.

        A task that the work has started, and the context of a timer, even of a cancelled one, keep the block alive: it
        is their `current_cancelable`.
        """
        if self.upstream is not None:
            self.upstream = None
        if self.is_unsettled:
            self.to_await = None
            self.condition = None
        if self.progress_callbacks is not None:
            self.progress_callbacks = None

    def end(self, scope: PoliteScope | None, exc: BaseException | None) -> BaseException | None:
        """Leave the scope, if there was one, and return the exception that should leave the block."""
        if scope is None:
            return None if exc is None else self.outcome(exc, exc)
        self.stop_timers()
        remaining = scope.end(exc)
        if exc is None and not scope.is_lost:
            return None
        if scope.is_delivered:
            self.delivered_at = scope.delivered_at
        return self.outcome(exc, remaining)

    def outcome(self, exc: BaseException | None, remaining: BaseException | None) -> BaseException:
        """Return the exception that leaves the block, where the scope has left ``remaining`` of the work's ``exc``."""
        if remaining is None:
            return self.stopped(exc)
        is_ours = self.has_task_group or self.cause is not None
        remaining = taken_apart(remaining, is_ours=is_ours, is_to_be=self.takes_groups_apart)
        is_ours_to_tell = self.cause is not None and not self.is_only_marked
        if is_ours_to_tell and self.loop is not None and is_anothers(remaining, self.loop):
            # For instance, a callback of ours has cancelled a future, before our own cancellation was delivered.
            return self.stopped(remaining)
        if isinstance(remaining, ParentCancelation) and self.cause is not None:
            return self.stopped(remaining)
        return remaining

    def stopped(self, exc: BaseException | None) -> BaseException:
        cause = self.cause
        assert cause is not None
        self.note(cause)
        error = cause.error()
        error.__cause__ = exc
        return error

    def note(self, cause: Cause) -> None:
        """Note that the error of ``cause`` is about to leave the block, or to be raised on entering it."""

    def has_to_settle(self) -> bool:
        return bool(self.to_await) or self.condition is not None

    async def settle(self) -> None:
        """Await the callbacks and the tasks that are left of the block."""
        try:
            await self.end_what_is_left()
        finally:
            self.let_go()

    async def end_what_is_left(self) -> None:
        if self.condition is not None:
            await self.condition.join()
        if self.to_await:
            await self.await_callbacks()

    def move_timeout(self, by: float) -> bool:
        """Move the deadline of this block, or of the nearest around it with a timeout; return whether it is in time."""
        block: Block | None = self
        while block is not None and block.timeout is None:
            # A handle that is not entered stands for the handler that has received it.
            block = current.get() if block.loop is None else block.parent
        if block is None or block.ended is not None or block.cause is not None:
            return False
        return block.move_own_deadline(by)
