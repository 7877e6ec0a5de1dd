"""An event loop of trio's; imported only where one runs."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from ..log import logger
from . import known, public_trio

with suppress(ImportError, AttributeError):
    # Private parts of trio that may be gone; `known` says so.
    from . import trio_scopes

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextvars import Context

    from .base import EventLoop, ScopeFamily, Timer, Worker


def _scopes() -> ScopeFamily:
    return trio_scopes if known.hooks_are_known(is_trio=True) else public_trio


class _TrioWorker:
    __slots__ = ("_ended", "_scope")

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context | None) -> None:
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        trio.lowlevel.spawn_system_task(self._run, work, name=work.__qualname__, context=context)

    async def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            with self._scope:
                await work()
        except (KeyboardInterrupt, SystemExit, trio.Cancelled):
            raise
        except BaseException:
            # Whatever leaves a system task ends trio itself, and with it the whole server.
            logger.exception("a task of ours failed")
        finally:
            self._ended.set()

    def cancel(self) -> None:
        self._scope.cancel()

    @property
    def is_cancelled(self) -> bool:
        return self._scope.cancel_called

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    async def join(self) -> None:
        await self._ended.wait()


class TrioLoop:
    is_trio = True
    is_thread = False
    shutdown: Any = None
    in_flight: Any = None

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self.token = token
        self.time = trio.lowlevel.current_clock().current_time
        self.home: EventLoop | None = self
        self.scopes = _scopes()
        self.extras: dict[Any, Any] = {}
        self.task_without_scope = self.scopes.task_finder(token)
        self.lines: dict[float, Any] = {}

    def is_running_here(self) -> bool:
        return trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is self.token

    def current_task(self) -> object:
        return trio.lowlevel.current_task()

    def times_asked(self, task: object) -> int:
        return 0

    def is_cancelled_by(self, exc: BaseException, asked: int) -> bool:
        # Nobody but a scope around the task can make one, and no task or future hands on that of another.
        return isinstance(exc, trio.Cancelled)

    def wake(self) -> None:
        pass  # trio wakes up at each signal

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        async def call() -> None:
            if self.time() < when:
                await trio.sleep_until(when)
            elif timer.is_cancelled:
                return
            # Who is overdue by now is to be stopped in this pass of the loop: to sleep would take two more.
            callback()

        # Whoever looks at the tasks of a loop sees what this one is for.
        call.__qualname__ = getattr(callback, "__qualname__", call.__qualname__)
        timer = _TrioWorker(call, None)
        return timer

    def call_from_thread(self, callback: Callable[..., object], *args: object) -> None:
        try:
            self.token.run_sync_soon(callback, *args)
        except trio.RunFinishedError:
            logger.debug("the event loop is closed: nothing is left to cancel in it")

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context) -> Worker:
        return _TrioWorker(work, context)
