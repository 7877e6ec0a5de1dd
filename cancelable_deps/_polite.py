"""Polite cancellation: deliver it once, leave the cleanup alone for a grace, then repeat it at every ``await``.

anyio repeats a cancellation at every ``await`` from the start, and that interrupts the very conversation by which a
database driver stops its query. So the work stands inside two scopes. The outer one is cancelled; once the cancellation
has been *delivered* to the task, the inner one is shielded against the repetitions, with the end of the grace as its
own deadline. Shielding earlier would lose the cancellation: a task in a shielded section, in a worker thread or not yet
at its first ``await`` has not seen it.

anyio has no direct way to see the moment of delivery in a block that somebody else's coroutine runs. What we use
instead is private, and stands in `_polite_asyncio.py` and `_polite_trio.py`; `tests/test_polite.py` fails when it
changes. Where `_polite_known.py` finds something else installed, `_polite_public.py` gets there by detours.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from ._polite_known import asyncio_is_known, trio_is_known

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from anyio import CancelScope

    from ._backend import EventLoop

    IsOurs = Callable[[object], bool]

    Mark = tuple[Any, Any, int, int]
    """Where a scope may be entered later: task, scope around it, serial number, cancellations so far."""


class PoliteScope(Protocol):
    """The two scopes around one block, begun and ended in one task."""

    def begin(self, deadline: float, mark: Mark | None) -> None:
        """Enter both scopes; where ``mark`` was made, if there is one."""

    @property
    def task(self) -> object:
        """The task in which it was begun; ``None`` before and after."""
        ...

    def end(self, exc: BaseException | None) -> BaseException | None:
        """Leave both scopes; what is left of ``exc`` once our own cancellation is taken out of it."""

    def cancel_politely(self, why: str) -> None: ...

    def take_for_delivered(self) -> None:
        """The task has been told by an exception, and cleans up."""

    @property
    def is_delivered(self) -> bool:
        """Whether the task has seen the cancellation."""
        ...

    def hold(self) -> None:
        """Let no cancellation of ours through until `resume`."""

    def resume(self) -> None: ...

    def release(self) -> None:
        """Let no cancellation of ours through any more, nor the end of a grace."""

    def move_deadline(self, deadline: float) -> None: ...

    @property
    def swallowed(self) -> bool:
        """Whether a scope inside took our cancellation for its own, so that the work went on in error."""
        ...


class Gate(Protocol):
    """One scope around a task that is cancelled from a scope further out."""

    def begin(self) -> None: ...

    def end(self, exc: BaseException | None) -> BaseException | None: ...

    def take_for_delivered(self) -> None:
        """The task is told in another way: what it does now is its cleanup."""

    @property
    def swallowed(self) -> bool:
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

    # A group recognises what is not its own by the words or the parents of its scope.
    is_passed_by = False

    def fire(self) -> None: ...

    def pass_on(self) -> None: ...

    def expect(self, is_cancelled: Callable[[], bool]) -> None: ...

    def watch(self, coro: Awaitable[Any]) -> Awaitable[Any]:
        return coro


def polite_scope(loop: EventLoop, grace: float, overdue: Callable[[], object]) -> PoliteScope:
    """``overdue`` is called if a deadline of the scope's own fires because the loop was blocked; only trio has one."""
    scope: PoliteScope = _classes(loop.is_trio)[0](loop, grace, overdue)
    return scope


def polite_gate(loop: EventLoop, grace: float, is_ours: IsOurs) -> Gate:
    """A scope that makes a cancellation from further out polite, if ``is_ours(origin)``.

    ``origin`` is the anyio scope that was cancelled; on trio, which does not tell, ``None``.
    """
    gate: Gate = _classes(loop.is_trio)[1](loop, grace, is_ours)
    return gate


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
def _classes(is_trio: bool) -> tuple[Any, Any]:
    # Each loads only where its backend runs.
    if not hooks_are_known(is_trio):
        from ._polite_public import PublicGate, PublicScope

        return PublicScope, PublicGate
    if is_trio:
        from ._polite_trio import TrioGate, TrioPoliteScope

        return TrioPoliteScope, TrioGate
    from ._polite_asyncio import AsyncioGate, AsyncioPoliteScope

    return AsyncioPoliteScope, AsyncioGate


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
