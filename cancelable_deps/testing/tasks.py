"""The tasks that are alive in the running event loop, and the lines where they stand."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio.lowlevel

from ..kernel.processes.pool import Pool
from ..kernel.sweep import Sweep
from ..kernel.timeouts import TimeoutQueue
from ..operations.redis.batches import Batches

if TYPE_CHECKING:
    from collections.abc import Iterator

# Passes of the loop in which callbacks that are due run, and tasks that are being cancelled end.
_PASSES = 5
# Ours, of which a loop has one for all requests: the timer that finds old ones, those of equal deadlines, which are there
# while anybody waits for one, the keeper of idle processes, and what talks to Redis for all operations.
_SHARED = (
    Sweep.tick.__qualname__,
    TimeoutQueue.tick.__qualname__,
    Pool.keep.__qualname__,
    Batches.send.__qualname__,
)
_OF_REDIS = Batches.__module__.removesuffix("batches")


@dataclass(frozen=True)
class Left:
    """A task that was left behind: it outlives the call or block in which it was started."""

    name: str
    """The name of the task."""

    line: str
    """The line where the task stands, as ``"file.py:12"``; empty if it does not stand in Python code."""

    def __str__(self) -> str:
        return f"{self.name} at {self.line}" if self.line else self.name


def tasks_now() -> set[Any]:
    """Return all tasks of the running event loop."""
    if not _on_trio():
        return set(asyncio.all_tasks())
    import trio  # loads late: an application on asyncio may not have it

    root = trio.lowlevel.current_root_task()
    return set() if root is None else {root, *_below(root)}


async def tasks_left(before: set[Any]) -> list[Left]:
    """Return the tasks that are alive now and were not ``before``, except those that serve all requests of the loop."""
    for _ in range(_PASSES):
        await anyio.lowlevel.checkpoint()
    return [Left(_name(task), _line(task)) for task in tasks_now() - before if not _is_shared(task)]


def _on_trio() -> bool:
    trio = sys.modules.get("trio")
    return trio is not None and bool(trio.lowlevel.in_trio_run())


def _below(task: Any) -> Iterator[Any]:
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield child
            yield from _below(child)


def _name(task: Any) -> str:
    return str(task.get_name() if isinstance(task, asyncio.Task) else task.name)


def _line(task: Any) -> str:
    coroutine = task.get_coro() if isinstance(task, asyncio.Task) else task.coro
    line = ""
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None:
            line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        coroutine = getattr(coroutine, "cr_await", None)
    return line


def _is_shared(task: Any) -> bool:
    name = _name(task)
    return name in _SHARED or name.startswith(_OF_REDIS)
