"""Polite cancellation: deliver it once, leave the cleanup alone for a grace, then repeat it at every ``await``.

anyio repeats a cancellation at every ``await`` from the start, and that interrupts the very conversation by which a
database driver stops its query. So the work stands inside two scopes. The outer one is cancelled; once the cancellation
has been *delivered* to the task, the inner one is shielded against the repetitions, with the end of the grace as its
own deadline. Shielding earlier would lose the cancellation: a task in a shielded section, in a worker thread or not yet
at its first ``await`` has not seen it.

anyio has no public way to see the moment of delivery in a block that somebody else's coroutine runs. This file holds
the two private hooks that we need, one a backend; `tests/test_polite.py` fails when either changes:

* asyncio: anyio's ``CancelScope._deliver_cancellation`` walks down the tree of scopes and calls ``Task.cancel()``. The
  inner scope overrides it, and looks whether its task was reached.
* trio: whatever reaches a task is sent to ``Task.coro``. While a block is open, that is a `_Stepper`, which looks at
  what is sent; and at a checkpoint it sends a ``trio.Cancelled`` of its own making.

Without the hooks a cancellation would still be delivered: impolitely, as by a plain scope.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable

    import trio

    from ._backend import EventLoop

    IsOurs = Callable[[object], bool]

# The outer scope's deadline is there for `anyio.current_effective_deadline()`. It trails our own timer, which records
# the reason. How much a timer may be late without being overtaken is a guess.
_TRAIL = 0.05


class PoliteScope(Protocol):
    """The two scopes around one block, begun and ended in one task."""

    def begin(self, deadline: float) -> None: ...

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


def polite_scope(loop: EventLoop, grace: float, overdue: Callable[[], object]) -> PoliteScope:
    """``overdue`` is called if the deadline fires that trails the block's own, because the loop was blocked."""
    if loop.is_trio:
        return _TrioPoliteScope(loop, grace, overdue)
    scope: PoliteScope = _asyncio_classes()[0](loop, grace, overdue)
    return scope


def polite_gate(loop: EventLoop, grace: float, is_ours: IsOurs) -> Gate:
    """A scope that makes a cancellation from further out polite, if ``is_ours(origin)``.

    ``origin`` is the anyio scope that was cancelled; on trio, which does not tell, ``None``.
    """
    if loop.is_trio:
        return _TrioGate(loop, grace, is_ours)
    gate: Gate = _asyncio_classes()[1](loop, grace, is_ours)
    return gate


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


