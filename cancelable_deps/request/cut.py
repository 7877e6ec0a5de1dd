"""How a response that has started takes its leave: an event stream by a last event, any other by a visible cut.

A connection is to be closed without the last chunk of its response, and without an error in the server's log. ASGI has
no message for it. An application that raises is logged with a traceback, and so (by uvicorn, in one line) is one that
returns early. Starlette's ``BaseHTTPMiddleware`` sends the last chunk in either case, as if the response were whole.
`_server` knows the servers, this file that middleware, by its private parts; `tests/test_servers_streaming.py` fails
when they change. Where it cannot tell, the caller raises, which every server answers by closing.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio

from ..hosts.servers import log_unknown, server_of
from ..kernel.foreign import SENDING, with_own_failures

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import Receive, Scope, Send

    from ..kernel.errors import CancelationError
    from .state import RequestState

    Headers = Iterable[tuple[bytes, bytes]]

SSE = "text/event-stream"
_ENDS_OF_EVENTS = (b"\n\n", b"\r\n\r\n", b"\r\r")

# For the last event: a client that does not read may not hold it up for ever.
_LEAVE_SECONDS = 5.0


async def cut(
    headers: Headers,
    last: bytes | memoryview,
    error: CancelationError,
    send: Send,
    state: RequestState,
    *,
    stalled: bool = False,
) -> bool:
    """End a started response with these headers; whether its client can tell that it is not whole.

    :param last: what was sent of its body at last, if anything.
    :param stalled: the client does not read: drop what has not been sent yet.
    """
    says_farewell = not stalled and _is_event_stream(headers)
    if says_farewell and await with_own_failures(SENDING, _say_farewell, error, last, send):
        return True
    # Our own middleware, further out, drops the last chunk if somebody in between sends one all the same.
    state.is_cut = True
    receive = state.reader.raw
    if await cut_at_once(receive, state.scope, drop=stalled) or _is_cut_by_returning(receive, state.scope):
        return True
    if _is_base_http_middleware(receive):
        await _break(send, error)
    else:
        log_unknown(receive)
    return False


def _is_event_stream(headers: Headers) -> bool:
    fields = {name.lower(): value for name, value in headers}
    media_type = fields.get(b"content-type", b"").partition(b";")[0].strip().lower()
    # A compressed one ends inside of what compresses it.
    return media_type == SSE.encode() and b"content-encoding" not in fields


async def _say_farewell(error: CancelationError, last: bytes | memoryview, send: Send) -> bool:
    with anyio.move_on_after(_LEAVE_SECONDS, shield=True):
        data = format_sse(json.dumps(reason_and_message(error)), event="cancelled")
        if last and not bytes(last[-4:]).endswith(_ENDS_OF_EVENTS):
            # What is passed on from elsewhere comes in chunks of any size: ours is not to become a part of half an event.
            data = b"\n\n" + data
        # Since ASGI 2.4 this may raise, and then the client has left.
        with suppress(OSError):
            await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True
    return False


def reason_and_message(error: CancelationError) -> dict[str, str]:
    """What the last event of a cut event stream tells the client."""
    return {"reason": str(error.reason), "message": str(error.detail)}


def format_sse(data: str, event: str | None = None) -> bytes:
    """One Server-Sent Event. FastAPI has this too, since 0.135, and we support older ones."""
    lines = [] if event is None else [f"event: {event}"]
    lines += [f"data: {line}" for line in data.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return ("\n".join(lines) + "\n\n").encode()


async def cut_at_once(receive: Receive, scope: Scope, *, drop: bool = False) -> bool:
    """Close the connection of a started response, or reset its stream, without noise; whether that could be done.

    :param receive: the server's own; behind a middleware that wraps it nothing can be told.
    :param drop: what has not been sent yet.
    """
    return await server_of(_servers_own(receive), scope).cut(drop=drop)


def _is_cut_by_returning(receive: Receive, scope: Scope) -> bool:
    # A `BaseHTTPMiddleware` in between completes what is left unfinished.
    return not _is_base_http_middleware(receive) and server_of(receive, scope).cuts_what_is_unfinished


def _is_base_http_middleware(receive: Any) -> bool:
    return getattr(receive, "__module__", None) == "starlette.middleware.base"


def _servers_own(receive: Any) -> Any:
    """The ``receive()`` outside of every ``BaseHTTPMiddleware``."""
    while _is_base_http_middleware(receive):
        names = dict(zip(receive.__code__.co_freevars, receive.__closure__ or (), strict=False))
        wrapped = names.get("wrapped_receive")
        request = None if wrapped is None else getattr(wrapped.cell_contents, "__self__", None)
        if request is None:
            break
        receive = request.receive
    return receive


async def _break(send: Send, error: CancelationError) -> None:
    """Make a ``BaseHTTPMiddleware`` fail in its own task: an error of the application's ends its stream as if whole."""
    await send({"type": "cancelable_deps.cut", **reason_and_message(error)})
