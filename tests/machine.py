"""The pace of this machine: how many times as long a test has to wait here as on an idle, usual one.

It is measured once for a session; pytest's workers and the servers that the tests start find it in the environment.
Whatever a test waits for, and whatever time is up in a test on a real server, goes through `scaled`.
"""

from __future__ import annotations

import os
import time

PACE = "CANCELABLE_DEPS_TESTS_PACE"
"""Set in the environment to the measured factor; set it by hand to choose one."""
HIGHEST = 6.0
_ROUNDS = 5
_USUAL = 0.010
"""Seconds that `_work` takes on the machine on which the tests' deadlines were chosen, while it does nothing else."""


def scaled(seconds: float) -> float:
    """Return a deadline that was chosen for an idle machine, as this one needs it."""
    return round(seconds * _factor, 2)


def measured() -> float:
    """Measure the factor: at least 1, at most `HIGHEST`.

    Either the work itself is slow, as it shares the processors with others just now, or it will be: the machine's load
    counts those who wait for a processor, and pauses of theirs do not hide them.
    """
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(_ROUNDS):
        _work()
    wall = time.perf_counter() - wall
    processor = time.process_time() - processor
    return max(1.0, min(HIGHEST, max(wall, processor * _share()) / (_ROUNDS * _USUAL)))


def _work() -> int:
    return sum(number * number % 7 for number in range(250_000))


def _share() -> float:
    """Return how many have to share one processor, ourselves included."""
    if not hasattr(os, "getloadavg"):
        return 1.0
    return max(1.0, (os.getloadavg()[0] + 1) / (os.cpu_count() or 1))


_factor = float(os.environ.setdefault(PACE, f"{measured():.2f}"))
