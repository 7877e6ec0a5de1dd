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
from ..kernel.members import with_one_more, without
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
    from ..kernel.token import Cause
    from .limits import Limits


# One that can be taken twice, because a signal handler may ask while its own thread makes a state.
_making: Final = RLock()


class FirstDoorBlock(DoorBlock):
    """The block of the first door on a request, which owns the request's end."""

    __slots__ = ("_made", "asgi_scope", "context", "in_flight", "is_over", "policy", "raw")

    _is_whole = False  # Its token is the root token, too, but is made only when it is asked for.
    lifetime = Lifetime.HANDLER
    reason: CancelationReason | None = None
    """The reason for which the request was stopped, as a test client asks for it; only a state can have one."""

    is_over: bool
    """Whether the request is closed, as long as there is no state that has `is_closed`."""

    _made: RequestState | None
    joined: JoinedBlock | None = None
    """The block of the decorator inside of this one, as long as that does without a state."""

    def __init__(self, scope: Scope, receive: Receive, loop: EventLoop) -> None:
        self.asgi_scope = scope
        self.raw = receive
        self.in_flight: InFlight = loop.in_flight or in_flight_of(loop)
        self.context = copy_context()
        self.loop = self.late_task = self.ended = self.upstream = self.face = self._left = self._made = None
        self.scope = self.parent = self.timeout = self.timeout_queue = self._token = self.policy = None
        self.started = math.nan
        self.is_over = self.is_unsettled = False
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
            elif self.joined is not None:
                # So that this block listens to the token as well.
                self._make_state()
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
                state.response_is_complete = True
                state.complete()
            if self.joined is not None:
                self.joined.become_whole(state)
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
        return self.raw() if self._made is None and self.is_over else self.state.reader.receive()

    def enter(self, loop: EventLoop | None = None) -> None:
        in_flight = self.in_flight
        loop = in_flight.loop
        shutdown = loop.shutdown
        if shutdown is not None and shutdown.refuses:
            self.token.cancel_because(shutdown.cause())
        timeout, find_task, task = self.timeout, loop.task_without_scope, None
        if find_task is not None and timeout != 0 and self._token is None and settings.listen_after:
            task = find_task() if current.get() is None else None
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
        # The usual case: nothing but the handler has run. As `leave_undisturbed`, without one more call.
        in_flight = self.in_flight
        self.late_task = None
        self.ended = in_flight.loop.time()
        if self.timeout_queue is not None:
            self.leave_queue()
        current.reset(self.outside)
        del self.outside
        in_flight.young.pop(self, None)
        return None

    @property
    def is_disturbed(self) -> bool:
        """Whether the request has a state or a token."""
        return self._made is not None or self._token is not None

    def can_be_joined(self) -> bool:
        """Return whether the caller may open a `JoinedBlock`: directly inside of this block, and nothing has happened."""
        if self.is_disturbed or self.is_over or self.joined is not None or current.get() is not self:
            return False
        find_task = self.in_flight.loop.task_without_scope
        return self.late_task is not None and find_task is not None and find_task() is self.late_task

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
        if self._made is not None:
            self._left = self._left or ref(self._made)
            self._made = None
        self.is_over = True
        if self.face is not None:
            # Only through its face somebody can have set them.
            self.progress_callbacks = None
        self.raw = _gone
        del self.asgi_scope, self.context


