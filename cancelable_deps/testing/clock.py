"""A movable clock of the event loop, with which a test of a long timeout takes milliseconds."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from ..kernel.loops.asyncio_loop import AsyncioLoop
from ..kernel.loops.current import current_loop
from ..kernel.options import seconds as checked
from ..kernel.settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

# Steps from one deadline to the next. The rest is one step, because an application may have a deadline every microsecond.
_MOST_STEPS = 100_000
# The loop is quiet after so many passes in which no other task runs; and the most passes to wait for that.
_QUIET, _MOST_PASSES = 10, 1000
# Added because timers are compared with the clock in floating point. Only at the end, or a deadline that is computed from
# the time of another one would come that much later.
_A_LITTLE = 1e-6
# The real seconds in which an application that is busy may begin to wait for something.
_PATIENCE = 0.5


async def advance(seconds: float) -> None:
    """Move the event loop's clock by ``seconds``, and let everything happen that is due until then.

    A test of a 30-second timeout takes milliseconds like that. On asyncio the loop's own ``time()`` is replaced from the
    first call on; on trio the test must run on a ``trio.testing.MockClock``.

    Only the loop's clock is moved, for everything in that loop. Threads, processes, real sockets and ``time.monotonic()``
    are not affected. After 100,000 deadlines the rest of the time passes in one step. uvloop's clock cannot be moved.

    :raises RuntimeError: if the clock cannot be moved.
    :raises TypeError: if ``seconds`` is not a number.
    :raises ValueError: if ``seconds`` is negative, infinite or NaN.
    """
    left = checked(seconds, "advance")
    if left == math.inf:
        raise ValueError("advance must be a finite number of seconds")
    clock = _clock()
    passes = _MOST_PASSES
    for _ in range(_MOST_STEPS):
        passes = await _settle(clock, passes)
        step = max(0.0, clock.until_next())
        if step > left:
            break
        clock.move(step)
        left -= step
    clock.move(left + _A_LITTLE)
    await _settle(clock, passes)


async def _settle(clock: _TrioClock | _AsyncioClock, passes: int) -> int:
    """Let everything happen that is due; return the most passes for the next time.

    A task that only yields in a loop takes all passes each time, so that fewer are allowed after that.
    """
    quiet = 0
    for _ in range(passes):
        await anyio.lowlevel.checkpoint()
        quiet = 0 if clock.is_acting() else quiet + 1
        if quiet == _QUIET:
            return passes
    return _QUIET


async def all_stand_still(at_most: float = math.inf) -> bool:
    """Wait until all tasks wait for something; return whether they do.

    Give up after half a second or ``at_most`` seconds, because a task that only yields in a loop never waits.
    """
    with real_seconds(min(_PATIENCE, at_most)) as scope:
        await anyio.wait_all_tasks_blocked()
    return not scope.cancelled_caught


@contextmanager
def real_seconds(limit: float) -> Generator[anyio.CancelScope]:
    """Cancel the code inside the block after ``limit`` seconds of a clock that no test moves."""
    loop = current_loop()
    end = time.monotonic() + limit
    timer: Any = None

    def look() -> None:
        nonlocal timer
        left = end - time.monotonic()
        if left > 0:
            timer = loop.call_at(loop.time() + left, look)
        else:
            scope.cancel()

    with anyio.CancelScope() as scope:
        if _stands_still():
            # No timer of its loop would fire.
            timer = threading.Timer(min(limit, threading.TIMEOUT_MAX), loop.call_from_thread, [scope.cancel])
            timer.daemon = True
            timer.start()
        elif loop.is_trio:
            scope.deadline = loop.time() + limit
        else:
            timer = loop.call_at(loop.time() + limit, look)
        try:
            yield scope
        finally:
            if timer is not None:
                timer.cancel()


def _stands_still() -> bool:
    """Return whether the clock is trio's ``MockClock``, on which no time passes by itself."""
    trio: Any = sys.modules.get("trio")
    return trio is not None and trio.lowlevel.in_trio_run() and hasattr(trio.lowlevel.current_clock(), "jump")


async def let_doors_listen(is_needless: Callable[[], bool]) -> None:
    """Move a clock that stands still by the milliseconds after which doors listen, unless ``is_needless()``."""
    if not _stands_still():
        return
    await all_stand_still()
    if not is_needless():
        await advance(2 * settings.listen_after)


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

    def is_acting(self) -> bool:
        now = self._statistics()
        return bool(now.tasks_runnable or now.run_sync_soon_queue_size)

    def until_next(self) -> float:
        seconds: float = self._statistics().seconds_to_next_deadline
        return seconds


class _AsyncioClock:
    """A clock that replaces ``loop.time`` when it is first moved."""

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
        # In debug mode, which `unittest` enables, a step that moves the clock would be logged as a slow callback.
        loop.slow_callback_duration = math.inf
        ours = current_loop()
        if isinstance(ours, AsyncioLoop):
            ours.time = self.time

    def time(self) -> float:
        return self._real() + self._ahead

    def is_acting(self) -> bool:
        # Private, as the timers below. A timer that has become due by the passing of real time is among these, too.
        return bool(getattr(self._loop, "_ready", ()))

    def until_next(self) -> float:
        # Private, and the only way to know a timer before it is due. Without it the clock moves in one step.
        timers = [timer.when() for timer in getattr(self._loop, "_scheduled", ()) if not timer.cancelled()]
        return min(timers, default=math.inf) - self.time()

    def move(self, seconds: float) -> None:
        self._ahead += seconds
