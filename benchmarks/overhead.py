"""The cost of each door for a request that is not cancelled: `python -m benchmarks.overhead`.

Two handlers: one that returns at once, served one at a time, and one that awaits 2 ms, 32 at a time. `us` is the CPU
time of the process for a request, without the waiting; `ratio` is that to bare FastAPI's, `spread` the ratio's
interquartile range, `floor` the ratio to the least that such a door can cost. All applications take turns, round by round
and in a new order each time, so that other load on the machine affects all alike. Ratios are taken within a round.

`instr` (with `--instructions`) is the ratio to bare FastAPI in instructions, which are reproducible where times are not;
see `_instructions.py`. An exclamation mark marks a figure above the door's target.
"""

import argparse
import gc
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp

from benchmarks import _instructions
from benchmarks._asgi import WAITING_AT_ONCE, loops, median_and_spread, run_on, serve, warmed, work_of
from benchmarks._catalogue import everything
from benchmarks._variants import BARE, Target, Variant

Rounds = dict[str, list[float]]
"""The microseconds per request, by variant, one for each round."""


@dataclass(frozen=True)
class Cost:
    """The cost of a variant's request with one handler; `over_floor` is the ratios minus those of the floor."""

    microseconds: float
    ratio: float
    spread: float
    to_floor: float
    over_floor: float
    instructions: float | None = None
    instructions_over_floor: float | None = None

    def missed(self, target: Target | None) -> tuple[bool, bool]:
        """Whether time and instructions are above the target."""
        if target is None:
            return False, False
        ratio, instructions = self.ratio, self.instructions
        if target.over_floor:
            ratio, instructions = self.over_floor, self.instructions_over_floor
        return ratio > target.time, instructions is not None and instructions > target.instructions

    @property
    def judged(self) -> float:
        return self.ratio if self.instructions is None else self.instructions


