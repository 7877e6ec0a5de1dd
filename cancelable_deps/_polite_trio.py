"""Polite cancellation on trio: whatever reaches a task is sent to ``Task.coro``, which is private.

While a block is open, that is a `_Stepper`, which looks at what is sent; and at a checkpoint it sends a
``trio.Cancelled`` of its own making.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import trio

from ._polite import HookedGate, leave

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._backend import EventLoop
    from ._polite import IsOurs, Mark

# The outer scope's deadline is there for `anyio.current_effective_deadline()`. It trails our own timer, which records
# the reason. How much a timer may be late without being overtaken is a guess.
_TRAIL = 0.05


class _Stepper:
    """Stands for a task's coroutine, and tells its gate before and after each step."""

    __slots__ = ("_after", "_before", "_coro", "_task")

    def __init__(self, task: Any, gate: TrioGate) -> None:
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


class TrioGate(HookedGate):
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


class TrioPoliteScope(TrioGate):
    __slots__ = ("_asked", "_outer", "_overdue")

    def __init__(self, loop: EventLoop, grace: float, overdue: Callable[[], object]) -> None:
        super().__init__(loop, grace, self._is_cancelled)
        self._outer = trio.CancelScope()
        self._overdue = overdue
        self._asked = False

    def begin(self, deadline: float = math.inf, mark: Mark | None = None) -> None:
        self._outer.deadline = deadline + _TRAIL
        self._outer.__enter__()
        super().begin()

    @property
    def task(self) -> object:
        return self._task

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
        # While the task runs, a cancellation that it has not seen yet is shielded as well, but only until it waits.
        if self._is_pending or not self._inner.shield:
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
    half_way = (trio.lowlevel.checkpoint.__code__, trio.lowlevel.cancel_shielded_checkpoint.__code__)
    codes = [frame.f_code for frame, _ in task.iter_await_frames()]
    return half_way in pairwise(codes)


def _cancelled_outcome() -> Any:
    import outcome

    # Private, as nobody but trio is to raise it; here it stands in for the very one that trio was about to raise.
    return outcome.Error(trio.Cancelled._create(source="explicit", reason="cancelled by cancelable_deps"))
