"""An event loop of asyncio's."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from contextvars import Context
from inspect import CORO_CREATED, getcoroutinestate
from typing import TYPE_CHECKING, Any

import anyio

from ..log import logger
from . import known, public_asyncio

with suppress(ImportError, AttributeError):
    # Private parts of anyio that may be gone; `known` says so.
    from . import asyncio_scopes

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from .base import EventLoop, ScopeFamily, Timer, Worker


def _scopes() -> ScopeFamily:
    return asyncio_scopes if known.hooks_are_known(is_trio=False) else public_asyncio


class _AsyncioWorker:
    __slots__ = ("_task",)

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    def cancel(self) -> None:
        if getcoroutinestate(self._task.get_coro()) == CORO_CREATED:  # type: ignore[arg-type]
            # Cancelled before it has begun it never would, and nobody be told of its end.
            self._task.get_loop().call_soon(self._task.cancel, context=Context())
        else:
            self._task.cancel()

    @property
    def done(self) -> bool:
        return self._task.done()

    async def join(self) -> None:
        if not self._task.done():
            await asyncio.wait([self._task])


class AsyncioLoop:
    is_trio = is_thread = False
    shutdown: Any = None
    in_flight: Any = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.time = loop.time
        self.extras: dict[Any, Any] = {}
        self.home: EventLoop | None = self
        self.scopes = _scopes()
        self.task_without_scope = self.scopes.task_finder(loop)
        self.lines: dict[float, Any] = {}

    def is_running_here(self) -> bool:
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False

    def current_task(self) -> object:
        return asyncio.current_task(self.loop)

    def times_asked(self, task: Any) -> int:
        # Private: a request that will be told at the next `await`, and so belongs to what comes.
        return 0 if task is None else task.cancelling() - getattr(task, "_must_cancel", False)

    def is_cancelled_by(self, exc: BaseException, asked: int) -> bool:
        if not isinstance(exc, asyncio.CancelledError):
            return False
        task = asyncio.current_task(self.loop)
        if task is None:
            return False
        # A scope of anyio's that is cancelled may also be told by a thread, of which asyncio counts nothing.
        return task.cancelling() > asked or anyio.current_effective_deadline() == -math.inf

    def wake(self) -> None:
        if asyncio.current_task(self.loop) is None:
            self.loop.call_soon_threadsafe(int)

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        # An empty context, or the timer would keep the variables of whichever request happened to start it.
        return self.loop.call_at(when, callback, context=Context())

    def call_from_thread(self, callback: Callable[..., object], *args: object) -> None:
        try:
            self.loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            logger.debug("the event loop is closed: nothing is left to cancel in it")

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context) -> Worker:
        # Not by the loop's task factory, which may begin it eagerly, before we have the worker, or know no contexts.
        return _AsyncioWorker(asyncio.Task(work(), loop=self.loop, context=context, name=work.__qualname__))
