"""What each door costs a request that nobody cancels: `python -m benchmarks.overhead`.

All applications take turns, round by round and in a new order each time, so that whatever else the machine does hits
them alike; ratios are taken within a round. Times are CPU time of the process: for a handler that returns at once that
is the whole of it, for one that waits it leaves the waiting out.
"""

import argparse
import asyncio
import functools
import gc
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp

from benchmarks._asgi import Work, at_once, loops, median_and_spread, run_on, serve
from benchmarks._doors import OURS
from benchmarks._rivals import rivals
from benchmarks._variants import BARE, FLOORS, REFERENCES, Variant

Rounds = dict[str, list[float]]
"""Microseconds per request, by variant, one for each round."""

_WAITING_AT_ONCE = 32


@dataclass(frozen=True)
class Row:
    variant: Variant
    microseconds: float
    added: float
    ratio: float
    spread: float
    over_floor: float


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    variants = _chosen([*FLOORS, *OURS, *REFERENCES, *rivals()], options.only)
    for loop in loops(options.loop):
        for milliseconds in options.wait:
            measured = measure(variants, loop, milliseconds, options.rounds, options.requests)
            _print_table(rows(variants, measured), loop, milliseconds, options)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--requests", type=int, default=50, help="per variant and round")
    parser.add_argument("--loop", choices=["asyncio", "uvloop", "both"], default="both")
    parser.add_argument("--wait", type=float, nargs="+", default=[0, 2], help="milliseconds that the handler awaits")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of the rows wanted (floors always)")
    return parser.parse_args(arguments)


def _chosen(variants: Sequence[Variant], only: Sequence[str]) -> list[Variant]:
    wanted = [v for v in variants if not only or any(part.lower() in v.name.lower() for part in only)]
    floors = {BARE, *(variant.floor for variant in wanted)}
    return [v for v in variants if v in wanted or v.name in floors]


def measure(variants: Sequence[Variant], loop: str, milliseconds: float, rounds: int, requests: int) -> Rounds:
    measured: Rounds = run_on(loop, _measure(variants, milliseconds, rounds, requests))
    return measured


async def _measure(variants: Sequence[Variant], milliseconds: float, rounds: int, requests: int) -> Rounds:
    work, concurrency = _work(milliseconds)
    apps = {variant: variant.build(work) for variant in variants}
    for variant, app in apps.items():
        await _warm_up(variant, app, concurrency)
    gc.collect()
    gc.freeze()
    measured: Rounds = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        for variant in random.sample(list(variants), len(variants)):
            measured[variant.name].append(await _cost(apps[variant], variant, requests, concurrency))
    gc.unfreeze()
    return measured


def _work(milliseconds: float) -> tuple[Work, int]:
    if milliseconds:
        return functools.partial(asyncio.sleep, milliseconds / 1000), _WAITING_AT_ONCE
    return at_once, 1


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


def rows(variants: Sequence[Variant], measured: Rounds) -> list[Row]:
    return [_row(variant, measured) for variant in variants]


def _row(variant: Variant, measured: Rounds) -> Row:
    own, bare = measured[variant.name], measured[BARE]
    ratio, spread = median_and_spread(_ratios(own, bare))
    return Row(
        variant,
        microseconds=median_and_spread(own)[0],
        added=median_and_spread([a - b for a, b in zip(own, bare, strict=True)])[0],
        ratio=ratio,
        spread=spread,
        over_floor=median_and_spread(_ratios(own, measured[variant.floor]))[0],
    )


def _ratios(own: Sequence[float], floor: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(own, floor, strict=True)]


def _print_table(table: Sequence[Row], loop: str, milliseconds: float, options: argparse.Namespace) -> None:
    handler = f"awaits {milliseconds:g} ms, {_WAITING_AT_ONCE} at a time" if milliseconds else "returns at once"
    print(f"\n{loop}, handler {handler}: {options.rounds} rounds of {options.requests} requests, medians")
    print(f"{'':44}{'us':>8}{'added':>8}{'ratio':>8}{'spread':>8}{'to floor':>10}  target")
    kind = ""
    for row in table:
        if row.variant.kind != kind:
            kind = row.variant.kind
            print(f"-- {kind}")
        print(_line(row, _best_rival(row.variant, table)))


def _best_rival(variant: Variant, table: Sequence[Row]) -> Row | None:
    if variant.kind != "ours" or variant.door is None:
        return None
    same_door = [row for row in table if row.variant.kind == "rival" and row.variant.door == variant.door]
    return min(same_door, key=lambda row: row.ratio, default=None)


def _line(row: Row, rival: Row | None) -> str:
    numbers = f"{row.microseconds:8.1f}{row.added:+8.1f}{row.ratio:8.2f}{row.spread:8.2f}{row.over_floor:10.2f}"
    return f"{row.variant.name:44}{numbers}  {verdict(row, rival)}".rstrip()


def verdict(row: Row, rival: Row | None) -> str:
    target = row.variant.target
    words = [] if target is None else [f"{target:.2f} " + ("ok" if row.ratio <= target else "MISSED")]
    if rival is not None and rival.ratio < row.ratio:
        words.append(f"BEHIND {rival.variant.name}")
    return ", ".join(words)


if __name__ == "__main__":
    main()
