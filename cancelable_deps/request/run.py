"""One request under a door that sees its whole response: middleware and route class."""

from __future__ import annotations

from asyncio import CancelledError
from collections import deque
from traceback import walk_tb
from typing import TYPE_CHECKING

import anyio.lowlevel
from fastapi.exceptions import FastAPIError

from ..kernel.errors import CancelationError
from ..kernel.foreign import SENDING, told
from ..kernel.reasons import CancelationReason
from ..kernel.settings import seconds
from ..kernel.unwrap import raise_as_it_is
from .blocks import DoorBlock
from .cut import cut
from .policies import TimeoutPolicy, named
from .state import SCOPE_KEY, RequestState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping
    from datetime import timedelta

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .cut import Headers

# In which what listens for a disconnect, behind other middleware too, wakes up and ends the task that sends.
_PASSES = 5

# Responses that have no body, whatever their headers say (RFC 9110).
_WITHOUT_BODY = frozenset({204, 205, 304})


class Limits:
    """What a door was configured with, checked when the app is built."""

    def __init__(
        self,
        default_timeout: float | timedelta | None,
        cleanup_grace: float | None,
        policies: Mapping[str, TimeoutPolicy] | None = None,
        default_policy: str | TimeoutPolicy | None = None,
    ) -> None:
        self.timeout = None if default_timeout is None else seconds(default_timeout, "default_timeout")
        self.policies = None if policies is None else _checked(policies)
        self.policy = named(default_policy, policies or {}) if isinstance(default_policy, str) else default_policy
        if self.policy is not None:
            if not isinstance(self.policy, TimeoutPolicy):
                raise TypeError(f"default_policy takes a name of `policies` or a TimeoutPolicy, not {default_policy!r}")
            if self.timeout is not None:
                raise TypeError("give default_timeout or default_policy, not both: a policy has a timeout")
            self.timeout = self.policy.enforced_timeout
        self.cleanup_grace = None if cleanup_grace is None else seconds(cleanup_grace, "cleanup_grace")


def _checked(policies: Mapping[str, TimeoutPolicy]) -> Mapping[str, TimeoutPolicy]:
    for name, policy in dict(policies).items():
        if not isinstance(policy, TimeoutPolicy):
            raise TypeError(f"policies maps names to TimeoutPolicy objects, and {name!r} is {policy!r}")
    return policies


async def run_request(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, limits: Limits
) -> CancelationError | None:
    """Run ``app``, and return the error with which the request is still to be answered, if there is one.

    An error that the application raises for itself is raised. One of ours that comes when the response has started cuts
    the response.
    """
    state: RequestState | None = scope.get(SCOPE_KEY)
    made = state is None
    if state is None:
        state = RequestState(scope, receive, held=True)
        state.cleanup_grace = limits.cleanup_grace
        receive = state.receive
        state.let_streams_listen()
    block = _make_block(state, limits)
    if made:
        state.outermost = block
    watch = ResponseWatch(send, state, is_outermost=made)
    try:
        try:
            block.enter(state.loop)
        except CancelationError as exc:
            return exc
        outcome = await run_through(block, app(scope, receive, watch.send))
        if block.policy is not None:
            block.policy.judge(block)
    finally:
        if made:
            state.close()
            if state.is_reading:
                await state.join()
    if outcome is None and state.token.cause is None and state.cut_by is None:
        return None
    try:
        return await _settle(outcome, watch, state)
    finally:
        del outcome  # Its traceback knows this frame: a cycle, as long as this frame knows it.


def _make_block(state: RequestState, limits: Limits) -> DoorBlock:
    block = DoorBlock(state, timeout=limits.timeout, cleanup_grace=limits.cleanup_grace)
    block.takes_groups_apart = False
    if state.default is None:
        state.default = block
    elif limits.timeout is not None:
        state.set_default(block)
    if limits.policies:
        state.add_policies(limits.policies)
    if limits.policy is not None:
        block.policy = limits.policy
    return block


async def run_through(block: DoorBlock, work: Awaitable[object]) -> BaseException | None:
    """Run ``work`` in ``block``, which has been entered, and leave it; return the exception that is to go further."""
    outcome: BaseException | None = None
    try:
        await work
    except BaseException as exc:
        outcome = exc
    still_open = block if not block.is_left else block.successor
    if still_open is not None:
        outcome = still_open.leave(outcome)
        if still_open.is_unsettled:
            await still_open.settle()
    try:
        return outcome
    finally:
        del outcome  # Its traceback knows this frame: a cycle, as long as this frame knows it.


async def _settle(outcome: BaseException | None, watch: ResponseWatch, state: RequestState) -> CancelationError | None:
    """Cut the response, return the error that is to answer the request, or raise what is not ours."""
    error = error_of(outcome, state)
    try:
        if error is None:
            if outcome is not None:
                raise_as_it_is(outcome)
            return None
        if not watch.started:
            return error
        if state.cannot_be_cut:
            raise_as_it_is(error)
        was_cut = state.is_cut and state.cut_by is None
        if not (watch.is_complete or was_cut or error.reason is CancelationReason.DISCONNECT):
            await watch.cut(error)
        return None
    finally:
        del outcome, error  # Their tracebacks know this frame: cycles, as long as this frame knows them.


