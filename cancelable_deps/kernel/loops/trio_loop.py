"""The `EventLoop` for trio. Imported only where trio runs."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from ..log import logger
from . import known, public_trio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextvars import Context

    from .base import Event, EventLoop, ScopeFamily, Timer, Worker

_hooked: ScopeFamily | None = None
with suppress(ImportError, AttributeError):
    # Private parts of trio may be missing; `known` reports that.
    from . import trio_scopes

    _hooked = trio_scopes


def _scopes() -> ScopeFamily:
    """Return the scopes with hooks, or those by public API where the hooks do not fit."""
    return _hooked if known.hooks_are_known(is_trio=True) and _hooked is not None else public_trio


class _TrioWorker:
    """A `Worker` that is a system task of trio."""

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
            # An exception that leaves a system task ends trio itself, and so the server.
            logger.exception("a background task of cancelable_deps failed")
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
    """A run of trio."""

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
        self.timeout_queues: dict[float, Any] = {}

    def is_running_here(self) -> bool:
        return trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is self.token

    def current_task(self) -> object:
        return trio.lowlevel.current_task()

    def times_asked(self, task: object) -> int:
        return 0

    def is_cancelled_by(self, exc: BaseException, asked: int) -> bool:
        # Only a scope around the task can raise `Cancelled` in it: awaiting another task or a future never does.
        return isinstance(exc, trio.Cancelled)

    def wake(self) -> None:
        pass  # trio wakes up at each signal by itself

    def make_event(self) -> Event:
        return trio.Event()

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        async def call() -> None:
            if self.time() < when:
                await trio.sleep_until(when)
            elif timer.is_cancelled:
                return
            # An overdue callback is to run in this pass of the loop: a sleep would take two more.
            callback()

        # A tool that lists the tasks of a loop shows the purpose of this one.
        call.__qualname__ = getattr(callback, "__qualname__", call.__qualname__)
        timer = _TrioWorker(call, None)
        return timer

    def call_from_thread(self, callback: Callable[..., object], *args: object) -> None:
        try:
            self.token.run_sync_soon(callback, *args)
        except trio.RunFinishedError:
            logger.debug("the event loop is closed, so it has nothing left to cancel")

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context) -> Worker:
        return _TrioWorker(work, context)
