"""The asyncio part of `public_scopes.py`: a watch that reads `asyncio.Task.cancelling`."""

from __future__ import annotations

import asyncio
import gc
import math
from contextvars import Context
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from .public_scopes import PublicMemberScope, PublicScope, Stepped, TellingScope, end_of_group
from .public_scopes import tell as tell  # noqa: PLC0414 - a part of the family

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio import CancelScope

    from .base import EventLoop, IsOurs, MemberScope, PoliteScope, TaskScope
    from .public_scopes import Pair

_PASSES_WITHOUT_DELAY = 50
_SECONDS_BETWEEN_OFFERS = 0.01
_SECONDS_BETWEEN_LOOKS = 0.05


class AsyncioStepped(Stepped):
    """A wrapper of a coroutine that notifies its member scope of a cancellation before it throws that in."""

    __slots__ = ("_member_scope",)

    def __init__(self, coro: Any, member_scope: PublicMemberScope) -> None:
        super().__init__(coro)
        self._member_scope = member_scope

    def throw(self, exc: Any, *details: Any) -> Any:
        # Callers that use the old signature may give the class of the exception.
        is_cancelled = isinstance(exc, asyncio.CancelledError) or exc is asyncio.CancelledError
        if is_cancelled and self._member_scope.is_open_to_us:
            self._member_scope.was_delivered()
        return super().throw(exc, *details)


class AsyncioWatch:
    """A `Watch` that offers a cancellation, and sees by the count of the task whether it has arrived.

    anyio delivers within the call that removes the shield, and again in each pass of the loop until the task has
    received the cancellation. So an offer stays open from one pass to the next, for a task that checks whether it is
    cancelled, which it does when it runs, and for a version of anyio that delivers later. In the next pass, the count
    is read directly before and after anyio's own callback; a count that changes at another time is due to other code.

    Then the scope is closed until the next step of the task, which follows when the future that it awaits is done.
    """

    __slots__ = ("_before", "_end_of_wait", "_future", "_handles", "_loop", "_pair", "_passes", "_struck", "_task")

    def __init__(self, pair: Pair, task: asyncio.Task[Any]) -> None:
        self._pair = pair
        self._task = task
        self._loop = task.get_loop()
        self._handles: list[asyncio.Handle] = []
        self._future: asyncio.Future[Any] | None = None
        self._struck: list[asyncio.Task[Any]] = []
        self._before = 0
        self._passes = 0
        self._end_of_wait = math.inf

    def start(self) -> None:
        is_stepping = getattr(self._task.get_coro(), "cr_running", False)
        if is_stepping and asyncio.current_task(self._loop) is not self._task:
            # A task that it has started eagerly cancels it. A cancellation now would take effect at the next await,
            # which may come after the end of the block.
            self._handles = [self._loop.call_soon(self._offer, context=Context())]
        else:
            self._offer()

    def shorten_grace(self, grace: float) -> None:
        until = self._loop.time() + grace
        if self._struck and until < self._end_of_wait:
            self._wait_for_others_until(until)

    def guard(self) -> None:
        self.stop()

    def stop(self) -> None:
        for handle in self._handles:
            handle.cancel()
        self._handles = []
        if self._future is not None:
            self._future.remove_done_callback(self._has_stepped)
            self._future = None
        for task in self._struck:
            task.remove_done_callback(self._has_ended)
        self._struck = []

    def _offer(self) -> None:
        self.stop()
        if self._task.done():
            return
        if self._pair.spares is not None and self._pair.spares():
            return
        others = self._others_in_thread()
        before = self._task.cancelling()
        note = self._loop.call_soon(self._note, context=Context())
        self._pair.open()
        look = self._loop.call_soon(self._look, context=Context())
        self._handles = [note, look]
        if self._task.cancelling() > before:
            self._was_reached()
            return
        self._struck = [task for task, count in others.items() if task.cancelling() > count]
        if self._struck:
            self.stop_and_wait_for_others()

    def _note(self) -> None:
        self._before = self._task.cancelling()

    def _look(self) -> None:
        if self._task.cancelling() > self._before:
            self._was_reached()
        else:
            self._pair.close()
            self._wait()

    def _was_reached(self) -> None:
        self._pair.count_once_more()
        self._pair.was_delivered()

    def _wait(self) -> None:
        self.stop()
        future = _awaited_by(self._task)
        if future is None or future.done():
            self._passes += 1
            delay = 0 if self._passes < _PASSES_WITHOUT_DELAY or future is not None else _SECONDS_BETWEEN_OFFERS
        else:
            self._passes = 0
            delay = _SECONDS_BETWEEN_LOOKS
            self._listen_to(future)
        if delay:
            self._handles = [self._loop.call_later(delay, self._offer, context=Context())]
        else:
            self._handles = [self._loop.call_soon(self._offer, context=Context())]

    def _listen_to(self, future: asyncio.Future[Any]) -> None:
        self._future = future
        future.add_done_callback(self._has_stepped, context=Context())

    def _has_stepped(self, future: asyncio.Future[Any]) -> None:
        """Offer again, directly after the step of the task that waited for ``future``."""
        if future is not self._future:
            # The watch has stopped since then, but the callback was already scheduled.
            return
        # A task in the loop that its worker thread waits for was cancelled, so the thread and the task are as well.
        is_told = not future.cancelled() and isinstance(future.exception(), asyncio.CancelledError)
        if not is_told:
            self._offer()
        elif self._pair.loop.extras.get(end_of_group) in _codes_of(self._task):
            # Its group swallows that cancellation as its own, and must do so before ours is offered.
            self._wait()
        else:
            self._pair.was_delivered()

    def _others_in_thread(self) -> dict[asyncio.Task[Any], int]:
        """Return the cancellation counts of all other tasks if ours waits for a thread, for which one may run."""
        if not any(code is anyio.to_thread.run_sync.__code__ for code in _codes_of(self._task)):
            return {}
        return {task: task.cancelling() for task in asyncio.all_tasks(self._loop) if task is not self._task}

    def stop_and_wait_for_others(self) -> None:
        """Stop offering until the cancelled tasks that run for the thread have cleaned up, or the grace is over."""
        struck = self._struck
        self.stop()
        self._pair.close()
        self._struck = struck
        for task in struck:
            task.add_done_callback(self._has_ended, context=Context())
        future = _awaited_by(self._task)
        if future is not None:
            self._listen_to(future)
        self._wait_for_others_until(self._loop.time() + self._pair.grace)

    def _wait_for_others_until(self, until: float) -> None:
        for handle in self._handles:
            handle.cancel()
        self._end_of_wait = until
        self._handles = [] if until == math.inf else [self._loop.call_at(until, self._offer, context=Context())]

    def _has_ended(self, task: asyncio.Task[Any]) -> None:
        if task in self._struck:
            self._struck.remove(task)
            if not self._struck:
                self._wait()


