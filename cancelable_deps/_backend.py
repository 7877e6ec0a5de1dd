"""What we need of an event loop and anyio does not offer: a call later, a task that no group owns, a call from a thread.

The only file besides `_polite.py` that knows asyncio and trio by name; trio is imported only by those who run on it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import threading
from asyncio import get_running_loop
from contextlib import suppress
from contextvars import Context
from inspect import CORO_CREATED, getcoroutinestate
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from ._polite import marker

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    import trio

    from ._deadlines import Line
    from ._polite import Mark

logger = logging.getLogger("cancelable_deps")


class Timer(Protocol):
    """Something that `EventLoop.call_at` will do."""

    def cancel(self) -> None: ...


class Worker(Protocol):
    """A task that belongs to nobody but its starter."""

    def cancel(self) -> None: ...

    @property
    def done(self) -> bool: ...

    async def join(self) -> None:
        """Wait until it has ended."""


class Newcomer(Protocol):
    """Somebody who has begun in the current step of a task."""

    def step_is_over(self) -> None:
        """Called once, when the task has come to wait for something."""


class EventLoop(Protocol):
    """The running loop, asyncio's or trio's."""

    is_trio: bool
    mark: Callable[[], Mark] | None
    """Makes a mark for `PoliteScope.begin`; ``None`` where scopes are entered at once."""

    time: Callable[[], float]
    extras: dict[Any, Any]
    drain: Any
    """What ends the loop's requests at shutdown, if anything does: asked for each request, so no entry in `extras`."""

    def is_running_here(self) -> bool: ...

    def current_task(self) -> object: ...

    def times_asked(self, task: object) -> int:
        """How often ``task``, which runs, was asked to end, as far as it has been told."""
        ...

    def is_cancelled_by(self, exc: BaseException, asked: int) -> bool:
        """Whether ``exc`` is a cancellation of the running task, which had been asked to end ``asked`` times before."""
        ...

    def wake(self) -> None:
        """What has just been scheduled, perhaps by a signal handler, is not to wait until the loop wakes up by itself."""

    newcomers: dict[Newcomer, None]
    """Those who are told when the current step of their task is over; whoever has left by then takes itself out."""

    lines: dict[float, Line]
    """By their limits, those in which somebody waits for a deadline."""

    is_awaiting_step: bool

    def await_step(self) -> None:
        """See to it that the `newcomers` are told. Only where there is a `mark`."""

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer: ...

    def call_from_thread(self, callback: Callable[..., object], *args: object) -> None: ...

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context) -> Worker: ...


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
    is_trio = False
    drain: Any = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.time = loop.time
        self.extras: dict[Any, Any] = {}
        self.mark = marker(loop)
        self.newcomers: dict[Newcomer, None] = {}
        self.lines: dict[float, Line] = {}
        self.is_awaiting_step = False

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

    def await_step(self) -> None:
        self.is_awaiting_step = True
        self.loop.call_soon(self._step_is_over, context=Context())

    def _step_is_over(self) -> None:
        self.is_awaiting_step = False
        newcomers, self.newcomers = self.newcomers, {}
        for newcomer in newcomers:
            try:
                newcomer.step_is_over()
            except Exception:
                # Or those after it could never be stopped.
                logger.exception("a request could not be made cancelable")

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


class _TrioWorker:
    __slots__ = ("_cancelled", "_ended", "_scope")

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context | None) -> None:
        import trio

        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._cancelled = trio.Cancelled
        trio.lowlevel.spawn_system_task(self._run, work, name=work.__qualname__, context=context)

    async def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            with self._scope:
                await work()
        except (KeyboardInterrupt, SystemExit, self._cancelled):
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
    drain: Any = None

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        import trio

        self.token = token
        self.time = trio.lowlevel.current_clock().current_time
        self.extras: dict[Any, Any] = {}
        self._current_task = trio.lowlevel.current_task
        self.mark: Callable[[], Mark] | None = None
        self.newcomers: dict[Newcomer, None] = {}
        self.lines: dict[float, Line] = {}
        self.is_awaiting_step = False
        self._sleep_until = trio.sleep_until
        self._cancelled = trio.Cancelled

    def is_running_here(self) -> bool:
        return _running_trio_token() is self.token

    def current_task(self) -> object:
        return self._current_task()

    def times_asked(self, task: object) -> int:
        return 0

    def is_cancelled_by(self, exc: BaseException, asked: int) -> bool:
        # Nobody but a scope around the task can make one, and no task or future hands on that of another.
        return isinstance(exc, self._cancelled)

    def wake(self) -> None:
        pass  # trio wakes up at each signal

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        async def call() -> None:
            if self.time() < when:
                await self._sleep_until(when)
            elif timer.is_cancelled:
                return
            # Who is overdue by now is to be stopped in this pass of the loop: to sleep would take two more.
            callback()

        # Whoever looks at the tasks of a loop sees what this one is for.
        call.__qualname__ = getattr(callback, "__qualname__", call.__qualname__)
        timer = _TrioWorker(call, None)
        return timer

    def await_step(self) -> None:
        raise NotImplementedError

    def call_from_thread(self, callback: Callable[..., object], *args: object) -> None:
        import trio

        try:
            self.token.run_sync_soon(callback, *args)
        except trio.RunFinishedError:
            logger.debug("the event loop is closed: nothing is left to cancel in it")

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context) -> Worker:
        return _TrioWorker(work, context)


class _ThreadLocal(threading.local):
    # The last loop seen in this thread: a server asks for the same one millions of times.
    asyncio: AsyncioLoop | None = None
    trio: TrioLoop | None = None


_seen = _ThreadLocal()


def _running_trio_token() -> trio.lowlevel.TrioToken | None:
    # trio first: in its guest mode an asyncio loop runs in the same thread.
    loaded: Any = sys.modules.get("trio")
    if loaded is None or not loaded.lowlevel.in_trio_run():
        return None
    token: trio.lowlevel.TrioToken = loaded.lowlevel.current_trio_token()
    return token


def current_loop() -> EventLoop:
    """The loop that runs in this thread.

    :raises RuntimeError: if none does.
    """
    if "trio" in sys.modules and (token := _running_trio_token()) is not None:
        seen_trio = _seen.trio
        if seen_trio is None or seen_trio.token is not token:
            seen_trio = _seen.trio = TrioLoop(token)
        return seen_trio
    loop = get_running_loop()
    seen = _seen.asyncio
    if seen is None or seen.loop is not loop:
        seen = _seen.asyncio = _of_asyncio(loop)
    return seen


def _of_asyncio(loop: Any) -> AsyncioLoop:
    # Kept by the loop itself: several may take turns in one thread, as those of fixtures and tests in pytest-asyncio do.
    known: AsyncioLoop | None = getattr(loop, "_cancelable_deps_loop", None)
    if known is None:
        known = AsyncioLoop(loop)
        with suppress(AttributeError):
            loop._cancelable_deps_loop = known
    return known
