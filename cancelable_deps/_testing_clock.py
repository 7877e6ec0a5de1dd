"""Moving an event loop's clock, so that a test of a long timeout takes milliseconds."""

from __future__ import annotations

import asyncio
import math
import sys
from typing import Any

import anyio
import anyio.lowlevel

from ._backend import AsyncioLoop, current_loop
from .settings import seconds as checked

# From one deadline to the next; then, for an application that does something every millisecond, in one go.
_MOST_STEPS = 1000
_PASSES = 10
# Timers are compared with the clock in floating point.
_A_LITTLE = 1e-6


async def advance(seconds: float) -> None:
    """Let ``seconds`` pass on the event loop's clock, and everything happen that is due then, in no time.

    So a test of a 30-second timeout takes milliseconds. On asyncio the loop's own ``time()`` is replaced from here on; on
    trio the test must run on a ``trio.testing.MockClock``.

    Only what waits for the loop's clock is moved: not threads, processes, real sockets or ``time.monotonic()``. Whatever
    else waits in the same loop has its time pass as well. uvloop's clock cannot be moved.

    :raises RuntimeError: for a clock that cannot be moved, :exc:`ValueError` for a time that is negative, endless or NaN.
    """
    left = checked(seconds, "advance")
    if left == math.inf:
        raise ValueError("advance must be a finite number of seconds")
    clock = _clock()
    for _ in range(_MOST_STEPS):
        await _settle()
        step = max(0.0, clock.until_next()) + _A_LITTLE
        if step > left:
            break
        clock.move(step)
        left -= step
    clock.move(left + _A_LITTLE)
    await _settle()


async def _settle() -> None:
    for _ in range(_PASSES):
        await anyio.lowlevel.checkpoint()
    await anyio.wait_all_tasks_blocked()


def _clock() -> _TrioClock | _AsyncioClock:
    trio: Any = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return _TrioClock(trio)
    loop = asyncio.get_running_loop()
    clock: _AsyncioClock | None = getattr(loop, "_cancelable_deps_clock", None)
    return _AsyncioClock(loop) if clock is None else clock


class _TrioClock:
    def __init__(self, trio: Any) -> None:
        clock = trio.lowlevel.current_clock()
        if not hasattr(clock, "jump"):
            raise RuntimeError(
                "trio's clock can only be moved if the test runs on a MockClock. With anyio's pytest plugin: "
                'anyio_backend = ("trio", {"clock": trio.testing.MockClock()})'
            )
        self.move = clock.jump
        self._statistics = trio.lowlevel.current_statistics

    def until_next(self) -> float:
        seconds: float = self._statistics().seconds_to_next_deadline
        return seconds


class _AsyncioClock:
    """Stands for ``loop.time`` from the first time on that it is moved."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        if not isinstance(loop, asyncio.BaseEventLoop):
            raise RuntimeError(  # noqa: TRY004 - it is no argument
                f"the clock of {type(loop).__module__}.{type(loop).__name__} cannot be moved: run the test on asyncio's "
                "own event loop, not on uvloop's"
            )
        self._loop = loop
        self._real = loop.time
        self._ahead = 0.0
        loop._cancelable_deps_clock = self  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        loop.time = self.time  # type: ignore[method-assign]
        ours = current_loop()
        if isinstance(ours, AsyncioLoop):
            ours.time = self.time

    def time(self) -> float:
        return self._real() + self._ahead

    def until_next(self) -> float:
        # Private, and the only way to know of a timer before it is due; without it the clock moves in one go.
        timers = [timer.when() for timer in getattr(self._loop, "_scheduled", ()) if not timer.cancelled()]
        return min(timers, default=math.inf) - self.time()

    def move(self, seconds: float) -> None:
        self._ahead += seconds