def error_of(outcome: BaseException | None, state: RequestState) -> CancelationError | None:
    """Return our error, if that is why the application has ended."""
    if isinstance(outcome, CancelationError):
        return outcome
    if outcome is None and state.cut_by is not None:
        return state.cut_by
    cause = state.token.cause
    if cause is None or state.is_finished:
        return None
    if outcome is None:
        # What was stopped ends by itself, as a stream does that was told, or takes our cancellation for its own.
        return cause.error()
    if _tells_that_it_was_swallowed(outcome):
        state.log(cause.reason, cause)
        return cause.error()
    return None


def _tells_that_it_was_swallowed(outcome: BaseException) -> bool:
    """Return whether FastAPI finds out so that a dependency with ``yield``, or on trio its own nursery, has kept an error.

    It says so where one of ``scope="request"`` has. Where one of ``scope="function"`` has it does not notice, and goes on
    to a response that was never assigned.
    """
    if type(outcome) is not UnboundLocalError:
        return type(outcome) is FastAPIError
    innermost = deque(walk_tb(outcome.__traceback__), maxlen=1)
    return any(frame.f_globals.get("__name__") == "fastapi.routing" for frame, _ in innermost)


class ResponseWatch:
    """Watches the response in one place, to know whether it has started and when it is complete.

    A response that has told its length is a finished result: from its start on nothing of ours stops it. Any other is
    the start of work, and can be stopped when that start is out.
    """

    __slots__ = ("_is_outermost", "_send", "_state", "_trailers", "is_complete", "last", "started", "stream_headers")

    def __init__(self, send: Send, state: RequestState, *, is_outermost: bool) -> None:
        self.started = self._trailers = self.is_complete = False
        self.stream_headers: Headers = ()
        self.last = b""
        self._send = send
        self._state = state
        # What is between a place further in and the outermost may hold the response back.
        self._is_outermost = is_outermost

    async def send(self, message: Message) -> None:
        # In one piece: a response pays for each coroutine between the application and its server, twice.
        kind = message["type"]
        state = self._state
        is_start_of_work = False
        if kind == "http.response.start":
            if state.drops_response:
                return
            is_start_of_work = self._starts_work(message)
        elif state.drops_response and not self.started:
            return
        elif kind == "http.response.body":
            if message.get("more_body", False) or self._trailers:
                self.last = message.get("body") or self.last
                state.body_has_begun = True
            elif state.is_cut:
                return
            else:
                self._complete()
        elif _is_last(kind, message):
            self._complete()
        try:
            await self._send(message)
        except OSError:
            if not await self._is_silent_end():
                raise
        except CancelledError as exc:
            raise_as_it_is(told(exc, state.loop, SENDING))
        finally:
            if is_start_of_work and self._is_outermost:
                state.start_is_out()

    def _starts_work(self, message: Message) -> bool:
        """Note the start of a response; return whether its work is still to come."""
        state = self._state
        self.started = True
        self._trailers = message.get("trailers", False)
        if _has_no_more_work(message):
            state.response_has_started = True
            if self._is_outermost:
                state.response_is_out = True
            if not state.is_finished:
                state.finish()
            return False
        self.stream_headers = message.get("headers", ())
        if not state.response_has_started:
            state.note_sender()
        state.start_response()
        return True

    async def _is_silent_end(self) -> bool:
        """Take an error of the server's ``send()`` for what it is since ASGI 2.4; return whether it goes no further."""
        state = self._state
        state.client_left()
        if state.ends_by_itself:
            # What listens has been told, and ends as it does where servers drop what they cannot send.
            for _ in range(_PASSES):
                await anyio.lowlevel.checkpoint()
            return True
        return state.is_deferring

    def _complete(self) -> None:
        # Before the server has the last bytes: if the client leaves while they are on their way, the work is done.
        self.is_complete = True
        state = self._state
        if self._is_outermost:
            state.complete_response()
        elif not state.is_finished:
            state.finish()

    async def cut(self, error: CancelationError) -> None:
        """End the response without its last chunk, or as an event stream by a last event."""
        await cut(self.stream_headers, self.last, error, self._send, self._state)


def _is_last(kind: str, message: Message) -> bool:
    """Return whether a message that is no chunk of a body ends the response."""
    if kind == "http.response.trailers":
        return not message.get("more_trailers", False)
    if kind == "http.response.zerocopysend":
        return not message.get("more_body", False)
    return kind == "http.response.pathsend"


def _has_no_more_work(start: Message) -> bool:
    """Return whether a response that begins like this is there already, and has only to be sent."""
    for name, _ in start.get("headers", ()):  # `any()` takes three times as long for what comes first
        if name == b"content-length":
            return True
    return start["status"] in _WITHOUT_BODY
