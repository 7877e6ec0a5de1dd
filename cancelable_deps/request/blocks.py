"""The blocks that are stopped by the root token of a request."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from weakref import ref

from starlette.requests import ClientDisconnect

from ..hosts.debugger import is_debugged
from ..hosts.frames import handler_has_returned, waits_for_thread_of_handler
from ..hosts.starlette import TOO_LATE
from ..kernel.block import Block, current
from ..kernel.errors import CancelationError, DisconnectCancelation
from ..kernel.reasons import CancelationReason
from ..kernel.settings import settings
from ..kernel.token import CancelationToken, Cause
from .client import PastRequest

if TYPE_CHECKING:
    from ..kernel.loops.base import EventLoop, PoliteScope
    from ..kernel.shields import OwnerOfClient
    from .client_timeout import Budget
    from .policies import TimeoutPolicy
    from .state import RequestState


def _timeouts_are_off() -> bool:
    """Return whether a debugger is active: the request that somebody looks at must not be cancelled."""
    return is_debugged() and not settings.timeouts_under_debugger


class RequestBlock(Block):
    """A block that the request's root token stops as well. Its limits were checked when the app was built.

    It has no scope until the request is listened to or cancelled, because most requests are over before that.
    """

    advice_on_second_entry = (
        "FastAPI hands it to every use of the same `Depends(...)` in a request. To have one for each use, write "
        "`RequestCancelable`, or leave the cache out by `Depends(..., use_cache=False)`."
    )
    # In slots is what every request reads or writes: a default of the class costs four times as much to read.
    __slots__ = (
        "_left",
        "_token",
        "ended",
        "face",
        "is_unsettled",
        "late_task",
        "loop",
        "outside",
        "parent",
        "scope",
        "started",
        "state",
        "timeout",
        "timeout_queue",
        "upstream",
    )

    may_begin_late = True
    is_door = False
    _is_whole = False
    """Whether the token of the block is the root token, so that a cancellation of the block cancels the request."""

    _left: ref[RequestState] | None
    """The request, once the block has been left."""

    def __init__(
        self, state: RequestState, *, timeout: float | None = None, cleanup_grace: float | None = None
    ) -> None:
        self.state = state
        self.loop = self.late_task = self.ended = self.upstream = self.face = self._left = None
        self.scope = self.parent = self.timeout_queue = None
        self.is_unsettled = False
        self.started = math.nan
        self.timeout = timeout
        self._token = state.token if self._is_whole else None
        if cleanup_grace is not None:
            self.grace = cleanup_grace

    def enter(self, loop: EventLoop | None = None) -> None:
        if self._left is None:
            self.upstream = self.state.root_token
        super().enter(loop)

    def leave(self, exc: BaseException | None) -> BaseException | None:
        if exc is not None or self._token is not None or self.upstream is not None or self.scope or self.parent:
            return super().leave(exc)
        self.leave_undisturbed()
        state = self.state
        state.unwatch(self)
        self._left = ref(state)
        del self.state
        return None

    def token_is_made(self, token: CancelationToken) -> None:
        """Listen to the root token, which has just been made; nothing has stopped the request before."""
        if not self._is_whole:
            self.upstream = token
            token.listen(self)

    @property
    def is_cancelled(self) -> bool:
        return self.cause is not None

    def works_in(self, task: object) -> bool:
        """Return whether the block is open in ``task``."""
        return self.task is task

    def listening_begins(self) -> None:
        """Enter the scope, because the request is listened to, and may be cancelled at any time from now on."""
        self.begun_scope()

    @property
    def deadline(self) -> float:
        """The earliest deadline of this block, the blocks around it, and the doors of its request."""
        request, deadline = self.known_request, super().deadline
        return deadline if request is None else min([deadline, *(door.own_deadline for door in request.doors)])

    @property
    def owner_of_client(self) -> OwnerOfClient:
        request = self.known_request
        return PastRequest(self.upstream or self.token) if request is None else request

    def begin(self, loop: EventLoop) -> None:
        if self.timeout is not None and _timeouts_are_off():
            self.own_deadline = math.inf
            self.leave_queue()
        super().begin(loop)

    def expire(self) -> None:
        if _timeouts_are_off():
            self.own_deadline = math.inf
            self.rearm()
        else:
            super().expire()

    def time_is_up(self, now: float) -> None:
        super().time_is_up(now)
        if self._left is None and self.cause is not None and not self.state.is_closed:
            # If the loop was blocked, the sweep is late as well; and the client may leave while the handler cleans up.
            self.state.arm_now()

    def prepare_for_thread(self) -> None:
        self.upstream = self.state.token

    def home(self) -> EventLoop:
        return self.state.loop

    def watch(self, loop: EventLoop) -> None:
        if self.state.is_closed and isinstance(self.parent, RequestBlock):
            self._follow(self.parent.state)
        self.state.watch(self)
        token = self.state.root_token
        if token is not None and self.upstream is None:
            # A thread has made it since we asked for it on entering, and did not know of us yet.
            self.token_is_made(token)

    def _follow(self, state: RequestState) -> None:
        """Join the state of a block around this one: the handler has returned, which has closed our own."""
        if state.scope is self.state.scope and not state.is_closed:
            self.state = state
            if state.root_token is not None:
                self.token_is_made(state.root_token)

    def unwatch(self) -> None:
        self.state.unwatch(self)

    def fire(self, cause: Cause) -> None:
        if not (self.is_open and self.state.postpones(self, cause)):
            super().fire(cause)

    def stop_at_once(self) -> None:
        """Deliver the cancellation without the time that listeners of the application have to end by themselves."""
        for child in list(self.children or ()):
            if isinstance(child, RequestBlock):
                # The innermost block raises the error.
                child.stop_at_once()
        if self.cause is not None and self.is_open:
            super().fire(self.cause)

    def stop_now(self, cause: Cause) -> None:
        """Deliver a cancellation that was postponed."""
        self.fire(cause)

    def has_to_settle(self) -> bool:
        return bool(self.to_await) or (self.state.is_armed and self.state.has_stopped_listening)

    async def end_what_is_left(self) -> None:
        if self.to_await:
            await self.await_callbacks()
        await self.state.settle()

    def let_go(self) -> None:
        if self.is_unsettled:
            self.to_await = None
        if self.progress_callbacks is not None:
            self.progress_callbacks = None
        if self._left is None:
            self._left = ref(self.state)
            del self.state

    @property
    def known_request(self) -> RequestState | None:
        """The state of the request; ``None`` if the block has been left, and nothing else keeps the state alive."""
        return self.state if self._left is None else self._left()

    def outcome(self, exc: BaseException | None, remaining: BaseException | None) -> BaseException:
        outcome = super().outcome(exc, remaining)
        if isinstance(outcome, ClientDisconnect):
            mistaken = outcome.__context__
            if isinstance(mistaken, OSError) and not self.state.has_left:
                # Under ASGI 2.4 Starlette takes any OSError out of a stream for one of the server's send().
                return mistaken
            # Starlette raises it where the body is read if the client has left, or if we have reported that to end it.
            cause = None if self.state.has_left else self.cause
            outcome = DisconnectCancelation() if cause is None else cause.error()
            outcome.__cause__ = exc
        if isinstance(outcome, CancelationError) and self.cause is not None:
            # `check()` may have raised it, so it has not been noted.
            self.note(self.cause)
        return outcome

    def note(self, cause: Cause) -> None:
        self.state.log(cause.reason, cause, cause.struck_at, self.delivered_at)


class DoorBlock(RequestBlock):
    """The block of a door around the whole handler, whose token is the root token: it stops the whole request."""

    _is_whole = is_door = True
    policy: TimeoutPolicy | None = None
    budget: Budget | None = None
    """The time that the client gives, which the timeout never exceeds."""

    successor: DoorBlock | None = None

    def enter(self, loop: EventLoop | None = None) -> None:
        self.token.listen(self)
        super(RequestBlock, self).enter(loop)

    def timeout_cause(self) -> Cause:
        policy, budget = self.policy, self.budget
        if budget is not None and self.timeout == budget.seconds:
            return budget.cause()
        if policy is None:
            return super().timeout_cause()
        message = f"Timed out after {self.timeout:g} seconds"
        return Cause(CancelationReason.TIMEOUT, message, status_code=policy.status_code, policy=policy)

    def use_policy(self, policy: TimeoutPolicy) -> None:
        """Replace the timeout by that of ``policy``, which counts from the start of the block."""
        self.policy = policy
        self._replace_timeout(policy.enforced_timeout)

    def _replace_timeout(self, timeout: float | None) -> None:
        self.timeout = timeout if self.budget is None else self.budget.within(timeout)
        self.own_deadline = math.inf if self.timeout is None else self.started + self.timeout
        self.rearm()

    def move_own_deadline(self, by: float) -> bool:
        budget, timeout = self.budget, self.timeout
        if budget is None or timeout is None:
            return super().move_own_deadline(by)
        if timeout >= budget.seconds:
            return False
        moved = super().move_own_deadline(min(by, budget.seconds - timeout))
        # Not the sum, which may miss it by a rounding error.
        self.timeout = min(timeout + by, budget.seconds)
        return moved

    @property
    def is_left(self) -> bool:
        return self.ended is not None

    def move_in(self, state: RequestState) -> bool:
        """Move a block that has no scope yet to the place of the caller, further in; return whether that was possible.

        It is not if the block belongs to another request, has a scope, or was entered in another task.
        """
        loop = self.loop
        if self.late_task is None or self.state is not state or loop is None or loop.task_without_scope is None:
            return False
        if loop.task_without_scope() is not self.late_task:
            if loop.current_task() is not self.late_task:
                return False
            # Another scope was entered in this task after the block: from here on the block is inside of that scope.
            self.late_task = None
            self.begin(loop)
        return True

    def move_out(self, state: RequestState) -> None:
        """Open a successor where the block was before `move_in`, with the rest of its time. The block has been left.

        Do nothing if the response is complete. Otherwise a middleware further out holds it back, and may take long.
        """
        if state.is_closed:
            return
        block = self.successor = DoorBlock(state, cleanup_grace=self.grace)
        block.takes_groups_apart, block.policy = self.takes_groups_apart, self.policy
        block.budget = self.budget
        loop = block.loop = state.loop
        block.started, block.timeout, block.own_deadline = self.started, self.timeout, self.own_deadline
        block.outside = current.set(block)
        block.late_task = loop.current_task()
        if self.parent is not None:
            block.link_to(self.parent)
        state.replace(self, block)
        block.token.listen(block)
        block.rearm()
        block.watch(loop)

    def runs_in(self, task: object) -> bool:
        return self.task is task or (self.is_open and task in self.state.main_tasks)

    def outcome(self, exc: BaseException | None, remaining: BaseException | None) -> BaseException:
        outcome = super().outcome(exc, remaining)
        # Not the error of a response of ours, which can only be aborted by raising, nor that of a background task.
        is_stranded = outcome.args == (TOO_LATE,) and not self.state.is_aborted and not self.state.is_closed
        if is_stranded and isinstance(outcome.__cause__, CancelationError):
            outcome = outcome.__cause__
        if isinstance(outcome, CancelationError):
            # It may come from a `Cancelable` further in, which does not know the request and has not logged it.
            text = outcome.message or outcome.detail
            self.state.log(outcome.reason, text, outcome.struck_at, self.delivered_at)
        return outcome

    def drop_timeout(self) -> None:
        """Remove the deadline, but for that of the client."""
        self.policy = None
        self._replace_timeout(None)

    def finish(self) -> None:
        """Drop a cancellation that is not delivered yet, and the end of a grace, because the result is there."""
        if self.scope is not None:
            self.scope.release()

    def deliver(self, scope: PoliteScope, cause: Cause) -> None:
        scope.spares = self._spares_what_has_returned
        super().deliver(scope, cause)

    def end(self, scope: PoliteScope | None, exc: BaseException | None) -> BaseException | None:
        if scope is not None and self.cause is not None:
            scope.spares = None  # It refers to this block, and tracebacks refer to the scope: a reference cycle.
        return super().end(scope, exc)

    def _spares_what_has_returned(self, from_thread: object = None) -> bool:
        """Hold a cancellation back if the handler has returned, and return whether that was done. Called by the scope.

        On trio it is called also before the task ``from_thread`` continues with the result of a thread.

        The result may be a stream, or may never be sent: so the cancellation is held until the start of the response
        has been sent, or for the time of a cleanup.
        """
        scope = self.scope
        if scope is None:
            return False
        if not (handler_has_returned(self.task) if from_thread is None else waits_for_thread_of_handler(from_thread)):
            return False
        scope.spares = None
        scope.hold()
        self.call_after_grace(self.resume)
        return True

    def fire_at_last(self) -> None:
        cause = self.cause
        if cause is not None and not (self.is_open and self.state.postpones(self, cause)):
            super().fire_at_last()

    def release(self) -> None:
        """Keep everything from stopping the block: the response is complete, and background work follows."""
        self.own_deadline = math.inf
        if self._token is not None:
            self._token.unlisten(self)
        if self.timeout_queue is not None:
            self.leave_queue()
        if self.scope is not None:
            self.stop_timers()
            self.scope.release()

    def stop_at_once(self) -> None:
        if self.state.is_closed and self.scope is not None:
            # The block was released.
            self.scope.resume()
        super().stop_at_once()

    def stop_background(self, cause: Cause) -> None:
        """Stop the work that is left after `release` all the same."""
        scope = self.begun_scope()
        if scope is not None:
            scope.resume()
            scope.cancel_politely(str(cause))
