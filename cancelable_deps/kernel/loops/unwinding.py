"""Polite cancellation: deliver it once, leave the cleanup alone for a grace, then repeat it at every ``await``.

anyio repeats a cancellation at every ``await`` from the start, and that interrupts the very conversation by which a
database driver stops its query. So the scope around the work is cancelled; once the cancellation has been *delivered* to
the task, it is shielded against the repetitions, with the end of the grace as its deadline. Shielding earlier would lose
the cancellation: a task in a shielded section, in a worker thread or not yet at its first ``await`` has not seen it, and
a nursery through which it travels would take it for its own.

That a task has been told is a fact of the task, not of one scope: what any scope, gate or exception of ours has begun,
no other one interrupts. So a scope that delivers covers those inside it, and an exception that leaves one, or that
`Cancelable.check` raises, spares those around it for as long as it is on its way.

anyio has no direct way to see the moment of delivery in a block that somebody else's coroutine runs. What we use
instead is private, and stands in `asyncio_scopes.py` and `trio_scopes.py`; `tests/test_polite.py` fails when it
changes. Where `known.py` finds something else installed, `public_scopes.py` gets there by detours.
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
    """What a `MemberScope` that a hook tells of every cancellation does not need."""

    __slots__ = ()

    # What is not the own cancellation of a group or a scope goes on outwards by itself.
    is_passed_by = is_lost = False

    def fire(self) -> None: ...

    def pass_on(self) -> None: ...

    def expect(self, is_cancelled: Callable[[], bool]) -> None: ...

    def watch(self, coro: Awaitable[Any]) -> Awaitable[Any]:
        return coro


class Unwinding:
    """A task through which exceptions of ours are on their way: what it does is its cleanup, for one grace at most.

    Whoever catches them and lets go of them works on, and may be stopped by something new.
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
        self._errors += ((_reference(error, self._is_gone), self._loop.time() + self._grace),)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.start_timer()

    @property
    def is_active(self) -> bool:
        now = self._loop.time()
        return any(error() is not None and now < until for error, until in self._errors)

    def drop_caught(self) -> None:
        """Something new has struck: let go of what has been caught, and is held by nothing but its own traceback.

        `contextlib.AsyncExitStack` keeps what passes through it in a variable, and so in a cycle. Only what is young is
        looked at: a whole collection may block the event loop for long.
        """
        if self.is_active:
            gc.collect(1)

    def start_timer(self) -> None:
        """Something has struck, or may: call ``grace_has_ended`` when the grace is over."""
        until = max((until for _, until in self._errors), default=math.inf)
        if self._timer is None and until < math.inf:
            self._timer = self._loop.call_at(until, self._is_over)

    def end(self) -> None:
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
    """Goes when the exception goes that it is noted on."""


def _reference(error: BaseException, when_gone: Callable[[ref[Any]], object]) -> ref[Any]:
    try:
        return ref(error, when_gone)
    except TypeError:
        # Those that are written in C cannot be referred to weakly. What they carry can.
        trace = error.__dict__.setdefault("_cancelable_deps_trace", _Trace())
        return ref(trace, when_gone)


def leave(scope: Any, exc: BaseException | None) -> BaseException | None:
    """``scope.__exit__`` as a function from exception to exception."""
    if exc is None:
        scope.__exit__(None, None, None)
        return None
    try:
        if scope.__exit__(type(exc), exc, exc.__traceback__):
            return None
    except BaseException as remaining:
        return remaining
    return exc
