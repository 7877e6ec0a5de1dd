"""Stores of operations for tests: in memory and in Redis by each client, with what may befall them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest

from cancelable_deps.operations import MemoryBackend, RedisBackend
from cancelable_deps.operations.backend import Identity
from cancelable_deps.operations.memory import MemoryHub

from .machine import scaled
from .redis_server import SharedRedis

LEASE = 1.0
CEILING = 20


async def until(condition: Callable[[], Awaitable[Any]], what: str, ceiling: float = CEILING) -> Any:
    """Wait until something is true, and return it."""
    with anyio.move_on_after(scaled(ceiling)):
        while True:
            if found := await condition():
                return found
            await anyio.sleep(0.02)
    raise AssertionError(f"it does not come to pass: {what}")


def identity(name: str) -> Identity:
    return Identity(name.ljust(12, "x"), "host", 1, "0", time.time())


class Store:
    """A store that several workers of a test share."""

    def backend(self) -> Any:
        raise NotImplementedError

    @asynccontextmanager
    async def worker(self, name: str, *, memory: float = 60) -> AsyncIterator[Any]:
        """A worker that has given its first sign of life, and its backend."""
        backend = self.backend()
        async with backend.connect(identity(name), memory=memory, lease=LEASE):
            await backend.beat(may_reap=False)
            yield backend

    @asynccontextmanager
    async def workers(self, *names: str) -> AsyncIterator[list[Any]]:
        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(self.worker(name)) for name in names]

    def lose_everything(self) -> None:
        raise NotImplementedError


class MemoryStore(Store):
    def __init__(self) -> None:
        self.hub = MemoryHub()

    def backend(self) -> Any:
        return MemoryBackend(self.hub)

    def lose_everything(self) -> None:
        self.hub.lose_everything()


class RedisStore(Store):
    def __init__(self, url: str, client: Callable[[str], Any] | None = None) -> None:
        self.redis = SharedRedis(url)
        self.client = client

    def backend(self) -> Any:
        if self.client is None:
            return RedisBackend(self.redis.url, lease=LEASE, prefix=self.redis.prefix)
        return RedisBackend(client=self.client(self.redis.url), lease=LEASE, prefix=self.redis.prefix)

    def lose_everything(self) -> None:
        self.redis.forget()


KINDS = [
    pytest.param(("memory", "asyncio"), id="memory-asyncio"),
    pytest.param(("memory", "trio"), id="memory-trio"),
    pytest.param(("redis", "asyncio"), id="redis-py"),
    pytest.param(("coredis", "asyncio"), id="coredis-asyncio", marks=pytest.mark.real),
    pytest.param(("redis", "trio"), id="coredis-trio"),
    pytest.param(("valkey", "asyncio"), id="valkey", marks=pytest.mark.real),
]
