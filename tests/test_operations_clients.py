"""The client libraries of the store: calls and reads that are interrupted, calls that are sent together, and connections
that break or fall silent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import coredis
import pytest
import redis.asyncio

from cancelable_deps.operations import Operations, RedisBackend
from cancelable_deps.operations.backend import Unavailable
from cancelable_deps.operations.redis.batches import Batches
from cancelable_deps.operations.redis.client import Call, Client, Script
from cancelable_deps.operations.redis.core_redis import CoredisClient
from cancelable_deps.operations.redis.redis_py import RedisPyClient
from cancelable_deps.testing import no_tasks_left

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
SIZE = Script.of("return #ARGV[1]")
PUSH = Script.of("return redis.call('RPUSH', KEYS[1], ARGV[1])")
SET = Script.of("return redis.call('SET', KEYS[1], ARGV[1])")
FAIL = Script.of("return redis.error_reply('ERR this one fails')")
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


@asynccontextmanager
async def batches_of(kind: str, proxy: Proxy, *, of_application: bool) -> AsyncIterator[Batches]:
    async with opened(kind, proxy, of_application=of_application) as client:
        batches = Batches(client)
        async with batches.opened():
            yield batches


async def all_of(batches: Batches, calls: list[Call]) -> list[Any]:
    """Make calls at the same time, and return their results in order; of one that fails the error."""
    results: list[Any] = [None] * len(calls)

    async def make(number: int) -> None:
        try:
            results[number] = await batches.run(calls[number])
        except Unavailable as exc:
            results[number] = exc

    async with anyio.create_task_group() as tasks:
        for number in range(len(calls)):
            tasks.start_soon(make, number)
    return results


def echo(number: int) -> Call:
    return Call(ECHO, [], [str(number)])


async def test_calls_at_the_same_time_share_few_connections(
    kind: str, of_application: bool, own_redis: RedisServer, proxy: Proxy
) -> None:
    async with batches_of(kind, proxy, of_application=of_application) as batches:
        assert await all_of(batches, [echo(number) for number in range(250)]) == [b"%d" % n for n in range(250)]
        proxy.pause()
        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(all_of, batches, [echo(number)])
                await anyio.wait_all_tasks_blocked()
            proxy.resume()
        await until(lambda: is_answered(batches), "calls are answered")
        connected = own_redis.command("INFO", "clients").decode().partition("connected_clients:")[2]
        # Four batches, and this question.
        assert int(connected.split()[0]) <= 5


async def test_a_call_that_fails_is_alone_with_it(
    kind: str, of_application: bool, own_redis: RedisServer, proxy: Proxy
) -> None:
    async with batches_of(kind, proxy, of_application=of_application) as batches:
        for _ in range(2):
            results = await all_of(batches, [echo(0), Call(FAIL, [], []), echo(2), Call(FAIL, [], []), echo(4)])
            assert results[::2] == [b"0", b"2", b"4"]
            assert all(isinstance(each, Unavailable) and "this one fails" in str(each) for each in results[1::2])
            assert results[1] is not results[3]
            # As after a restart: it knows none of the scripts.
            own_redis.command("SCRIPT", "FLUSH")


async def test_scripts_that_a_server_has_forgotten_are_sent_together(
    kind: str, of_application: bool, own_redis: RedisServer, proxy: Proxy
) -> None:
    async with batches_of(kind, proxy, of_application=of_application) as batches:
        await batches.run(echo(0))
        own_redis.command("SCRIPT", "FLUSH")
        # One by one they would take longer than a batch may.
        proxy.delay = 0.008
        assert await all_of(batches, [echo(number) for number in range(100)]) == [b"%d" % n for n in range(100)]


class WithPrefix(redis.asyncio.Redis):
    """A client that changes commands, and not those of pipelines."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        command, script, count, *rest = args
        base: Any = super()
        return await base.execute_command(
            command, script, count, *[f"mine:{each}" for each in rest[:count]], *rest[count:]
        )


@pytest.mark.parametrize("kind", ["redis-py"])
async def test_calls_pass_through_a_client_that_changes_them(kind: str, own_redis: RedisServer) -> None:
    async with WithPrefix(port=own_redis.port) as own:
        client = RedisPyClient(None, own, LONGEST_READ)
        batches = Batches(client)
        async with client.opened(), batches.opened():
            await all_of(batches, [Call(SET, [f"key{number}"], ["1"]) for number in range(3)])
    names = own_redis.command("KEYS", "*").decode().split()
    assert sorted(each for each in names if "key" in each) == ["mine:key0", "mine:key1", "mine:key2"]


