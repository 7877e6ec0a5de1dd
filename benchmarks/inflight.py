"""The cost of each door while many requests wait, and when all clients hang up at once: `python -m benchmarks.inflight`.

Every measurement has a process of its own. `KiB` is the growth of the resident set per request, from before the first
until all wait and are listened to. `wakes` is the number of wake-ups in an idle second: near 0, nothing polls. Bare
FastAPI does not notice a hang-up, so its tasks are cancelled, which is the least that stopping a request can cost.
`serve us` is the cost of a request that is answered at once while the others wait.

Times depend on the machine and its load. The targets are for a machine that serves a bare request in 40 us. So each
process also times bare requests, just before and after; `scaled` is the figure of such a machine. `growth` is that of the
scaled figure since the smallest number of requests.

The targets: 4 KiB a waiting request over bare, 50 us (scaled) a hang-up, and both costs flat from the smallest number of
requests to the largest.
"""

import argparse
import asyncio
import gc
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil
from starlette.types import ASGIApp

from benchmarks._asgi import Exchange, at_once, forever, loops, run_on, serve, start
from benchmarks._catalogue import everything, named
from benchmarks._variants import BARE, FLOORS, Variant

_KIB_OVER_BARE = 4.0
_HANG_UP = 50.0
_GROWTH = 1.25
"""The limit of `growth`: not 1, because the memory of ten thousand requests fits the caches less well than that of 500."""
_BARE_REQUEST = 40.0
_SERVED = 150


@dataclass(frozen=True)
class Measurement:
    """The figures of one process: per request, but `wakes` per second and `wall` in milliseconds for all requests."""

    kib: float
    idle: float
    wakes: float
    served: float
    served_scaled: float
    hang_up: float
    scaled: float
    wall: float
    bare_request: float
    statuses: str


