"""One request under a door that sees its whole response: middleware and route class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._exceptions import raise_as_it_is
from ._request import SCOPE_KEY, DoorBlock, RequestState
from .errors import CancelationError
from .settings import seconds

if TYPE_CHECKING:
    from datetime import timedelta

    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Limits:
    """What a door was configured with, checked when the app is built."""

    def __init__(self, default_timeout: float | timedelta | None, cleanup_grace: float | None) -> None:
        self.timeout = None if default_timeout is None else seconds(default_timeout, "default_timeout")
        self.cleanup_grace = None if cleanup_grace is None else seconds(cleanup_grace, "cleanup_grace")


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
        state = RequestState(scope, receive)
        state.cleanup_grace = limits.cleanup_grace
        state.hold()
    block = DoorBlock(state, timeout=limits.timeout, cleanup_grace=limits.cleanup_grace)
    if limits.timeout is not None:
        state.set_default(block)
    exchange = _Exchange(send, block, state if made else None)
    try:
        outcome = await exchange.run(app, scope, state.reader.receive if made else receive)
    finally:
        if made:
            await state.aclose()
    if outcome is None and state.token.cause is not None and not exchange.started:
        # A middleware inside took our cancellation for its own, and sent nothing.
        outcome = state.token.cause.error()
    return None if exchange.started else outcome


class _Exchange:
    """Watches the response, to know whether it has started and when it is complete.

    While a handler's finished result is on its way, nothing of ours may stop it; a stream, of which the start is sent
    before its work begins, can be stopped again when that is out.
    """

    started = False
    _trailers = False

    def __init__(self, send: Send, block: DoorBlock, state: RequestState | None) -> None:
        self._send = send
        self._block = block
        # Of a door further in, whose response may still be held back by something between it and the outermost door.
        self._state = state

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive) -> CancelationError | None:
        block = self._block
        try:
            block._enter()
        except CancelationError as exc:
            return exc
        raised: BaseException | None = None
        try:
            await app(scope, receive, self.send)
        except BaseException as exc:
            raised = exc
        outcome = await block._exit(raised)
        if outcome is None or isinstance(outcome, CancelationError):
            return outcome
        raise_as_it_is(outcome)

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.body":
            if message.get("more_body", False) or self._trailers:
                self._block.resume()
            else:
                self._complete()
        elif kind == "http.response.start":
            await self._start(message)
            return
        elif kind == "http.response.pathsend" or (
            kind == "http.response.trailers" and not message.get("more_trailers", False)
        ):
            self._complete()
        await self._send(message)

    async def _start(self, message: Message) -> None:
        self._trailers = message.get("trailers", False)
        self._block.hold()
        self.started = True
        await self._send(message)
        if not _has_length(message):
            self._block.resume()

    def _complete(self) -> None:
        # Before the server has the last bytes: if the client leaves while they are on their way, the work is done.
        self._block.release()
        if self._state is not None:
            self._state.close()


def _has_length(start: Message) -> bool:
    return b"content-length" in dict(start.get("headers", ()))
