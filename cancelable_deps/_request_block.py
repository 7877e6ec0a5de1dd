"""The blocks that a request's root token stops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from starlette.requests import ClientDisconnect

from ._debugger import is_debugged
from ._request import RequestState
from .cancelable import Cancelable
from .errors import CancelationError, DisconnectCancelation
from .reasons import CancelationReason
from .settings import settings
from .token import CancelationToken, Cause

if TYPE_CHECKING:
    from ._backend import EventLoop
    from ._polite import PoliteScope
    from .policies import TimeoutPolicy

# What Starlette makes of an error that it would answer, had the response not started.
_TOO_LATE = "Caught handled exception, but response already started."


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
    _is_whole = False
    """Whether what stops the block stops the request."""

    def __init__(
        self, state: RequestState, *, timeout: float | None = None, cleanup_grace: float | None = None
    ) -> None:
        self._request = state
        if self._is_whole:
            self._token = state.token
        else:
            self._token = CancelationToken()
            self._upstream = state.token
        if timeout is not None:
            self._timeout = timeout
        if cleanup_grace is not None:
            self._grace = cleanup_grace

    async def __aenter__(self) -> Self:
        self._enter(self._request.loop)
        return self

    @property
    def _owner_of_client(self) -> RequestState:
        return self._request

    def armed(self) -> None:
        self._start_timer()

    def _begin(self, loop: EventLoop) -> None:
        if self._timeout is not None and _timeouts_are_off():
            self._deadline = math.inf
        super()._begin(loop)

    def _expire(self) -> None:
        if _timeouts_are_off():
            self._deadline = math.inf
            self._rearm()
        else:
            super()._expire()

    def _home(self) -> EventLoop:
        return self._request.loop

    def _watch(self, loop: EventLoop) -> None:
        if self._request.is_closed and isinstance(self._parent, RequestBlock):
            self._follow(self._parent._request)
        self._request.watch(self)
        if self._timeout is not None and self._timeout < 3 * settings.listen_after:
            self._start_timer()

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

    def _has_to_settle(self) -> bool:
        return bool(self._to_await) or self._request.has_stopped_listening

    async def _settle(self) -> None:
        if self._to_await:
            await self._await_callbacks()
        await self._request.settle()

    def _outcome(self, exc: BaseException | None, remaining: BaseException | None) -> BaseException:
        outcome = super()._outcome(exc, remaining)
        if isinstance(outcome, ClientDisconnect):
            mistaken = outcome.__context__
            if isinstance(mistaken, OSError) and not self._request.has_left:
                # Starlette believes, under ASGI 2.4, that any OSError out of a stream was that of the server's send().
                return mistaken
            # What Starlette raises to whoever was reading the body when the client left.
            outcome = DisconnectCancelation()
            outcome.__cause__ = exc
        if isinstance(outcome, CancelationError) and self._token.cause is not None:
            # Also one that `check()` has raised.
            self._note(self._token.cause)
        return outcome

    def _note(self, cause: Cause) -> None:
        self._request.log(cause.reason, cause)


class _PolicyCause(Cause):
    """The cause that knows how its timeout is answered."""

    __slots__ = ("_policy",)

    def __init__(self, policy: TimeoutPolicy, message: str) -> None:
        super().__init__(CancelationReason.TIMEOUT, message)
        self._policy = policy

    def error(self) -> CancelationError:
        error = super().error()
        error.status_code = self._policy.status_code
        error.policy = self._policy  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        return error


class DoorBlock(RequestBlock):
    """The block of a door around the whole handler: its token is the root token, so what stops it stops the request."""

    _is_whole = True
    _is_on_hold = False
    policy: TimeoutPolicy | None = None

    def _expire(self) -> None:
        if self.policy is None or _timeouts_are_off():
            super()._expire()
        else:
            self._token.cancel_because(_PolicyCause(self.policy, f"Timed out after {self._timeout:g} seconds"))

    def use_policy(self, policy: TimeoutPolicy) -> None:
        """Instead of the timeout so far; it counts from the block's start."""
        self.policy = policy
        self._timeout = policy.enforced_timeout
        self._deadline = math.inf if self._timeout is None else self._started + self._timeout
        self._rearm()

    def _runs_in(self, task: object) -> bool:
        return self._task is task or (self.is_active and task in self._request.main_tasks)

    def _outcome(self, exc: BaseException | None, remaining: BaseException | None) -> BaseException:
        outcome = super()._outcome(exc, remaining)
        # Not that of a response of ours, which knows no other way to be cut than to raise, nor of a background task.
        is_stranded = outcome.args == (_TOO_LATE,) and not self._request.is_cut and not self._request.is_closed
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
        """Until `resume`, nothing can stop the block: the handler is done, its response is on its way."""
        self._is_on_hold = True
        if self._scope is not None:
            self._scope.hold()

    def resume(self) -> None:
        self._is_on_hold = False
        if self._scope is not None:
            self._scope.resume()

    def _stop(self, scope: PoliteScope, cause: Cause) -> None:
        super()._stop(scope, cause)
        if self._is_on_hold:
            # It may be no finished result, but a stream that has told its length and never makes its first chunk.
            loop = self._request.loop
            self._late = loop.call_at(loop.time() + self._cleanup_grace, self.resume)

    def _begin(self, loop: EventLoop) -> None:
        super()._begin(loop)
        if self._is_on_hold and self._scope is not None:
            self._scope.hold()

    def release(self) -> None:
        """Nothing can stop the block any more: the response is complete, and what follows is background work."""
        self._deadline = math.inf
        self._is_on_hold = True
        self._token.unlisten(self)
        if self._scope is None:
            # At shutdown there must be something to stop background tasks by.
            if self._loop is not None and self._loop.drain is None:
                self._loop.newcomers.pop(self, None)
        else:
            self._stop_timers()
            self._scope.release()

    def stop_background(self, cause: Cause) -> None:
        """After `release`: stop what is left all the same."""
        scope = self._begun_scope()
        if scope is not None:
            scope.resume()
            scope.cancel_politely(str(cause))


RequestState.block_class = RequestBlock
RequestState.door_class = DoorBlock
