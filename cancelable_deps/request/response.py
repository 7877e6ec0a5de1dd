"""The response of a request: watching it while it is sent, and answering an error of ours."""

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
    from starlette.exceptions import HTTPException
    from starlette.responses import Response
    from starlette.types import Message, Receive, Scope, Send

    from .sse import Headers
    from .state import RequestState

# Passes of the event loop in which a task that listens for the disconnect, behind other middleware too, wakes up and ends
# the task that sends.
_PASSES = 5

# Responses that have no body, whatever their headers say (RFC 9110).
_WITHOUT_BODY = frozenset({204, 205, 304})


class ResponseWatch:
    """A ``send()`` that notes whether the response has started and when it is complete.

    A response with a ``content-length`` is a finished result: from its start on we do not stop it. Any other response is
    the start of work, and can be stopped once its start has been sent.
    """

    __slots__ = ("_is_outermost", "_send", "_state", "_trailers", "is_complete", "last", "started", "stream_headers")

    def __init__(self, send: Send, state: RequestState, *, is_outermost: bool) -> None:
        self.started = self._trailers = self.is_complete = False
        self.stream_headers: Headers = ()
        self.last = b""
        self._send = send
        self._state = state
        # A middleware between an inner watch and the outermost one may hold the response back.
        self._is_outermost = is_outermost

    async def send(self, message: Message) -> None:
        """Send a message of the application, and note what it says of the response."""
        # Not split into coroutines: a response pays twice for each coroutine between the application and its server.
        kind = message["type"]
        state = self._state
        is_start_of_work = is_end = False
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
                is_end = True
        else:
            is_end = _is_last(kind, message)
        if is_end:
            self._complete()
        try:
            await self._send(message)
        except (OSError, CancelledError) as exc:
            await failed_to_send(exc, state)
        finally:
            if is_end:
                if self._is_outermost:
                    state.end_is_out()
            elif is_start_of_work and self._is_outermost:
                state.start_is_out()

    def _starts_work(self, message: Message) -> bool:
        """Note the start of a response; return whether work for its body is still to come."""
        state = self._state
        self.started = True
        self._trailers = message.get("trailers", False)
        if has_no_more_work(message):
            state.response_has_started = True
            state.status = message["status"]
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
        # Before the last bytes are sent: if the client leaves while they are on their way, the work is done.
        self.is_complete = True
        state = self._state
        state.response_is_complete = True
        if self._is_outermost:
            state.end_is_being_sent = True
            state.complete_response()
        elif not state.is_finished:
            state.finish()

    async def abort(self, error: CancelationError) -> None:
        """Abort the response: end it without its last chunk, or, as an event stream, with a last event."""
        await abort_response(self.stream_headers, self.last, error, self._send, self._state)


def _is_last(kind: str, message: Message) -> bool:
    """Return whether a message other than a body chunk ends the response."""
    if kind == "http.response.trailers":
        return not message.get("more_trailers", False)
    if kind == "http.response.zerocopysend":
        return not message.get("more_body", False)
    return kind == "http.response.pathsend"


def has_no_more_work(start: Message) -> bool:
    """Return whether the body of a response with this start exists already, and has only to be sent."""
    for name, _ in start.get("headers", ()):  # `any()` takes three times as long for a header that comes first
        if name == b"content-length":
            return True
    return start["status"] in _WITHOUT_BODY


def left_by(exc: BaseException, state: RequestState) -> bool:
    """Note a disconnect that a ``send()`` has raised; return whether disconnects are deferred, so the error is dropped.

    Since ASGI 2.4 servers raise an ``OSError`` if the client has left. A ``CancelledError`` that does not belong to this
    task is raised as a failure of sending.
    """
    if isinstance(exc, CancelledError):
        try:
            raise_as_it_is(told(exc, state.loop, SENDING))
        finally:
            del exc  # Its traceback knows this frame: a cycle, as long as this frame knows it.
    state.client_left()
    return state.is_deferring


async def send_or_leave(send: Send, message: Message, state: RequestState) -> None:
    """Send a message of a response of ours; if the client has left, raise the cancellation that is due, or the error."""
    try:
        await send(message)
    except (OSError, CancelledError) as exc:
        if not left_by(exc, state):
            await anyio.lowlevel.checkpoint()
            raise


async def failed_to_send(exc: BaseException, state: RequestState) -> None:
    """Note a disconnect that the server's ``send()`` has raised; raise the error again unless it is to be dropped.

    If the disconnect stops the task, the cancellation is raised instead.
    """
    is_deferred = left_by(exc, state)
    if state.ends_by_itself:
        await _let_listeners_end()
    elif not is_deferred:
        # Here, and not in the cleanup that the error would begin.
        await anyio.lowlevel.checkpoint()
        raise  # noqa: PLE0704 - it is being handled by the caller


async def _let_listeners_end() -> None:
    """Let the tasks that listen for the disconnect end, as they do on servers that drop what they cannot send."""
    for _ in range(_PASSES):
        await anyio.lowlevel.checkpoint()


async def answer(error: HTTPException, scope: Scope, receive: Receive, send: Send) -> None:
    """Send the response to ``error``: that of its policy's writer, or JSON with the error's ``detail``."""
    response = await written(error, Request(scope, receive))
    if response is None:
        response = JSONResponse({"detail": error.detail}, status_code=error.status_code, headers=error.headers)
    await with_own_failures("the response of a cancellation", response, scope, receive, send)


async def written(error: BaseException | None, request: Request) -> Response | None:
    """Return the response that the policy's writer makes of ``error``; ``None`` without a policy or a writer."""
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
