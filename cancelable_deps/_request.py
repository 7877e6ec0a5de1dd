"""The one object per request that owns its reader and its root token."""

from __future__ import annotations

import math
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import anyio
from starlette.requests import ClientDisconnect, HTTPConnection, Request

from ._backend import current_loop, logger
from ._receive import Reader
from ._sweep import sweep_of
from .cancelable import Cancelable
from .errors import CancelationError, DisconnectCancelation
from .reasons import CancelationReason
from .settings import settings
from .token import CancelationToken

if TYPE_CHECKING:
    from contextlib import AsyncExitStack
    from typing import Protocol

    from starlette.types import Receive, Scope

    from ._backend import EventLoop

    class Watcher(Protocol):
        def armed(self) -> None:
            """The request has run for a while, and is listened to."""


SCOPE_KEY = "cancelable_deps"

# FastAPI's exit stack around dependencies and handler, closed when the handler has returned. Private, but nothing
# public tells a plain dependency of that moment, and a yield dependency costs a request as much as all the rest.
_HANDLER_STACK_KEY = "fastapi_function_astack"
# The one around the response and its background tasks; only for what must not be left behind by an error.
_REQUEST_STACK_KEY = "fastapi_inner_astack"


class RequestState:
    """What all doors on one request share.

    Whoever makes it closes it: a middleware or route class when the response is complete, the decorator and the
    dependencies when the handler has returned. Listening starts when the request has run for ``listen_after`` seconds
    and someone watches.
    """

    pen: Any = None
    is_closed = False
    has_left = False
    main_tasks: tuple[object, ...] = ()
    """The tasks, besides that of a door, in which the handler runs: a ``BaseHTTPMiddleware`` starts one."""

    cleanup_grace: float | None = None
    _armed = False
    _held = False
    _kept = False
    _logged = False
    _leaving: anyio.Event | None = None
    _default: DoorBlock | None = None
    _stack: AsyncExitStack | None = None
    _watchers: tuple[Watcher, ...] = ()

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self.token = CancelationToken()
        self.loop: EventLoop = current_loop()
        self.arrived = self.loop.time()
        self.reader = Reader(scope, receive, self, copy_context())
        scope[SCOPE_KEY] = self

    def watch(self, watcher: Watcher) -> None:
        self._watchers += (watcher,)
        if self.is_closed:
            watcher.armed()
        elif self._armed:
            watcher.armed()
            self.reader.arm(self.loop)
        elif self.pen is None:
            self._wait_for_the_sweep()

    def unwatch(self, watcher: Watcher) -> None:
        self._watchers = tuple(other for other in self._watchers if other is not watcher)
        if not self._watchers:
            self._leave_pen()
            if not self._held:
                # Nobody will tell us of the request's end. A later block finds us by the reader, if there is one.
                self.scope.pop(SCOPE_KEY, None)
                self.reader.stop()

    def hold(self) -> None:
        """Somebody will call `close`; until then, listening does not end with the last block."""
        self._held = True

    def arm(self) -> None:
        self._armed = True
        if self.is_closed:
            return
        if self._stack is not None:
            self._stack.push_async_callback(self.handler_returned)
        for watcher in self._watchers:
            watcher.armed()
        self.reader.arm(self.loop)

    def arm_now(self) -> None:
        """Listen from now on: somebody waits for nothing else."""
        if not self._armed:
            self._leave_pen()
            self.arm()

    def client_left(self) -> None:
        """The reader tells us."""
        if self.is_closed:
            return
        self.has_left = True
        self.token.cancel_nowait(CancelationReason.DISCONNECT)
        assert self.token.cause is not None
        self.log(self.token.cause.reason, self.token.cause)
        if self._leaving is not None:
            self._leaving.set()

    async def wait_disconnected(self) -> None:
        """Wait until the client has left."""
        if not self.has_left:
            if self._leaving is None:
                self._leaving = anyio.Event()
            await self._leaving.wait()

    @property
    def is_stopping(self) -> bool:
        return any(isinstance(watcher, RequestBlock) and watcher.is_cancelled for watcher in self._watchers)

    def close(self) -> None:
        """The response is complete, or the handler has returned: from here on a disconnect means nothing."""
        self.is_closed = True
        self.scope.pop(SCOPE_KEY, None)
        self._leave_pen()
        self.reader.stop()
        # Or every request would be garbage of the kind that only the collector finds.
        self.reader.owner = None
        self._stack = None
        self._watchers = ()
        self._default = None

    async def aclose(self) -> None:
        """As `close`, and wait until nothing of ours is left."""
        self.close()
        await self.reader.join()

    def close_with(self, stack: AsyncExitStack | None) -> None:
        """Close when ``stack`` is closed; without one, listening ends with the last block."""
        if stack is not None:
            self._stack = stack
            stack.push(self)
            self.hold()

    def keep_through_response(self) -> None:
        """Somebody listens until the response has ended, and closes us then: the handler's return does not."""
        self._kept = True
        # Unless an error on the way means that this response is never sent.
        request_stack: AsyncExitStack | None = self.scope.get(_REQUEST_STACK_KEY)
        if request_stack is not None:
            request_stack.push_async_callback(self.aclose)

    # FastAPI's stack of exits takes any context manager, and this is its cheapest form.
    def __enter__(self) -> None: ...

    def __exit__(self, *exc_info: object) -> None:
        if not self._kept:
            self.close()

    async def handler_returned(self) -> None:
        if not self._kept:
            await self.aclose()

    @property
    def has_stopped_listening(self) -> bool:
        return self._armed and not self.reader.is_armed

    async def settle(self) -> None:
        """Wait for a reader that was stopped."""
        if self.has_stopped_listening:
            await self.reader.join()

    def set_default(self, block: DoorBlock) -> None:
        """``block`` has the application's default timeout, which a route's own replaces."""
        self.lift_default()
        self._default = block

    def lift_default(self) -> None:
        """The route has a timeout of its own, or wants none."""
        if self._default is not None:
            self._default.drop_timeout()
            self._default = None

    def log(self, reason: CancelationReason, cause: object) -> None:
        """The one line about this request."""
        if self._logged:
            return
        self._logged = True
        method = self.scope.get("method", "")
        route = getattr(self.scope.get("route"), "path", None) or self.scope.get("path", "")
        elapsed = self.loop.time() - self.arrived
        extra = {"method": method, "route": route, "reason": str(reason), "elapsed": elapsed}
        logger.info("%s %s cancelled after %.3f s: %s", method, route, elapsed, cause, extra=extra)

    def _wait_for_the_sweep(self) -> None:
        interval = settings.listen_after
        if interval:
            sweep_of(self.loop, interval).add(self)
        else:
            self.arm()

    def _leave_pen(self) -> None:
        if self.pen is not None:
            self.pen.pop(self, None)
            self.pen = None


