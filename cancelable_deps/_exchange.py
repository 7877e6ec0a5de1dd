"""One request under a door that sees its whole response: middleware and route class."""

from __future__ import annotations

from asyncio import CancelledError
from collections import deque
from traceback import walk_tb
from typing import TYPE_CHECKING

from fastapi.exceptions import FastAPIError

from ._cut import cut
from ._exceptions import raise_as_it_is
from ._foreign import SENDING, told
from ._request import SCOPE_KEY, RequestState
from ._request_block import DoorBlock
from .errors import CancelationError
from .policies import TimeoutPolicy, named
from .reasons import CancelationReason
from .settings import seconds

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import timedelta

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ._cut import Headers


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
    """Run ``app``, and say with which error the request is still to be answered, if with any.

    An error that the application raises for itself, and one that comes when the response has started, is not ours to
    answer: the first is raised, the second drops what was left of the response.
    """
    state: RequestState | None = scope.get(SCOPE_KEY)
    made = state is None
    if state is None:
        state = RequestState(scope, receive, held=True)
        state.cleanup_grace = limits.cleanup_grace
        receive = state.receive
        # So streams run in this task, and their cleanup has its grace; in a task group of their own it would have none.
        state.listen_for_streams()
    block = DoorBlock(state, timeout=limits.timeout, cleanup_grace=limits.cleanup_grace)
    if state.default is None:
        state.default = block
    elif limits.timeout is not None:
        state.set_default(block)
    if limits.policies:
        state.add_policies(limits.policies)
    if limits.policy is not None:
        block.policy = limits.policy
    exchange = _Exchange(send, block, state if made else None)
    outcome: BaseException | None = None
    try:
        try:
            block._enter(state.loop)
        except CancelationError as exc:
            return exc
        try:
            await app(scope, receive, exchange.send)
        except BaseException as exc:
            outcome = exc
        outcome = block._leave(outcome)
        if block._is_unsettled:
            await block._settle()
        if block.policy is not None:
            block.policy.judge(block)
    finally:
        if made:
            state.close()
            if state.is_reading:
                await state.join()
    if outcome is None:
        if state.token.cause is None or exchange.started:
            return None
        # A middleware inside took our cancellation for its own, and sent nothing.
        return state.token.cause.error()
    if state.token.cause is not None and _tells_that_it_was_swallowed(outcome):
        state.log(state.token.cause.reason, state.token.cause)
        outcome = state.token.cause.error()
    if exchange.started and isinstance(outcome, CancelationError):
        if outcome.reason is not CancelationReason.DISCONNECT and not exchange.is_complete:
            await cut(exchange.stream_headers, exchange.last, outcome, send, state)
        return None
    try:
        if isinstance(outcome, CancelationError):
            return outcome
        raise_as_it_is(outcome)
    finally:
        del outcome  # Its traceback knows this frame: a cycle, as long as this frame knows it.


def _tells_that_it_was_swallowed(outcome: BaseException) -> bool:
    """Whether it is how FastAPI finds out that a dependency with ``yield``, or on trio its own nursery, has kept an error.

    It says so where one of ``scope="request"`` has. Where one of ``scope="function"`` has it does not notice, and goes on
    to a response that was never assigned.
    """
    if type(outcome) is not UnboundLocalError:
        return type(outcome) is FastAPIError
    innermost = deque(walk_tb(outcome.__traceback__), maxlen=1)
    return any(frame.f_globals.get("__name__") == "fastapi.routing" for frame, _ in innermost)


class _Exchange:
    """Watches the response, to know whether it has started and when it is complete.

    While a handler's finished result is on its way, nothing of ours may stop it; a stream, of which the start is sent
    before its work begins, can be stopped again when that is out.
    """

    __slots__ = ("_block", "_send", "_state", "_trailers", "is_complete", "last", "started", "stream_headers")

    def __init__(self, send: Send, block: DoorBlock, state: RequestState | None) -> None:
        self.started = self._trailers = self.is_complete = False
        self.stream_headers: Headers = ()
        self.last = b""
        self._send = send
        self._block = block
        # Of a door further in, whose response may still be held back by something between it and the outermost door.
        self._state = state

    async def send(self, message: Message) -> None:
        kind = message["type"]
        is_start = False
        if kind == "http.response.body":
            if message.get("more_body", False) or self._trailers:
                self._block.resume()
                self.last = message.get("body") or self.last
            elif self._block._request.is_cut:
                return
            else:
                self._complete()
        elif kind == "http.response.start":
            is_start = self.started = True
            self._trailers = message.get("trailers", False)
            self._block.hold()
        elif kind == "http.response.pathsend" or (
            kind == "http.response.trailers" and not message.get("more_trailers", False)
        ):
            self._complete()
        try:
            await self._send(message)
        except OSError:
            # Since ASGI 2.4 this is how a server says that the client left.
            state = self._block._request
            state.client_left()
            if not state.is_deferring:
                raise
        except CancelledError as exc:
            raise_as_it_is(told(exc, self._block._request.loop, SENDING))
        if is_start and not _has_length(message):
            self.stream_headers = message.get("headers", ())
            self._block.resume()

    def _complete(self) -> None:
        # Before the server has the last bytes: if the client leaves while they are on their way, the work is done.
        self.is_complete = True
        self._block.release()
        if self._state is not None:
            self._state.complete()


def _has_length(start: Message) -> bool:
    for name, _ in start.get("headers", ()):  # noqa: SIM110 - `any()` takes three times as long for what comes first
        if name == b"content-length":
            return True
    return False
