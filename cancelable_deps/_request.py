"""The one object per request that owns its reader and its root token."""

from __future__ import annotations

from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import anyio
from starlette.requests import ClientDisconnect

from ._backend import current_loop, logger
from ._receive import Reader
from ._sweep import sweep_of
from .cancelable import Cancelable
from .errors import DisconnectCancelation
from .reasons import CancelationReason
from .settings import settings
from .token import CancelationToken, Cause

if TYPE_CHECKING:
    from contextlib import AsyncExitStack
    from typing import Protocol

    from starlette.requests import Request
    from starlette.types import Receive, Scope

    from ._backend import EventLoop

    class Watcher(Protocol):
        def armed(self) -> None:
            """The request has run for a while, and is listened to."""


SCOPE_KEY = "cancelable_deps"

# FastAPI's exit stack around dependencies and handler, closed when the handler has returned. Private, but nothing
# public tells a plain dependency of that moment, and a yield dependency costs a request as much as all the rest.
_HANDLER_STACK_KEY = "fastapi_function_astack"


class RequestState:
    """What all doors on one request share.

    Whoever makes it closes it: a middleware or route class when the response is complete, the decorator and the
    dependencies when the handler has returned. Listening starts when the request has run for ``listen_after`` seconds
    and someone watches.
    """

    pen: Any = None
    _armed = False
    _held = False
    _closed = False
    _kept = False
    _logged = False
    _left = False
    _leaving: anyio.Event | None = None
    _default: DoorBlock | None = None
    _stack: AsyncExitStack | None = None
    _watchers: tuple[Watcher, ...] = ()

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self.token = CancelationToken()
        self.loop: EventLoop = current_loop()
        self.arrived = self.loop.time()
        self.reader = Reader(scope, receive, self._disconnected, copy_context())
        scope[SCOPE_KEY] = self

    def watch(self, watcher: Watcher) -> None:
        self._watchers += (watcher,)
        if self._closed:
            return
        if self._armed:
            watcher.armed()
            self.reader.arm(self.loop)
        elif self.pen is None:
            self._wait_for_the_sweep()

    def unwatch(self, watcher: Watcher) -> None:
        self._watchers = tuple(other for other in self._watchers if other is not watcher)
        if not self._watchers:
            self._leave_pen()
            if self._armed and not self._held:
                self.reader.stop()

    def hold(self) -> None:
        """Somebody will call `close`; until then, listening does not end with the last block."""
        self._held = True

    def arm(self) -> None:
        self._armed = True
        if self._closed:
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

    async def wait_disconnected(self) -> None:
        """Wait until the client has left."""
        if not self._left:
            if self._leaving is None:
                self._leaving = anyio.Event()
            await self._leaving.wait()

    def close(self) -> None:
        """The response is complete, or the handler has returned: from here on a disconnect means nothing."""
        self._closed = True
        self.scope.pop(SCOPE_KEY, None)
        self._leave_pen()
        self.reader.stop()

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

    async def settle(self) -> None:
        """Wait for a reader that was stopped."""
        if self._armed and not self.reader.is_armed:
            await self.reader.join()

    @property
    def is_closed(self) -> bool:
        return self._closed

    def set_default(self, block: DoorBlock) -> None:
        """``block`` has the application's default timeout, which a route's own replaces."""
        self.lift_default()
        self._default = block

    def lift_default(self) -> None:
        """The route has a timeout of its own, or wants none."""
        if self._default is not None:
            self._default.drop_timeout()
            self._default = None

    def log(self, cause: Cause) -> None:
        """The one line about this request."""
        if self._logged:
            return
        self._logged = True
        method = self.scope.get("method", "")
        route = getattr(self.scope.get("route"), "path", None) or self.scope.get("path", "")
        elapsed = self.loop.time() - self.arrived
        logger.info(
            "%s %s cancelled after %.3f s: %s",
            method,
            route,
            elapsed,
            cause,
            extra={"method": method, "route": route, "reason": str(cause.reason), "elapsed": elapsed},
        )

    # FastAPI's stack of exits takes any context manager, and this is its cheapest form.
    def __enter__(self) -> None: ...

    def __exit__(self, *exc_info: object) -> None:
        if not self._kept:
            self.close()

    async def handler_returned(self) -> None:
        if not self._kept:
            await self.aclose()

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

    def _disconnected(self) -> None:
        if self._closed:
            return
        self._left = True
        self.token.cancel_nowait(CancelationReason.DISCONNECT)
        if self.token.cause is not None:
            self.log(self.token.cause)
        if self._leaving is not None:
            self._leaving.set()


def request_state(request: Request) -> RequestState:
    """The state of ``request``, made by the first who asks."""
    state: RequestState | None = request.scope.get(SCOPE_KEY)
    if state is None:
        state = RequestState(request.scope, request.receive)
        if isinstance(getattr(request.receive, "__self__", None), Reader):
            # An earlier state is closed and gone: this is a background task, whose client has its response.
            state.close()
    if request.receive is state.reader.raw:
        # Private, and the only way to give back to `request.body()` what the reader has read: FastAPI hands the same
        # Request to all dependencies and the handler.
        request._receive = state.reader.receive
    return state


def handler_state(request: Request) -> RequestState:
    """As `request_state`, called from a dependency: closed when the handler has returned."""
    made = SCOPE_KEY not in request.scope
    state = request_state(request)
    if made:
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
        outcome = await super()._exit(exc)
        await self._request.settle()
        return outcome

    def _outcome(self, exc: BaseException | None, remaining: BaseException | None) -> BaseException:
        outcome = super()._outcome(exc, remaining)
        if isinstance(outcome, ClientDisconnect):
            # What Starlette raises to whoever was reading the body when the client left.
            error = DisconnectCancelation()
            error.__cause__ = outcome
            return error
        return outcome

    def _stopped(self, exc: BaseException | None) -> BaseException:
        error = super()._stopped(exc)
        assert self._token.cause is not None
        self._request.log(self._token.cause)
        return error

    def _refused(self) -> None:
        assert self._token.cause is not None
        self._request.log(self._token.cause)


class DoorBlock(RequestBlock):
    """The block of a door around the whole handler: its token is the root token, so what stops it stops the request."""

    def _set_token(self, root: CancelationToken) -> None:
        self._token = root

    def drop_timeout(self) -> None:
        """No deadline from here on."""
        self._deadline = float("inf")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._scope is not None:
            self._scope.move_deadline(self._deadline)

    def release(self) -> None:
        """Nothing can stop the block any more: the response is complete, and what follows is background work."""
        self.drop_timeout()
        self._token.unlisten(self)
