"""Abort a response: end one that has started, so that the client sees that it is incomplete.

An event stream gets a last event that says why. Any other response is ended without its last chunk: the connection is
closed, or the HTTP/2 stream reset, and the server should not log an error. ASGI has no message for that. If an
application raises, the server logs a traceback; if it returns early, uvicorn logs a line. Starlette's
``BaseHTTPMiddleware`` sends the last chunk in either case, as if the response were complete.

`hosts.servers` knows the servers and `hosts.starlette` that middleware, by their private parts;
`tests/test_servers_streaming.py` fails when these change. If a response cannot be aborted like this, the caller raises,
which makes every server close the connection.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import anyio

from ..hosts.servers import log_unknown, server_of
from ..hosts.starlette import is_base_http_middleware, servers_own
from ..kernel.foreign import SENDING, with_own_failures
from .sse import is_event_stream, last_event, reason_and_message

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from ..kernel.errors import CancelationError
    from .sse import Headers
    from .state import RequestState

# For the last event: a client that does not read must not block it for ever.
_LAST_EVENT_SECONDS = 5.0


async def abort_response(
    headers: Headers,
    last: bytes | memoryview,
    error: CancelationError,
    send: Send,
    state: RequestState,
    *,
    stalled: bool = False,
) -> bool:
    """Abort a response that has started with these headers; return whether its client can see that it is incomplete.

    :param last: the last piece of the body that was sent, if any.
    :param stalled: whether the client does not read; what has not been sent yet is discarded.
    """
    can_say_why = not stalled and is_event_stream(headers)
    if can_say_why and await with_own_failures(SENDING, _send_last_event, error, last, send):
        return True
    # Our own middleware, further out, discards the last chunk if a middleware in between sends one all the same.
    state.is_aborted = True
    receive = state.reader.raw
    if await abort_at_once(receive, state.scope, drop=stalled) or _is_aborted_by_returning(receive, state.scope):
        return True
    if is_base_http_middleware(receive):
        await _make_middleware_fail(send, error)
    else:
        log_unknown(receive)
    return False


async def _send_last_event(error: CancelationError, last: bytes | memoryview, send: Send) -> bool:
    with anyio.move_on_after(_LAST_EVENT_SECONDS, shield=True):
        data = last_event(error, last)
        # Since ASGI 2.4 send() raises if the client has left.
        with suppress(OSError):
            await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True
    return False


async def abort_at_once(receive: Receive, scope: Scope, *, drop: bool = False) -> bool:
    """Close the connection of a started response, or reset its stream, quietly; return whether that was possible.

    :param receive: the server's own ``receive()``; one that another middleware has wrapped hides the server.
    :param drop: discard what has not been sent yet.
    """
    return await server_of(servers_own(receive), scope).abort(drop=drop)


def _is_aborted_by_returning(receive: Receive, scope: Scope) -> bool:
    # A `BaseHTTPMiddleware` in between completes what is left unfinished.
    return not is_base_http_middleware(receive) and server_of(receive, scope).aborts_unfinished_responses


async def _make_middleware_fail(send: Send, error: CancelationError) -> None:
    """Make a ``BaseHTTPMiddleware`` fail in its own task, by a message that it does not know.

    An error that the application raises would end the middleware's stream as if it were complete.
    """
    await send({"type": "cancelable_deps.abort", **reason_and_message(error)})