def _awaited_by(task: asyncio.Task[Any]) -> asyncio.Future[Any] | None:
    """Return the future that ``task`` waits for; ``None`` if it has only yielded, or the future cannot be found."""
    last = _await_chain(task)[-1]
    if asyncio.isfuture(last):
        return last
    # An awaitable written in C does not show its future in any other way.
    return next((found for found in gc.get_referents(last) if asyncio.isfuture(found)), None)


def _codes_of(task: asyncio.Task[Any]) -> list[Any]:
    return [getattr(awaitable, "cr_code", None) for awaitable in _await_chain(task)]


def _await_chain(task: asyncio.Task[Any]) -> list[Any]:
    """Return all awaitables from the coroutine of ``task`` to the innermost one."""
    chain: list[Any] = []
    awaitable: Any = task.get_coro()
    while awaitable is not None:
        chain.append(awaitable)
        awaitable = _awaited(awaitable)
    return chain


def _awaited(awaitable: Any) -> Any:
    for name in ("cr_await", "gi_yieldfrom", "ag_await"):
        if hasattr(awaitable, name):
            return getattr(awaitable, name)
    if type(awaitable).__name__ in ("async_generator_asend", "async_generator_athrow"):
        # These do not show their generator in any other way; trio does the same.
        return next((found for found in gc.get_referents(awaitable) if hasattr(found, "ag_await")), None)
    return None


class AsyncioPublicScope(PublicScope):
    __slots__ = ()

    _new_watch = AsyncioWatch


class AsyncioPublicMemberScope(PublicMemberScope):
    __slots__ = ()

    _new_watch = AsyncioWatch
    _step = AsyncioStepped


class _AsyncioTaskEnd:
    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop

    def put_around(self, ended: Callable[[bool], object]) -> None:
        task: Any = self._loop.current_task()
        task.add_done_callback(lambda _: ended(task.cancelled()), context=Context())


def polite_scope(loop: EventLoop, grace: float) -> PoliteScope:
    return AsyncioPublicScope(loop, grace)


def member_scope(loop: EventLoop, grace: float, is_ours: IsOurs) -> MemberScope:
    return AsyncioPublicMemberScope(loop, grace, is_ours)


def task_scope(loop: EventLoop, grace: float, is_ours: IsOurs) -> TaskScope:
    """Return an object that only notices the end of the task: public API cannot insert a scope."""
    return _AsyncioTaskEnd(loop)


def told_scope(loop: EventLoop, scope: CancelScope, member_scopes: dict[Any, MemberScope]) -> CancelScope:
    """Return a scope in place of ``scope`` that notifies ``member_scopes`` when cancelled, as no hook does."""
    return TellingScope(loop, scope, member_scopes)


def task_finder(loop: Any) -> None:
    """Return ``None``: scopes are always entered at once."""
