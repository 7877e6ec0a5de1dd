"""The one object per request that owns its reader and its root token."""

from __future__ import annotations

import math
from contextlib import contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import WeakSet, ref

import anyio

from ..hosts.fastapi import HANDLER_STACK_KEY, REQUEST_STACK_KEY
from ..hosts.frames import is_parsing_body
from ..hosts.starlette import route_of
from ..kernel.log import logger
from ..kernel.loops.current import current_loop
from ..kernel.members import Members, with_one_more, without
from ..kernel.reasons import CancelationReason
from ..kernel.settings import settings
from ..kernel.sweep import sweep_of
from ..kernel.token import CancelationToken, Cause, telling_everybody
from .http_reader import Reader
from .postponed import Postponed, Stoppable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from contextlib import AsyncExitStack

    from starlette.types import Message, Receive, Scope

    from ..kernel.errors import CancelationError

SCOPE_KEY = "cancelable_deps"
PROBE_KEY = "cancelable_deps.probe"
"""Under this key a test client puts a function that is told of each request state."""

_WAITERS = 32

# The root tokens of requests whose client was seen to leave: all that a block which outlives its request has of it.
_clients_left: WeakSet[CancelationToken] = WeakSet()


class Watcher(Protocol):
    """Somebody for whom a request listens for its client."""

    def listening_begins(self) -> None:
        """Called when the request is listened to, or is already: from now on something may strike."""

    @property
    def is_cancelled(self) -> bool:
        """Whether it is a block that is being cancelled."""
        ...

    @property
    def is_door(self) -> bool:
        """Whether it is a `Door`."""
        ...

    def works_in(self, task: object) -> bool:
        """Return whether a cancellation of the request reaches ``task`` by way of this one."""
        ...


class Door(Watcher, Protocol):
    """A block around the whole handler."""

    def hold(self) -> None:
        """Let nothing that stops the block reach its task until `resume`."""

    def resume(self) -> None:
        """Let what is due strike."""

    def finish(self) -> None:
        """Note that the result is there: no stop that is under way reaches the task any more."""

    def release(self) -> None:
        """Let nothing stop the block any more."""

    def stop_background(self, cause: Cause) -> None:
        """Stop what is left after `release` all the same."""

    def use_policy(self, policy: Any) -> None:
        """Take the timeout of a `TimeoutPolicy` in place of the one so far."""

    def drop_timeout(self) -> None:
        """Have no deadline from here on."""


class Shutdown(Protocol):
    """The end of all requests of one event loop, which the loop knows once somebody waits for it."""

    refuses: bool

    def cause(self) -> Cause:
        """Return why requests are stopped or refused."""
        ...

    def add(self, request: RequestState) -> None:
        """Know a request that has run for a while; it takes itself out of its pen."""


class Listening:
    """The `Watcher` of a handle that only asks, and runs nothing."""

    __slots__ = ()
    is_cancelled = is_door = False

    def works_in(self, task: object) -> bool:
        return False

    def listening_begins(self) -> None:
        """There is nothing that could be struck."""


class PastRequest:
    """A request that is over and gone, to whoever still asks for its client."""

    def __init__(self, token: CancelationToken) -> None:
        self.has_left = token in _clients_left

    def defer_disconnect(self, by: int) -> None:
        """There is nothing left to be deferred."""