class JoinedBlock(DoorBlock):
    """The block of the decorator inside of a first door, as long as the request has no state.

    It needs nothing of its own: whatever stops it makes the state, and this block an ordinary `DoorBlock` by that.
    """

    __slots__ = ()

    def __init__(self, first: FirstDoorBlock) -> None:
        self.loop = self.late_task = self.ended = self.upstream = self.face = self._left = None
        self.scope = self.timeout = self.timeout_queue = self._token = None
        self.started = math.nan
        self.is_unsettled = False
        self.parent = first

    @property
    def state(self) -> RequestState:  # type: ignore[override]
        state: RequestState = self.parent.state
        return state

    @property
    def token(self) -> CancelationToken:
        token: CancelationToken = self.parent.token
        return token

    @property
    def cause(self) -> Cause | None:
        cause: Cause | None = self.parent.cause
        return cause

    @property
    def known_request(self) -> RequestState | None:
        request: RequestState | None = self.parent.known_request
        return request

    @property
    def owner_of_client(self) -> OwnerOfClient:
        owner: OwnerOfClient = self.parent.owner_of_client
        return owner

    def runs_in(self, task: object) -> bool:
        return self.task is task

    def enter(self, loop: EventLoop | None = None) -> None:
        first: FirstDoorBlock = self.parent
        loop = self.loop = first.in_flight.loop
        self.late_task = first.late_task
        self.started = loop.time()
        self.outside = current.set(self)
        first.children = with_one_more(first.children, self)
        first.joined = self
        if first.is_disturbed:
            # A thread has made a token or a state since the decorator asked, and did not know of this block.
            self.become_whole(self.state)

    def leave(self, exc: BaseException | None) -> BaseException | None:
        if exc is not None or self.scope is not None or self.children:
            self.become_whole(self.state)
            return self.leave(exc)
        first: FirstDoorBlock = self.parent
        first.joined = None
        first.children = without(first.children, self)
        self.leave_undisturbed()
        if self.face is not None:
            self.progress_callbacks = None
        return None

    def become_whole(self, state: RequestState) -> None:
        """Become an ordinary block of a request with this state."""
        with _making:
            if type(self) is not JoinedBlock:
                return
            self.parent.joined = None
            self.__class__ = DoorBlock  # type: ignore[assignment]
            self.state = state  # type: ignore[misc]
            token = self._token = state.token
        token.listen(self)
        state.watch(self)
        if state.is_closed:
            self.release()


class Inlet:
    """The ``receive`` of a request under the decorator: that of its owner, or of the server once the handler has returned.

    The request keeps this object, and not the block: a task that outlives the request may keep the block, but not what
    the server knows of the request.
    """

    __slots__ = ("owner", "raw")

    def __init__(self, owner: HandlerBlock | RequestState, raw: Receive) -> None:
        self.owner: HandlerBlock | RequestState | None = owner
        """The block; after the handler the state, if there is one."""
        self.raw = raw

    def receive(self) -> Awaitable[Message]:
        """Return the next message."""
        owner = self.owner
        return self.raw() if owner is None else owner.receive()


async def _gone() -> Message:
    return {"type": "http.disconnect"}


class HandlerBlock(FirstDoorBlock):
    """The block of the decorator, if that is the first door."""

    __slots__ = ("_inlet",)

    def __init__(self, request: Request, receive: Receive, loop: EventLoop) -> None:
        FirstDoorBlock.__init__(self, request.scope, receive, loop)
        # Messages that the reader has read ahead can be replayed only here.
        inlet = self._inlet = Inlet(self, receive)
        setattr(request, RECEIVE, inlet.receive)

    def end_request(self) -> RequestState | None:
        made = self._made
        # A background task may use the request, and then has to find out that the request is closed. The handler may
        # have handed our `receive` to what sends the response, too.
        self._inlet.owner = made
        if made is None:
            # Without the call: it has left the young requests when the block was left.
            self.asgi_scope.pop(SCOPE_KEY, None)
            left = None
        else:
            left = super().end_request()
        del self._inlet
        self.forget()
        return left


class WholeDoorBlock(FirstDoorBlock):
    """The block of a middleware or route class, which sees the whole response as well."""

    __slots__ = ("_end_is_out", "_has_result", "_limits", "_send")

    lifetime = Lifetime.DOOR
    takes_groups_apart = False
    _watch: ResponseWatch | None = None
    _has_result: bool
    """Whether a response whose length is known has started."""

    _end_is_out: bool
    """Whether its last part has been sent, as long as there is no state that knows."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, loop: EventLoop, limits: Limits) -> None:
        FirstDoorBlock.__init__(self, scope, receive, loop)
        self._send = send
        self._limits = limits
        self._has_result = self._end_is_out = False
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
            state.end_is_being_sent = self.is_over and not self._end_is_out

    def has_ended_undisturbed(self) -> bool:
        """Leave the block and end the request, if nothing but the application has run; return whether that is so."""
        if self._made is not None or self._token is not None or self.late_task is None or self.parent is not None:
            return False
        FirstDoorBlock.leave(self, None)
        if self.policy is not None:
            self.policy.judge(self.asgi_scope, self.elapsed)
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
                finally:
                    if self.is_over:
                        self._end_is_out = True
                        if self._made is not None:
                            self._made.end_is_out()
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
