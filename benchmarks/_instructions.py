"""Count the instructions of a request under valgrind's callgrind: unlike times, the counts are reproducible.

Under valgrind everything takes some fifty times as long, and more on a busy machine. With the real clock a handler that
returns at once would outlive `listen_after` (5 ms), after which a request costs more, and one that sleeps 2 ms would
be older still: the count would be of code that natively never runs, and would follow the load of the machine. So the
process under valgrind has a clock of its own, `_clock.c`, loaded with `LD_PRELOAD`. It stands still while code runs,
takes 20 us for a pass of the event loop, and jumps to the next timer when the loop would wait: a sleep of 2 ms takes
2 ms, for asyncio, for uvloop, and for whatever the rivals time, and a request is as old as it would be natively.

Counted is only the serving of `requests` requests in a process that has served some before, with the garbage collector
off and with fixed hashes and addresses: starting up and importing are not in it. Two runs of the same code print the
same number. Where objects lie decides which collide in the interpreter's caches, though, and a change elsewhere that
moves them, or another folder, can move a count by a percent and a half. So each count is the median of `LAYOUTS`
processes whose objects lie elsewhere, and a ratio that differs by less than a percent may be chance.
"""

import argparse
import asyncio
import ctypes
import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks._asgi import WAITING_AT_ONCE, run_on, serve, warmed, work_of
from benchmarks._catalogue import named
from benchmarks._variants import Variant

Counts = dict[str, list[float]]
"""Instructions per request, by variant, one for each handler."""

LAYOUTS = 3

_HERE = Path(__file__).parent
_WARM_UP = 3 * WAITING_AT_ONCE


def why_not() -> str | None:
    """Return a message about the programs that are missing to count instructions; `None` if none is."""
    missing = [tool for tool in ("valgrind", "cc") if shutil.which(tool) is None]
    if missing or sys.platform != "linux":
        return f"instructions: not counted; this needs Linux, valgrind and a C compiler (missing: {missing})"
    return None


def count(
    variants: Sequence[Variant], loop: str, waits: Sequence[float], requests: int, layouts: int = LAYOUTS
) -> Counts:
    """Count, with `layouts` processes for each variant and as many at a time as there are cores."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        clock = compiled(Path(folder))
        jobs = {
            variant.name: [
                pool.submit(
                    _in_child, variant, loop, waits, requests, clock, Path(folder, f"{number}-{layout}"), layout
                )
                for layout in range(layouts)
            ]
            for number, variant in enumerate(variants)
        }
        return {name: _medians([job.result() for job in children]) for name, children in jobs.items()}


def _medians(children: Sequence[Sequence[float]]) -> list[float]:
    """Return the median over the processes, for each handler."""
    return [statistics.median(handler) for handler in zip(*children, strict=True)]


def compiled(folder: Path) -> Path:
    """Compile the clock into a library for `LD_PRELOAD`."""
    clock = folder / "clock.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", clock, _HERE / "_clock.c"], check=True)
    return clock


def _in_child(
    variant: Variant, loop: str, waits: Sequence[float], requests: int, clock: Path, out: Path, layout: int
) -> list[float]:
    # Without address space randomization, because dictionaries hash addresses.
    fixed_addresses = ["setarch", "-R"] if shutil.which("setarch") else []
    # The interpreter first makes strings of its environment, which moves all later objects.
    padding = {f"BENCHMARK_PADDING_{number}": "x" for number in range(37 * layout)}
    valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
    python = [sys.executable, "-m", "benchmarks._instructions", variant.name, loop, str(requests), str(clock)]
    child = subprocess.run(
        [*fixed_addresses, *valgrind, *python, *map(str, waits)],
        cwd=_HERE.parent,
        env={**os.environ, **padding, "LD_PRELOAD": str(clock), "PYTHONHASHSEED": str(layout)},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"{variant.name}, under valgrind: {child.stderr}")
    # callgrind numbers the files of the dumps that it is asked for. At its end it writes the rest, which is empty, to `out`.
    return [_total(out.with_name(f"{out.name}.{number}")) / requests for number in range(1, len(waits) + 1)]


def _total(written: Path) -> int:
    (line,) = [line for line in written.read_text().splitlines() if line.startswith("totals: ")]
    return int(line.split()[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the requests that are counted, in the process under valgrind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant")
    parser.add_argument("loop")
    parser.add_argument("requests", type=int)
    parser.add_argument("clock")
    parser.add_argument("waits", type=float, nargs="+")
    options = parser.parse_args(arguments)
    variant, counter = named(options.variant), ctypes.CDLL(options.clock)
    for milliseconds in options.waits:
        run_on(options.loop, _serve(variant, milliseconds, options.requests, counter))


async def _serve(variant: Variant, milliseconds: float, requests: int, counter: ctypes.CDLL) -> None:
    work, concurrency = work_of(milliseconds)
    app = variant.build(work)
    await serve(app, _WARM_UP, concurrency, variant.query)
    await asyncio.sleep(0)
    app = warmed(app)
    gc.collect()
    gc.disable()
    counter.counting_begins()
    await serve(app, requests, concurrency, variant.query)
    counter.counting_ends()
    gc.enable()


if __name__ == "__main__":
    main()
