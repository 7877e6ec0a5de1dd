"""The response of a request: how it is watched on its way out, and how an error of ours is answered."""

from __future__ import annotations

import inspect
from asyncio import CancelledError
from typing import TYPE_CHECKING

import anyio.lowlevel
from starlette.requests import Request
from starlette.responses import JSONResponse

from ..kernel.errors import CancelationError
from ..kernel.foreign import SENDING, ThisTask, as_failure, told, with_own_failures
from ..kernel.unwrap import raise_as_it_is
from .abort import abort_response

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import Message, Receive, Scope, Send

    from .sse import Headers
    from .state import RequestState

# In which what listens for a disconnect, behind other middleware too, wakes up and ends the task that sends.
_PASSES = 5

# Responses that have no body, whatever their headers say (RFC 9110).
_WITHOUT_BODY = frozenset({204, 205, 304})


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
            elif state.is_aborted:
                return
            else:
                self._complete()
        elif _is_last(kind, message):
            self._complete()
        try:
            await self._send(message)
        except (OSError, CancelledError) as exc:
            is_deferred = left_by(exc, state)
            if state.ends_by_itself:
                await _let_listeners_end()
            elif not is_deferred:
                raise
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

    def _complete(self) -> None:
        # Before the server has the last bytes: if the client leaves while they are on their way, the work is done.
        self.is_complete = True
        state = self._state
        if self._is_outermost:
            state.complete_response()
        elif not state.is_finished:
            state.finish()

    async def abort(self, error: CancelationError) -> None:
        """End the response without its last chunk, or as an event stream by a last event."""
        await abort_response(self.stream_headers, self.last, error, self._send, self._state)


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


def left_by(exc: BaseException, state: RequestState) -> bool:
    """Take what a ``send()`` has raised for what it means; return whether that is to go no further for now.

    Since ASGI 2.4 servers say by an ``OSError`` that the client has left. It goes no further while that is deferred.
    A ``CancelledError`` of somebody else is raised as a failure of sending.
    """
    if isinstance(exc, CancelledError):
        try:
            raise_as_it_is(told(exc, state.loop, SENDING))
        finally:
            del exc  # Its traceback knows this frame: a cycle, as long as this frame knows it.
    state.client_left()
    return state.is_deferring


async def send_or_leave(send: Send, message: Message, state: RequestState) -> None:
    """Send a message of a response of ours; if the client has left, a stop that is due for it strikes here."""
    try:
        await send(message)
    except (OSError, CancelledError) as exc:
        if not left_by(exc, state):
            await anyio.lowlevel.checkpoint()
            raise


async def _let_listeners_end() -> None:
    """Let what listens end as it does where servers drop what they cannot send: it has been told."""
    for _ in range(_PASSES):
        await anyio.lowlevel.checkpoint()


async def answer(error: CancelationError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send the response of ``error``, as its policy writes it if it has one."""
    response = await written(error, Request(scope, receive))
    if response is None:
        response = JSONResponse({"detail": error.detail}, status_code=error.status_code, headers=error.headers)
    await with_own_failures("the response of a cancellation", response, scope, receive, send)


async def written(error: BaseException | None, request: Request) -> Response | None:
    """Return the response that the writer of the policy makes of ``error``, if it has a policy with a writer."""
    policy = error.policy if isinstance(error, CancelationError) else None
    if policy is None or policy.response is None:
        return None
    this_task = ThisTask()
    try:
        given = policy.response(request, error)
        response: Response = await given if inspect.isawaitable(given) else given
        return response
    except BaseException as exc:
        if this_task.is_ended_by(exc):
            raise
        raise_as_it_is(as_failure(exc, f"the `response` of {policy!r}"))
