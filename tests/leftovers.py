"""What is still alive in the running loop once a piece of work has ended."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel

from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.kernel.sweep import Sweep
from cancelable_deps.kernel.timeouts import TimeoutQueue

_OURS = ("cancelable_deps", "anyio")
_ITERATIONS = 3


@asynccontextmanager
async def nothing_left() -> AsyncGenerator[None]:
    """Fail if what ran inside has left a task, a timer or a scheduled call of ours or anyio's.

    Callbacks that are scheduled when it ends may run first. The shared sweep's own timer may live on, and the timers of
    those who have waited for a deadline since before.
    """
    before = _tasks()
    timers = _handles()
    waiting = _waiting()
    try:
        yield
    finally:
        await _look(before, timers, waiting)


async def _look(before: set[Any], timers: list[asyncio.Handle], waiting: set[object]) -> None:
    for _ in range(_ITERATIONS):
        await anyio.lowlevel.checkpoint()
    still_waiting = _waiting() - waiting
    assert not still_waiting, f"deadlines are left: {still_waiting}"
    tasks = [task for task in _tasks() - before if not _is_shared(_called_by(task))]
    assert not tasks, f"tasks are left: {tasks}"
    handles = [handle for handle in _handles() if not any(handle is timer for timer in timers)]
    assert not handles, f"timers or callbacks are left: {handles}"


def _waiting() -> set[object]:
    return {item for queue in current_loop().timeout_queues.values() for item in queue.waiting}


def _on_trio() -> bool:
    trio = sys.modules.get("trio")
    return trio is not None and bool(trio.lowlevel.in_trio_run())


def _tasks() -> set[Any]:
    if not _on_trio():
        return set(asyncio.all_tasks())
    import trio

    root = trio.lowlevel.current_root_task()
    assert root is not None
    found = {root, *_below(root)}
    assert len(found) == trio.lowlevel.current_statistics().tasks_living
    return set(found)


def _below(task: Any) -> Iterator[Any]:
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield child
            yield from _below(child)


def _handles() -> list[asyncio.Handle]:
    """Timers and calls of ours or anyio's that asyncio will make. uvloop does not show its own."""
    if _on_trio():
        return []
    loop: Any = asyncio.get_running_loop()
    waiting: list[asyncio.Handle] = [*getattr(loop, "_scheduled", ()), *getattr(loop, "_ready", ())]
    return [handle for handle in waiting if not handle.cancelled() and _is_ours(handle)]


def _is_ours(handle: Any) -> bool:
    callback = handle._callback
    return str(inspect.unwrap(getattr(callback, "__func__", callback)).__module__).startswith(_OURS) and not _is_shared(
        callback
    )


def _is_shared(callback: Any) -> bool:
    """Whether it is the sweep's timer, or that of a queue in which several may wait: `_look` has seen who does."""
    if getattr(callback, "__func__", None) is TimeoutQueue.tick:
        queue = callback.__self__
        return bool(queue.waiting) and queue in current_loop().timeout_queues.values()
    return getattr(callback, "__func__", None) is Sweep.tick


def _called_by(task: Any) -> Any:
    """What a timer of ours on trio, which is a task, will call."""
    frame = getattr(getattr(task, "coro", None), "cr_frame", None)
    work = frame.f_locals.get("work") if frame is not None else None
    return inspect.getclosurevars(work).nonlocals.get("callback") if inspect.isfunction(work) else None
