"""The first door of a request: its block is the only object of this package that most requests need.

Most requests are over before they are listened to. Until then the block of the first door stands for the request: the
scope has it under `SCOPE_KEY`. It makes the `RequestState` when another door, a handle or a reader of the body needs
one, or when the request has run for ``listen_after`` seconds.
"""

from __future__ import annotations

import math
from asyncio import CancelledError
from contextvars import copy_context
from threading import RLock
from typing import TYPE_CHECKING, Final
from weakref import ref

from ..hosts.starlette import RECEIVE
from ..kernel.block import current
from ..kernel.settings import settings
from ..kernel.token import CancelationToken
from .blocks import DoorBlock, RequestBlock
from .in_flight import InFlight, in_flight_of
from .lifetime import Lifetime
from .response import ResponseWatch, failed_to_send, has_no_more_work
from .state import PROBE_KEY, SCOPE_KEY, RequestState

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.requests import Request
    from starlette.types import Message, Receive, Scope, Send

    from ..kernel.loops.base import EventLoop
    from ..kernel.reasons import CancelationReason
    from ..kernel.shields import OwnerOfClient
    from .limits import Limits


# One that can be taken twice, because a signal handler may ask while its own thread makes a state.
_making: Final = RLock()


class FirstDoorBlock(DoorBlock):
    """The block of the first door on a request, which owns the request's end."""

    __slots__ = ("_made", "asgi_scope", "context", "in_flight", "is_over", "raw")

    _is_whole = False  # Its token is the root token, too, but is made only when it is asked for.
    lifetime = Lifetime.HANDLER
    reason: CancelationReason | None = None
    """The reason for which the request was stopped, as a test client asks for it; only a state can have one."""

    is_over: bool
    """Whether the request is closed, as long as there is no state that has `is_closed`."""

    _made: RequestState | None

    def __init__(self, scope: Scope, receive: Receive, loop: EventLoop) -> None:
        # Each attribute costs every request something: defaults come from the class.
        self.asgi_scope = scope
        self.raw = receive
        self.in_flight: InFlight = loop.in_flight or in_flight_of(loop)
        self.context = copy_context()
        self.loop = self.late_task = self.ended = self.upstream = self.face = self._left = self._made = None
        self.started = math.nan
        self.is_over = False
        scope[SCOPE_KEY] = self
        if PROBE_KEY in scope:
            scope[PROBE_KEY](self)

    @property
    def loop_of_request(self) -> EventLoop:
        return self.in_flight.loop

    @property
    def state(self) -> RequestState:  # type: ignore[override]
        return self._make_state() if self._made is None else self._made

    @property
    def token(self) -> CancelationToken:
        token = self._token
        if token is None:
            token = super().token
            if self.is_closed:
                # As `release` does with one that there was: background work is spared.
                token.unlisten(self)
            if self._made is not None:
                # The state shares the token, and its other blocks listen to it.
                self._made.adopt(token)
        return token

    def token_is_made(self, token: CancelationToken) -> None:
        """It is our own, which has us among its listeners as long as it can stop us."""

    @property
    def known_request(self) -> RequestState | None:
        return self._made if self._left is None else self._left()

    def _make_state(self) -> RequestState:
        # A thread of the handler may ask as well, while the loop lets the request grow old.
        with _making:
            if self._made is not None:
                return self._made
            if self.raw is _gone:
                return self._past_state()
            was_over = self.is_over
            state = RequestState(self.asgi_scope, self.raw, lifetime=self.lifetime, first=self)
            self.equip(state)
            if self.is_open:
                state.young_entry = self
                state.watch(self)
            self._made = state
            if self._token is not None:
                state.adopt(self._token)
            if was_over:
                # The response is complete: a block that is still open belongs to background work.
                state.complete()
            return state

    def _past_state(self) -> RequestState:
        """Return a closed state, for a copy of the scope that outlives the request."""
        state = None if self._left is None else self._left()
        if state is None:
            state = RequestState({"type": "http", "headers": []}, _gone)
            state.root_token = CancelationToken()
            state.close()
        return state

    def equip(self, state: RequestState) -> None:
        """Copy the settings of the door to its new state."""

    def receive(self) -> Awaitable[Message]:
        """Return the next message, as the ``receive()`` of the application."""
        if self._made is None and self.is_over:
            return self._receive_afterwards()
        return self.state.reader.receive()

    def _receive_afterwards(self) -> Awaitable[Message]:
        return self.raw()

    def enter(self, loop: EventLoop | None = None) -> None:
        in_flight = self.in_flight
        loop = in_flight.loop
        shutdown = loop.shutdown
        if shutdown is not None and shutdown.refuses:
            self.token.cancel_because(shutdown.cause())
        timeout, find_task = self.timeout, loop.task_without_scope
        is_alone = find_task is not None and self._token is None and current.get() is None
        task = find_task() if is_alone and find_task is not None and timeout != 0 and settings.listen_after else None
        if task is None:
            # Not by `RequestBlock.enter`: the token has this block among its listeners once it is made.
            super(RequestBlock, self).enter(loop)
            return
        # The same in fewer steps, as nearly all requests come here.
        self.loop, self.late_task = loop, task
        self.started = loop.time()
        self.outside = current.set(self)
        in_flight.add_young(self)
        if timeout is not None:
            self.own_deadline = self.started + timeout
            self.wait_for_deadline(loop, timeout)

    def leave(self, exc: BaseException | None) -> BaseException | None:
        if exc is not None or self._made is not None or self._token is not None or self.scope or self.parent:
            return super(RequestBlock, self).leave(exc)
        # The usual case: nothing but the handler has run.
        self.leave_undisturbed()
        self.in_flight.young.pop(self, None)
        return None

    def watch(self, loop: EventLoop) -> None:
        if self._made is not None:
            self._made.watch(self)
        elif settings.listen_after:
            self.in_flight.add_young(self)
        else:
            self.grow_old()

    def unwatch(self) -> None:
        if self._made is None:
            self.in_flight.young.pop(self, None)
        else:
            self._made.unwatch(self)

    def grow_old(self) -> None:
        """Listen to the request, which has run for ``listen_after`` seconds, also if this block has been left."""
        state = self.known_request or self.state
        state.young_entry = None
        state.arm()

    def has_to_settle(self) -> bool:
        made = self._made
        return bool(self.to_await) or (made is not None and made.has_stopped_listening)

    def runs_in(self, task: object) -> bool:
        return self.task is task or (self._made is not None and super().runs_in(task))

    def let_go(self) -> None:
        if self.is_unsettled:
            self.to_await = None
        if self.progress_callbacks is not None:
            self.progress_callbacks = None

    async def end_what_is_left(self) -> None:
        if self.to_await:
            await self.await_callbacks()
        if self._made is not None:
            await self._made.settle()

    @property
    def owner_of_client(self) -> OwnerOfClient:
        return self.state if self.is_open else super().owner_of_client

    @property
    def is_closed(self) -> bool:
        """Whether a disconnect is no longer acted on."""
        return self.is_over or (self._made is not None and self._made.is_closed)

    @property
    def is_listening(self) -> bool:
        return self._made is not None and self._made.is_listening

    def end_request(self) -> RequestState | None:
        """End the request, unless something listens on; return its state if the reader is to be joined."""
        made = self._made
        self.is_over = True
        if made is None:
            self.asgi_scope.pop(SCOPE_KEY, None)
            self.in_flight.young.pop(self, None)
            return None
        return made.end_request()

    def forget(self) -> None:
        """Drop the references to the request, which has ended: a task that outlives it may keep this block."""
        if self._left is None and self._made is not None:
            self._left = ref(self._made)
        self._made = None
        self.is_over = True
        if self.progress_callbacks is not None:
            self.progress_callbacks = None
        self.raw = _gone
        del self.asgi_scope, self.context


