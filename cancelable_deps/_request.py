"""The one object per request that owns its reader and its root token."""

from __future__ import annotations

from contextvars import copy_context
from typing import TYPE_CHECKING, Any, ClassVar, Final
from urllib.parse import quote
from weakref import ref

import anyio

from ._backend import current_loop, logger
from ._members import Members, with_one_more, without
from ._receive import Reader
from ._sweep import sweep_of
from .reasons import CancelationReason
from .settings import settings
from .token import CancelationToken, Cause, telling_everybody

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AsyncExitStack
    from typing import Protocol

    from starlette.requests import Request
    from starlette.types import Message, Receive, Scope

    from ._drain import Drain
    from ._request_block import DoorBlock, RequestBlock
    from .policies import TimeoutPolicy

    class Watcher(Protocol):
        def armed(self) -> None:
            """The request has run for a while, and is listened to."""


SCOPE_KEY = "cancelable_deps"
PROBE_KEY = "cancelable_deps.probe"
"""Under this key a test client puts a function that is told of each request state."""

# FastAPI's exit stack around dependencies and handler, closed when the handler has returned. Private, but nothing
# public tells a plain dependency of that moment, and a yield dependency costs a request as much as all the rest.
_HANDLER_STACK_KEY = "fastapi_function_astack"
# The one around the response and its background tasks; only for what must not be left behind by an error.
_REQUEST_STACK_KEY = "fastapi_inner_astack"

_NO_ASGI: Final[dict[str, Any]] = {"version": "3.0"}


