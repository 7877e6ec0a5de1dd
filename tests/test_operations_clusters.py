"""Operations over a Redis Cluster, and over a master that Sentinels watch, which die."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest

from cancelable_deps.operations import Operations, RedisBackend

from .redis_groups import Sentinels, cluster_client, redis_cluster, redis_sentinels, sentinel_client
from .redis_server import RedisServer
from .redis_workers import (
    LEASE,
    MARKS,
    Work,
    WorkerProcess,
    cancelled_or_none,
    forever,
    is_cancelled,
    know_each_other,
    none_is_lost,
    worker_process,
)
from .stores import until

pytest_plugins = ["tests.redis_fixtures"]
pytestmark = [
    *MARKS,
    pytest.mark.real,
    pytest.mark.parametrize(
        ("library", "anyio_backend"), [("redis", "asyncio"), ("coredis", "asyncio"), ("coredis", "trio")], ids=str
    ),
]


@pytest.fixture
def cluster() -> Iterator[list[RedisServer]]:
    with redis_cluster() as servers:
        yield servers


@pytest.fixture
def sentinels() -> Iterator[Sentinels]:
    with redis_sentinels() as sentinels:
        yield sentinels


@asynccontextmanager
async def opened(count: int, client: Any, lease: float = 3) -> AsyncIterator[list[Operations]]:
    """Several workers, each with a client that ``client`` makes."""
    async with AsyncExitStack() as stack:
        workers = []
        for _ in range(count):
            backend = RedisBackend(client=await stack.enter_async_context(client()), lease=lease)
            workers.append(await stack.enter_async_context(Operations(backend, background_grace=0)))
        yield workers


async def test_a_cluster_whose_master_dies(library: str, cluster: list[RedisServer]) -> None:
    async with opened(2, lambda: cluster_client(library, cluster[0].port)) as [a, b]:
        await know_each_other(a, b)
        first = await a.start(forever)
        # A node that stands still for a second is given up by the others, on a busy machine at any time.
        await until(lambda: is_cancelled(b, first.id), "background work is reached")
        second = await a.start(forever, id="second")
        owner = next(each for each in cluster[:3] if each.names())
        owner.kill()
        await until(lambda: is_cancelled(b, second.id), "the replica has taken over")
        third = await b.start(forever)
        # The other one may still look for the new master by its reads.
        await until(lambda: is_cancelled(a, third.id), "the other one reads again")


async def test_a_cluster_that_comes_late(library: str, cluster: list[RedisServer]) -> None:
    for each in cluster:
        each.pause()
    async with opened(1, lambda: cluster_client(library, cluster[0].port)) as [a]:
        for each in cluster:
            each.resume()

        async def is_started() -> bool:
            return await started_or_none(a) is not None

        await until(is_started, "it is connected")


async def started_or_none(operations: Operations) -> str | None:
    try:
        return (await operations.start(forever)).id
    except Exception:
        return None


async def of_sentinels(
    sentinels: Sentinels, library: str, backend: str, disturb: Any, what: str, *, gives_up: bool = False
) -> None:
    """Count the acknowledged cancels that are lost while ``disturb(worker)`` disturbs the servers.

    :param gives_up: whether a worker that lives may be given up meanwhile: its background work is ``lost`` then, and
        nobody knows its requests.
    """
    ends = ("cancelled", "lost") if gives_up else ("cancelled",)
    others = ("unavailable", "unknown") if gives_up else ("unavailable",)
    ids = [f"job-{number}" for number in range(300)]
    url = f"sentinel:{library}:{','.join(map(str, sentinels.ports))}"
    async with (
        opened(2, lambda: sentinel_client(library, sentinels.ports), LEASE) as [a, c],
        worker_process(url, lease=LEASE, backend=backend) as b,
    ):
        await b.say("track", *ids)
        await b.hears("running", count=300)
        kept = await c.start(forever, id="kept", key="key", when_busy="refuse")

        async def know_it() -> bool:
            return len(a.worker.exchange.alive) == len(c.worker.exchange.alive) == 3

        await until(know_it, "the workers know each other")
        await none_is_lost(f"{what}, {library}, {backend}", a, b, ids, disturb(b), 6, others)

        async def is_moved() -> bool:
            return sentinels.master_port() == sentinels.replica.port

        await until(is_moved, "the replica is the master", ceiling=60)
        await until(
            lambda: ends_as(a, kept.id, ends), "its record is there, or there again, and background work is reached"
        )
        await b.say("start", "new", "key")
        await b.hears("started", "new")
        await until(lambda: is_cancelled(a, "new"), "background work is reached")


async def ends_as(operations: Operations, id: str, outcomes: tuple[str, ...]) -> bool:
    return await cancelled_or_none(operations, id) in outcomes


async def test_no_acknowledged_cancel_is_lost_when_a_master_of_sentinels_dies(
    library: str, anyio_backend: str, sentinels: Sentinels
) -> None:
    def disturb_by(b: WorkerProcess) -> Work:
        async def disturb() -> None:
            await anyio.sleep(0.7)
            await b.say("busy", 0.5)
            # The replica takes over without the last of what was acknowledged.
            sentinels.replica.pause()
            await anyio.sleep(0.3)
            sentinels.master.kill()
            sentinels.replica.resume()

        return disturb

    await of_sentinels(sentinels, library, anyio_backend, disturb_by, "a master dies, its replica 0.3 s behind")


async def test_no_acknowledged_cancel_is_lost_when_a_master_of_sentinels_stands_still(
    library: str, anyio_backend: str, sentinels: Sentinels
) -> None:
    def disturb_by(b: WorkerProcess) -> Work:
        async def disturb() -> None:
            await anyio.sleep(0.7)
            sentinels.master.pause()

            async def is_moved() -> bool:
                return sentinels.master_port() == sentinels.replica.port

            await until(is_moved, "the replica is the master", ceiling=60)
            # For some seconds there are two masters, until the sentinels make this one a replica. A worker that talks
            # to this one gives the new one no sign of life, which may give it up: its work is stopped, and `lost`.
            sentinels.master.resume()

        return disturb

    what = "a master stands still, and comes back"
    await of_sentinels(sentinels, library, anyio_backend, disturb_by, what, gives_up=True)