class EndedRequest:
    """A stand-in for a request whose handler returned before the request was listened to."""

    __slots__ = ("__weakref__", "_raw")
    is_closed = True

    def __init__(self, receive: Receive) -> None:
        self._raw = receive

    def receive(self) -> Awaitable[Message]:
        """Return the next message of the server."""
        return self._raw()


async def _gone() -> Message:
    return {"type": "http.disconnect"}


class HandlerBlock(FirstDoorBlock):
    """The block of the decorator, if that is the first door."""

    __slots__ = ("_after", "_request")

    _after: ref[EndedRequest | RequestState] | None
    """The object by whose ``receive`` the request receives once the handler has returned."""

    def __init__(self, request: Request, receive: Receive, loop: EventLoop) -> None:
        FirstDoorBlock.__init__(self, request.scope, receive, loop)
        self._after = None
        self._request = request
        # Messages that the reader has read ahead can be replayed only here.
        setattr(request, RECEIVE, self.receive)

    def end_request(self) -> RequestState | None:
        request, made = self._request, self._made
        # A background task may use the request, and then has to find out that the request is closed.
        after = EndedRequest(self.raw) if made is None else made
        setattr(request, RECEIVE, after.receive)
        self._after = ref(after)
        if made is None:
            # Without the call: it has left the young requests when the block was left.
            self.asgi_scope.pop(SCOPE_KEY, None)
            left = None
        else:
            left = super().end_request()
        del self._request
        self.forget()
        return left

    def _receive_afterwards(self) -> Awaitable[Message]:
        # The handler may have handed our `receive` to what sends the response.
        after = None if self._after is None else self._after()
        return self.raw() if after is None else after.receive()


