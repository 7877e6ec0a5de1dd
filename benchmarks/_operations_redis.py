"""How fast operations are across workers, and what an idle one costs: `python -m benchmarks.operations --redis`.

It starts a Redis of its own, and the other workers in processes of their own. The targets stand beside the figures.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
from anyio.streams.buffered import BufferedByteReceiveStream

from cancelable_deps import Cancelable
from cancelable_deps.operations import Operations, RedisBackend
from cancelable_deps.operations.exchange import Exchange
from tests.redis_server import RedisServer, redis_server

Row = tuple[str, str, str]
LISTED = 100_000


async def forever(cancel: Cancelable) -> None:
    await anyio.sleep_forever()


async def nothing(cancel: Cancelable) -> None: ...


def milliseconds(times: list[float]) -> str:
    cuts = statistics.quantiles(times, n=100)
    return f"p50 {cuts[49] * 1000:.2f} ms, p99 {cuts[98] * 1000:.2f} ms"


async def timed(call: Callable[[int], Awaitable[Any]], count: int) -> list[float]:
    times = []
    for number in range(count):
        begin = time.perf_counter()
        await call(number)
        times.append(time.perf_counter() - begin)
    return times


def opened(url: str) -> Operations:
    return Operations(RedisBackend(url), background_grace=0)


async def work_for_others(url: str, count: int) -> None:
    """Be a worker: run blocks, and tell when they run."""
    async with opened(url) as operations, anyio.create_task_group() as tasks:

        async def block(number: int) -> None:
            try:
                async with operations.track(id=f"{os.getpid()}-{number}"):
                    await anyio.sleep_forever()
            except Exception:
                return

        for number in range(count):
            tasks.start_soon(block, number)
        await anyio.lowlevel.checkpoint()
        sys.stdout.write(f"{operations.worker.local.worker}\n")
        sys.stdout.flush()
        await anyio.to_thread.run_sync(sys.stdin.readline)
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def other_worker(url: str, backend: str, count: int) -> AsyncIterator[anyio.abc.Process]:
    """Another worker, in a process of its own, which runs ``count`` blocks."""
    command = [sys.executable, "-m", "benchmarks._operations_redis", "--worker", url, backend, str(count)]
    async with await anyio.open_process(command, stderr=None) as process:
        assert process.stdout
        await BufferedByteReceiveStream(process.stdout).receive_until(b"\n", 1000)
        try:
            yield process
        finally:
            # In good order: nobody waits then for the answers of a worker that is dead.
            assert process.stdin
            await process.stdin.send(b"end\n")
            await process.wait()


async def known(exchange: Exchange, count: int) -> None:
    while len(exchange.alive) < count:  # noqa: ASYNC110 - nothing tells of it
        await anyio.sleep(0.05)


async def cancels(url: str, backend: str, count: int) -> Row:
    async with opened(url) as here, other_worker(url, backend, count) as other:
        await known(here.worker.exchange, 2)
        outcomes = []

        async def cancel(number: int) -> None:
            outcomes.append((await here.cancel(f"{other.pid}-{number}", wait=10)).outcome)

        times = await timed(cancel, count)
    lost = count - outcomes.count("cancelled")
    target = "p50 5 ms, p99 50 ms" if backend == "asyncio" else "p50 12 ms, p99 50 ms"
    return f"cancel across workers, {backend}", f"{milliseconds(times)}; not cancelled {lost} of {count}", target


async def enters(url: str, backend: str, count: int) -> Row:
    async with opened(url) as here:
        store = here.backend

        async def enter(number: int) -> None:
            await store.enter("key", str(number), limit=1, queue=0, latest=True, waits=False)

        times = []
        for number in range(count):
            times += await timed(lambda _, number=number: enter(number), 1)  # type: ignore[misc]
            await store.leave("key", str(number))
    return f"enter, {backend}", milliseconds(times), "p50 1 ms"


async def starts(url: str, backend: str, count: int) -> list[Row]:
    async with opened(url) as here:
        times = await timed(lambda _: here.start(nothing), 200)
        begin, left = time.perf_counter(), iter(range(count))

        async def some() -> None:
            for _ in left:
                await here.start(nothing)

        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(some)
        rate = count / (time.perf_counter() - begin)
        await here.worker.background.wait_empty()
        with_ends = count / (time.perf_counter() - begin)
    found = f"{rate:,.0f} a second; {with_ends:,.0f} until all have ended"
    return [
        (f"start to 202, {backend}", milliseconds(times), "p50 2 ms"),
        (f"starts of one worker, 50 at a time, {backend}", found, "5,000 a second"),
    ]


async def idle(url: str, backend: str, seconds: float) -> Row:
    async with opened(url):
        await anyio.sleep(1)
        begin, used = time.perf_counter(), time.process_time()
        await anyio.sleep(seconds)
        share = (time.process_time() - used) / (time.perf_counter() - begin)
    return f"CPU of an idle worker, {backend}", f"{share * 100:.3f} %", "0.1 %"


async def lists(url: str, backend: str, count: int) -> Row:
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(opened(url))
        for _ in range(4):
            await stack.enter_async_context(other_worker(url, backend, count // 4))
        await known(here.worker.exchange, 5)
        answers = []

        async def ask(number: int) -> None:
            answers.append(await here.list(limit=100, timeout=10))

        times = await timed(ask, 20)
    assert {answer.total for answer in answers} == {count}
    return f"list 100 of {count:,} on 4 workers, {backend}", milliseconds(times), "p50 50 ms"


async def measured(server: RedisServer, backend: str, share: float) -> list[Row]:
    url = server.url
    rows = [
        await cancels(url, backend, max(50, int(1000 * share))),
        await enters(url, backend, max(50, int(1000 * share))),
        *await starts(url, backend, max(200, int(10_000 * share))),
        await idle(url, backend, max(2, 15 * share)),
        await lists(url, backend, max(400, int(LISTED * share))),
    ]
    return rows


def main(share: float = 1.0) -> None:
    """Print the table.

    :param share: the part of the work that is done, for a quick look.
    """
    logging.getLogger("cancelable_deps").setLevel(logging.ERROR)
    with redis_server() as server:
        print("| what | measured | target |\n| --- | --- | --- |")
        for backend in ("asyncio", "trio"):
            for row in anyio.run(measured, server, backend, share, backend=backend):
                print("| " + " | ".join(row) + " |")
                sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="the part of the work that is done")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        url_, backend_, count_ = arguments.worker
        anyio.run(work_for_others, url_, int(count_), backend=backend_)
    else:
        main(arguments.share)
