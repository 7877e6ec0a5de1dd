"""A predicate that cancels a block when it becomes true."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import TYPE_CHECKING

import anyio

from .foreign import EXITS, ThisTask
from .options import seconds
from .reasons import CancelationReason

if TYPE_CHECKING:
    from datetime import timedelta

    from .loops.base import EventLoop, Worker

Cancel = Callable[[CancelationReason, str], object]


class Condition:
    """A predicate that is called at an interval while a block is open."""

    def __init__(self, predicate: Callable[[], bool | Awaitable[bool]], interval: float | timedelta) -> None:
        if not callable(predicate):
            raise TypeError(f"a condition must be a function without arguments that returns a bool, not {predicate!r}")
        self._predicate = predicate
        self._interval = seconds(interval, "interval")
        self._worker: Worker | None = None

    def start(self, cancel: Cancel, loop: EventLoop) -> None:
        """Start to call the predicate, in a task of its own; ``cancel`` is called when it is true or fails."""

        async def ask() -> None:
            await self._ask(cancel)

        self._worker = loop.spawn(ask, copy_context())

    def stop(self) -> None:
        """Cancel the task, without waiting for its end."""
        if self._worker is not None:
            self._worker.cancel()

    async def join(self) -> None:
        """Wait, shielded, until the task has ended."""
        if self._worker is not None:
            with anyio.CancelScope(shield=True):
                await self._worker.join()

    async def _ask(self, cancel: Cancel) -> None:
        this_task = ThisTask()
        try:
            while not await self._is_true():  # noqa: ASYNC110 - no event is set when a predicate becomes true
                await anyio.sleep(self._interval)
        except BaseException as exc:
            is_stopped = this_task.is_ended_by(exc)
            if not is_stopped or isinstance(exc, EXITS):
                cancel(CancelationReason.ERROR, f"The condition failed: {exc!r}")
            if is_stopped:
                raise
        else:
            cancel(CancelationReason.CONDITION, "The condition came true")

    async def _is_true(self) -> bool:
        answer = self._predicate()
        return bool(await answer) if inspect.isawaitable(answer) else bool(answer)
