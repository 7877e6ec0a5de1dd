"""aiomysql in handlers: a query that takes long, on a pool of two; ``MYSQL_SOCKET`` names the server."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiomysql
from fastapi import FastAPI, Request

from cancelable_deps import cancelation_lifespan
from tests.compat.doors import Door, each_door, say


def build(door: Door) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with aiomysql.create_pool(
            minsize=1, maxsize=2, unix_socket=os.environ["MYSQL_SOCKET"], user="root", db="mysql", autocommit=True
        ) as pool:
            app.state.pool = pool
            yield

    app = door.app(lifespan=cancelation_lifespan(lifespan, grace=0.1, background_grace=0.1))

    async def query(text: str) -> Any:
        async with app.state.pool.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute(text)
            return await cursor.fetchone()

    @app.get("/sleep")
    @door.decorate
    async def sleep(request: Request) -> Any:
        key = request.headers["x-id"]
        say(key, "started")
        try:
            return await query(f"select sleep(30), '{key}'")
        finally:
            say(key, "ended")

    @app.get("/one")
    @door.decorate
    async def one() -> Any:
        return await query("select 1")

    @app.get("/runs/{key}")
    async def runs(key: str) -> int:
        """How many queries with this key the server runs, this one left out."""
        row = await query(
            f"select count(*) from information_schema.processlist where info like '%sleep(30), ''{key}''%'"
            " and id <> connection_id()"
        )
        return int(row[0])

    return door.cover(app)


def apps() -> dict[str, Any]:
    return each_door(build)
