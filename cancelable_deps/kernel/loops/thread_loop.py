"""The substitute for an event loop in a worker thread, where none runs."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from . import public_asyncio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextvars import Context

    from .base import Event, EventLoop, Late, ScopeFamily, Timer, Worker


class ThreadScope:
    """The substitute for the scope of a block in a thread, which only `Cancelable.check` can stop."""

    is_delivered = is_lost = False
    delivered_at = math.nan
    spares: Callable[..., bool] | None = None

    def __init__(self, task: int) -> None:
        self.task = task

    def begin(self, deadline: float, late: Late | None) -> None: ...

    def end(self, exc: BaseException | None) -> BaseException | None:
        return exc

    def cancel_politely(self, why: str) -> None: ...

    def reaches(self, inner: object) -> bool:
        return True

    def take_for_delivered(self) -> None: ...

    def hold(self) -> None: ...

    def resume(self) -> None: ...

    def release(self) -> None: ...

    def move_deadline(self, deadline: float) -> None: ...

    def shorten_grace(self, grace: float) -> None: ...


class _NoTimer:
    def cancel(self) -> None: ...


class ThreadLoop:
    """The event loop of a block in a thread: it uses the clock of ``home``, and its timers by calls from the thread."""

    is_trio = False
    is_thread = True
    task_without_scope: Callable[[], object] | None = None
    shutdown: Any = None
    in_flight: Any = None

    def __init__(self, home: EventLoop | None) -> None:
        self.home = home
        self.time = time.monotonic if home is None else home.time
        self.extras: dict[Any, Any] = {}
        self.scopes: ScopeFamily = public_asyncio
        self.timeout_queues: dict[float, Any] = {}

    def is_running_here(self) -> bool:
        # No loop has to be woken up in another thread, whichever thread cancels.
        return True

    def current_task(self) -> object:
        return None

    def times_asked(self, task: object) -> int:
        return 0

    def is_cancelled_by(self, exc: BaseException, asked: int) -> bool:
        return False

    def wake(self) -> None: ...

    def make_event(self) -> Event:
        raise RuntimeError("no event loop runs in this thread")

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        if self.home is None or not self.home.is_running_here():
            return _NoTimer()
        return self.home.call_at(when, callback)

    def call_from_thread(self, callback: Callable[..., object], *args: object) -> None:
        if self.home is not None:
            self.home.call_from_thread(callback, *args)

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context) -> Worker:
        raise RuntimeError("no event loop runs in this thread")