class RequestState:
    """What all doors on one request share.

    Whoever makes it closes it: a middleware or route class when the response is complete, the decorator and the
    dependencies when the handler has returned. Listening starts when the request has run for ``listen_after`` seconds
    and someone watches.
    """

    block_class: ClassVar[type[RequestBlock]]
    door_class: ClassVar[type[DoorBlock]]
    pen: Any = None
    is_closed = False
    has_left = False
    is_cut = False
    """Nothing more of the response may be sent: it ends without its last chunk."""

    main_tasks: tuple[object, ...] = ()
    """The tasks, besides that of a door, in which the handler runs: a ``BaseHTTPMiddleware`` starts one."""

    cleanup_grace: float | None = None
    policies: Mapping[str, TimeoutPolicy] | None = None
    is_armed = False
    _deferrals = 0
    _deferred: anyio.Event | None = None
    _reader: Reader | None = None
    _held = False
    _kept = False
    _kept_for: ref[object] | None = None
    reason: CancelationReason | None = None
    """Why it was stopped, as far as there is a line about it in the log."""
    _leaving: anyio.Event | None = None
    default: DoorBlock | None = None
    """The block with the timeout that a route's own replaces."""

    _stack: AsyncExitStack | None = None
    _watchers: Members[Watcher] = ()

    def __init__(self, scope: Scope, receive: Receive, *, held: bool = False) -> None:
        if held:
            self._held = True
        self.scope = scope
        self.raw = receive
        self.token = CancelationToken()
        loop = self.loop = current_loop()
        self.arrived = loop.time()
        self._context = copy_context()
        scope[SCOPE_KEY] = self
        if PROBE_KEY in scope:
            scope[PROBE_KEY](self)
        if loop.drain is not None and loop.drain.refuses:
            self.token.cancel_because(loop.drain.cause())

    @property
    def reader(self) -> Reader:
        """Made for the first who asks: most requests are over before anybody reads or listens."""
        if self._reader is None:
            self._reader = Reader(self.scope, self.raw, None if self.is_closed else self, self._context)
        return self._reader

    def receive(self) -> Awaitable[Message]:
        """The application's ``receive()``."""
        return self.reader.receive()

    def watch(self, watcher: Watcher) -> None:
        self._watchers = with_one_more(self._watchers, watcher) if self._watchers else (watcher,)
        if self.is_armed or self.is_closed:
            watcher.armed()
            if not self.is_closed:
                self.reader.arm(self.loop)
            self._enter_drain()
        elif self.pen is None:
            interval = settings.listen_after
            if interval:
                sweep = self.loop.extras.get(interval) or sweep_of(self.loop, interval)
                pen = self.pen = sweep.young
                pen[self] = None
                if not sweep.is_wound:
                    sweep.wind()
            else:
                self.arm()

    def unwatch(self, watcher: Watcher) -> None:
        watchers = self._watchers
        if watchers == (watcher,):
            self._watchers = ()
        else:
            self._watchers = without(watchers, watcher)
        if not self._watchers:
            if self.pen is not None:
                self._leave_pen()
            if not self._held:
                # Nobody will tell us of the request's end. A later block finds us by `receive`, if it is ours.
                self.scope.pop(SCOPE_KEY, None)
                if self._reader is not None:
                    self._reader.stop()

    def hold(self) -> None:
        """Somebody will call `close`; until then, listening does not end with the last block."""
        self._held = True

    @property
    def is_held(self) -> bool:
        return self._held

    def arm(self) -> None:
        self.is_armed = True
        if not self.is_closed:
            if self._stack is not None:
                self._stack.push_async_callback(self.handler_returned)
            for watcher in tuple(self._watchers):
                watcher.armed()
            self.reader.arm(self.loop)
        self._enter_drain()

    def arm_now(self) -> None:
        """Listen from now on: somebody waits for nothing else."""
        if not self.is_armed:
            self._leave_pen()
            self.arm()

    def client_left(self) -> None:
        """The reader tells us."""
        if self.is_closed:
            return
        self.has_left = True
        if not self._deferrals:
            self._disconnect()

    def defer_disconnect(self, by: int) -> None:
        """As long as there are more in than out, nobody is told that the client has left; from any thread."""
        self._deferrals += by
        if not self._deferrals:
            if self.has_left and not self.is_closed:
                self._disconnect()
            self._call_in_loop(self._tell_those_deferred)

    @property
    def is_deferring(self) -> bool:
        return self._deferrals > 0 and not self.is_closed

    async def deferral_over(self) -> None:
        """Wait until a disconnect may be told."""
        while self.is_deferring:
            if self._deferred is None:
                self._deferred = anyio.Event()
            await self._deferred.wait()

    def _tell_those_deferred(self) -> None:
        if self._deferred is not None:
            self._deferred.set()
            self._deferred = None

    def _disconnect(self) -> None:
        with telling_everybody():
            self.token.cancel_nowait(CancelationReason.DISCONNECT)
            assert self.token.cause is not None
            self.log(self.token.cause.reason, self.token.cause)
            if self._leaving is not None:
                self._call_in_loop(self._leaving.set)

    def _call_in_loop(self, callback: Callable[[], object]) -> None:
        if self.loop.is_running_here():
            callback()
        else:
            self.loop.call_from_thread(callback)

    async def wait_disconnected(self) -> None:
        """Wait until the client has left."""
        if not self.has_left:
            if self._leaving is None:
                self._leaving = anyio.Event()
            await self._leaving.wait()

    @property
    def is_stopping(self) -> bool:
        return any(isinstance(watcher, self.block_class) and watcher.is_cancelled for watcher in self._watchers)

    def complete(self) -> None:
        """The response is complete, or the handler has returned: from here on a disconnect means nothing."""
        self.is_closed = True
        if self._deferred is not None:
            self._tell_those_deferred()
        self.scope.pop(SCOPE_KEY, None)
        if self._reader is not None:
            self._reader.stop()
            self._reader.owner = None
        if self._stack is not None:
            self._stack = None
        if self.default is not None:
            self.default = None

    def close(self) -> None:
        """As `complete`, and no background task of ours runs on."""
        if not self.is_closed:
            self.complete()
        if self.pen is not None:
            self._leave_pen()
        # Or every request would be garbage of the kind that only the collector finds.
        if self._watchers:
            self._watchers = ()

    @property
    def _doors(self) -> list[DoorBlock]:
        return [watcher for watcher in self._watchers if isinstance(watcher, self.door_class)]

    def spare_background(self) -> None:
        """What still runs comes after the response: whatever has stopped that does not stop this."""
        for door in self._doors:
            door.release()
        self.complete()

    def stop(self, cause: Cause) -> None:
        """Cancel the request; if its response is complete, what runs after that."""
        self.token.cancel_because(cause)
        if self.is_closed:
            for innermost in self._doors[-1:]:
                innermost.stop_background(cause)

    async def aclose(self) -> None:
        """As `close`, and wait until nothing of ours is left."""
        self.close()
        await self.join()

    @property
    def is_reading(self) -> bool:
        """Whether a task of ours is left to `join`, after `close`."""
        return self._reader is not None and self._reader.is_reading

    async def join(self) -> None:
        if self._reader is not None:
            await self._reader.join()

    def close_with_handler(self) -> bool:
        """Close when the handler has returned, if FastAPI tells us; otherwise listening ends with the last block."""
        stack: AsyncExitStack | None = self.scope.get(_HANDLER_STACK_KEY)
        if stack is None or self.is_closed:
            return False
        self._stack = stack
        stack.push(self)
        self.hold()
        return True

    def keep_through_response(self, response: object = None) -> None:
        """Somebody listens until the response has ended, and closes us then: the handler's return does not.

        :param response: who that is, if the handler may throw it away.
        """
        if response is not None:
            self._kept_for = ref(response)
        if self._kept:
            return
        self._kept = True
        # Unless an error on the way means that this response is never sent.
        if self.request_stack is not None:
            self.request_stack.push_async_callback(self.aclose)

    @property
    def request_stack(self) -> AsyncExitStack | None:
        """FastAPI's, which is closed when the response and its background tasks are over; ``None`` without it."""
        stack: AsyncExitStack | None = self.scope.get(_REQUEST_STACK_KEY)
        return stack

    def listen_for_streams(self) -> None:
        """Starlette's streams need not listen from here on, beside us: under ASGI 2.4 they do not."""
        self.scope["asgi"] = {**self.scope.get("asgi", _NO_ASGI), "spec_version": "2.4"}

    # FastAPI's stack of exits takes any context manager, and this is its cheapest form.
    def __enter__(self) -> None: ...

    def __exit__(self, *exc_info: object) -> None:
        if not self.is_kept:
            self.close()

    async def handler_returned(self) -> None:
        if not self.is_kept:
            await self.aclose()

    @property
    def ends_with_handler(self) -> bool:
        """Whether FastAPI's stack around the handler closes us, unless a response of ours that is still there listens on."""
        return self._stack is not None and not self.is_closed and (not self._kept or self._kept_for is not None)

    @property
    def is_kept(self) -> bool:
        """Whether somebody listens until the response has ended."""
        return self._kept and (self._kept_for is None or self._kept_for() is not None)

    @property
    def is_listening(self) -> bool:
        return self._reader is not None and self._reader.is_armed

    @property
    def has_stopped_listening(self) -> bool:
        return self.is_armed and not self.is_listening

    async def settle(self) -> None:
        """Wait for a reader that was stopped."""
        if self.has_stopped_listening:
            await self.join()

    def set_default(self, block: DoorBlock) -> None:
        """``block`` has the application's default timeout, which a route's own replaces."""
        if self.default is not None:
            self.lift_default()
        self.default = block

    def add_policies(self, policies: Mapping[str, TimeoutPolicy]) -> None:
        """Those of one more door: a mounted application has those of the one around it, too."""
        self.policies = policies if self.policies is None else {**self.policies, **policies}

    def replace_default(self, policy: TimeoutPolicy) -> None:
        """The route has chosen a policy."""
        if self.default is None:
            raise RuntimeError(
                "timeout_policy() replaces the default of RequestCancelationMiddleware or CancelableRoute, and this "
                "request has neither. Use @with_cancelation(policy=...), or cancelable_with_timeout()."
            )
        self.default.use_policy(policy)

    def lift_default(self) -> None:
        """The route has a timeout of its own, or wants none."""
        if self.default is not None:
            self.default.drop_timeout()
            self.default = None

    def log(self, reason: CancelationReason, cause: object) -> None:
        """The one line about this request."""
        if self.reason is not None:
            return
        self.reason = reason
        method = self.scope.get("method", "WEBSOCKET")
        route = route_of(self.scope)
        elapsed = self.loop.time() - self.arrived
        extra = {"method": method, "route": route, "reason": str(reason), "elapsed": elapsed}
        why = " ".join(str(cause).splitlines())
        logger.info("%s %s cancelled after %.3f s: %s", method, route, elapsed, why, extra=extra)

    def _enter_drain(self) -> None:
        drain: Drain | None = self.loop.drain
        if drain is not None and self.pen is None:
            drain.add(self)

    def _leave_pen(self) -> None:
        if self.pen is not None:
            self.pen.pop(self, None)
            self.pen = None


