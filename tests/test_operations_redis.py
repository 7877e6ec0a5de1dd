"""Operations over a real Redis that dies, stops, loses its data or is not there, and workers that die or stop."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.to_thread
import coredis
import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
from coredis.connection import TCPLocation

from cancelable_deps import Cancelable
from cancelable_deps.operations import (
    Operations,
    OperationState,
    OperationsUnavailable,
    RedisBackend,
)
from cancelable_deps.operations.entries import decoded

from .machine import scaled
from .ports import free_port
from .redis_server import RedisServer, SharedRedis, redis_server
from .redis_workers import MARKS, forever, know_each_other, opened
from .stores import identity, until

pytest_plugins = ["tests.redis_fixtures"]
pytestmark = MARKS


async def test_an_operation_is_stopped_from_another_worker(shared_redis: SharedRedis) -> None:
    async with opened(shared_redis.url, 2, prefix=shared_redis.prefix) as [a, b]:
        await know_each_other(a, b)
        operation = await a.start(forever, owner="me")
        assert (await b.get(operation.id)) is not None
        assert (await b.cancel(operation.id, owner="you")).outcome == "unknown"
        cancelation = await b.cancel(operation.id, owner="me", message="enough", wait=10)
        assert cancelation.outcome == "cancelled"
        assert cancelation.operation is not None
        assert cancelation.operation.message == "enough"
        assert (await b.cancel(operation.id, wait=0)).outcome == "cancelled"
        assert [each.id for each in (await b.list(state="cancelled")).items] == [operation.id]
        assert len(await b.workers()) == 2


async def test_when_all_workers_have_left_redis_forgets_everything(shared_redis: SharedRedis) -> None:
    async with opened(shared_redis.url, 2, prefix=shared_redis.prefix) as [a, b]:
        await know_each_other(a, b)
        operation = await a.start(forever, owner="me", key="key", when_busy="wait")
        await b.start(forever, id="waits", key="key", when_busy="wait")
        await b.cancel(operation.id, wait=10)
        await a.cancel("nobody-has-it", wait=0.1)
    with redis.Redis.from_url(shared_redis.url, decode_responses=True) as client:
        kept = list(client.scan_iter(f"{{{shared_redis.prefix}}}:*", count=1000))
        assert any(name.endswith(":log") for name in kept)
        assert [name for name in kept if client.pttl(name) == -1] == []


async def test_results_and_progress_are_read_in_another_worker(shared_redis: SharedRedis) -> None:
    release = anyio.Event()

    async def work(cancel: Cancelable) -> dict[str, int]:
        await cancel.report_progress("half", {"done": 1})
        await release.wait()
        return {"answer": 42}

    async with opened(shared_redis.url, 2, prefix=shared_redis.prefix) as [a, b]:
        await know_each_other(a, b)
        operation = await a.start(work, owner="me")
        kinds = []
        async for event in b.events(operation.id, owner="me"):
            kinds.append(event.kind)
            if event.operation.progress is not None:
                release.set()
        assert kinds[-1] == "end"
        assert await b.result(operation.id, owner="me") == {"answer": 42}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_clients_of_the_application_are_used(shared_redis: SharedRedis) -> None:
    own: list[Any] = [
        # LiteLLM's default: a read that waits for longer is an error.
        redis.asyncio.Redis.from_url(shared_redis.url, socket_timeout=0.1),
        redis.asyncio.Redis.from_url(shared_redis.url, decode_responses=True, protocol=3, max_connections=2),
        coredis.Redis.from_url(shared_redis.url, stream_timeout=0.1),
        coredis.Redis.from_url(shared_redis.url, decode_responses=True),
    ]
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(
                Operations(RedisBackend(client=client, lease=3, prefix=shared_redis.prefix), background_grace=0)
            )
            for client in own
        ]
        await know_each_other(*workers)
        for each in workers:
            operation = await each.start(forever)
            for other in workers:
                assert await other.get(operation.id) is not None
            assert (await workers[0].cancel(operation.id, wait=10)).outcome == "cancelled"
        assert not any(each.worker.exchange.is_broken for each in workers)
    for client in own[:2]:
        assert await client.ping()  # It is not closed.
        await client.aclose()


def test_wrong_arguments_say_how_to_do_it_right() -> None:
    with pytest.raises(TypeError, match="not both"):
        RedisBackend()
    with pytest.raises(TypeError, match="blocks"):
        RedisBackend(client=redis.Redis())
    with pytest.raises(TypeError, match=r"redis\.asyncio or coredis"):
        RedisBackend(client=object())
    for manager in (
        redis.asyncio.sentinel.Sentinel([("localhost", 1)]),  # type: ignore[no-untyped-call]
        coredis.Sentinel([TCPLocation("localhost", 1)]),
    ):
        with pytest.raises(TypeError, match=r"sentinel\.master_for"):
            RedisBackend(client=manager)
        replicas: Any = getattr(manager, "slave_for", None) or manager.replica_for
        with pytest.raises(TypeError, match="for the master"):
            RedisBackend(client=replicas("mymaster"))
    with pytest.raises(ValueError, match="prefix"):
        RedisBackend("redis://localhost", prefix="{app}")
    with pytest.raises(ValueError, match="lease"):
        RedisBackend("redis://localhost", lease=0.5)


def test_no_library_is_an_error_that_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cancelable_deps.operations.redis.choice.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"cancelable-deps\[redis\].*cancelable-deps\[coredis\]"):
        RedisBackend("redis://localhost")


async def test_a_sentinel_of_coredis_that_is_not_open_is_an_error_at_the_start() -> None:
    sentinel = coredis.Sentinel([TCPLocation("127.0.0.1", free_port())])
    with pytest.raises(RuntimeError, match="entering the pool's async context manager"):
        async with Operations(RedisBackend(client=sentinel.primary_for("mymaster"))):
            raise AssertionError("it does not start")


async def test_importing_operations_loads_no_client() -> None:
    code = "import sys, cancelable_deps.operations; print([n for n in ('redis', 'coredis') if n in sys.modules])"
    done = await anyio.run_process([sys.executable, "-c", code])
    assert done.stdout.strip() == b"[]"


async def test_an_evicting_redis_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with redis_server("--save", "", "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru") as server:
        async with opened(server.url) as [a]:

            async def is_warned() -> bool:
                return "allkeys-lru" in caplog.text

            await until(is_warned, "the warning")
            await a.start(forever)
    assert caplog.text.count("allkeys-lru") == 1


async def test_a_full_redis_is_unavailable(own_redis: RedisServer) -> None:
    async with opened(own_redis.url) as [a]:
        await a.start(forever, id="before")
        own_redis.command("CONFIG", "SET", "maxmemory", "1mb")
        with pytest.raises(OperationsUnavailable):
            await a.start(forever)
        # What runs here is stopped all the same.
        assert (await a.cancel("before", wait=10)).outcome == "cancelled"
        own_redis.command("CONFIG", "SET", "maxmemory", "0")
        await a.start(forever)


async def test_entries_of_newer_and_of_unknown_kinds_are_ignored(shared_redis: SharedRedis) -> None:
    async with opened(shared_redis.url, 2, prefix=shared_redis.prefix) as [a, b]:
        await know_each_other(a, b)
        backend = RedisBackend(shared_redis.url, lease=3, prefix=shared_redis.prefix)
        async with backend.connect(identity("wnewer"), memory=60, lease=3):
            await backend.beat(may_reap=False)
            operation = await a.start(forever)
            data = {"target": operation.id, "owner": None, "message": None, "wait": 0, "grace": None}
            entry = {"v": 2, "kind": "cancel", "id": "1", "from": "wnewer", "at": time.time(), "data": data}
            for odd in (
                b"\xff no json",
                json.dumps({**entry, "least": 2}).encode(),
                json.dumps({**entry, "kind": "fly", "id": "2"}).encode(),
            ):
                await backend.broadcast(odd, "odd")
            assert (await b.get(operation.id)).state is OperationState.RUNNING  # type: ignore[union-attr]
            # Of a newer version that this one may read, with a field that it does not know.
            await backend.broadcast(json.dumps({**entry, "id": "3", "urgency": 7}).encode(), "3")
            assert (await b.wait(operation.id, timeout=10)).state is OperationState.CANCELLED
    assert decoded(json.dumps({**entry, "urgency": 7}).encode()) is not None


async def test_after_a_loss_entries_of_a_server_whose_clock_is_slow_are_read(shared_redis: SharedRedis) -> None:
    backend = RedisBackend(shared_redis.url, lease=3, prefix=shared_redis.prefix)
    log, mail = (f"{{{shared_redis.prefix}}}:{name}" for name in ("log", f"in:{identity('wa').name}"))
    async with backend.connect(identity("wa"), memory=60, lease=3), anyio.create_task_group() as tasks:
        entries: list[bytes] = []

        async def keep_reading() -> None:
            while True:
                entries.extend(data for _, data in await backend.receive())

        async def has(count: int) -> bool:
            return len(entries) >= count

        await backend.beat(may_reap=False)
        tasks.start_soon(keep_reading)
        position = await backend.broadcast(b"first", "1")
        await backend.send(identity("wa").name, b"first mail", "2")
        await until(lambda: has(2), "both are read")
        shared_redis.forget()
        early = f"{int(position.partition('-')[0]) - 20_000}-0"
        with redis.Redis.from_url(shared_redis.url) as client:
            client.xadd(log, {"i": "3", "d": b"late"}, id=early)
            client.xadd(mail, {"i": "4", "d": b"late mail"}, id=early)
        assert (await backend.beat(may_reap=False)).has_forgotten
        await until(lambda: has(4), "what comes after a loss is read")
        assert set(entries[2:]) == {b"late", b"late mail"}
        assert not (await backend.beat(may_reap=False)).has_forgotten
        tasks.cancel_scope.cancel()


async def test_redis_that_comes_late(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = RedisServer(port=free_port())
    try:
        async with opened(server.url, 2, lease=1) as [a, b]:
            with pytest.raises(OperationsUnavailable):
                await a.start(forever)
            async with anyio.create_task_group() as tasks:

                async def block() -> None:
                    async with a.track(id="local"):
                        await anyio.sleep_forever()

                with anyio.CancelScope():
                    tasks.start_soon(_ignoring_errors, block)
                    await until(lambda: _value(a.worker.local.everything()), "the block has begun")
                    assert (await a.cancel("local", wait=10)).outcome == "cancelled"
            await anyio.to_thread.run_sync(server.start)
            await know_each_other(a, b)
            operation = await a.start(forever)
            assert (await b.cancel(operation.id, wait=10)).outcome == "cancelled"
    finally:
        server.close()
    assert caplog.text.count("can be reached again") <= 2


async def _value(value: Any) -> Any:
    return value


async def _ignoring_errors(work: Any) -> None:
    try:
        await work()
    except Exception:
        return


async def test_after_a_flush_everything_is_there_again(own_redis: RedisServer) -> None:
    async with opened(own_redis.url, 2, lease=1) as [a, b]:
        await know_each_other(a, b)
        running = await a.start(forever, owner="me", key="key", when_busy="refuse")
        waiting = await b.start(forever, key="key", when_busy="wait")
        own_redis.command("FLUSHALL")

        async def is_back() -> bool:
            found = await b.get(running.id, owner="me")
            return found is not None

        await until(is_back, "the record is back")
        assert (await b.cancel(running.id, wait=10)).outcome == "cancelled"

        async def runs() -> bool:
            found = await a.get(waiting.id)
            return found is not None and found.state is OperationState.RUNNING

        await until(runs, "the one that waited has its turn")
        assert (await a.cancel(waiting.id, wait=10)).outcome == "cancelled"


async def test_a_place_that_could_not_be_given_back_is_free_when_redis_is_back(own_redis: RedisServer) -> None:
    async with opened(own_redis.url, 2, lease=1) as [a, b]:
        await know_each_other(a, b)
        operation = await a.start(forever, key="key", when_busy="refuse")
        waiting = await b.start(forever, key="key", when_busy="wait")
        own_redis.pause()
        assert (await a.cancel(operation.id, wait=scaled(5))).outcome in ("cancelled", "stopping")
        own_redis.resume()

        async def runs() -> bool:
            found = await _or_none(a.get(waiting.id))
            return found is not None and found.state is OperationState.RUNNING

        await until(runs, "the one that waited has its turn")


async def _or_none(call: Any) -> Any:
    try:
        return await call
    except OperationsUnavailable:
        return None
