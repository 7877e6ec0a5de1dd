"""python-socketio, mounted, over long polling and WebSockets."""

from __future__ import annotations

from typing import Any, cast

import anyio
import socketio
from fastapi import FastAPI

from cancelable_deps import RequestCancelationMiddleware
from tests.compat.doors import SHORT, Door, ends_with_its_server, say


def build(door: Door, name: str = "") -> FastAPI:
    server = socketio.AsyncServer(async_mode="asgi", ping_interval=1, ping_timeout=1)

    @server.event
    async def connect(sid: str, environ: dict[str, Any]) -> None:
        say(f"{name or door.name}-socket", "connected")

    @server.event
    async def disconnect(sid: str, reason: str) -> None:
        say(f"{name or door.name}-socket", "disconnected")

    @server.event
    async def double(sid: str, number: int) -> int:
        return 2 * number

    @server.event
    async def later(sid: str) -> None:
        await anyio.sleep(2 * SHORT)
        await server.emit("late", to=sid)

    app = door.app(lifespan=ends_with_its_server())
    app.mount("/socket.io", socketio.ASGIApp(server, socketio_path=cast("Any", None)))
    return door.cover(app)


def apps() -> dict[str, Any]:
    excluded = build(Door("bare"), "excluded")
    excluded.add_middleware(RequestCancelationMiddleware, default_timeout=SHORT, exclude="/socket.io/*")
    return {"bare": build(Door("bare")), "mw": build(Door("mw")), "excluded": excluded}