def request_state(request: Request) -> RequestState:
    """The state of ``request``, made by the first who asks."""
    state: RequestState | None = request.scope.get(SCOPE_KEY)
    if state is None:
        state = _earlier_state(request) or RequestState(request.scope, request.receive)
    if request.receive is state.reader.raw:
        # Private, and the only way to give back to `request.body()` what the reader has read: FastAPI hands the same
        # Request to all dependencies and the handler.
        request._receive = state.reader.receive
    return state


def _earlier_state(request: Request) -> RequestState | None:
    reader = getattr(request.receive, "__self__", None)
    if not isinstance(reader, Reader):
        return None
    state = reader.owner
    if isinstance(state, RequestState):
        request.scope[SCOPE_KEY] = state
        return state
    # The earlier one is closed: this is a background task, and its client has a response.
    state = RequestState(request.scope, request.receive)
    state.close()
    return state


def handler_state(request: HTTPConnection) -> RequestState:
    """As `request_state`, called before the handler or in it: closed when the handler has returned."""
    if not isinstance(request, Request):
        raise TypeError(
            "the handles of cancelable_deps serve HTTP requests: a WebSocket route cannot have one. Use a Cancelable."
        )
    made = SCOPE_KEY not in request.scope
    state = request_state(request)
    if made and not state.is_closed:
        state.close_with(request.scope.get(_HANDLER_STACK_KEY))
    return state


class RequestBlock(Cancelable):
    """A `Cancelable` that the request's root token stops as well. Its limits were checked when the app was built."""

    def __init__(
        self, state: RequestState, *, timeout: float | None = None, cleanup_grace: float | None = None
    ) -> None:
        self._request = state
        self._set_token(state.token)
        if timeout is not None:
            self._timeout = timeout
        if cleanup_grace is not None:
            self._grace = cleanup_grace

    def _set_token(self, root: CancelationToken) -> None:
        self._token = CancelationToken()
        self._upstream = root

    def armed(self) -> None:
        self._start_timer()

    def _watch(self, loop: EventLoop) -> None:
        self._request.watch(self)
        if self._timeout is not None and self._timeout < 3 * settings.listen_after:
            self._start_timer()

    def _unwatch(self) -> None:
        super()._unwatch()
        self._request.unwatch(self)

    async def _exit(self, exc: BaseException | None) -> BaseException | None:
        outcome = self._leave(exc)
        if self._to_await:
            await self._settle()
        if self._request.has_stopped_listening:
            await self._request.settle()
        return outcome

    def _outcome(self, exc: BaseException | None, remaining: BaseException | None) -> BaseException:
        outcome = super()._outcome(exc, remaining)
        if isinstance(outcome, ClientDisconnect):
            # What Starlette raises to whoever was reading the body when the client left.
            outcome = DisconnectCancelation()
            outcome.__cause__ = exc
        return outcome

    def _stopped(self, exc: BaseException | None) -> BaseException:
        error = super()._stopped(exc)
        assert self._token.cause is not None
        self._request.log(self._token.cause.reason, self._token.cause)
        return error

    def _refused(self) -> None:
        assert self._token.cause is not None
        self._request.log(self._token.cause.reason, self._token.cause)


class DoorBlock(RequestBlock):
    """The block of a door around the whole handler: its token is the root token, so what stops it stops the request."""

    def _set_token(self, root: CancelationToken) -> None:
        self._token = root

    def _runs_in(self, task: object) -> bool:
        return task is self._task or task in self._request.main_tasks

    def _outcome(self, exc: BaseException | None, remaining: BaseException | None) -> BaseException:
        outcome = super()._outcome(exc, remaining)
        if isinstance(outcome, CancelationError):
            # Also that of a block which was opened by hand below, and knows nothing of the request.
            self._request.log(outcome.reason, outcome.detail)
        return outcome

    def drop_timeout(self) -> None:
        """No deadline from here on."""
        self._deadline = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._scope is not None:
            self._scope.move_deadline(math.inf)

    def hold(self) -> None:
        """Until `resume`, nothing can stop the block: the handler is done, its response is on its way."""
        if self._scope is not None:
            self._scope.hold()

    def resume(self) -> None:
        if self._scope is not None:
            self._scope.resume()

    def release(self) -> None:
        """Nothing can stop the block any more: the response is complete, and what follows is background work."""
        self._deadline = math.inf
        self._stop_timers()
        self._token.unlisten(self)
        if self._scope is not None:
            self._scope.release()
