"""The blocks that a request's root token stops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self
from weakref import ref

from starlette.requests import ClientDisconnect

from ..hosts.debugger import is_debugged
from ..hosts.frames import handler_has_returned, waits_for_thread_of_handler
from ..hosts.starlette import TOO_LATE
from ..kernel.cancelable import Cancelable, _current
from ..kernel.errors import CancelationError, DisconnectCancelation
from ..kernel.reasons import CancelationReason
from ..kernel.settings import settings
from ..kernel.token import CancelationToken, Cause
from .state import PastRequest

if TYPE_CHECKING:
    from ..kernel.loops.base import EventLoop, Mark, PoliteScope
    from ..kernel.shields import OwnerOfClient
    from .policies import TimeoutPolicy
    from .state import RequestState


def _timeouts_are_off() -> bool:
    """Somebody looks at a request in a debugger, who would find it cancelled."""
    return is_debugged() and not settings.timeouts_under_debugger


class RequestBlock(Cancelable):
    """A `Cancelable` that the request's root token stops as well. Its limits were checked when the app was built.

    It has no scope until its task has come to wait for something: a handler that never does cannot be cancelled.
    """

    _instead_of_entering_twice = (
        "FastAPI hands it to every use of the same `Depends(...)` in a request. To have one for each use, write "
        "`RequestCancelable`, or leave the cache out by `Depends(..., use_cache=False)`."
    )
    _may_begin_late = True
    is_door = False
    _is_whole = False
    """Whether what stops the block stops the request."""

    _left: ref[RequestState] | None = None
    """The request, once the block has been left."""

    def __init__(
        self, state: RequestState, *, timeout: float | None = None, cleanup_grace: float | None = None
    ) -> None:
        self._request = state
        if self._is_whole:
            self._token = state.token
            self._upstream = None
        else:
            self._token = CancelationToken()
            self._upstream = state.token
        self._timeout = timeout
        # Every request asks for these, some more than once. To write one costs a tenth of finding it in the class.
        self._loop = self._line = self._scope = self._inner = self._parent = self._left = self._progress_callbacks = (
            None
        )
        self._callbacks = ()
        self._is_unsettled = False
        if cleanup_grace is not None:
            self._grace = cleanup_grace

    async def __aenter__(self) -> Self:
        if self._left is not None:
            raise self._entered_before()
        self._enter(self._request.loop)
        return self

    @property
    def _owner_of_client(self) -> OwnerOfClient:
        request = self.known_request
        return PastRequest(self._upstream or self._token) if request is None else request

    def _begin(self, loop: EventLoop) -> None:
        if self._timeout is not None and _timeouts_are_off():
            self._deadline = math.inf
            self._leave_line()
        super()._begin(loop)

    def _expire(self) -> None:
        if _timeouts_are_off():
            self._deadline = math.inf
            self._rearm()
        else:
            super()._expire()

    def time_is_up(self, now: float) -> None:
        super().time_is_up(now)
        if self._left is None and self.is_cancelled and not self._request.is_closed:
            # In a loop that was blocked the sweep is late as well. While the handler cleans up its client may leave.
            self._request.arm_now()

    def _home(self) -> EventLoop:
        return self._request.loop

    def works_in(self, task: object) -> bool:
        """Return whether the block is open in ``task``."""
        return self._task is task

    def _watch(self, loop: EventLoop) -> None:
        if self._request.is_closed and isinstance(self._parent, RequestBlock):
            self._follow(self._parent._request)
        self._request.watch(self)

    def _follow(self, state: RequestState) -> None:
        """Entered in the body of a response, after the handler's return had closed our own request state."""
        if state.scope is self._request.scope and not state.is_closed:
            self._request = state
            self._upstream = state.token
            state.token.listen(self)

    def _unwatch(self) -> None:
        self._request.unwatch(self)

    def _forget(self) -> None:
        if not self._request.is_held:
            self._request.unwatch(self)

    def _fire(self, cause: Cause) -> None:
        if not (self.is_active and self._request.postpones(self, cause)):
            super()._fire(cause)

    def stop_at_once(self) -> None:
        """Stop what is to be stopped, also where others have time to end by themselves."""
        for child in list(self._children or ()):
            if isinstance(child, RequestBlock):
                # The innermost answers.
                child.stop_at_once()
        if self._token.cause is not None and self.is_active:
            super()._fire(self._token.cause)

    def stop_now(self, cause: Cause) -> None:
        """Do what was postponed."""
        self._fire(cause)

    def _has_to_settle(self) -> bool:
        return bool(self._to_await) or self._request.has_stopped_listening

    async def _end_what_is_left(self) -> None:
        if self._to_await:
            await self._await_callbacks()
        await self._request.settle()

    def _let_go(self) -> None:
        if self._is_unsettled:
            self._to_await = None
        if self._progress_callbacks is not None:
            self._progress_callbacks = None
        if self._left is None:
            self._left = ref(self._request)
            del self._request

    @property
    def known_request(self) -> RequestState | None:
        """The request; once the block is left, for as long as somebody else knows it."""
        return self._request if self._left is None else self._left()

    def _outcome(self, exc: BaseException | None, remaining: BaseException | None) -> BaseException:
        outcome = super()._outcome(exc, remaining)
        if isinstance(outcome, ClientDisconnect):
            mistaken = outcome.__context__
            if isinstance(mistaken, OSError) and not self._request.has_left:
                # Starlette believes, under ASGI 2.4, that any OSError out of a stream was that of the server's send().
                return mistaken
            # What Starlette raises to the reader of a body when the client left, or we have said so to end it.
            cause = None if self._request.has_left else self._token.cause
            outcome = DisconnectCancelation() if cause is None else cause.error()
            outcome.__cause__ = exc
        if isinstance(outcome, CancelationError) and self._token.cause is not None:
            # Also one that `check()` has raised.
            self._note(self._token.cause)
        return outcome

    def _note(self, cause: Cause) -> None:
        self._request.log(cause.reason, cause)


