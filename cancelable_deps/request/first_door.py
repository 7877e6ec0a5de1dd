"""The door that a request comes in by: one object, as long as nobody asks for more.

Most requests are over before they are listened to. Until then the block of the first door stands for the request: it
is what `SCOPE_KEY` leads to, and makes the `RequestState` when another door, a handle, a reader of the body or the time
asks for one.
"""

from __future__ import annotations

from asyncio import CancelledError
from contextvars import copy_context
from threading import RLock
from typing import TYPE_CHECKING, Final
from weakref import ref

from ..hosts.starlette import RECEIVE
from ..kernel.settings import settings
from ..kernel.token import CancelationToken
from .blocks import DoorBlock, RequestBlock
from .in_flight import in_flight_of
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

    _is_whole = False  # Its token is the root token, which is made when it is asked for.
    lifetime = Lifetime.HANDLER
    reason: CancelationReason | None = None
    """Why the request was stopped, to a test client; a state knows it."""

    is_over = False
    """Whether a disconnect means nothing any more, although there is no state to say so."""

    _made: RequestState | None = None

    def __init__(self, scope: Scope, receive: Receive, loop: EventLoop, timeout: float | None) -> None:
        # Each attribute costs: what can be had from the class is not set.
        self.asgi_scope = scope
        self.raw = receive
        self.loop_of_request = loop
        self.in_flight = loop.in_flight or in_flight_of(loop)
        self.context = copy_context()
        if timeout is not None:
            self.timeout = timeout
        scope[SCOPE_KEY] = self
        if PROBE_KEY in scope:
            scope[PROBE_KEY](self)

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
                # It is that of the state, whose blocks are to hear of it.
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
                # What is still open comes after the response.
                state.complete()
            return state

    def _past_state(self) -> RequestState:
        """Return a closed state, for whom the request outlives in a copy of its scope."""
        state = None if self._left is None else self._left()
        if state is None:
            state = RequestState({"type": "http", "headers": []}, _gone)
            state.root_token = CancelationToken()
            state.close()
        return state

    def equip(self, state: RequestState) -> None:
        """Give the new state what the door knows."""

    def receive(self) -> Awaitable[Message]:
        """The application's ``receive()``."""
        if self._made is None and self.is_over:
            # There is nothing that we have read, nor will.
            return self._receive_afterwards()
        return self.state.reader.receive()

    def _receive_afterwards(self) -> Awaitable[Message]:
        return self.raw()

    def enter(self, loop: EventLoop | None = None) -> None:
        loop = self.loop_of_request
        shutdown = loop.shutdown
        if shutdown is not None and shutdown.refuses:
            self.token.cancel_because(shutdown.cause())
        # The token, once it is made, has us among its listeners.
        super(RequestBlock, self).enter(loop)

    def leave(self, exc: BaseException | None) -> BaseException | None:
        if exc is not None or self._made is not None or self._token is not None or self.scope or self.parent:
            return super().leave(exc)
        # Nothing has happened to the request but its handler, which is what happens to nearly all of them.
        self.leave_undisturbed()
        self.in_flight.young.pop(self, None)
        return None

    def watch(self, loop: EventLoop) -> None:
        if self._made is not None:
            self._made.watch(self)
        elif settings.listen_after:
            in_flight = self.in_flight
            in_flight.young[self] = None
            if not in_flight.is_looked_after:
                in_flight.begin()
        else:
            self.grow_old()

    def unwatch(self) -> None:
        if self._made is None:
            self.in_flight.young.pop(self, None)
        else:
            self._made.unwatch(self)

    def grow_old(self) -> None:
        """Called when the request has run for a while: listen to it, also if this block has been left."""
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
        """Whether a disconnect means nothing any more."""
        return self.is_over or (self._made is not None and self._made.is_closed)

    @property
    def is_listening(self) -> bool:
        return self._made is not None and self._made.is_listening

    def end_request(self) -> RequestState | None:
        """End the request, if nothing listens on; return its state if that is to be joined."""
        made = self._made
        self.is_over = True
        if made is None:
            self.asgi_scope.pop(SCOPE_KEY, None)
            self.in_flight.young.pop(self, None)
            return None
        return made.end_request()

    def forget(self) -> None:
        """Keep nothing of the request, which has ended: a task that goes on may know this block."""
        if self._left is None and self._made is not None:
            self._left = ref(self._made)
        self._made = None
        self.is_over = True
        if self.progress_callbacks is not None:
            self.progress_callbacks = None
        self.raw = _gone
        del self.asgi_scope, self.context


class EndedRequest:
    """Stands for a request whose handler has returned before it was listened to."""

    __slots__ = ("__weakref__", "_raw")
    is_closed = True

    def __init__(self, receive: Receive) -> None:
        self._raw = receive

    def receive(self) -> Awaitable[Message]:
        """The application's ``receive()``: the server's."""
        return self._raw()


async def _gone() -> Message:
    return {"type": "http.disconnect"}


class HandlerBlock(FirstDoorBlock):
    """The block of the decorator, if that is the first door."""

    _after: ref[EndedRequest | RequestState] | None = None
    """By what the request receives once the handler has returned."""

    def __init__(
        self, request: Request, receive: Receive, loop: EventLoop, timeout: float | None, grace: float | None
    ) -> None:
        super().__init__(request.scope, receive, loop, timeout)
        if grace is not None:
            self.grace = grace
        self._request = request
        # What is read ahead can be given back nowhere else.
        setattr(request, RECEIVE, self.receive)

    def end_request(self) -> RequestState | None:
        made = self._made
        # A background task may have the request, whose client has a response.
        after = EndedRequest(self.raw) if made is None else made
        setattr(self._request, RECEIVE, after.receive)
        self._after = ref(after)
        del self._request
        left = super().end_request()
        self.forget()
        return left

    def _receive_afterwards(self) -> Awaitable[Message]:
        # The handler may have handed our `receive` to what sends the response.
        after = None if self._after is None else self._after()
        return self.raw() if after is None else after.receive()


class WholeDoorBlock(FirstDoorBlock):
    """The block of a middleware or route class, which sees the whole response as well."""

    lifetime = Lifetime.DOOR
    takes_groups_apart = False
    _watch: ResponseWatch | None = None
    _has_result = False
    """Whether a response that has told its length has begun."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, loop: EventLoop, limits: Limits) -> None:
        super().__init__(scope, receive, loop, limits.timeout)
        self._send = send
        self._limits = limits
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

    @property
    def is_undisturbed(self) -> bool:
        """Whether nothing has stopped the request, nor a stream of its."""
        made = self._made
        return made is None or (made.cause is None and made.aborted_by is None and not made.stream_was_cancelled)

    @property
    def response(self) -> ResponseWatch:
        """The watch of the response; made for the first who asks."""
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
        """Note that all of the response is on its way to the server: what follows is background work, and is spared."""
        self.is_over = True
        self.asgi_scope.pop(SCOPE_KEY, None)
        self.release()

    def forget(self) -> None:
        super().forget()
        self._watch = None
        del self._send