@dataclass(frozen=True)
class Row:
    variant: Variant
    costs: list[Cost]
    """One for each handler."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    variants = _chosen(everything(), options.only)
    counts_instructions = options.instructions
    if counts_instructions and (missing := _instructions.why_not()):
        print(missing)
        counts_instructions = False
    for loop in loops(options.loop):
        counts: _instructions.Counts = {}
        if counts_instructions:
            counts = _instructions.count(variants, loop, options.wait, options.counted)
        measured = [measure(variants, loop, wait, options.rounds, options.requests) for wait in options.wait]
        _print_table(rows(variants, measured, counts), loop, counts, options)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--requests", type=int, default=50, help="per variant and round")
    parser.add_argument("--loop", choices=["asyncio", "uvloop", "both"], default="both")
    parser.add_argument("--wait", type=float, nargs="+", default=[0, 2], help="milliseconds that the handlers await")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of the rows wanted (floors always)")
    parser.add_argument("--instructions", action="store_true", help="count them, under valgrind: some minutes")
    parser.add_argument("--counted", type=int, default=320, help="requests whose instructions are counted")
    return parser.parse_args(arguments)


def _chosen(variants: Sequence[Variant], only: Sequence[str]) -> list[Variant]:
    wanted = [v for v in variants if not only or any(part.lower() in v.name.lower() for part in only)]
    floors = {BARE, *(variant.floor for variant in wanted)}
    return [v for v in variants if v in wanted or v.name in floors]


def measure(variants: Sequence[Variant], loop: str, milliseconds: float, rounds: int, requests: int) -> Rounds:
    measured: Rounds = run_on(loop, _measure(variants, milliseconds, rounds, requests))
    return measured


async def _measure(variants: Sequence[Variant], milliseconds: float, rounds: int, requests: int) -> Rounds:
    work, concurrency = work_of(milliseconds)
    apps = {variant: variant.build(work) for variant in variants}
    for variant, app in apps.items():
        await _warm_up(variant, app, concurrency)
        apps[variant] = warmed(app)
    gc.collect()
    gc.freeze()
    measured: Rounds = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        for variant in random.sample(list(variants), len(variants)):
            measured[variant.name].append(await _cost(apps[variant], variant, requests, concurrency))
    gc.unfreeze()
    return measured


async def _warm_up(variant: Variant, app: ASGIApp, concurrency: int) -> None:
    try:
        await serve(app, 50, concurrency, variant.query)
    except Exception as error:
        error.add_note(f"variant: {variant.name}")
        raise


async def _cost(app: ASGIApp, variant: Variant, requests: int, concurrency: int) -> float:
    started = time.process_time()
    await serve(app, requests, concurrency, variant.query)
    return (time.process_time() - started) / requests * 1e6


def rows(variants: Sequence[Variant], measured: Sequence[Rounds], counts: _instructions.Counts) -> list[Row]:
    """Return a row for each variant, with a cost for each handler that was measured."""
    return [
        Row(variant, [_cost_of(variant, rounds, number, counts) for number, rounds in enumerate(measured)])
        for variant in variants
    ]


def _cost_of(variant: Variant, rounds: Rounds, number: int, counts: _instructions.Counts) -> Cost:
    own, bare, floor = rounds[variant.name], rounds[BARE], rounds[variant.floor]
    ratio, spread = median_and_spread(_ratios(own, bare))
    instructions, over_floor = None, None
    if counts:
        counted = counts[variant.name][number] / counts[BARE][number]
        instructions, over_floor = counted, counted - counts[variant.floor][number] / counts[BARE][number]
    return Cost(
        microseconds=median_and_spread(own)[0],
        ratio=ratio,
        spread=spread,
        to_floor=median_and_spread(_ratios(own, floor))[0],
        over_floor=ratio - median_and_spread(_ratios(floor, bare))[0],
        instructions=instructions,
        instructions_over_floor=over_floor,
    )


def _ratios(own: Sequence[float], floor: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(own, floor, strict=True)]


def _print_table(table: Sequence[Row], loop: str, counts: _instructions.Counts, options: argparse.Namespace) -> None:
    python = platform.python_version()
    print(f"\n{loop}, Python {python}: {options.rounds} rounds of {options.requests} requests, medians, ratios to bare")
    if counts:
        thousands = " and ".join(f"{counted / 1000:.1f}" for counted in counts[BARE])
        print(f"a bare request takes {thousands} thousand instructions")
    handlers = [
        f"awaits {wait:g} ms, {WAITING_AT_ONCE} at a time" if wait else "returns at once" for wait in options.wait
    ]
    print(f"{'':44}" + "".join(f"{f'-- handler {handler}':40}" for handler in handlers).rstrip())
    print(
        f"{'':44}"
        + f"{'us':>7}{'ratio':>8}{'spread':>8}{'floor':>7}{'instr':>8}  " * len(handlers)
        + "target: time, instr"
    )
    kind = ""
    for row in table:
        if row.variant.kind != kind:
            kind = row.variant.kind
            print(f"-- {kind}")
        print(_line(row, _same_door(row.variant, table)))


def _same_door(variant: Variant, table: Sequence[Row]) -> list[Row]:
    """Return the rows of the rivals that a door of ours is compared with."""
    if variant.kind != "ours" or variant.door is None:
        return []
    return [row for row in table if row.variant.kind == "rival" and row.variant.door == variant.door]


def _line(row: Row, rivals: Sequence[Row]) -> str:
    columns = "".join(_columns(cost, row.variant.target) for cost in row.costs)
    return f"{row.variant.name:44}{columns}{verdict(row, rivals)}".rstrip()


def _columns(cost: Cost, target: Target | None) -> str:
    time_missed, instructions_missed = ("!" if missed else " " for missed in cost.missed(target))
    counted = "-" if cost.instructions is None else f"{cost.instructions:.3f}"
    numbers = f"{cost.microseconds:7.1f}{cost.ratio:7.2f}{time_missed}{cost.spread:8.2f}{cost.to_floor:7.2f}"
    return f"{numbers}{counted:>7}{instructions_missed}  "


def verdict(row: Row, rivals: Sequence[Row]) -> str:
    """Return the targets of the row, whether they are met, and the best rival where that is cheaper at a handler."""
    words = []
    if (target := row.variant.target) is not None:
        missed = any(any(cost.missed(target)) for cost in row.costs)
        least = "floor + " if target.over_floor else ""
        words.append(f"{least}{target.time:.2f}, {target.instructions:.2f} {'MISSED' if missed else 'ok'}")
    for number, cost in enumerate(row.costs):
        best = min(rivals, key=lambda rival: rival.costs[number].judged, default=None)
        if best is not None and best.costs[number].judged < cost.judged:
            words.append(f"BEHIND {best.variant.name}")
    return ", ".join(dict.fromkeys(words))


if __name__ == "__main__":
    main()
