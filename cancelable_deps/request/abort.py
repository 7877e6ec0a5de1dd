"""How a response that has started takes its leave: an event stream by a last event, any other by a visible cut.

A connection is to be closed without the last chunk of its response, and without an error in the server's log. ASGI has
no message for it. An application that raises is logged with a traceback, and so (by uvicorn, in one line) is one that
returns early. Starlette's ``BaseHTTPMiddleware`` sends the last chunk in either case, as if the response were whole.
`hosts.servers` knows the servers, `hosts.starlette` that middleware, by its private parts;
`tests/test_servers_streaming.py` fails when they change. Where it cannot tell, the caller raises, which every server answers by closing.
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

# For the last event: a client that does not read may not hold it up for ever.
_LEAVE_SECONDS = 5.0


async def abort_response(
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
    says_farewell = not stalled and is_event_stream(headers)
    if says_farewell and await with_own_failures(SENDING, _say_farewell, error, last, send):
        return True
    # Our own middleware, further out, drops the last chunk if somebody in between sends one all the same.
    state.is_aborted = True
    receive = state.reader.raw
    if await abort_at_once(receive, state.scope, drop=stalled) or _is_aborted_by_returning(receive, state.scope):
        return True
    if is_base_http_middleware(receive):
        await _break(send, error)
    else:
        log_unknown(receive)
    return False


async def _say_farewell(error: CancelationError, last: bytes | memoryview, send: Send) -> bool:
    with anyio.move_on_after(_LEAVE_SECONDS, shield=True):
        data = last_event(error, last)
        # Since ASGI 2.4 this may raise, and then the client has left.
        with suppress(OSError):
            await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True
    return False


async def abort_at_once(receive: Receive, scope: Scope, *, drop: bool = False) -> bool:
    """Close the connection of a started response, or reset its stream, without noise; whether that could be done.

    :param receive: the server's own; behind a middleware that wraps it nothing can be told.
    :param drop: what has not been sent yet.
    """
    return await server_of(servers_own(receive), scope).abort(drop=drop)


def _is_aborted_by_returning(receive: Receive, scope: Scope) -> bool:
    # A `BaseHTTPMiddleware` in between completes what is left unfinished.
    return not is_base_http_middleware(receive) and server_of(receive, scope).aborts_unfinished_responses


async def _break(send: Send, error: CancelationError) -> None:
    """Make a ``BaseHTTPMiddleware`` fail in its own task: an error of the application's ends its stream as if whole."""
    await send({"type": "cancelable_deps.abort", **reason_and_message(error)})
