"""Stores of operations for tests: in memory and in Redis by each client, with what may befall them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import anyio
import pytest

from cancelable_deps.operations import Operations, RedisBackend
from cancelable_deps.operations.backend import Identity
from cancelable_deps.testing import OperationsHub

from .machine import scaled
from .proxy import Proxy
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
    """A store that several workers of a test share, and what may befall it."""

    def backend(self) -> Any:
        """The store of one more worker."""
        raise NotImplementedError

    def operations(self, **options: Any) -> Operations:
        """One more worker."""
        return Operations(self.backend(), **{"background_grace": 0, **options})

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

    def pause(self, *backends: Any) -> None:
        """Let the store not answer these workers, or any."""
        raise NotImplementedError

    def resume(self) -> None:
        """End `pause`."""
        raise NotImplementedError

    def delay(self, seconds: float) -> None:
        """Let each answer take so long."""
        raise NotImplementedError

    def lose_everything(self) -> None:
        """Forget all, without anybody's connection breaking."""
        raise NotImplementedError

    def lose_last(self, seconds: float) -> None:
        """Forget the entries of the last ``seconds``; connections break."""
        raise NotImplementedError

    def close(self) -> None: ...


class MemoryStore(Store):
    def __init__(self) -> None:
        self._hub = OperationsHub(lease=LEASE)
        self._workers: dict[Any, Operations] = {}

    def backend(self) -> Any:
        worker = self._hub.operations()
        self._workers[worker.backend] = worker
        return worker.backend

    def pause(self, *backends: Any) -> None:
        for backend in backends or self._workers:
            self._hub.cut(self._workers[backend])

    def resume(self) -> None:
        for worker in self._workers.values():
            self._hub.resume(worker)

    def delay(self, seconds: float) -> None:
        self._hub.delay(seconds)

    def lose_everything(self) -> None:
        next(iter(self._workers)).hub.lose_everything()

    def lose_last(self, seconds: float) -> None:
        self._hub.lose_last(seconds)


class RedisStore(Store):
    """The keys of one prefix of a server, which each worker reaches through a proxy of its own."""

    def __init__(self, url: str, client: Callable[[str], Any] | None = None) -> None:
        self._redis = SharedRedis(url)
        self._client = client
        self._proxies: dict[Any, Proxy] = {}
        self._delay = 0.0

    def backend(self) -> Any:
        parts = urlsplit(self._redis.url)
        proxy = Proxy(parts.hostname or "127.0.0.1", parts.port or 6379)
        proxy.delay = self._delay / 2
        account, at, _ = parts.netloc.rpartition("@")
        url = parts._replace(netloc=f"{account}{at}127.0.0.1:{proxy.port}").geturl()
        if self._client is None:
            backend = RedisBackend(url, lease=LEASE, prefix=self._redis.prefix)
        else:
            backend = RedisBackend(client=self._client(url), lease=LEASE, prefix=self._redis.prefix)
        self._proxies[backend] = proxy
        return backend

    def pause(self, *backends: Any) -> None:
        for backend in backends or self._proxies:
            self._proxies[backend].pause()

    def resume(self) -> None:
        for proxy in self._proxies.values():
            proxy.resume()

    def delay(self, seconds: float) -> None:
        self._delay = seconds
        for proxy in self._proxies.values():
            proxy.delay = seconds / 2

    def lose_everything(self) -> None:
        self._redis.forget()

    def lose_last(self, seconds: float) -> None:
        self._redis.forget_entries(seconds)
        for proxy in self._proxies.values():
            proxy.cut()

    def close(self) -> None:
        for proxy in self._proxies.values():
            proxy.close()
        self._redis.forget()


KINDS = {
    "memory-asyncio": ("memory", "asyncio"),
    "memory-trio": ("memory", "trio"),
    "redis-py": ("redis", "asyncio"),
    "coredis-asyncio": ("coredis", "asyncio"),
    "coredis-trio": ("redis", "trio"),
    "valkey": ("valkey", "asyncio"),
}
"""The stores, by the library and the event loop; with a URL, trio takes coredis."""


def kinds(*real: str) -> list[Any]:
    """The parameters of ``store_kind``, of which those that are named are not in the short run."""
    return [pytest.param(kind, id=id, marks=[pytest.mark.real] if id in real else []) for id, kind in KINDS.items()]
