"""The client libraries of the store: calls and reads that are interrupted, and connections that break or fall silent."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import coredis
import pytest
import redis.asyncio

from cancelable_deps.operations import Operations, RedisBackend
from cancelable_deps.operations.backend import Unavailable
from cancelable_deps.operations.redis.client import Client, Script
from cancelable_deps.operations.redis.core_redis import CoredisClient
from cancelable_deps.operations.redis.redis_py import RedisPyClient

from .machine import scaled
from .proxy import Proxy, proxy_to
from .redis_server import RedisServer
from .redis_workers import MARKS
from .stores import CEILING, until

pytest_plugins = ["tests.redis_fixtures"]
pytestmark = MARKS

LONGEST_READ = 3.0
MANY = 80
"""More than coredis has places in a pool."""

ECHO = Script.of("return ARGV[1]")
ADD = Script.of("return redis.call('XADD', KEYS[1], '*', 'd', ARGV[1])")


@pytest.fixture(params=["redis-py", "coredis-asyncio", "coredis-trio"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def anyio_backend(kind: str) -> str:
    return "trio" if kind == "coredis-trio" else "asyncio"


@pytest.fixture
def proxy(own_redis: RedisServer) -> Iterator[Proxy]:
    with proxy_to("127.0.0.1", own_redis.port) as proxy:
        yield proxy


@pytest.fixture(params=["ours", "the application's"])
def of_application(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "the application's")


@asynccontextmanager
async def opened(kind: str, proxy: Proxy, *, of_application: bool) -> AsyncIterator[Client]:
    url = f"redis://127.0.0.1:{proxy.port}"
    async with AsyncExitStack() as stack:
        client: Any
        own: Any
        if kind == "redis-py":
            own = redis.asyncio.Redis.from_url(url) if of_application else None
            if own is not None:
                stack.push_async_callback(own.aclose)
            client = RedisPyClient(None if own else url, own, LONGEST_READ)
        else:
            own = coredis.Redis.from_url(url) if of_application else None
            client = CoredisClient(None if own else url, own, LONGEST_READ)
        await stack.enter_async_context(client.opened())
        yield client


async def echoes(client: Client) -> bool:
    try:
        with anyio.fail_after(1):
            return bool(await client.script(ECHO, [], ["here"]) == b"here")
    except (Unavailable, TimeoutError):
        return False


async def test_calls_that_are_interrupted_while_it_connects_cost_nothing(
    kind: str, of_application: bool, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with opened(kind, proxy, of_application=of_application) as client:
        for number in range(MANY):
            proxy.delay = 0.02
            with anyio.move_on_after(0.001 * (number % 10)) as scope:
                await client.script(ECHO, [], ["late"])
            assert scope.cancelled_caught
            with anyio.move_on_after(0.001 * (number % 10)) as scope:
                await client.xread({"none": "0-0"}, 5000)
            assert scope.cancelled_caught
        proxy.delay = 0
        await until(lambda: echoes(client), "it is connected")
        stream = "stream"
        await client.script(ADD, [stream], ["entry"])
        with anyio.fail_after(scaled(CEILING)):
            assert [entry[2] for entry in await client.xread({stream: "0-0"}, 5000)] == [b"entry"]
    assert caplog.text == ""


@pytest.mark.real
async def test_reads_that_break_cost_nothing(
    kind: str, of_application: bool, own_redis: RedisServer, proxy: Proxy
) -> None:
    async with opened(kind, proxy, of_application=of_application) as client:
        for _ in range(MANY):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(broken_read, client)
                await until(lambda: reads(own_redis), "it reads")
                proxy.cut()
        await client.script(ADD, ["stream"], ["entry"])
        with anyio.fail_after(scaled(CEILING)):
            assert [entry[2] for entry in await client.xread({"stream": "0-0"}, 5000)] == [b"entry"]


async def broken_read(client: Client) -> None:
    with pytest.raises(Unavailable), anyio.fail_after(scaled(CEILING)):
        await client.xread({"stream": "0-0"}, 2000)


async def reads(server: RedisServer) -> bool:
    return b"blocked_clients:1" in server.command("INFO", "clients")


@pytest.mark.real
async def test_connections_that_fall_silent_are_replaced(kind: str, of_application: bool, proxy: Proxy) -> None:
    async with opened(kind, proxy, of_application=of_application) as client:
        await client.script(ADD, ["stream"], ["entry"])
        await client.xread({"stream": "0-0"}, 2000)
        proxy.drop()
        assert not await echoes(client)
        await until(lambda: echoes(client), "calls are answered")

        async def has_read() -> bool:
            try:
                # As the store does, which gives up a read that is late.
                with anyio.move_on_after(LONGEST_READ):
                    return bool(await client.xread({"stream": "0-0"}, 1000))
            except Unavailable:
                pass
            return False

        await until(has_read, "a read is answered")


async def test_calls_while_the_server_hangs_cost_nothing(
    kind: str, of_application: bool, own_redis: RedisServer, proxy: Proxy
) -> None:
    async with opened(kind, proxy, of_application=of_application) as client:
        await client.script(ECHO, [], ["first"])
        proxy.pause()
        proxy.cut()
        async with anyio.create_task_group() as tasks:
            for _ in range(MANY):
                tasks.start_soon(echoes, client)
        proxy.resume()
        await until(lambda: echoes(client), "calls are answered")


@pytest.mark.parametrize("kind", ["redis-py", "coredis-asyncio", "coredis-trio"])
async def test_an_exception_leaves_the_operations_as_it_is(
    own_redis: RedisServer, of_application: bool, kind: str
) -> None:
    error = ValueError("of the application")
    client: Any = None
    if of_application:
        client = redis.asyncio.Redis(port=own_redis.port) if kind == "redis-py" else coredis.Redis(port=own_redis.port)
    with pytest.raises(ValueError, match="of the application") as caught:
        async with Operations(RedisBackend(None if client else own_redis.url, client=client)):
            raise error
    assert caught.value is error
    if kind == "redis-py" and client is not None:
        await client.aclose()
