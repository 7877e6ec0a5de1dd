"""Polite cancellation: deliver it once, do not interrupt the cleanup for a grace, then repeat it at every ``await``.

anyio repeats a cancellation at every ``await`` from the start. That interrupts, for example, the network exchange by
which a database driver stops its query. So the scope around the work is cancelled, and once the cancellation has been
*delivered* to the task, the scope is shielded against repetitions, with the end of the grace as its deadline. An
earlier shield would lose the cancellation: a task in a shielded section, in a worker thread or before its first
``await`` has not received it yet, and a nursery that it passes through would swallow it as its own.

Delivery is a state of the task, not of one scope: a cleanup that any scope or exception of this package has started is
not interrupted by another. So a scope that delivers also shields the scopes inside it. An exception that leaves a
scope, or that `Cancelable.check` raises, delays the cancellations of the scopes around it while it unwinds the task.

anyio has no public way to see the moment of delivery in a block that runs a coroutine of another author. The hooks used
instead are private, and are in `asyncio_scopes.py` and `trio_scopes.py`; `tests/test_polite.py` fails when they change.
Where `known.py` finds that they do not fit the installed version, `public_scopes.py` uses public API, at a higher cost.
"""

from __future__ import annotations

import gc
import math
from typing import TYPE_CHECKING, Any
from weakref import ref

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .base import EventLoop, Timer


class HookedMemberScope:
    """The parts of a `MemberScope` that are not needed where a hook sees every cancellation."""

    __slots__ = ()

    # A cancellation from further out passes through the group or scope by itself.
    is_passed_by = is_lost = False

    def fire(self) -> None: ...

    def pass_on(self) -> None: ...

    def expect(self, is_cancelled: Callable[[], bool]) -> None: ...

    def watch(self, coro: Awaitable[Any]) -> Awaitable[Any]:
        return coro


class Unwinding:
    """The exceptions of this package that unwind a task at present, and so protect its cleanup for one grace at most.

    Code that catches such an exception and drops it continues its work, and may be cancelled again.

    :param error_was_caught: called when all exceptions have been dropped.
    :param grace_has_ended: called when the grace is over and an exception is still unwinding the task.
    """

    __slots__ = ("_error_was_caught", "_errors", "_grace", "_grace_has_ended", "_loop", "_timer")

    def __init__(
        self,
        loop: EventLoop,
        grace: float,
        error_was_caught: Callable[[], object],
        grace_has_ended: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._grace = grace
        self._error_was_caught = error_was_caught
        self._grace_has_ended = grace_has_ended
        self._timer: Timer | None = None
        self._errors: tuple[tuple[ref[Any], float], ...] = ()

    def add(self, error: BaseException) -> None:
        """Protect the cleanup for one grace, as long as ``error`` exists."""
        self._errors += ((_reference(error, self._is_gone), self._loop.time() + self._grace),)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.start_timer()

    @property
    def is_active(self) -> bool:
        """Whether an exception still exists whose grace is not over."""
        now = self._loop.time()
        return any(error() is not None and now < until for error, until in self._errors)

    def drop_caught(self) -> None:
        """Free exceptions that have been caught and dropped, and are kept by a reference cycle only.

        Called when something new cancels the task. `contextlib.AsyncExitStack` keeps an exception that passes through
        it in a variable, and so in a cycle with its traceback. Only young objects are collected, because a full
        collection may block the event loop for long.
        """
        if self.is_active:
            gc.collect(1)

    def start_timer(self) -> None:
        """Call ``grace_has_ended`` when the grace is over, because the task has been cancelled again, or may be."""
        until = max((until for _, until in self._errors), default=math.inf)
        if self._timer is None and until < math.inf:
            self._timer = self._loop.call_at(until, self._is_over)

    def shorten_grace(self, grace: float) -> None:
        """Protect the cleanup for at most ``grace`` seconds, from now or from an exception that is added later."""
        self._grace = min(self._grace, grace)
        by = self._loop.time() + grace
        self._errors = tuple((error, min(until, by)) for error, until in self._errors)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.start_timer()

    def end(self) -> None:
        """Forget all exceptions, without a call."""
        self._errors = ()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_over(self) -> None:
        if self._errors:
            self.end()
            self._grace_has_ended()

    def _is_gone(self, error: ref[Any]) -> None:
        if all(error is not other for other, _ in self._errors):
            return
        if not self._loop.is_running_here():
            self._loop.call_from_thread(self._is_gone, error)
            return
        self._errors = tuple(pair for pair in self._errors if pair[0] is not error)
        if not self._errors:
            self.end()
            self._error_was_caught()


class _Trace:
    """An attribute of an exception, which is freed with it and can be referenced weakly."""


def _reference(error: BaseException, when_gone: Callable[[ref[Any]], object]) -> ref[Any]:
    try:
        return ref(error, when_gone)
    except TypeError:
        # Exceptions that are written in C do not support weak references. An object in their `__dict__` does.
        trace = error.__dict__.setdefault("_cancelable_deps_trace", _Trace())
        return ref(trace, when_gone)


def leave(scope: Any, exc: BaseException | None) -> BaseException | None:
    """Leave ``scope`` with ``exc``, and return the exception that comes out; ``None`` if the scope swallows it."""
    if exc is None:
        scope.__exit__(None, None, None)
        return None
    try:
        if scope.__exit__(type(exc), exc, exc.__traceback__):
            return None
    except BaseException as remaining:
        return remaining
    return exc
