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

    def __init__(
        self, default_timeout: float | timedelta | None, cleanup_grace: float | None, *, spans_tasks: bool
    ) -> None:
        self.timeout = None if default_timeout is None else seconds(default_timeout, "default_timeout")
        self.cleanup_grace = None if cleanup_grace is None else seconds(cleanup_grace, "cleanup_grace")
        self.spans_tasks = spans_tasks


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
        state.hold()
    block = _door(state, limits)
    exchange = _Exchange(send, block, state)
    try:
        outcome = await exchange.run(app, scope, state.reader.receive if made else receive)
    finally:
        if made:
            await state.aclose()
    if not isinstance(outcome, CancelationError):
        return None
    return None if exchange.started else outcome


def _door(state: RequestState, limits: Limits) -> DoorBlock:
    block = DoorBlock(state, timeout=limits.timeout, cleanup_grace=limits.cleanup_grace)
    if limits.spans_tasks:
        block._spans_tasks = True
    if limits.timeout is not None:
        state.set_default(block)
    return block


class _Exchange:
    """Watches the response, to know whether it has started and when it is complete."""

    started = False
    _trailers = False

    def __init__(self, send: Send, block: DoorBlock, state: RequestState) -> None:
        self._send = send
        self._block = block
        self._state = state

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive) -> BaseException | None:
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
        # Before the server has it: if the client leaves while the last bytes are on their way, the work is done.
        kind = message["type"]
        if kind == "http.response.body":
            if not message.get("more_body", False) and not self._trailers:
                self._complete()
        elif kind == "http.response.start":
            self.started = True
            self._trailers = message.get("trailers", False)
        elif kind == "http.response.pathsend" or (
            kind == "http.response.trailers" and not message.get("more_trailers", False)
        ):
            self._complete()
        await self._send(message)

    def _complete(self) -> None:
        self._block.release()
        self._state.close()
