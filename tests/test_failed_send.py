"""A `send()` that fails because the client has left: the work is told by that, and cleans up undisturbed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelable_deps import (
    CancelableRoute,
    CancelableStreamingResponse,
    CancelableWebSocket,
    RequestCancelationMiddleware,
    with_cancelation,
)
from tests.calls import CEILING
from tests.doors import endpoint

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("at_once")]

PASSES = 10


class Line:
    """A connection whose client leaves when the application sends its second message; `receive()` says so later."""

    def __init__(self, kind: str) -> None:
        self.scope: Scope = {
            "type": kind,
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "GET",
            "path": "/",
            "query_string": b"",
            "headers": [],
        }
        if kind == "websocket":
            del self.scope["method"]
        self.sent = 0
        self.heard = anyio.Event()
        """Set when the application may hear of the disconnect by `receive()`."""
        self.has_heard = False
        self._connects = kind == "websocket"

    async def receive(self) -> Message:
        kind = self.scope["type"]
        if self._connects:
            self._connects = False
            return {"type": "websocket.connect"}
        await self.heard.wait()
        self.has_heard = True
        return {"type": f"{kind}.disconnect", "code": 1001}

    async def send(self, message: Message) -> None:
        await anyio.lowlevel.checkpoint()
        self.sent += 1
        if self.sent > 1:
            raise OSError("the client has left")

    async def clean_up(self) -> None:
        """Hear of the disconnect in the middle of a cleanup."""
        await anyio.lowlevel.checkpoint()
        self.heard.set()
        for _ in range(PASSES):
            await anyio.lowlevel.checkpoint()

    async def run(self, app: ASGIApp) -> None:
        with anyio.fail_after(CEILING):
            await app(self.scope, self.receive, self.send)


async def send_for_ever(socket: Any) -> None:
    await socket.accept()
    while True:
        await socket.send_text("more")


@pytest.mark.parametrize("door", ["cancelable", "task_group", "decorator", "middleware", "all", "ours"])
async def test_a_socket_cleans_up_undisturbed(door: str) -> None:
    line = Line("websocket")
    done: list[str] = []

    async def work(websocket: WebSocket) -> None:
        try:
            await send_for_ever(websocket)
        finally:
            await line.clean_up()
            done.append("cleaned up")

    async def ours(websocket: WebSocket) -> None:
        async with CancelableWebSocket(websocket) as socket:
            await work(socket)  # type: ignore[arg-type]

    app = FastAPI()
    app.websocket("/")(endpoint(door, ours if door == "ours" else work, WebSocket))
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    await line.run(app)
    assert (done, line.has_heard) == (["cleaned up"], True)


@pytest.mark.parametrize("door", ["cancelable", "decorator", "middleware"])
async def test_a_socket_that_catches_the_disconnect_has_the_time_of_a_cleanup(door: str) -> None:
    line = Line("websocket")
    done: list[str] = []

    async def work(websocket: WebSocket) -> None:
        with suppress(WebSocketDisconnect):
            await send_for_ever(websocket)
        await line.clean_up()
        done.append("cleaned up")

    app = FastAPI()
    app.websocket("/")(endpoint(door, work, WebSocket))
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    await line.run(app)
    assert done == ["cleaned up"]


class Sends(Response):
    """A response that sends in pieces, and cleans up after itself."""

    def __init__(self, line: Line, done: list[str]) -> None:
        super().__init__()
        self.line, self.done = line, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": b"more", "more_body": True})
        finally:
            await self.line.clean_up()
            self.done.append("cleaned up")


@pytest.mark.parametrize("kind", ["response", "ours", "generator", "app"])
@pytest.mark.parametrize("door", ["decorator", "middleware", "route", "all"])
async def test_a_response_cleans_up_undisturbed(door: str, kind: str) -> None:
    if kind == "generator":
        pytest.importorskip("fastapi.sse", reason="generator endpoints came with FastAPI 0.135")
    line = Line("http")
    done: list[str] = []

    async def chunks() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"more"
        finally:
            await line.clean_up()
            done.append("cleaned up")

    async def handler() -> Response:
        return Sends(line, done) if kind == "response" else CancelableStreamingResponse(chunks())

    work: Any = chunks if kind == "generator" else handler
    app = FastAPI()
    if door == "route":
        app.router.route_class = CancelableRoute
    if kind == "generator":
        app.get("/", response_class=StreamingResponse)(with_cancelation(work))
    else:
        app.get("/")(with_cancelation(work) if door in {"decorator", "all"} else work)
    running: ASGIApp = Sends(line, done) if kind == "app" else app
    if door in {"middleware", "all"}:
        running = RequestCancelationMiddleware(running)
    with suppress(OSError, ClientDisconnect):
        # Without a door that sees the response, Starlette tells the server.
        await line.run(running)
    assert done == ["cleaned up"]
