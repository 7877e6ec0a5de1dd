"""A GraphQL router of Strawberry, with a slow query and a subscription."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import strawberry
from fastapi import FastAPI
from strawberry.fastapi import GraphQLRouter

from tests.compat.doors import COVERING, Door, each_door, ends_with_its_server, watched, work


@strawberry.type
class Query:
    @strawberry.field
    async def work(self, key: str) -> str:
        await work(key)
        return "done"

    @strawberry.field
    async def ping(self) -> str:
        return "pong"


@strawberry.type
class Subscription:
    @strawberry.subscription
    async def ticks(self, key: str) -> AsyncGenerator[int, None]:
        async with watched(key, cleanup=None):
            for number in range(100_000):
                yield number
                await asyncio.sleep(0.01)


schema = strawberry.Schema(Query, subscription=Subscription)


def build(door: Door) -> FastAPI:
    app = door.app(lifespan=ends_with_its_server())
    app.include_router(GraphQLRouter(schema), prefix="/graphql")
    return door.cover(app)


def apps() -> dict[str, Any]:
    return each_door(build, COVERING)
