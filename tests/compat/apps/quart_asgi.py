"""Quart, mounted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from quart import Quart, request

from tests.compat.doors import COVERING, Door, each_door, ends_with_its_server, watched, work

quart: Any = Quart(__name__)


@quart.route("/work")
async def endless() -> str:
    await work(request.headers["x-id"])
    return "done"


@quart.route("/stream")
async def stream() -> Any:
    key = request.headers["x-id"]

    async def chunks() -> AsyncIterator[bytes]:
        async with watched(key, cleanup=None):
            for number in range(100_000):
                yield f"{number}\n".encode()
                await asyncio.sleep(0.01)

    return chunks()


@quart.route("/ping")
async def ping() -> str:
    return "pong"


@quart.route("/upload", methods=["POST"])
async def upload() -> str:
    return str(len(await request.get_data()))


def build(door: Door) -> FastAPI:
    app = door.app(lifespan=ends_with_its_server())
    app.mount("/q", quart)
    return door.cover(app)


def apps() -> dict[str, Any]:
    return each_door(build, COVERING)
