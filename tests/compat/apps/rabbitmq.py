"""aio-pika in handlers: a consumer, and a call that waits for its answer; ``AMQP_URL`` names the broker."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import anyio.lowlevel
from fastapi import FastAPI, Request

from cancelable_deps import cancelation_lifespan
from tests.compat.doors import Door, each_door, say, work


def build(door: Door) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.connection = await aio_pika.connect_robust(os.environ["AMQP_URL"])
        async with app.state.connection:
            yield

    app = door.app(lifespan=cancelation_lifespan(lifespan, grace=0.1, background_grace=0.1))

    @app.get("/consume/{queue}")
    @door.decorate
    async def consume(request: Request, queue: str) -> str:
        """Take one message, and work on it without end the first time that it is delivered."""
        key = request.headers["x-id"]
        async with app.state.connection.channel() as channel:
            declared = await channel.declare_queue(queue, auto_delete=False)
            async with declared.iterator() as messages:
                say(key, "waits")
                async for message in messages:
                    async with message.process(requeue=True):
                        if not message.redelivered:
                            await work(key)
                        return str(message.body.decode())
        raise AssertionError("no message")

    @app.post("/publish/{queue}")
    @door.decorate
    async def publish(queue: str, text: str) -> None:
        async with app.state.connection.channel() as channel:
            await channel.declare_queue(queue, auto_delete=False)
            await channel.default_exchange.publish(aio_pika.Message(text.encode()), queue)

    @app.get("/storm/{queue}")
    @door.decorate
    async def storm(request: Request, queue: str) -> None:
        """Talk to the broker in a hurry; its short calls are shielded, for a cancellation in one breaks the connection."""
        say(request.headers["x-id"], "waits")
        while True:
            with anyio.CancelScope(shield=True):
                async with app.state.connection.channel() as channel:
                    await channel.declare_queue(queue, auto_delete=False)
                    await channel.default_exchange.publish(aio_pika.Message(b"x"), queue)
            await anyio.lowlevel.checkpoint()

    return door.cover(app)


def apps() -> dict[str, Any]:
    return each_door(build)
