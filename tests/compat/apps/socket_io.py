"""python-socketio, mounted, over long polling and WebSockets."""

from __future__ import annotations

from typing import Any

import socketio
from fastapi import FastAPI

from tests.compat.doors import SHORT, Door, ends_with_its_server, say


def build(door: Door) -> FastAPI:
    server = socketio.AsyncServer(async_mode="asgi", ping_interval=1, ping_timeout=1)

    @server.event
    async def connect(sid: str, environ: dict[str, Any]) -> None:
        say(f"{door.name}-socket", "connected")

    @server.event
    async def disconnect(sid: str, reason: str) -> None:
        say(f"{door.name}-socket", "disconnected")

    @server.event
    async def double(sid: str, number: int) -> int:
        return 2 * number

    app = door.app(lifespan=ends_with_its_server())
    app.mount("/socket.io", socketio.ASGIApp(server, socketio_path=None))
    return door.cover(app)


def apps() -> dict[str, Any]:
    return {door.name: build(door) for door in (Door("bare"), Door("mw"), Door("mw", SHORT))}
