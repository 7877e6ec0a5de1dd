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
instead is private, and stands in `_polite_asyncio.py` and `_polite_trio.py`; `tests/test_polite.py` fails when it
changes. Where `_polite_known.py` finds something else installed, `_polite_public.py` gets there by detours.
"""

from __future__ import annotations

import gc
import math
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

from ._polite_known import asyncio_is_known, trio_is_known

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from anyio import CancelScope

    from ._backend import EventLoop, Timer

    IsOurs = Callable[[object], bool]

    Mark = tuple[Any, Any, int, int]
    """Where a scope may be entered later: task, scope around it, serial number, cancellations so far."""


class PoliteScope(Protocol):
    """The scope around one block, begun and ended in one task."""

    def begin(self, deadline: float, mark: Mark | None) -> None:
        """Enter the scope; where ``mark`` was made, if there is one. ``deadline`` is told, and strikes nobody."""

    @property
    def task(self) -> object:
        """The task in which it was begun; ``None`` before and after."""
        ...

    def end(self, exc: BaseException | None) -> BaseException | None:
        """Leave the scope; what is left of ``exc`` once our own cancellation is taken out of it."""

    spares: Callable[..., bool] | None
    """Asked before a cancellation of this scope is delivered; if it says so, the scope is held and nothing is."""

    def cancel_politely(self, why: str) -> None: ...

    def reaches(self, inner: Any) -> bool:
        """Whether what this scope delivers arrives in ``inner``, another one of the same task: no shield stands between."""
        ...

    def take_for_delivered(self) -> None:
        """The task has been told by an exception, and cleans up."""

    @property
    def is_delivered(self) -> bool:
        """Whether the task has seen the cancellation, or that of a scope further out."""
        ...

    def hold(self) -> None:
        """Let no cancellation of ours through until `resume`; those of others pass."""

    def resume(self) -> None: ...

    def release(self) -> None:
        """Let no cancellation of ours through any more, nor the end of a grace; those of others pass."""

    def move_deadline(self, deadline: float) -> None: ...

    @property
    def is_lost(self) -> bool:
        """Whether a scope inside took our cancellation for its own, so that the work went on in error."""
        ...


class Gate(Protocol):
    """One scope around a task that is cancelled from a scope further out."""

    def begin(self) -> None: ...

    def end(self, exc: BaseException | None) -> BaseException | None: ...

    def take_for_delivered(self) -> None:
        """The task is told in another way: what it does now is its cleanup."""

    @property
    def is_delivered(self) -> bool:
        """As that of a `PoliteScope`."""
        ...

    @property
    def is_lost(self) -> bool:
        """As that of a `PoliteScope`."""
        ...

    def fire(self) -> None:
        """What is around it is cancelled, or about to be."""

    @property
    def is_passed_by(self) -> bool:
        """Whether what it was told came from further out than the group that it belongs to, and is to go on outwards."""
        ...

    def pass_on(self) -> None:
        """After its end: the group raises what is to go on outwards, so that the task has been told."""

    def expect(self, is_cancelled: Callable[[], bool]) -> None:
        """Let nothing through for two passes of the loop, after which what is around it may be cancelled."""

    def watch(self, coro: Awaitable[Any]) -> Awaitable[Any]:
        """What to await in place of ``coro``, so that the gate sees a cancellation arrive."""
        ...


class HookedGate:
    """What a `Gate` that a hook tells of every cancellation does not need."""

    __slots__ = ()

    # What is not the own cancellation of a group or a scope goes on outwards by itself.
    is_passed_by = is_lost = False

    def fire(self) -> None: ...

    def pass_on(self) -> None: ...

    def expect(self, is_cancelled: Callable[[], bool]) -> None: ...

    def watch(self, coro: Awaitable[Any]) -> Awaitable[Any]:
        return coro


class Spared:
    """A task through which exceptions of ours are on their way: what it does is its cleanup, for one grace at most.

    Whoever catches them and lets go of them works on, and may be stopped by something new.
    """

    __slots__ = ("_errors", "_go_on", "_grace", "_loop", "_lose_patience", "_timer")

    def __init__(
        self, loop: EventLoop, grace: float, go_on: Callable[[], object], lose_patience: Callable[[], object]
    ) -> None:
        self._loop = loop
        self._grace = grace
        self._go_on = go_on
        self._lose_patience = lose_patience
        self._timer: Timer | None = None
        self._errors: tuple[tuple[ref[Any], float], ...] = ()

    def add(self, error: BaseException) -> None:
        self._errors += ((_reference(error, self._is_gone), self._loop.time() + self._grace),)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.start_timer()

    @property
    def is_on_its_way(self) -> bool:
        now = self._loop.time()
        return any(error() is not None and now < until for error, until in self._errors)

    def look_again(self) -> None:
        """Something new has struck: let go of what has been caught, and is held by nothing but its own traceback.

        `contextlib.AsyncExitStack` keeps what passes through it in a variable, and so in a cycle. Only what is young is
        looked at: a whole collection may block the event loop for long.
        """
        if self.is_on_its_way:
            gc.collect(1)

    def start_timer(self) -> None:
        """Something has struck, or may: call ``lose_patience`` when the grace is over."""
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
            self._lose_patience()

    def _is_gone(self, error: ref[Any]) -> None:
        if all(error is not other for other, _ in self._errors):
            return
        if not self._loop.is_running_here():
            self._loop.call_from_thread(self._is_gone, error)
            return
        self._errors = tuple(pair for pair in self._errors if pair[0] is not error)
        if not self._errors:
            self.end()
            self._go_on()


class _Trace:
    """Goes when the exception goes that it is noted on."""


def _reference(error: BaseException, when_gone: Callable[[ref[Any]], object]) -> ref[Any]:
    try:
        return ref(error, when_gone)
    except TypeError:
        # Those that are written in C cannot be referred to weakly. What they carry can.
        trace = error.__dict__.setdefault("_cancelable_deps_trace", _Trace())
        return ref(trace, when_gone)


def polite_scope(loop: EventLoop, grace: float) -> PoliteScope:
    scope: PoliteScope = _classes(loop.is_trio)[0](loop, grace)
    return scope


def polite_gate(loop: EventLoop, grace: float, is_ours: IsOurs) -> Gate:
    """A scope that makes a cancellation from further out polite, if ``is_ours(None)`` or a block of ours has struck."""
    gate: Gate = _classes(loop.is_trio)[1](loop, grace, is_ours)
    return gate


def tell(loop: EventLoop, error: BaseException) -> None:
    """``error`` has told the current task to stop, and is on its way through the scopes that are open in the task."""
    _classes(loop.is_trio)[2](error)


def told_scope(loop: EventLoop, scope: CancelScope, gates: dict[Any, Gate]) -> CancelScope:
    """``scope`` itself, or where no hook tells the ``gates`` inside of it, one in its place that does when cancelled."""
    if hooks_are_known(loop.is_trio):
        return scope
    from ._polite_public import TellingScope

    return TellingScope(loop, scope, gates)


def stop_telling(scope: CancelScope) -> None:
    """The group of ``scope``, from `told_scope`, has ended."""
    drop_timer = getattr(scope, "drop_timer", None)
    if drop_timer is not None:
        drop_timer()


@cache
def _classes(is_trio: bool) -> tuple[Any, Any, Any]:
    # Each loads only where its backend runs.
    if not hooks_are_known(is_trio):
        from . import _polite_public

        return _polite_public.PublicScope, _polite_public.PublicGate, _polite_public.tell
    if is_trio:
        from . import _polite_trio

        return _polite_trio.TrioPoliteScope, _polite_trio.TrioGate, _polite_trio.tell
    from . import _polite_asyncio

    return _polite_asyncio.AsyncioPoliteScope, _polite_asyncio.AsyncioGate, _polite_asyncio.tell


def hooks_are_known(is_trio: bool) -> bool:
    """Whether the private parts that the hooks need are those that we know; otherwise public API has to do."""
    return trio_is_known() if is_trio else asyncio_is_known()


def marker(loop: asyncio.AbstractEventLoop) -> Callable[[], Mark] | None:
    """A function that marks the place in which a scope may be put later; ``None`` if scopes are entered at once."""
    if not hooks_are_known(False):
        return None
    from ._polite_asyncio import make_marker

    return make_marker(loop)


# At import, so that the warning, if there is one, is the first thing to be read. trio is not to be loaded for that.
hooks_are_known(is_trio=False)


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
