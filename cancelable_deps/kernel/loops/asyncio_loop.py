"""The `EventLoop` for asyncio."""

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

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from .base import Event, EventLoop, ScopeFamily, Timer, Worker

_hooked: ScopeFamily | None = None
with suppress(ImportError, AttributeError):
    # Private parts of anyio may be missing; `known` reports that.
    from . import asyncio_scopes

    _hooked = asyncio_scopes


def _scopes() -> ScopeFamily:
    """Return the scopes with hooks, or those by public API where the hooks do not fit."""
    return _hooked if known.hooks_are_known(is_trio=False) and _hooked is not None else public_asyncio


class _AsyncioWorker:
    """A `Worker` that is an asyncio task."""

    __slots__ = ("_task",)

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    def cancel(self) -> None:
        if getcoroutinestate(self._task.get_coro()) == CORO_CREATED:  # type: ignore[arg-type]
            # A task that is cancelled before its first step never runs, and its cleanup would not report the end.
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
    """An event loop of asyncio."""

    is_trio = is_thread = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.time = loop.time
        self.extras: dict[Any, Any] = {}
        self.home: EventLoop | None = self
        self.scopes = _scopes()
        self.task_without_scope = self.scopes.task_finder(loop)
        self.timeout_queues: dict[float, Any] = {}
        # Each request reads them, which for a default of the class would cost four times as much.
        self.shutdown: Any = None
        self.in_flight: Any = None

    def is_running_here(self) -> bool:
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False

    def current_task(self) -> object:
        return asyncio.current_task(self.loop)

    def times_asked(self, task: Any) -> int:
        # `_must_cancel` is private: a cancellation that is raised at the next `await`, and so is not in the past yet.
        return 0 if task is None else task.cancelling() - getattr(task, "_must_cancel", False)

    def is_cancelled_by(self, exc: BaseException, asked: int) -> bool:
        if not isinstance(exc, asyncio.CancelledError):
            return False
        task = asyncio.current_task(self.loop)
        if task is None:
            return False
        # A worker thread may raise the cancellation of an anyio scope, which asyncio does not count.
        return task.cancelling() > asked or anyio.current_effective_deadline() == -math.inf

    def wake(self) -> None:
        if asyncio.current_task(self.loop) is None:
            self.loop.call_soon_threadsafe(int)

    def make_event(self) -> Event:
        return asyncio.Event()

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        # An empty context, because the timer would keep the variables of the request that happens to start it.
        return self.loop.call_at(when, callback, context=Context())

    def call_from_thread(self, callback: Callable[..., object], *args: object) -> None:
        try:
            self.loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            logger.debug("the event loop is closed, so it has nothing left to cancel")

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context) -> Worker:
        # Not by the loop's task factory: it may run the task eagerly, before the worker exists, or take no context.
        return _AsyncioWorker(asyncio.Task(work(), loop=self.loop, context=context, name=work.__qualname__))
