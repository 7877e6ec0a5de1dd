"""The cost of operations: `python -m benchmarks.operations` in one process, with `--redis` across workers.

Requests are in flight under the middleware, and idle. `cancel` is from the call to the end of the request, its cleanup
and its answer included. `longest block` is the longest time in which the event loop did nothing else while all requests
were listed, counted and stopped; the garbage collector, whose pauses grow with the whole process, is off then. All of it is CPU time of the process, so that other load on the machine does not count.
Medians, unless it is said otherwise; MISSED marks a figure that misses its target.
"""

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI

from benchmarks import _operations_redis
from benchmarks._asgi import Exchange, forever, loops, run_on, start
from cancelable_deps import Cancelable, RequestCancelationMiddleware, configure
from cancelable_deps.operations import Operations


class Figure(NamedTuple):
    """One line of the table."""

    name: str
    value: float
    unit: str
    target: float | None = None
    is_least: bool = False
    """Whether the target is the least that the value may be."""

    @property
    def is_missed(self) -> bool:
        if self.target is None:
            return False
        return self.value < self.target if self.is_least else self.value > self.target


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--running", type=int, default=100_000, help="requests in flight")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--loop", choices=["asyncio", "uvloop", "both"], default="both")
    parser.add_argument("--redis", action="store_true", help="across workers, with a Redis of its own")
    parser.add_argument("--share", type=float, default=1.0, help="with --redis: the part of the work that is done")
    options = parser.parse_args(arguments)
    if options.redis:
        _operations_redis.main(options.share)
        return
    for loop in loops(options.loop):
        print(f"\n{loop}: {options.running:,} requests in flight, {options.calls:,} calls of each kind")
        for figure in run_on(loop, _measure(options.running, options.calls)):
            print(line(figure), flush=True)


def line(figure: Figure) -> str:
    """Return a line of the table."""
    target = ""
    if figure.target is not None:
        target = f"  {'at least' if figure.is_least else 'at most'} {figure.target:g}"
        target += "  MISSED" if figure.is_missed else "  ok"
    return f"{figure.name:44}{figure.value:12,.3f} {figure.unit:9}{target}"


async def _measure(running: int, calls: int) -> list[Figure]:
    operations = Operations()
    app = _app(operations)
    async with operations:
        figures = [*await _ids(app, operations, calls), *await _starts(operations, calls)]
        configure(listen_after=0)
        tasks = [await _begun(app) for _ in range(running)]
        gc.collect()
        gc.freeze()
        try:
            figures += await _lists(operations)
            figures += await _stops(operations)
        finally:
            gc.unfreeze()
            configure(listen_after=0.005)
        await asyncio.gather(*tasks, return_exceptions=True)
    return figures


def _app(operations: Operations) -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")

    @app.get("/")
    async def handler() -> None:
        await forever()

    return app


async def _begun(app: FastAPI, id: str | None = None) -> asyncio.Task[None]:
    exchange = Exchange()
    if id is not None:
        exchange.scope["headers"].append((b"operation-id", id.encode()))
    task = start(app, exchange)
    await asyncio.sleep(0)
    return task


async def _ids(app: FastAPI, operations: Operations, calls: int) -> list[Figure]:
    """Measure what is done with one id."""
    cancels, looks = [], []
    for number in range(calls):
        task = await _begun(app, f"id-{number}")
        await asyncio.sleep(0)
        looks.append(await _seconds(lambda id=f"id-{number}": operations.get(id)))  # type: ignore[misc]
        cancels.append(await _seconds(lambda id=f"id-{number}": operations.cancel(id)))  # type: ignore[misc]
        await task
    local = operations.worker.local
    scopes = [{"type": "http"} for _ in range(calls)]
    began = time.process_time()
    for number, scope in enumerate(scopes):
        local.arrive(f"fresh-{number}", scope)
        local.depart(f"fresh-{number}", scope)
    register = (time.process_time() - began) / calls
    return [
        Figure("register an id, and forget it", register * 1e6, "us"),
        Figure("look an id up", statistics.median(looks) * 1e6, "us"),
        Figure("cancel by id, end to end", statistics.median(cancels) * 1e3, "ms", 1),
        Figure("cancel by id, end to end, p99", _p99(cancels) * 1e3, "ms"),
    ]


async def _starts(operations: Operations, calls: int) -> list[Figure]:
    async def work(cancel: Cancelable) -> None: ...

    began = time.process_time()
    accepted = [await _seconds(lambda: _accepted(operations, work)) for _ in range(calls)]
    elapsed = time.process_time() - began
    return [
        Figure("start to 202", statistics.median(accepted) * 1e3, "ms", 2),
        Figure("starts a second", calls / elapsed, "", 5000, is_least=True),
    ]


async def _accepted(operations: Operations, work: Callable[[Cancelable], Awaitable[None]]) -> None:
    (await operations.start(work)).accepted()


async def _lists(operations: Operations) -> list[Figure]:
    conditions: dict[str, dict[str, Any]] = {
        "list 100": {},
        "list 100, by route": {"route": "/"},
        "list 100, by owner and label": {"owner": "ann", "labels": {"stage": "render"}},
        "list 1,000, by age": {"older_than": 0, "limit": 1000},
        "count": {"limit": 0},
    }
    figures = []
    for name, options in conditions.items():
        await operations.list(**options)
        times = [await _seconds(lambda options=options: operations.list(**options)) for _ in range(5)]  # type: ignore[misc]
        figures.append(Figure(name, statistics.median(times) * 1e3, "ms", 50))
    blocked = await _longest_block(lambda: operations.list(route="/", limit=1000))
    return [*figures, Figure("list: longest block of the loop", blocked * 1e3, "ms", 20)]


async def _stops(operations: Operations) -> list[Figure]:
    began = time.process_time()
    blocked = await _longest_block(lambda: operations.cancel_all(route="/"))
    return [
        Figure("cancel_all", time.process_time() - began, "s"),
        Figure("cancel_all: longest block of the loop", blocked * 1e3, "ms", 20),
    ]


async def _seconds(call: Callable[[], Awaitable[object]]) -> float:
    began = time.process_time()
    await call()
    return time.process_time() - began


async def _longest_block(call: Callable[[], Awaitable[object]]) -> float:
    """Return the longest time between two turns of another task, while the call runs."""
    longest = 0.0

    async def look() -> None:
        nonlocal longest
        last = time.process_time()
        while True:
            await asyncio.sleep(0)
            now = time.process_time()
            longest, last = max(longest, now - last), now

    gc.disable()
    looking = asyncio.get_running_loop().create_task(look())
    await asyncio.sleep(0)
    try:
        await call()
    finally:
        gc.enable()
    looking.cancel()
    return longest


def _p99(samples: Sequence[float]) -> float:
    return sorted(samples)[int(len(samples) * 0.99)]


if __name__ == "__main__":
    main()
