"""Starlette's own `StreamingResponse`, with a background task of its own and with injected ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from tests.compat.doors import Door, each_door, ends_with_its_server, say, watched


async def bill(key: str) -> None:
    await asyncio.sleep(0.02)
    say(key, "billed")


async def chunks(key: str) -> AsyncIterator[str]:
    async with watched(key, cleanup=None):
        for number in range(100_000):
            yield f"{number}\n"
            await asyncio.sleep(0.01)


def build(door: Door) -> FastAPI:
    app = door.app(lifespan=ends_with_its_server())

    @app.get("/own")
    @door.decorate
    async def own(request: Request) -> Any:
        key = request.headers["x-id"]
        return StreamingResponse(chunks(key), background=BackgroundTask(bill, key))

    @app.get("/injected")
    @door.decorate
    async def injected(request: Request, tasks: BackgroundTasks) -> Any:
        key = request.headers["x-id"]
        tasks.add_task(bill, key)
        return StreamingResponse(chunks(key))

    return door.cover(app)


def apps() -> dict[str, Any]:
    return each_door(build)