class DoorBlock(RequestBlock):
    """The block of a door around the whole handler: its token is the root token, so what stops it stops the request."""

    _is_whole = is_door = True
    policy: TimeoutPolicy | None = None
    successor: DoorBlock | None = None
    _place_outside: Mark | None = None

    def _expire(self) -> None:
        policy = self.policy
        if policy is None or _timeouts_are_off():
            super()._expire()
        else:
            message = f"Timed out after {self._timeout:g} seconds"
            self._token.cancel_because(
                Cause(CancelationReason.TIMEOUT, message, status_code=policy.status_code, policy=policy)
            )

    def use_policy(self, policy: TimeoutPolicy) -> None:
        """Instead of the timeout so far; it counts from the block's start."""
        self.policy = policy
        self._timeout = policy.enforced_timeout
        self._deadline = math.inf if self._timeout is None else self._started + self._timeout
        self._rearm()

    @property
    def is_left(self) -> bool:
        return self._ended is not None

    def move_in(self, state: RequestState) -> bool:
        """Let the block of this request begin where the caller stands, further in.

        Return ``False`` if it is that of another one, or has begun already.
        """
        if self._position is None or self._request is not state or self._loop is None or self._loop.mark is None:
            return False
        self._place_outside, self._position = self._position, self._loop.mark()
        return True

    def move_out(self, state: RequestState) -> None:
        """After leaving: open a successor where the block was before it was moved in, with what is left of its time.

        Unless the response is out. Otherwise something there holds it back, and may take long.
        """
        place, self._place_outside = self._place_outside, None
        if state.is_closed:
            return
        assert self._loop is not None
        block = self.successor = DoorBlock(state, cleanup_grace=self._grace)
        block.takes_groups_apart, block.policy = self.takes_groups_apart, self.policy
        block._loop, block._started = self._loop, self._started
        block._timeout, block._deadline = self._timeout, self._deadline
        block._outside = _current.set(block)
        block._position = place
        if self._parent is not None:
            block._link_to(self._parent)
        self._loop.newcomers[block] = None
        if not self._loop.is_awaiting_step:
            self._loop.await_step()
        block._rearm()
        state.replace(self, block)
        block._token.listen(block)

    def _runs_in(self, task: object) -> bool:
        return self._task is task or (self.is_active and task in self._request.main_tasks)

    def _outcome(self, exc: BaseException | None, remaining: BaseException | None) -> BaseException:
        outcome = super()._outcome(exc, remaining)
        # Not that of a response of ours, which knows no other way to be cut than to raise, nor of a background task.
        is_stranded = outcome.args == (TOO_LATE,) and not self._request.is_cut and not self._request.is_closed
        if is_stranded and isinstance(outcome.__cause__, CancelationError):
            outcome = outcome.__cause__
        if isinstance(outcome, CancelationError):
            # Also that of a block which was opened by hand below, and knows nothing of the request.
            self._request.log(outcome.reason, outcome.message or outcome.detail)
        return outcome

    def drop_timeout(self) -> None:
        """No deadline from here on."""
        self.policy = self._timeout = None
        self._deadline = math.inf
        self._rearm()

    def hold(self) -> None:
        """Let nothing that stops the block reach its task until `resume`."""
        self._hold()

    def resume(self) -> None:
        """Let what is due strike."""
        self._resume()

    def finish(self) -> None:
        """The result is there: no stop that is under way reaches the task any more, nor does the end of a grace."""
        if self._scope is not None:
            self._scope.release()

    def _stop(self, scope: PoliteScope, cause: Cause) -> None:
        scope.spares = self._spares_what_has_returned
        super()._stop(scope, cause)

    def _end(self, scope: PoliteScope, exc: BaseException | None) -> BaseException | None:
        if self._token.cause is not None:
            scope.spares = None  # It knows us, and is known by tracebacks: a cycle.
        return super()._end(scope, exc)

    def _spares_what_has_returned(self, from_thread: object = None) -> bool:
        """Hold a stop that is about to reach a handler that has returned; asked by the scope.

        On trio also before ``from_thread``, the task, goes on with what a thread has returned.

        What it has returned may be a stream, or never be sent: so until the start of the response is out, or for as long
        as a cleanup may take.
        """
        scope = self._scope
        if scope is None:
            return False
        if not (handler_has_returned(self._task) if from_thread is None else waits_for_thread_of_handler(from_thread)):
            return False
        scope.spares = None
        scope.hold()
        loop = self._request.loop
        self._late = loop.call_at(loop.time() + self._cleanup_grace, self._resume)
        return True

    def _fire_at_last(self) -> None:
        cause = self._token.cause
        if cause is not None and not (self.is_active and self._request.postpones(self, cause)):
            super()._fire_at_last()

    def release(self) -> None:
        """Nothing can stop the block any more: the response is complete, and what follows is background work."""
        self._deadline = math.inf
        self._token.unlisten(self)
        if self._line is not None:
            self._leave_line()
        if self._scope is None:
            # At shutdown there must be something to stop background tasks by.
            if self._loop is not None and self._loop.drain is None:
                self._loop.newcomers.pop(self, None)
        else:
            self._stop_timers()
            self._scope.release()

    def stop_at_once(self) -> None:
        if self._request.is_closed and self._scope is not None:
            # It was released.
            self._scope.resume()
        super().stop_at_once()

    def stop_background(self, cause: Cause) -> None:
        """After `release`: stop what is left all the same."""
        scope = self._begun_scope()
        if scope is not None:
            scope.resume()
            scope.cancel_politely(str(cause))
