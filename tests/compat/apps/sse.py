"""sse-starlette: a stream with a callback for a client that closes, and a background task."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from sse_starlette import EventSourceResponse
from starlette.background import BackgroundTask

from tests.compat.doors import Door, each_door, ends_with_its_server, say, watched


async def ticks(key: str) -> AsyncIterator[dict[str, int]]:
    async with watched(key, cleanup=None):
        for number in range(100_000):
            yield {"data": number}
            await asyncio.sleep(0.01)


async def three() -> AsyncIterator[dict[str, int]]:
    for number in range(3):
        yield {"data": number}
        await asyncio.sleep(0.02)


def build(door: Door) -> FastAPI:
    app = door.app(lifespan=ends_with_its_server())

    @app.get("/ticks")
    @door.decorate
    async def endless(request: Request) -> Any:
        key = request.headers["x-id"]

        async def closed(message: Any) -> None:
            await asyncio.sleep(0.01)
            say(key, "closed by", message["type"])

        async def bill() -> None:
            await asyncio.sleep(0.01)
            say(key, "billed")

        return EventSourceResponse(
            ticks(key), ping=0.05, client_close_handler_callable=closed, background=BackgroundTask(bill)
        )

    @app.get("/three")
    @door.decorate
    async def whole(request: Request) -> Any:
        return EventSourceResponse(three(), background=BackgroundTask(say, request.headers["x-id"], "billed"))

    return door.cover(app)


def apps() -> dict[str, Any]:
    return each_door(build)