Block = dict[str, Measurement]
"""The medians at one number of requests, by variant."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.child is not None:
        variant = named(options.child)
        print(json.dumps(asdict(measure(variant, options.loop, options.counts[0], options.idle, options.ballast))))
        return
    variants = _chosen(options.only)
    for loop in loops(options.loop):
        print(f"\n{loop}, handler waits for ever: median of {options.repeats} processes, {options.idle:g} s idle")
        smallest: Block = {}
        for count in options.counts:
            block = _block(variants, loop, count, options)
            smallest = smallest or block
            _print_block(variants, count, block, smallest)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inflight", description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 2_000, 10_000], help="requests in flight")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each measurement")
    parser.add_argument("--idle", type=float, default=1.0, help="seconds to watch the waiting requests")
    parser.add_argument(
        "--ballast", type=int, default=1_500, help="requests that wait before memory is first looked at"
    )
    parser.add_argument("--loop", choices=["asyncio", "uvloop", "both"], default="both")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of the rows wanted (bare always)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _chosen(only: Sequence[str]) -> list[Variant]:
    # Thousands of requests that poll leave no CPU time for anything else.
    hearing = [variant for variant in everything() if variant.hears and not variant.polls]
    wanted = [v for v in hearing if not only or any(part.lower() in v.name.lower() for part in only)]
    return [FLOORS[0], *wanted]


def measure(variant: Variant, loop: str, count: int, idle: float, ballast: int) -> Measurement:
    """Measure in this process, which must be a fresh one, because memory is measured."""
    measured: Measurement = run_on(loop, _measure(variant, count, idle, ballast))
    return measured


async def _measure(variant: Variant, count: int, idle: float, ballast: int) -> Measurement:
    app, process = variant.build(forever), psutil.Process()
    # These requests fill the memory that importing has left free. Otherwise the next thousand would seem to cost nothing.
    earlier = await _in_flight(variant, app, ballast)
    gc.collect()
    empty = process.memory_info().rss
    waiting = await _in_flight(variant, app, count)
    gc.collect()
    full = process.memory_info().rss
    cpu, wakes = await _idle(process, idle)
    await _hang_up(variant, earlier)
    before, served = await _alternating(FLOORS[0].build(at_once), variant.build(at_once))
    hang_up, wall = await _hang_up(variant, waiting)
    after, _ = await _alternating(FLOORS[0].build(at_once))
    bare_request = (before + after) / 2
    return Measurement(
        kib=(full - empty) / 1024 / count,
        idle=cpu * 1e6 / (count + ballast),
        wakes=wakes,
        served=served,
        served_scaled=served * _BARE_REQUEST / before,
        hang_up=hang_up * 1e6 / count,
        scaled=hang_up * 1e6 / count * _BARE_REQUEST / bare_request,
        wall=wall * 1e3,
        bare_request=bare_request,
        statuses=_statuses(waiting),
    )


async def _alternating(*apps: ASGIApp) -> tuple[float, float]:
    """Return the median microseconds for a request of the first and of the last app, which take turns."""
    for app in apps:
        await serve(app, 50, 1)
    rounds = [[await _cost(app) for app in apps] for _ in range(7)]
    return statistics.median(costs[0] for costs in rounds), statistics.median(costs[-1] for costs in rounds)


async def _cost(app: ASGIApp) -> float:
    """Return the microseconds for a request, over so many of them that periodic looks at waiting requests are included."""
    started = time.process_time()
    await serve(app, _SERVED, 1)
    return (time.process_time() - started) / _SERVED * 1e6


Waiting = list[tuple[Exchange, asyncio.Task[None]]]


async def _in_flight(variant: Variant, app: ASGIApp, count: int) -> Waiting:
    """Start requests; return when every door listens."""
    waiting: Waiting = []
    for _ in range(count):
        exchange = Exchange(variant.query)
        waiting.append((exchange, start(app, exchange)))
        if len(waiting) % 100 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(0)
    if variant.hears:
        await _listened_to(waiting)
    return waiting


async def _listened_to(waiting: Waiting) -> None:
    for _ in range(600):
        await asyncio.sleep(0.05)
        if all(exchange.listened_to for exchange, _ in waiting):
            return
    raise RuntimeError("nobody listens to some of the requests")


async def _idle(process: psutil.Process, seconds: float) -> tuple[float, float]:
    """Return the CPU seconds and the wake-ups per second, without the wake-up that ends the measurement."""
    switches, started = process.num_ctx_switches().voluntary, time.process_time()
    await asyncio.sleep(seconds)
    cpu, wakes = time.process_time() - started, process.num_ctx_switches().voluntary - switches - 1
    return cpu / seconds, max(wakes, 0) / seconds


async def _hang_up(variant: Variant, waiting: Waiting) -> tuple[float, float]:
    """Return the CPU and wall-clock seconds from the hang-ups to the end of the last task."""
    ended = asyncio.gather(*(task for _, task in waiting), return_exceptions=True)
    cpu, wall = time.process_time(), time.perf_counter()
    for exchange, task in waiting:
        if variant.hears:
            exchange.hang_up()
        else:
            task.cancel()
    await ended
    return time.process_time() - cpu, time.perf_counter() - wall


def _statuses(waiting: Waiting) -> str:
    counted = Counter(exchange.status for exchange, _ in waiting)
    return ", ".join(f"{number} x {status or 'no response'}" for status, number in counted.items())


def _block(variants: Sequence[Variant], loop: str, count: int, options: argparse.Namespace) -> Block:
    samples: dict[str, list[Measurement]] = {variant.name: [] for variant in variants}
    for _ in range(options.repeats):
        for variant in variants:
            samples[variant.name] += _in_child(variant, loop, count, options)
    return {name: _median(measurements) for name, measurements in samples.items() if measurements}


def _in_child(variant: Variant, loop: str, count: int, options: argparse.Namespace) -> list[Measurement]:
    """Measure once in a fresh process; print a message and return `None` if that fails."""
    flags = [f"--child={variant.name}", f"--loop={loop}", f"--counts={count}"]
    flags += [f"--idle={options.idle}", f"--ballast={options.ballast}"]
    command = [sys.executable, "-m", "benchmarks.inflight", *flags]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        print(f"{variant.name}: failed: {child.stderr.strip().splitlines()[-1]}")
        return []
    return [Measurement(**json.loads(child.stdout.splitlines()[-1]))]


def _median(samples: Sequence[Measurement]) -> Measurement:
    numbers = [asdict(sample) for sample in samples]
    fields = [name for name in numbers[0] if name != "statuses"]
    medians = {name: statistics.median(sample[name] for sample in numbers) for name in fields}
    return Measurement(**medians, statuses=samples[-1].statuses)


def _print_block(variants: Sequence[Variant], count: int, block: Block, smallest: Block) -> None:
    print(f"\n{count:,} requests (a bare request took {block[BARE].bare_request:.0f} us)")
    print(
        f"{'':44}{'KiB':>8}{'over bare':>11}{'idle us/s':>11}{'wakes/s':>9}{'serve us':>10}{'scaled':>8}{'growth':>8}"
        f"{'hang-up us':>12}{'scaled':>8}{'growth':>8}{'all, ms':>9}  answers"
    )
    for variant in variants:
        if variant.name in block:
            first = smallest.get(variant.name, block[variant.name])
            print(_line(variant, block[variant.name], block[BARE], first), flush=True)


def _line(variant: Variant, median: Measurement, bare: Measurement, first: Measurement) -> str:
    served_growth, growth = median.served_scaled / first.served_scaled, median.scaled / first.scaled
    over_bare = median.kib - bare.kib
    marks = missed(over_bare, median.scaled, growth, served_growth) if variant.kind == "ours" else ""
    return (
        f"{variant.name:44}{median.kib:8.1f}{over_bare:+11.1f}{median.idle:11.2f}{median.wakes:9.1f}"
        f"{median.served:10.1f}{median.served_scaled:8.1f}{served_growth:8.2f}"
        f"{median.hang_up:12.1f}{median.scaled:8.1f}{growth:8.2f}{median.wall:9.0f}  {median.statuses}{marks}"
    )


def missed(over_bare: float, scaled: float, growth: float, served_growth: float) -> str:
    words = [f"KiB over bare above {_KIB_OVER_BARE:g}"] if over_bare > _KIB_OVER_BARE else []
    words += [f"hang-up above {_HANG_UP:g} us"] if scaled > _HANG_UP else []
    words += [f"hang-up grows above {_GROWTH:g}"] if growth > _GROWTH else []
    words += [f"serving grows above {_GROWTH:g}"] if served_growth > _GROWTH else []
    return f"  MISSED: {', '.join(words)}" if words else ""


if __name__ == "__main__":
    main()