@cache
def _asyncio_classes() -> tuple[Any, Any]:
    # Not imported by name: the backend's module loads only where asyncio runs, and this is the class it hands out.
    scope_class: Any = type(anyio.CancelScope())

    class Inner(scope_class):  # type: ignore[misc]
        __slots__ = ("_grace", "_held", "_loop", "is_delivered")

        def __new__(cls, *args: object) -> Any:
            return object.__new__(cls)

        def __init__(self, loop: EventLoop, grace: float) -> None:
            scope_class.__init__(self)
            self._loop = loop
            self._grace = grace
            self._held = False
            self.is_delivered = False

        def _deliver_cancellation(self, origin: Any) -> bool:
            if origin is self or not self._is_ours(origin):
                # Its own: the grace is over, or this is anyio's last look at a scope that has been left.
                retry: bool = scope_class._deliver_cancellation(self, origin)
                return retry
            if self._pending_uncancellations and self._grace > 0:
                # A scope further in, cancelled in the same tick, has let its cancellation pass for ours.
                self.take_for_delivered()
                return False
            task = self._host_task
            before = task.cancelling()
            retry = scope_class._deliver_cancellation(self, origin)
            if task.cancelling() > before:
                self.take_for_delivered()
            return retry

        def take_for_delivered(self) -> None:
            self.is_delivered = True
            shielded: bool = self.shield  # type: ignore[has-type]
            if self._grace > 0 and not shielded:
                self.deadline = self._loop.time() + self._grace  # type: ignore[misc]
                self.shield = True  # type: ignore[misc]

        def end(self, exc: BaseException | None) -> BaseException | None:
            return leave(self, exc)

    class AsyncioPoliteScope(Inner):
        __slots__ = ("_asked", "_outer", "_overdue")

        def __init__(self, loop: EventLoop, grace: float, overdue: Callable[[], object]) -> None:
            Inner.__init__(self, loop, grace)
            self._overdue = overdue
            self._asked = False

        def begin(self, deadline: float) -> None:
            outer = self._outer = scope_class(deadline=deadline + _TRAIL)
            outer.__enter__()
            self.__enter__()

        def end(self, exc: BaseException | None) -> BaseException | None:
            return leave(self._outer, leave(self, exc))

        def cancel_politely(self, why: str) -> None:
            self._asked = True
            self._outer.cancel(why)

        def hold(self) -> None:
            if not self.shield:
                self.shield = self._held = True  # type: ignore[misc]

        def resume(self) -> None:
            if self._held:
                self.shield = self._held = False  # type: ignore[misc]

        def release(self) -> None:
            # Setting a scope's deadline is not cheap, and few have one.
            if self._outer.deadline < math.inf:
                self.move_deadline(math.inf)
            if self._outer.cancel_called or self.is_delivered:
                self.deadline = math.inf  # type: ignore[misc]
                self.shield = True  # type: ignore[misc]

        def move_deadline(self, deadline: float) -> None:
            self._outer.deadline = deadline + _TRAIL

        @property
        def swallowed(self) -> bool:
            # anyio counts what `Task.cancel()` was asked for, and lets no scope take a request that is not its own.
            return False

        def _is_ours(self, origin: object) -> bool:
            if origin is self._outer and not self._asked:
                self._asked = True
                self._overdue()
            return origin is self._outer

    class AsyncioGate(Inner):
        __slots__ = ("_is_ours",)

        def __init__(self, loop: EventLoop, grace: float, is_ours: IsOurs) -> None:
            Inner.__init__(self, loop, grace)
            self._is_ours = is_ours

        def begin(self) -> None:
            self.__enter__()

    return AsyncioPoliteScope, AsyncioGate


class _Stepper:
    """Stands for a task's coroutine, and tells its gate before and after each step."""

    __slots__ = ("_after", "_before", "_coro", "_task")

    def __init__(self, task: Any, gate: _TrioGate) -> None:
        self._before = gate.before_step
        self._after = gate.after_step
        self._task = task
        self._coro = task.coro
        task.coro = self

    def remove(self) -> None:
        self._task.coro = self._coro

    def send(self, value: Any) -> Any:
        message = self._coro.send(self._before(value))
        self._after()
        return message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coro, name)