@pytest.mark.parametrize("kind", ["redis-py"])
async def test_a_client_of_one_connection_needs_no_other(kind: str, own_redis: RedisServer) -> None:
    async with redis.asyncio.Redis(port=own_redis.port, single_connection_client=True, max_connections=1) as own:
        client = RedisPyClient(None, own, LONGEST_READ)
        batches = Batches(client)
        async with client.opened(), batches.opened():
            assert await all_of(batches, [echo(number) for number in range(3)]) == [b"0", b"1", b"2"]


@pytest.mark.parametrize("kind", ["redis-py"])
async def test_a_client_of_few_connections_is_asked_for_no_more(kind: str, own_redis: RedisServer) -> None:
    async with redis.asyncio.Redis(port=own_redis.port, max_connections=2) as own:
        client = RedisPyClient(None, own, LONGEST_READ)
        batches = Batches(client)
        results: list[Any] = []

        async def make(number: int) -> None:
            results.append(await batches.run(echo(number)))

        async with client.opened(), batches.opened(), anyio.create_task_group() as tasks:
            own_redis.pause()
            for number in range(6):
                tasks.start_soon(make, number)
                await anyio.wait_all_tasks_blocked()
            own_redis.resume()
        assert sorted(results) == [b"%d" % number for number in range(6)]


@pytest.mark.parametrize("kind", ["redis-py", "coredis-asyncio"])
async def test_calls_are_sent_after_all_tasks_were_cancelled_once(
    kind: str, of_application: bool, proxy: Proxy
) -> None:
    async with batches_of(kind, proxy, of_application=of_application) as batches:
        await batches.run(echo(0))
        before = asyncio.all_tasks()
        asker = asyncio.create_task(batches.run(echo(1)))
        await asyncio.sleep(0)
        # It has asked, and the task that is to send it has not begun.
        started = asyncio.all_tasks() - before
        assert len(started) == 2
        for task in started:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asker
        with anyio.fail_after(scaled(CEILING)):
            assert await batches.run(echo(2)) == b"2"