def route_of(scope: Scope) -> str:
    """The route as it was written, for the log; where there is none the path, quoted: it may hold line breaks."""
    return getattr(scope.get("route"), "path", None) or quote(scope.get("path", ""))


def request_state(request: Request, *, held: bool = False) -> RequestState:
    """The state of ``request``, made by the first who asks, who holds it if ``held``."""
    scope = request.scope
    state: RequestState | None = scope.get(SCOPE_KEY)
    # Private, and the only way to give back to `request.body()` what the reader has read: FastAPI hands the same
    # Request to all dependencies and the handler.
    receive = request._receive
    if state is None:
        earlier = getattr(receive, "__self__", None)
        if isinstance(earlier, RequestState) and not earlier.is_closed:
            scope[SCOPE_KEY] = earlier
            if held:
                earlier.hold()
            return earlier
        state = RequestState(scope, receive, held=held)
        if isinstance(earlier, RequestState):
            # This is a background task, and its client has a response. Nor is it new, to be refused at shutdown.
            state.token = CancelationToken()
            state.close()
    if receive is state.raw:
        request._receive = state.receive
    return state


def handler_state(request: Request) -> RequestState:
    """As `request_state`, called before the handler or in it: closed when the handler has returned."""
    made = SCOPE_KEY not in request.scope
    state = request_state(request)
    if made:
        state.close_with_handler()
    return state