class _TrioGate:
    """From the moment of cancelling, the scope is shielded while the task runs, and open where it stands and waits.

    trio asks in two ways whether a task is cancelled: the scheduler does where the task waits, and that delivers. But
    ``checkpoint()`` and ``checkpoint_if_cancelled()`` ask while the task runs, raise through a scope of their own, and
    would lose a cancellation that is shielded at the moment of delivery. So a running task never looks cancelled, and
    at a checkpoint we deliver it ourselves.
    """

    __slots__ = (
        "_current_effective_deadline",
        "_grace",
        "_held",
        "_inner",
        "_is_ours",
        "_loop",
        "_lost",
        "_nurseries",
        "_opened_before",
        "_stepper",
        "_task",
        "is_delivered",
    )

    def __init__(self, loop: EventLoop, grace: float, is_ours: IsOurs) -> None:
        import trio

        self._loop = loop
        self._grace = grace
        self._is_ours = is_ours
        self._inner = trio.CancelScope()
        self._task = trio.lowlevel.current_task()
        self._current_effective_deadline = trio.current_effective_deadline
        self._nurseries: list[trio.Nursery] = []
        self.is_delivered = False
        self._held = False
        self._lost = False

    def begin(self) -> None:
        self._inner.__enter__()
        self._opened_before = len(self._task.child_nurseries)
        self._stepper = _Stepper(self._task, self)

    def end(self, exc: BaseException | None) -> BaseException | None:
        self._stepper.remove()
        # They know us: cycles, and there is no more to ask or tell.
        del self._stepper
        self._is_ours = _nothing_is_ours
        return leave(self._inner, exc)

    @property
    def _is_pending(self) -> bool:
        return not self.is_delivered and not self._held and self._grace > 0 and self._is_ours(None)

    def before_step(self, value: Any) -> Any:
        if self._is_pending:
            is_exposed = self._current_effective_deadline() == -math.inf
            self._inner.shield = True
            self._nurseries = self._task.child_nurseries[self._opened_before :]
            if self._current_effective_deadline() == -math.inf:
                # A scope further in is cancelled as well, and takes this one for its own. Ours comes after it.
                return value
            if self._is_delivery(value):
                self._deliver()
            elif is_exposed and _stands_at_checkpoint(self._task):
                self._deliver()
                return _cancelled_outcome()
        return value

    def after_step(self) -> None:
        if self._nurseries and self.swallowed:
            self._lost = True
            self.is_delivered = False
            self._nurseries = []
        if self._is_pending:
            self._inner.shield = False

    def _is_delivery(self, value: Any) -> bool:
        import outcome
        import trio

        return isinstance(value, outcome.Error) and isinstance(value.error, trio.Cancelled)

    def take_for_delivered(self) -> None:
        if self._is_pending:
            self._inner.shield = True
            self._deliver()

    def _deliver(self) -> None:
        self.is_delivered = True
        self._lost = False
        self._inner.deadline = self._loop.time() + self._grace

    @property
    def swallowed(self) -> bool:
        # A nursery cancels itself when a cancellation passes through its body or reaches it at its end. With the shield
        # above it, it believes that one to be its own, and ends as if nothing had been: the work would go on without
        # its children's results.
        return self._lost or any(nursery.cancel_scope.cancelled_caught for nursery in self._nurseries)


class _TrioPoliteScope(_TrioGate):
    __slots__ = ("_asked", "_outer", "_overdue")

    def __init__(self, loop: EventLoop, grace: float, overdue: Callable[[], object]) -> None:
        import trio

        super().__init__(loop, grace, self._is_cancelled)
        self._outer = trio.CancelScope()
        self._overdue = overdue
        self._asked = False

    def begin(self, deadline: float = math.inf) -> None:
        self._outer.deadline = deadline + _TRAIL
        self._outer.__enter__()
        super().begin()

    def end(self, exc: BaseException | None) -> BaseException | None:
        self._asked = True
        return leave(self._outer, super().end(exc))

    def cancel_politely(self, why: str) -> None:
        self._asked = True
        self._outer.cancel(why)

    def _is_cancelled(self, origin: object) -> bool:
        if not self._outer.cancel_called:
            return False
        if not self._asked:
            self._asked = True
            self._overdue()
        return True

    def hold(self) -> None:
        if not self._inner.shield:
            self._inner.shield = self._held = True

    def resume(self) -> None:
        if self._held:
            self._inner.shield = self._held = False

    def release(self) -> None:
        self.move_deadline(math.inf)
        self._inner.deadline = math.inf
        if self._outer.cancel_called or self.is_delivered:
            self._inner.shield = self._held = True

    def move_deadline(self, deadline: float) -> None:
        self._outer.deadline = deadline + _TRAIL


def _nothing_is_ours(origin: object) -> bool:
    return False


def _stands_at_checkpoint(task: Any) -> bool:
    """Whether ``task`` has yielded in `trio.lowlevel.checkpoint`, before that asks whether it is cancelled."""
    import trio

    half_way = (trio.lowlevel.checkpoint.__code__, trio.lowlevel.cancel_shielded_checkpoint.__code__)
    codes = [frame.f_code for frame, _ in task.iter_await_frames()]
    return half_way in pairwise(codes)


def _cancelled_outcome() -> Any:
    import outcome
    import trio

    # Private, as nobody but trio is to raise it; here it stands in for the very one that trio was about to raise.
    return outcome.Error(trio.Cancelled._create(source="explicit", reason="cancelled by cancelable_deps"))
