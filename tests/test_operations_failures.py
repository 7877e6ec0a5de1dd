"""Operations over a Redis that is killed, stopped, emptied, cut off or not there."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator

import anyio
import anyio.to_thread
import pytest

from cancelable_deps.operations import Operations, OperationState, OperationsUnavailable

from .machine import scaled
from .ports import free_port
from .proxy import Proxy, proxy_to
from .redis_server import RedisServer, redis_server
from .redis_workers import (
    LEASE,
    MARKS,
    Work,
    WorkerProcess,
    cancelled_or_none,
    forever,
    is_cancelled,
    is_in,
    know_each_other,
    none_is_lost,
    opened,
    worker_process,
)
from .stores import until

pytest_plugins = ["tests.redis_fixtures"]
pytestmark = [*MARKS, pytest.mark.real]

PERSISTENCE = {
    "nothing": ("--save", "", "--appendonly", "no"),
    "all but a second": ("--save", "", "--appendonly", "yes", "--appendfsync", "everysec"),
}
CANCELS = 300
KINDS = ["blocks", "background work"]
"""Cancels of blocks go through the log, as their ids are chosen by clients; those of background work by mail and record."""


@pytest.fixture
def proxy(own_redis: RedisServer) -> Iterator[Proxy]:
    with proxy_to("127.0.0.1", own_redis.port) as proxy:
        yield proxy


async def count_lost(what: str, url: str, kind: str, backend: str, disturb_by: Callable[[WorkerProcess], Work]) -> None:
    async with opened(url, 2, lease=LEASE) as [a, c], worker_process(url, lease=LEASE, backend=backend) as b:
        if kind == "blocks":
            ids = [f"job-{number}" for number in range(CANCELS)]
            await b.say("track", *ids)
            await b.hears("running", count=CANCELS)
        else:
            for _ in range(CANCELS):
                await b.say("start", "-", "-")
            ids = [each["started"] for each in await b.hears("started", count=CANCELS)]

        async def knows_it() -> bool:
            return len(a.worker.exchange.alive) == len(c.worker.exchange.alive) == 3

        await until(knows_it, "the workers know each other")
        await none_is_lost(f"{what}, {kind}, {backend}", a, b, ids, disturb_by(b))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", PERSISTENCE)
async def test_no_acknowledged_cancel_is_lost_when_redis_is_killed_and_the_worker_busy(
    kept: str, kind: str, anyio_backend: str
) -> None:
    with redis_server(*PERSISTENCE[kept]) as server:

        def disturb_by(b: WorkerProcess) -> Work:
            async def disturb() -> None:
                await anyio.sleep(0.7)
                await b.say("busy", 0.5)
                await anyio.sleep(0.3)
                server.kill()
                await anyio.sleep(0.5)
                await anyio.to_thread.run_sync(server.start)

            return disturb

        await count_lost(f"Redis killed, which keeps {kept}", server.url, kind, anyio_backend, disturb_by)


@pytest.mark.parametrize("kind", KINDS)
async def test_no_acknowledged_cancel_is_lost_when_redis_is_emptied_and_the_worker_busy(
    kind: str, own_redis: RedisServer, anyio_backend: str
) -> None:
    def disturb_by(b: WorkerProcess) -> Work:
        async def disturb() -> None:
            for _ in range(2):
                await anyio.sleep(0.7)
                await b.say("busy", 0.5)
                await anyio.sleep(0.3)
                # Nobody's connection breaks.
                own_redis.command("FLUSHALL")

        return disturb

    await count_lost("FLUSHALL twice", own_redis.url, kind, anyio_backend, disturb_by)


@pytest.mark.parametrize("kind", KINDS)
async def test_no_acknowledged_cancel_is_lost_on_a_line_that_stops_breaks_and_falls_silent(
    kind: str, proxy: Proxy, anyio_backend: str
) -> None:
    def disturb_by(b: WorkerProcess) -> Work:
        async def disturb() -> None:
            proxy.delay = 0.005
            await anyio.sleep(0.5)
            proxy.cut()
            await anyio.sleep(0.5)
            proxy.pause()
            await anyio.sleep(0.5)
            proxy.resume()
            await anyio.sleep(0.5)
            proxy.drop()
            proxy.delay = 0

        return disturb

    url = f"redis://127.0.0.1:{proxy.port}/0"
    await count_lost("a line that delays, breaks, stops and falls silent", url, kind, anyio_backend, disturb_by)


async def test_a_redis_that_is_stopped_for_six_seconds_costs_nothing(
    own_redis: RedisServer, anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = own_redis.url
    async with opened(url, lease=15) as [a], worker_process(url, lease=15, backend=anyio_backend) as b:
        await b.say("start", "one", "-")
        await b.hears("started")
        operation = await a.start(forever, id="local")
        own_redis.pause()
        begin = time.monotonic()
        # What runs here is stopped at once.
        assert (await a.cancel(operation.id, wait=scaled(5))).outcome in ("cancelled", "stopping")
        with pytest.raises(OperationsUnavailable):
            await a.cancel("one")
        await anyio.sleep(max(0.0, 6 - (time.monotonic() - begin)))
        own_redis.resume()
        await until(lambda: is_cancelled(a, "one"), "the other worker is reached again")
    assert "given up" not in caplog.text + "".join(b.log)


async def test_calls_that_redis_holds_up_are_unavailable_and_nobody_is_given_up(own_redis: RedisServer) -> None:
    async with opened(own_redis.url, 2, lease=2) as [a, b]:
        await know_each_other(a, b)
        operation = await b.start(forever)
        own_redis.command("CLIENT", "PAUSE", "5000", "ALL")
        with pytest.raises(OperationsUnavailable):
            await a.start(forever)
        await until(lambda: is_cancelled(a, operation.id), "it is stopped after the pause")


async def test_a_line_that_breaks_often_loses_nothing(own_redis: RedisServer, proxy: Proxy) -> None:
    async with (
        opened(f"redis://127.0.0.1:{proxy.port}/0") as [a],
        opened(own_redis.url) as [b],
    ):
        await know_each_other(a, b)
        for number in range(10):
            proxy.delay = 0.01 * (number % 3)
            ids = [f"op-{number}-{each}" for each in range(3)]
            for id in ids:
                await started(a, id)
            proxy.cut()
            for id in ids:
                outcome = await until(lambda id=id: cancelled_or_none(b, id), f"{id} is cancelled")  # type: ignore[misc]
                assert outcome == "cancelled"


async def started(operations: Operations, id: str) -> None:
    async def is_started() -> bool:
        try:
            await operations.start(forever, id=id)
        except OperationsUnavailable:
            return False
        return True

    await until(is_started, f"{id} is started")


# Redis is not there.


async def test_without_redis_the_application_runs_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with opened(f"redis://127.0.0.1:{free_port()}/0", lease=1) as [a]:
        await until(lambda: logged(caplog, "cannot be reached"), "the warning")
        with pytest.raises(OperationsUnavailable):
            await a.start(forever)
        with pytest.raises(OperationsUnavailable):
            await a.cancel("elsewhere")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(local_block, a)
            await until(lambda: runs_here(a), "the block has begun")
            # Its own are not all that run, and it does not know the others.
            with pytest.raises(OperationsUnavailable):
                await a.list()
            with pytest.raises(OperationsUnavailable):
                await a.workers()
            assert (await a.get("local")) is not None
            assert (await a.cancel("local", wait=10)).outcome == "cancelled"
        # For as long as several leases.
        await until(lambda: has_missed(a, 15), "five leases have passed")
    # The second one is that the others cannot be told of its end.
    assert levels(caplog) == {"WARNING": 1, "INFO": 1}


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


async def local_block(operations: Operations) -> None:
    try:
        async with operations.track(id="local"):
            await anyio.sleep_forever()
    except Exception:
        return


async def runs_here(operations: Operations) -> bool:
    return bool(operations.worker.local.everything())


async def has_missed(operations: Operations, count: int) -> bool:
    """Whether so many signs of life have failed in a row, of which there are three in a lease."""
    return bool(vars(operations.worker.exchange)["_missed"] >= count)


def levels(caplog: pytest.LogCaptureFixture) -> dict[str, int]:
    """How many lines of operations were logged of each level, besides those of single operations."""
    return dict(Counter(record.levelname for record in caplog.records if "store of operations" in record.getMessage()))


@pytest.mark.parametrize("is_emptied", [False, True])
async def test_an_outage_of_several_leases_costs_nothing(
    is_emptied: bool, anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = PERSISTENCE["nothing" if is_emptied else "all but a second"]
    with redis_server(*options) as server:
        async with opened(server.url, lease=2) as [a], worker_process(server.url, lease=2, backend=anyio_backend) as b:
            await b.say("start", "held", "key")
            await b.hears("started", "held")
            await b.say("start", "other", "-")
            await b.hears("started", "other")
            waiting = await a.start(forever, key="key", when_busy="wait")
            assert waiting.state is OperationState.WAITING
            server.kill()
            await until(lambda: has_missed(a, 15), "five leases have passed")
            await anyio.to_thread.run_sync(server.start)
            await until(lambda: is_in(a, "held", OperationState.RUNNING), "it runs still, and has a record")
            assert await is_in(a, waiting.id, OperationState.WAITING)
            await until(lambda: is_cancelled(a, "other"), "the other worker is reached again")
            await until(lambda: is_cancelled(a, "held"), "the other worker is reached again")
            await until(lambda: is_in(a, waiting.id, OperationState.RUNNING), "the one that waited has its turn")
            await until(lambda: logged(caplog, "can be reached again"), "the next sign of life")
        assert "given up" not in caplog.text + "".join(b.log)
    assert levels(caplog) == {"WARNING": 1, "INFO": 1}
