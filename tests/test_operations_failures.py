"""Operations over a Redis that is killed, stopped or cut off, and workers in other processes that die or stop."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import coredis
import httpx
import pytest
import redis.asyncio

from cancelable_deps.operations import Operations, OperationState, OperationsUnavailable, RedisBackend

from .machine import scaled
from .redis_server import RedisServer, free_port, redis_server
from .redis_workers import forever, know_each_other, opened, worker_process
from .stores import until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.real,
    # coredis leaves the streams of connections that break to the garbage collector.
    pytest.mark.filterwarnings("ignore:Exception ignored in.*MemoryObject:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]
PERSISTENCE = {
    "nothing": ("--save", "", "--appendonly", "no"),
    "all but a second": ("--save", "", "--appendonly", "yes", "--appendfsync", "everysec"),
}
CANCELS = 300
ACKNOWLEDGED = ("cancelled", "stopping", "sent")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Find the streams that coredis has left here, and not in another test."""
    yield
    gc.collect()


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


async def cancelled_during(a: Operations, ids: list[str], seconds: float) -> dict[str, str]:
    """Cancel operations one after the other, evenly, without waiting for each; and return what was answered."""
    answers: dict[str, str] = {}

    async def cancel(id: str) -> None:
        try:
            answers[id] = (await a.cancel(id, wait=1.0)).outcome
        except OperationsUnavailable:
            answers[id] = "unavailable"

    async with anyio.create_task_group() as tasks:
        for id in ids:
            tasks.start_soon(cancel, id)
            await anyio.sleep(seconds / len(ids))
    return answers


@pytest.mark.parametrize("kept", PERSISTENCE)
async def test_no_acknowledged_cancel_is_lost_when_redis_is_killed_and_the_worker_busy(
    kept: str, anyio_backend: str
) -> None:
    ids = [f"job-{number}" for number in range(CANCELS)]
    with redis_server(*PERSISTENCE[kept]) as server:
        async with opened(server.url, 2) as [a, c], worker_process(server.url, backend=anyio_backend) as b:
            await b.say("track", *ids)
            await b.hears("running", count=CANCELS)

            async def knows_it() -> bool:
                return len(a.worker.exchange.alive) == len(c.worker.exchange.alive) == 3

            await until(knows_it, "the workers know each other")

            async def disturb() -> None:
                await anyio.sleep(0.7)
                await b.say("busy", 0.5)
                await anyio.sleep(0.3)
                server.kill()
                await anyio.sleep(0.5)
                await anyio.to_thread.run_sync(server.start)

            answers: dict[str, str] = {}
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(disturb)
                answers = await cancelled_during(a, ids, 3)
            acknowledged = {id for id, outcome in answers.items() if outcome in ACKNOWLEDGED}
            counted = Counter(answers.values())
            print(f"\nkept: {kept}, {anyio_backend}: {dict(counted)}, acknowledged {len(acknowledged)}")
            assert len(acknowledged) > CANCELS / 4
            assert set(counted) <= {*ACKNOWLEDGED, "unavailable"}

            async def are_all_ended() -> bool:
                return acknowledged <= b.ended.keys()

            try:
                await until(are_all_ended, "all that were acknowledged have ended")
            finally:
                print(f"lost: {len(acknowledged - b.ended.keys())} of {len(acknowledged)}")