async def test_large_calls_are_not_sent_together(
    kind: str, of_application: bool, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(kind, proxy, of_application=of_application) as client:
        sent: list[int] = []
        scripts = client.scripts

        async def noted(calls: Sequence[Call]) -> list[Any]:
            sent.append(sum(len(str(call.args[0])) for call in calls))
            return await scripts(calls)

        monkeypatch.setattr(client, "scripts", noted)
        batches = Batches(client)
        sizes = [number * 60_000 for number in range(10)] + [2_000_000]
        async with batches.opened():
            results = await all_of(batches, [Call(SIZE, [], ["x" * size]) for size in sizes])
        assert results == sizes
        assert sent
        # Beside those that are not large.
        assert max(sent) <= (1 << 20) + 2 * 60_000


async def test_a_call_that_cannot_be_sent_is_alone_with_it(kind: str, of_application: bool, proxy: Proxy) -> None:
    async with batches_of(kind, proxy, of_application=of_application) as batches:
        answers: list[bytes] = []

        async def make(number: int) -> None:
            answers.append(await batches.run(echo(number)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(make, 0)
            tasks.start_soon(fails_to_encode, batches)
            tasks.start_soon(make, 2)
        assert sorted(answers) == [b"0", b"2"]


async def fails_to_encode(batches: Batches) -> None:
    with pytest.raises(UnicodeEncodeError):
        await batches.run(Call(ECHO, [], ["\ud800"]))


async def test_a_call_does_not_overtake_one_of_its_key_whose_caller_has_left(
    kind: str, of_application: bool, own_redis: RedisServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(kind, proxy, of_application=of_application) as client:
        script, goes_on = client.script, anyio.Event()

        async def held(which: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
            if args == ["first"]:
                # As one does for which a connection is made.
                await goes_on.wait()
            return await script(which, keys, args)

        monkeypatch.setattr(client, "script", held)
        batches = Batches(client)
        async with batches.opened(), anyio.create_task_group() as tasks:
            with anyio.move_on_after(0.05):
                await batches.run(Call(PUSH, ["list"], ["first"]))
            tasks.start_soon(batches.run, Call(PUSH, ["list"], ["second"]))
            for number in range(3):
                # Others are not held up.
                assert await batches.run(echo(number)) == b"%d" % number
            goes_on.set()
        assert own_redis.command("LRANGE", "list", "0", "-1").split()[2::2] == [b"first", b"second"]


async def test_callers_that_are_cancelled_take_nothing_along(kind: str, of_application: bool, proxy: Proxy) -> None:
    async with batches_of(kind, proxy, of_application=of_application) as batches:
        answers: dict[int, bytes] = {}
        scopes = [anyio.CancelScope() for _ in range(MANY)]

        async def make(number: int) -> None:
            with scopes[number]:
                answers[number] = await batches.run(echo(number))

        proxy.delay = 0.02
        async with anyio.create_task_group() as tasks:
            for number in range(MANY):
                tasks.start_soon(make, number)
                if number % 7 == 0:
                    # Some have been sent by then.
                    await anyio.sleep(0.001)
                    for scope in scopes[:number:2]:
                        scope.cancel()
        assert answers.keys() >= set(range(1, MANY, 2))
        assert answers == {number: b"%d" % number for number in answers}


async def test_a_call_whose_caller_left_before_it_was_sent_is_not_sent(
    kind: str, of_application: bool, own_redis: RedisServer, proxy: Proxy
) -> None:
    async with batches_of(kind, proxy, of_application=of_application) as batches:
        await batches.run(echo(0))
        proxy.pause()
        async with anyio.create_task_group() as tasks:
            for number in range(4):
                # All that may be under way are.
                tasks.start_soon(all_of, batches, [echo(number)])
                await anyio.wait_all_tasks_blocked()
            with anyio.move_on_after(0.001):
                await batches.run(Call(SET, ["late"], ["1"]))
            proxy.resume()
        await until(lambda: is_answered(batches), "calls are answered")
        assert own_redis.command("EXISTS", "late") == b":0\r\n"


async def is_answered(batches: Batches) -> bool:
    return await all_of(batches, [echo(1)]) == [b"1"]


async def test_a_call_that_goes_on_without_its_caller_is_no_task_that_was_left(
    kind: str, of_application: bool, proxy: Proxy
) -> None:
    async with batches_of(kind, proxy, of_application=of_application) as batches:
        await batches.run(echo(0))
        proxy.pause()
        async with no_tasks_left():
            with anyio.move_on_after(0.001) as scope:
                await batches.run(echo(1))
        assert scope.cancelled_caught
        proxy.resume()


async def test_calls_of_a_server_that_is_silent_fail_within_seconds(
    kind: str, of_application: bool, proxy: Proxy
) -> None:
    async with batches_of(kind, proxy, of_application=of_application) as batches:
        await batches.run(echo(0))
        proxy.pause()
        with anyio.fail_after(scaled(CEILING)):
            results = await all_of(batches, [echo(number) for number in range(MANY)])
        assert all(isinstance(each, Unavailable) for each in results)
        proxy.resume()
        await until(lambda: is_answered(batches), "calls are answered")


async def test_at_the_end_calls_that_wait_are_told_and_those_under_way_end(
    kind: str, of_application: bool, own_redis: RedisServer, proxy: Proxy
) -> None:
    results: list[Any] = []
    async with opened(kind, proxy, of_application=of_application) as client:
        batches = Batches(client)

        async def make(call: Call) -> None:
            results.extend(await all_of(batches, [call]))

        with anyio.fail_after(scaled(CEILING)):
            async with anyio.create_task_group() as tasks, batches.opened():
                await batches.run(echo(0))
                proxy.pause()
                for number in range(4):
                    tasks.start_soon(make, echo(number))
                    await anyio.wait_all_tasks_blocked()
                tasks.start_soon(make, Call(SET, ["late"], ["1"]))
                await anyio.wait_all_tasks_blocked()
        assert len(results) == 5
        assert all(isinstance(each, Unavailable) for each in results)
        assert "not open" in str(results[0])
        proxy.resume()
    assert own_redis.command("EXISTS", "late") == b":0\r\n"


async def test_no_call_is_made_before_and_after(kind: str, own_redis: RedisServer, proxy: Proxy) -> None:
    async with opened(kind, proxy, of_application=False) as client:
        batches = Batches(client)
        with pytest.raises(Unavailable, match="not open"):
            await batches.run(echo(1))
        async with batches.opened():
            assert await batches.run(echo(1)) == b"1"
        with pytest.raises(Unavailable, match="not open"):
            await batches.run(echo(1))


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
