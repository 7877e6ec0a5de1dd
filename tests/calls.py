"""One request, or one WebSocket, by a client of its own: `CancelableClient` for tests that need no other call."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio.testing

from cancelable_deps.request.state import SCOPE_KEY
from cancelable_deps.testing import Call, CancelableClient, SocketCall
from tests.leftovers import nothing_left
from tests.machine import scaled

if TYPE_CHECKING:
    from starlette.types import ASGIApp

CEILING = scaled(10)
"""Seconds after which a state that a test waits for will not come any more."""

movable_clock = pytest.mark.parametrize(
    "anyio_backend", ["asyncio", pytest.param(("trio", {"clock": trio.testing.MockClock(rate=1)}), id="trio")]
)
"""For tests that `advance()`: time passes as ever besides."""

_OF_THE_CLIENT = {"disconnect", "spec_version", "send_raises", "raise_app_exceptions", "lifespan"}


@asynccontextmanager
async def running(app: ASGIApp, path: str = "/", method: str = "GET", **options: Any) -> AsyncGenerator[Call]:
    """A request that runs beside the test; leaving waits for its end."""
    async with _client(app, options) as client, client.start(method, path, **options) as call:
        yield call


async def get(app: ASGIApp, path: str = "/", method: str = "GET", **options: Any) -> Call:
    """A request whose client stays."""
    async with running(app, path, method, **options) as call:
        pass
    return call


async def hang_up(app: ASGIApp, path: str = "/", method: str = "GET", **options: Any) -> Call:
    """A request whose client leaves as soon as somebody listens."""
    async with running(app, path, method, **options) as call:
        await call.listened_to()
        await call.hang_up()
    return call


@asynccontextmanager
async def connected(app: ASGIApp, path: str = "/", **options: Any) -> AsyncGenerator[SocketCall]:
    """A WebSocket that is served beside the test; leaving drops it, and waits for its end.

    Sending to a client that has left raises, as most servers have it.
    """
    options.setdefault("send_raises", True)
    async with _client(app, options) as client, client.websocket(path, **options) as socket:
        yield socket


@asynccontextmanager
async def checked_socket(app: ASGIApp, path: str = "/", **options: Any) -> AsyncGenerator[SocketCall]:
    """A WebSocket whose client stays until the application ends it, and that leaves nothing of ours."""
    async with nothing_left(), connected(app, path, **options) as socket:
        yield socket
        await socket.ended()
    assert SCOPE_KEY not in socket.scope


async def say(socket: SocketCall, *messages: str | bytes) -> None:
    for message in messages:
        await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_text(message))


def closed(socket: SocketCall) -> tuple[int | None, str]:
    # Not a member of our enum, which would pass for a string here and not on every wire.
    assert type(socket.close_reason) is str
    return socket.close_code, socket.close_reason


def _client(app: ASGIApp, options: dict[str, Any]) -> CancelableClient:
    """Most of the applications here have no lifespan, and some would take it for a request."""
    chosen = {key: options.pop(key) for key in _OF_THE_CLIENT & options.keys()}
    return CancelableClient(app, **{"lifespan": False, "ceiling": CEILING, **chosen})