async def test_a_redis_that_is_stopped_for_six_seconds_costs_nothing(
    server: RedisServer, anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(server.url, lease=15) as [a], worker_process(server.url, lease=15, backend=anyio_backend) as b:
        await b.say("start", "one", "-")
        await b.hears("started")
        operation = await a.start(forever, id="local")
        server.pause()
        begin = time.monotonic()
        # What runs here is stopped at once.
        assert (await a.cancel(operation.id, wait=scaled(5))).outcome in ("cancelled", "stopping")
        with pytest.raises(OperationsUnavailable):
            await a.cancel("one")
        await anyio.sleep(max(0.0, 6 - (time.monotonic() - begin)))
        server.resume()

        async def is_stopped() -> bool:
            try:
                return (await a.cancel("one", wait=2)).outcome == "cancelled"
            except OperationsUnavailable:
                return False

        await until(is_stopped, "the other worker is reached again")
    assert "given up" not in caplog.text + "".join(b.log)


async def test_calls_that_redis_holds_up_are_unavailable_and_nobody_is_given_up(server: RedisServer) -> None:
    async with opened(server.url, 2, lease=2) as [a, b]:
        await know_each_other(a, b)
        operation = await b.start(forever)
        server.command("CLIENT", "PAUSE", "5000", "ALL")
        with pytest.raises(OperationsUnavailable):
            await a.start(forever)

        async def is_back() -> bool:
            try:
                return (await a.cancel(operation.id, wait=2)).outcome == "cancelled"
            except OperationsUnavailable:
                return False

        await until(is_back, "it is stopped after the pause")


async def test_a_worker_that_is_killed_leaves_nothing(server: RedisServer, anyio_backend: str) -> None:
    lease = 3
    async with opened(server.url, lease=lease, result_ttl=2) as [a]:
        async with worker_process(server.url, lease=lease, backend=anyio_backend) as b:
            ids = [f"op-{number}" for number in range(100)]
            for id in ids:
                await b.say("start", id, "-")
            await b.say("start", "holder", "key")
            await b.hears("started", count=101)
            waiting = await a.start(forever, id="waiter", key="key", when_busy="wait")
            assert waiting.state is OperationState.WAITING
            b.process.kill()
            killed = time.monotonic()

            async def are_lost() -> bool:
                found = [await a.get(id) for id in ("op-0", "op-99", "holder")]
                return all(each is not None and each.state is OperationState.LOST for each in found)

            # Asked for by their ids, as those that have ended are forgotten soon.
            await until(are_lost, "its operations are lost")
            took = time.monotonic() - killed
            print(f"\nlost after {took:.1f} s with a lease of {lease} s")
            assert took < scaled(lease + 5)

            async def runs() -> bool:
                found = await a.get("waiter")
                return found is not None and found.state is OperationState.RUNNING

            await until(runs, "the one that waited runs")
        dead = next(each["ready"] for each in b.heard if "ready" in each)

        async def is_forgotten() -> bool:
            return "{app}:held:" + dead not in server.names()

        await until(is_forgotten, "all that it had is given up")
        await a.cancel("waiter", wait=10)

    async def is_nothing_left() -> bool:
        kept = ("gen", "log", "dead:", "workers", "identities", "since")
        return not [key for key in server.names() if not key.startswith(tuple("{app}:" + each for each in kept))]

    try:
        await until(is_nothing_left, "nothing is left")
    finally:
        print(server.names())
    for key in server.names():
        assert int(server.command("PTTL", key)[1:]) > 0, f"{key} stays for ever"


async def test_a_worker_that_stands_still_for_longer_than_its_lease_is_given_up(
    server: RedisServer, anyio_backend: str
) -> None:
    lease = 2
    async with (
        opened(server.url, lease=lease) as [a],
        worker_process(server.url, lease=lease, backend=anyio_backend) as b,
    ):
        await b.say("start", "one", "key")
        await b.hears("started")
        waiting = await a.start(forever, key="key", when_busy="wait")
        b.process.send_signal(signal.SIGSTOP)

        async def is_lost() -> bool:
            found = await a.get("one")
            return found is not None and found.state is OperationState.LOST

        await until(is_lost, "its operation is lost")
        b.process.send_signal(signal.SIGCONT)
        await b.hears("ended", "one")
        found = await a.get("one")
        assert found is not None
        assert found.state is OperationState.LOST

        async def runs() -> bool:
            now = await a.get(waiting.id)
            return now is not None and now.state is OperationState.RUNNING

        await until(runs, "the one that waited runs")
        assert "given up" in "".join(b.log)
        # It goes on under another name.
        await b.say("start", "two", "-")
        await b.hears("started", "two")
        assert (await a.cancel("two", wait=10)).outcome == "cancelled"


async def test_a_proxy_that_cuts_and_delays(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    proxy = Proxy(server.port)
    async with anyio.create_task_group() as tasks:
        url = await tasks.start(proxy.run)
        async with opened(url, lease=3) as [a], opened(server.url, lease=3) as [b]:
            await know_each_other(a, b)
            for number in range(10):
                proxy.delay = 0.01 * (number % 3)
                ids = [f"op-{number}-{each}" for each in range(3)]
                for id in ids:
                    await retried(a, id)
                proxy.cut()
                for id in ids:
                    outcome = await until(lambda id=id: cancelled_or_none(b, id), f"{id} is cancelled")  # type: ignore[misc]
                    assert outcome == "cancelled"
        tasks.cancel_scope.cancel()


async def retried(operations: Operations, id: str) -> None:
    async def started() -> bool:
        try:
            await operations.start(forever, id=id)
        except OperationsUnavailable:
            return False
        return True

    await until(started, f"{id} is started")


async def cancelled_or_none(operations: Operations, id: str) -> str | None:
    try:
        outcome = (await operations.cancel(id, wait=2)).outcome
    except OperationsUnavailable:
        return None
    return outcome if outcome not in ("sent", "stopping") else None


class Proxy:
    """Between a worker and Redis: passes bytes on in parts, late, and cuts connections in the middle of an answer."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.delay = 0.0
        self._scopes: set[anyio.CancelScope] = set()

    def cut(self) -> None:
        for scope in self._scopes:
            scope.cancel()

    async def run(self, *, task_status: anyio.abc.TaskStatus[str]) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        async with listener:
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            task_status.started(f"redis://127.0.0.1:{port}/0")
            await listener.serve(self._connected)

    async def _connected(self, client: anyio.abc.SocketStream) -> None:
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            async with (
                client,
                await anyio.connect_tcp("127.0.0.1", self.port) as redis,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(self._pass_on, client, redis, scope)
                tasks.start_soon(self._pass_on, redis, client, scope)
        self._scopes.discard(scope)

    async def _pass_on(self, source: Any, goal: Any, scope: anyio.CancelScope) -> None:
        try:
            while True:
                data = await source.receive(1000)
                await anyio.sleep(self.delay)
                await goal.send(data)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            scope.cancel()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_uvicorn_workers_stop_each_others_requests(server: RedisServer) -> None:
    port, count = free_port(), 200
    command = [
        "uvicorn",
        "tests.operations_workers_app:app",
        "--workers",
        "3",
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    command += ["--timeout-worker-healthcheck", "60"]
    environment = {**os.environ, "REDIS_URL_OF_TEST": server.url}
    async with (
        await anyio.open_process(
            [sys.executable, "-m", *command], env=environment, stderr=None, stdout=None
        ) as process,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=httpx.Limits()) as client,
    ):
        try:

            async def are_there() -> bool:
                try:
                    return len((await client.get("/worker")).json()) == 4
                except httpx.HTTPError:
                    return False

            await until(are_there, "three workers know each other")
            statuses: list[int] = []
            pairs: set[str] = set()
            times: list[float] = []

            async def wait(number: int) -> None:
                # A connection each, so that the workers share them.
                async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as own:
                    answer = await own.get("/wait", headers={"operation-id": f"r{number}"} if number % 2 else {})
                    statuses.append(answer.status_code)

            async def stop(id: str) -> None:
                async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as own:
                    begin = time.perf_counter()
                    pid, outcome = (await own.post(f"/stop/{id}")).json()
                    times.append(time.perf_counter() - begin)
                    pairs.add(pid)
                    assert outcome == "cancelled"

            async with anyio.create_task_group() as tasks:
                for number in range(count):
                    tasks.start_soon(wait, number)

                async def all_ids() -> list[str] | None:
                    # A connection of its own: one that is kept may be closed meanwhile.
                    async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as own:
                        ids: list[str] = (await own.get("/ids")).json()
                    return ids if len(ids) == count else None

                for id in await until(all_ids, "all requests run"):
                    await stop(id)
            assert Counter(statuses) == {499: count}
            assert len(pairs) == 3
            times.sort()
            print(
                f"\nPOST to cancelled: p50 {times[count // 2] * 1000:.1f} ms, p99 {times[-count // 100] * 1000:.1f} ms"
            )
        finally:
            process.send_signal(signal.SIGTERM)
            await process.wait()


@pytest.mark.parametrize(
    ("library", "anyio_backend"), [("redis", "asyncio"), ("coredis", "asyncio"), ("coredis", "trio")], ids=str
)
async def test_a_cluster_whose_master_dies(library: str, cluster: list[RedisServer]) -> None:
    async with AsyncExitStack() as stack:
        workers = []
        for _ in range(2):
            client = cluster_client(library, cluster[0].port)
            if library == "redis":
                stack.push_async_callback(client.aclose)
            operations = Operations(RedisBackend(client=client, lease=3), background_grace=0)
            workers.append(await stack.enter_async_context(operations))
        a, b = workers
        await know_each_other(a, b)
        first = await a.start(forever)
        assert (await b.cancel(first.id, wait=10)).outcome == "cancelled"
        second = await a.start(forever, id="second")
        owner = next(each for each in cluster[:3] if each.names())
        owner.kill()

        async def is_stopped() -> bool:
            return await cancelled_or_none(b, second.id) == "cancelled"

        await until(is_stopped, "the replica has taken over")


def cluster_client(library: str, port: int) -> Any:
    if library == "redis":
        return redis.asyncio.RedisCluster(host="127.0.0.1", port=port)
    return coredis.RedisCluster("127.0.0.1", port)


@pytest.fixture
def cluster() -> Iterator[list[RedisServer]]:
    """Three masters, and a replica of each."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--save", "")
    servers = [RedisServer(*options, port=free_cluster_port()) for _ in range(6)]
    try:
        for server in servers:
            server.start()
        for number, server in enumerate(servers[:3]):
            slots = [number * 5462, min(16383, number * 5462 + 5461)]
            server.command("CLUSTER", "ADDSLOTSRANGE", *map(str, slots))
        for server in servers[1:]:
            server.command("CLUSTER", "MEET", "127.0.0.1", str(servers[0].port))
        eventually(lambda: all("cluster_known_nodes:6" in info(each) for each in servers))
        for master, replica in zip(servers[:3], servers[3:], strict=True):
            id = master.command("CLUSTER", "MYID").decode().split("\r\n")[1]
            eventually(lambda id=id, replica=replica: id in replica.command("CLUSTER", "NODES").decode())
            replica.command("CLUSTER", "REPLICATE", id)
        eventually(lambda: all("cluster_state:ok" in info(each) for each in servers))
        eventually(lambda: all("master_link_status:up" in info(each, "INFO", "replication") for each in servers[3:]))
        yield servers
    finally:
        for server in servers:
            server.close()


def info(server: RedisServer, *command: str) -> str:
    return server.command(*(command or ("CLUSTER", "INFO"))).decode()


def free_cluster_port() -> int:
    # Its bus has a port that is higher by 10,000.
    while (port := free_port()) > 50_000:
        pass
    return port


def eventually(condition: Any) -> None:
    until_ = time.monotonic() + scaled(20)
    while not condition():
        assert time.monotonic() < until_, "the cluster does not come about"
        time.sleep(0.05)