class WholeDoorBlock(FirstDoorBlock):
    """The block of a middleware or route class, which sees the whole response as well."""

    __slots__ = ("_has_result", "_limits", "_send")

    lifetime = Lifetime.DOOR
    takes_groups_apart = False
    _watch: ResponseWatch | None = None
    _has_result: bool
    """Whether a response whose length is known has started."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, loop: EventLoop, limits: Limits) -> None:
        FirstDoorBlock.__init__(self, scope, receive, loop)
        self._send = send
        self._limits = limits
        self._has_result = False
        if limits.timeout is not None:
            self.timeout = limits.timeout
            if limits.budget is not None:
                self.budget = limits.budget
        if limits.policy is not None:
            self.policy = limits.policy
        if limits.cleanup_grace is not None:
            self.grace = limits.cleanup_grace

    def equip(self, state: RequestState) -> None:
        limits = self._limits
        state.cleanup_grace = limits.cleanup_grace
        state.outermost = state.default = self
        if limits.policies:
            state.add_policies(limits.policies)
        if self._has_result:
            state.response_has_started = state.response_is_out = state.is_finished = True

    def has_ended_undisturbed(self) -> bool:
        """End the request if nothing has happened to it that would have to be settled; return whether that is so."""
        if self._made is not None:
            return False
        self.asgi_scope.pop(SCOPE_KEY, None)
        self.forget()
        return True

    @property
    def is_undisturbed(self) -> bool:
        """Whether neither the request nor the stream of its response has been stopped."""
        made = self._made
        return made is None or (made.cause is None and made.aborted_by is None and not made.stream_was_cancelled)

    @property
    def response(self) -> ResponseWatch:
        """The watch of the response; made when it is first asked for."""
        watch = self._watch
        if watch is None:
            watch = self._watch = ResponseWatch(self._send, self.state, is_outermost=True)
            watch.started, watch.is_complete = self._has_result, self.is_over
        return watch

    async def send(self, message: Message) -> None:
        if self._made is None:
            kind = message["type"]
            is_all = False
            if kind == "http.response.start":
                is_all = self._has_result = has_no_more_work(message) and not message.get("trailers", False)
            elif kind == "http.response.body" and self._has_result and not message.get("more_body", False):
                is_all = True
                self._complete()
            if is_all:
                try:
                    await self._send(message)
                except (OSError, CancelledError) as exc:
                    await failed_to_send(exc, self.state)
                return
        await self.response.send(message)

    def end_request(self) -> RequestState | None:
        made = self._made
        if made is None:
            return super().end_request()
        made.close()
        return made if made.is_reading else None

    def _complete(self) -> None:
        """Note that the last part of the response is being sent: background work follows, and is not cancelled."""
        self.is_over = True
        self.asgi_scope.pop(SCOPE_KEY, None)
        self.release()

    def forget(self) -> None:
        super().forget()
        self._watch = None
        del self._send
