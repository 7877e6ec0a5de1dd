"""Operations of workers in other processes that are killed, or stand still."""

from __future__ import annotations

import signal
import time

import anyio
import pytest

from cancelable_deps.operations import Operations, OperationState
from cancelable_deps.operations.errors import OperationLost

from .machine import scaled
from .redis_server import RedisServer
from .redis_workers import MARKS, WorkerProcess, forever, opened, worker_process
from .stores import until

pytest_plugins = ["tests.redis_fixtures"]
pytestmark = [*MARKS, pytest.mark.real]


async def state_of(operations: Operations, id: str) -> OperationState | None:
    found = await operations.get(id)
    return None if found is None else found.state


async def is_in(operations: Operations, id: str, state: OperationState) -> bool:
    return await state_of(operations, id) is state


async def test_a_worker_that_is_killed_leaves_nothing(own_redis: RedisServer, anyio_backend: str) -> None:
    lease = 3
    async with opened(own_redis.url, lease=lease, result_ttl=2, memory=2) as [a]:
        async with worker_process(own_redis.url, lease=lease, backend=anyio_backend) as b:
            ids = [f"op-{number}" for number in range(100)]
            for id in ids:
                await b.say("start", id, "-")
            keys = [f"key-{number}" for number in range(5)]
            for key in keys:
                await b.say("start", f"holder-{key}", key)
            # One that waits in the worker that dies, before those that live.
            await b.say("start", "dead-waiter", keys[0])
            await b.hears("started", count=106)
            waiting = [await a.start(forever, id=f"waiter-{key}", key=key, when_busy="wait") for key in keys]
            assert {each.state for each in waiting} == {OperationState.WAITING}
            b.process.kill()
            killed = time.monotonic()
            lost: set[str] = set()

            async def are_lost() -> bool:
                # Asked for by their ids, as those that have ended are forgotten soon.
                for id in [*ids, *(f"holder-{key}" for key in keys), "dead-waiter"]:
                    if id not in lost and await is_in(a, id, OperationState.LOST):
                        lost.add(id)
                return len(lost) == 106

            await until(are_lost, "its operations are lost")
            took = time.monotonic() - killed
            print(f"\n106 operations lost after {took:.1f} s with a lease of {lease} s")
            assert took < scaled(lease + 5)
            for each in waiting:
                await until(lambda id=each.id: is_in(a, id, OperationState.RUNNING), "the one that waited runs")  # type: ignore[misc]
        dead = next(each["ready"] for each in b.heard if "ready" in each)

        async def is_forgotten() -> bool:
            return not [name for name in own_redis.names() if dead in name and "dead:" not in name]

        await until(is_forgotten, "all that it had is given up")
        for each in waiting:
            await a.cancel(each.id, wait=10)

    async def is_nothing_left() -> bool:
        # What protects from workers that come back, and generations that must not go back.
        return {name.removeprefix("{app}:") for name in own_redis.names()} == {"gen", f"dead:{dead}"}

    try:
        await until(is_nothing_left, "nothing is left")
    finally:
        print(own_redis.names())
    for name in own_redis.names():
        assert int(own_redis.command("PTTL", name)[1:]) > 0, f"{name} stays for ever"


async def test_those_that_wait_keep_their_order_when_holders_are_killed(
    own_redis: RedisServer, anyio_backend: str
) -> None:
    url, lease = own_redis.url, 2
    async with (
        opened(url, lease=lease) as [a],
        worker_process(url, lease=lease, backend=anyio_backend) as b,
        worker_process(url, lease=lease, backend=anyio_backend) as c,
    ):
        for worker, id in ((b, "1"), (c, "2"), (b, "3"), (c, "4"), (b, "5")):
            await worker.say("start", id, "key")
            await worker.hears("started", id)
        last = await a.start(forever, id="6", key="key", when_busy="wait")
        assert last.state is OperationState.WAITING
        b.process.kill()
        killed = time.monotonic()
        await until(lambda: is_in(a, "2", OperationState.RUNNING), "the first of the living runs")
        print(f"\nruns {time.monotonic() - killed:.1f} s after the holder was killed, with a lease of {lease} s")
        assert [await state_of(a, id) for id in ("4", "6")] == [OperationState.WAITING] * 2
        await a.cancel("2", wait=10)
        await until(lambda: is_in(a, "4", OperationState.RUNNING), "the second of the living runs")
        assert await state_of(a, "6") is OperationState.WAITING
        c.process.kill()
        await until(lambda: is_in(a, "6", OperationState.RUNNING), "the last one runs")


async def test_a_worker_that_stands_still_for_longer_than_its_lease_is_given_up(
    own_redis: RedisServer, anyio_backend: str
) -> None:
    url, lease = own_redis.url, 2
    async with (
        opened(url, lease=lease) as [a],
        worker_process(url, lease=lease, result_ttl=60, backend=anyio_backend) as b,
    ):
        await stands_still_and_is_given_up(a, b, 0)


async def test_a_pause_of_5_s_costs_nothing_and_one_of_20_s_the_background_work(
    own_redis: RedisServer, anyio_backend: str
) -> None:
    url, lease = own_redis.url, 15
    async with (
        opened(url, lease=lease) as [a],
        worker_process(url, lease=lease, result_ttl=60, backend=anyio_backend) as b,
    ):
        await b.say("track", "block")
        await b.hears("running", "block")
        await b.say("start", "early", "-")
        await b.hears("started", "early")
        b.process.send_signal(signal.SIGSTOP)
        await anyio.sleep(5)
        for id in ("block", "early"):
            assert (await a.cancel(id, wait=0.5)).outcome == "sent"
        b.process.send_signal(signal.SIGCONT)
        await b.hears("ended", "block")
        await b.hears("ended", "early")
        assert await is_in(a, "early", OperationState.CANCELLED)
        assert "given up" not in "".join(b.log)
        await stands_still_and_is_given_up(a, b, 20)


async def stands_still_and_is_given_up(a: Operations, b: WorkerProcess, seconds: float) -> None:
    """Stop a worker until it was given up, and ``seconds`` at least: what it does then is refused."""
    for line in (("start", "one", "key"), ("late", "late")):
        await b.say(*line)
        await b.hears("started", line[1])
    waiting = await a.start(forever, key="key", when_busy="wait")
    b.process.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    for id in ("one", "late"):
        await until(lambda id=id: is_in(a, id, OperationState.LOST), f"{id} is lost", ceiling=60)  # type: ignore[misc]
    print(f"\nlost {time.monotonic() - stopped:.1f} s after the stop")
    await anyio.sleep(max(0.0, seconds - (time.monotonic() - stopped)))
    # Its result comes before it can know that it was given up.
    await b.say("release", "late")
    b.process.send_signal(signal.SIGCONT)
    await b.hears("ended", "one")
    await b.hears("ended", "late")
    await until(lambda: was_said(b, "this worker was given up"), "it knows that it was given up")
    await until(lambda: was_said(b, "the result of the operation late is refused"), "its result is refused")
    assert [await state_of(a, id) for id in ("one", "late")] == [OperationState.LOST] * 2
    with pytest.raises(OperationLost):
        await a.result("late")
    await until(lambda: is_in(a, waiting.id, OperationState.RUNNING), "the one that waited runs")
    # It goes on under another name.
    await b.say("start", "two", "-")
    await b.hears("started", "two")
    assert (await a.cancel("two", wait=10)).outcome == "cancelled"


async def was_said(worker: WorkerProcess, text: str) -> bool:
    return text in "".join(worker.log)