class RequestState:
    """What all doors on one request share.

    Whoever makes it closes it: a middleware or route class when the response is complete, the decorator and the
    dependencies when the handler has returned. Listening starts when the request has run for ``listen_after`` seconds
    and someone watches.
    """

    pen: Any = None
    is_closed = False
    has_left = False
    is_aborted = False
    """Nothing more of the response may be sent: it ends without its last chunk."""

    response_has_started = False
    """Whether anything of a response has left the innermost place where we watch."""

    response_is_out = False
    """Whether anything of a response has been sent to the server."""

    body_has_begun = False
    response_is_starting = False
    """The start of a response is on its way: whether it got out could not be told of one that is stopped now."""

    drops_response = False
    """What the application has yet to send tells of a client that left, and is no answer to one that is there."""

    stream_was_cancelled = False
    """The task that sent a stream was cancelled, and not by us."""

    is_finished = False
    """The handler's result is there: nothing of ours stops what sends it."""

    aborted_by: CancelationError | None = None
    """The error that stopped a stream further in; its response is to be aborted."""

    cannot_be_aborted = False
    """That error is to be raised into the server, which closes the connection then."""

    main_tasks: tuple[object, ...] = ()
    """The tasks, besides that of a door, in which the handler runs: a ``BaseHTTPMiddleware`` starts one."""

    cleanup_grace: float | None = None
    policies: Mapping[str, Any] | None = None
    """The `TimeoutPolicy` objects of all doors so far, by name."""

    is_armed = False
    _deferrals = 0
    _deferred: anyio.Event | None = None
    _reader: Reader | None = None
    _held = False
    _kept = False
    _kept_for: ref[object] | None = None
    reason: CancelationReason | None = None
    """Why it was stopped, as far as there is a line about it in the log."""
    _leaving: dict[anyio.Event, int] | None = None
    _postponed: Postponed | None = None
    _guard: Postponed | None = None
    ends_by_itself = False
    """Whether what listens inside the application was told, and has time."""

    _left_after: float | None = None
    outermost: Door | None = None
    """The block of the middleware or route class that has made this state."""

    default: Door | None = None
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
        shutdown: Shutdown | None = loop.shutdown
        if shutdown is not None and shutdown.refuses:
            self.token.cancel_because(shutdown.cause())

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
            if not self.is_closed:
                self.reader.arm(self.loop)
            self._enter_shutdown()
            watcher.listening_begins()
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
            self.reader.arm(self.loop)
            for watcher in list(self._watchers):
                _tell(watcher)
        self._enter_shutdown()

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
        _clients_left.add(self.token)
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
        if self._left_after is None:
            self._left_after = self.loop.time() - self.arrived
        if self.has_listeners:
            self.tell_listeners()
        with telling_everybody():
            self.token.cancel_nowait(CancelationReason.DISCONNECT)
            if self._leaving is not None:
                self._call_in_loop(self._tell_those_who_wait)

    def _tell_those_who_wait(self) -> None:
        for event in self._leaving or ():
            event.set()

    def _call_in_loop(self, callback: Callable[[], object]) -> None:
        if self.loop.is_running_here():
            callback()
        else:
            self.loop.call_from_thread(callback)

    async def wait_disconnected(self) -> None:
        """Wait until the client has left."""
        if self.has_left:
            return
        waiting = self._leaving = {} if self._leaving is None else self._leaving
        # One event for some: asyncio's own looks through all who wait for it when one of them is cancelled.
        event = next(reversed(waiting), None)
        if event is None or waiting[event] >= _WAITERS:
            event = anyio.Event()
        waiting[event] = waiting.get(event, 0) + 1
        try:
            await event.wait()
        finally:
            waiting[event] -= 1
            if not waiting[event]:
                del waiting[event]

    def is_parsing_body(self, task: object) -> bool:
        return is_parsing_body(task)

    def is_work(self, task: object) -> bool:
        """Return whether a cancellation of the request reaches ``task`` first."""
        if task in self.main_tasks or (self.outermost is not None and self.outermost.works_in(task)):
            return True
        return any(watcher.works_in(task) for watcher in self._watchers)

    @property
    def has_listeners(self) -> bool:
        return self._reader is not None and self._reader.has_listeners

    @property
    def has_watchers(self) -> bool:
        return self._reader is not None and self._reader.has_watchers

    def tell_listeners(self) -> None:
        """Answer what inside the application listens for a disconnect, and give it the time to end by itself.

        As long as a cleanup may take: what it does then is one, a stream's background and the callbacks of its framework
        included. What is left after that is cancelled.
        """
        if self._postponed is None or not self.ends_by_itself:
            self.ends_by_itself = True
            earlier, self._postponed = self._postponed, Postponed(self.loop, self.grace)
            if earlier is not None:
                earlier.hand_on(self._postponed)
        self.reader.tell_listeners()

    @property
    def grace(self) -> float:
        return settings.cleanup_grace if self.cleanup_grace is None else self.cleanup_grace

    def postpones(self, block: Stoppable, cause: Cause) -> bool:
        """Return whether ``block`` is stopped later, or not at all, although the request is."""
        if cause is not self.token.cause or self.is_closed or not self.loop.is_running_here():
            return False
        if self._guard is not None:
            self._guard.add(block, cause)
            return True
        if self._postponed is None:
            if self.response_is_starting or self.is_finished:
                self._postponed = Postponed(self.loop, self.grace)
            elif self.has_watchers:
                self.drops_response = not self.response_has_started
                self.tell_listeners()
        if self._postponed is None:
            return False
        if self._postponed.is_over:
            return self.is_finished and self._is_on_its_way()
        self._postponed.add(block, cause)
        return True

    def _is_on_its_way(self) -> bool:
        """Return whether a finished result is being sent, and not kept by something between the handler and us."""
        if self.response_is_out and not self.body_has_begun and self.has_watchers:
            # It has told its length and never makes its first chunk; that can only be a stream.
            self.tell_listeners()
        return self.response_is_out

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Let nothing of ours reach the request's tasks inside; what is due then strikes at the end."""
        guard = self._guard = Postponed(self.loop, math.inf)
        doors = self._doors
        for door in doors:
            door.hold()
        try:
            yield
        finally:
            self._guard = None
            for door in doors:
                door.resume()
            guard.end()

    def start_response(self) -> None:
        """Note that the start of a response is on its way; `start_is_out` is to follow."""
        self.response_has_started = self.response_is_starting = True
        if self.token.cause is not None:
            for door in self._doors:
                door.hold()

    def start_is_out(self) -> None:
        """Note that the start of a response is sent: a stream can be stopped from here on."""
        self.response_is_starting = False
        if self.token.cause is None or self.is_finished:
            return
        if self._postponed is not None and not self.ends_by_itself:
            postponed, self._postponed = self._postponed, None
            postponed.end()
        for door in self._doors:
            door.resume()

    def finish(self) -> None:
        """Note that the handler's result is there, and is the response: what of ours has not struck yet never will."""
        self.is_finished = True
        if self.token.cause is not None:
            for door in self._doors:
                door.finish()

    @property
    def is_stopping(self) -> bool:
        """Whether a block of the request is being cancelled."""
        return any(watcher.is_cancelled for watcher in self._watchers)

    def complete(self) -> None:
        """The response is complete, or the handler has returned: from here on a disconnect means nothing."""
        self.note_disconnect()
        self.is_closed = True
        if self._postponed is not None:
            self._postponed.forget()
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

    def complete_response(self) -> None:
        """Note that all of the response is on its way to the server: what follows is background work, and is spared."""
        if self.outermost is not None:
            # Not among the watchers as long as it has not begun.
            self.outermost.release()
        if self._watchers:
            for door in self._doors:
                door.release()
        self.complete()

    def close(self) -> None:
        """As `complete`, and no background task of ours runs on."""
        if not self.is_closed:
            self.complete()
        if self.pen is not None:
            self._leave_pen()
        # Or every request would be garbage of the kind that only the collector finds.
        self.outermost = None
        if self._watchers:
            self._watchers = ()

    @property
    def _doors(self) -> list[Door]:
        return [cast("Door", watcher) for watcher in self._watchers if watcher.is_door]

    def spare_background(self) -> None:
        """What still runs comes after the response: whatever has stopped that does not stop this."""
        self.complete_response()

    def stop(self, cause: Cause) -> None:
        """Cancel the request, unless its result is there."""
        self.token.cancel_because(cause)

    def stop_all(self, cause: Cause) -> None:
        """Cancel the request; if its result is there, what sends it and what runs after that."""
        self.token.cancel_because(cause)
        if self.is_closed or self.is_finished:
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
        stack: AsyncExitStack | None = self.scope.get(HANDLER_STACK_KEY)
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
        stack: AsyncExitStack | None = self.scope.get(REQUEST_STACK_KEY)
        return stack

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
    def is_kept_open(self) -> bool:
        """Whether somebody was to listen until the response has ended, there or not."""
        return self._kept

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

    def set_default(self, block: Door) -> None:
        """``block`` has the application's default timeout, which a route's own replaces."""
        if self.default is not None:
            self.lift_default()
        self.default = block

    def add_policies(self, policies: Mapping[str, Any]) -> None:
        """Those of one more door: a mounted application has those of the one around it, too."""
        self.policies = policies if self.policies is None else {**self.policies, **policies}

    def replace(self, block: Door, by: Door) -> None:
        """``by`` has taken the place of ``block``."""
        if self.outermost is block:
            self.outermost = by
        if self.default is block:
            self.default = by

    def replace_default(self, policy: Any) -> None:
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

    def note_sender(self) -> None:
        """Note that the calling task sends a stream. If it is one of the application's own, its cleanup has its grace."""
        if not self.is_work(self.loop.current_task()):
            # Starlette and others send a stream from a child task, and cancel that when they hear that the client has
            # left; anyio and trio repeat a cancellation at every `await`, also in the cleanup of the stream's generator.
            gate = self.loop.scopes.task_gate(self.loop, self.grace, lambda origin: self.token.is_cancelled)
            gate.put_around(self._stream_ended)

    def _stream_ended(self, was_cancelled: bool) -> None:
        """Spare what comes after a stream that was told to end, and has: its background, the end of its framework."""
        self.stream_was_cancelled = was_cancelled and not self.token.is_cancelled
        if self.ends_by_itself and not self.is_closed:
            self.complete_response()

    def note_disconnect(self) -> None:
        """Log that the client left, in the context of the caller, if nothing that was stopped has been logged."""
        if self._left_after is not None and self.reason is None and self.token.cause is not None:
            self.log(self.token.cause.reason, self.token.cause)

    def log(self, reason: CancelationReason, cause: object) -> None:
        """The one line about this request."""
        if self.reason is not None:
            return
        self.reason = reason
        method = self.scope.get("method", "WEBSOCKET")
        route = route_of(self.scope)
        elapsed = self.loop.time() - self.arrived if self._left_after is None else self._left_after
        extra = {"method": method, "route": route, "reason": str(reason), "elapsed": elapsed}
        why = " ".join(str(cause).splitlines())
        logger.info("%s %s cancelled after %.3f s: %s", method, route, elapsed, why, extra=extra)

    def _enter_shutdown(self) -> None:
        shutdown: Shutdown | None = self.loop.shutdown
        if shutdown is not None and self.pen is None:
            shutdown.add(self)

    def _leave_pen(self) -> None:
        if self.pen is not None:
            self.pen.pop(self, None)
            self.pen = None


def _tell(watcher: Watcher) -> None:
    try:
        watcher.listening_begins()
    except Exception:
        # Or those after it could never be stopped.
        logger.exception("a request could not be made cancelable")
