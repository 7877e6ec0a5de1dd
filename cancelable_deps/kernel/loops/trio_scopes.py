"""Polite cancellation on trio: four private hooks.

* Whatever reaches a task is sent to ``Task.coro``. While scopes of ours are open in a task, that is a `_Stepper`, which
  sees a ``trio.Cancelled`` arrive. Only then is a cancellation delivered, and only then may a shield rise: trio's own
  ``checkpoint()`` and every nursery ask, while the cancellation is on its way, whether it came from outside.
* A scope that closes asks its ``CancelStatus`` whether a cancellation from outside is visible, and if not takes what
  passes for its own. With our shield above it, it would, and the code behind it run as if all had been done. So those
  that are open at the moment of delivery are made to say yes.
* A task that waits for a nursery's children is sent no cancellation: it has it from them, in ``Nursery._pending_excs``.
* A ``CancelStatus`` asks "any object with attributes `deadline`, `shield`, and `cancel_called`", and ours is asked
  instead of its scope: the deadline that it tells is that of our timer, which alone may strike.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import outcome
import trio
from trio._core._run import CancelStatus

from .unwinding import HookedMemberScope, Unwinding, leave

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio import CancelScope

    from .base import EventLoop, IsOurs, Late, MemberScope, PoliteScope, TaskScope


class _Stepper:
    """Stands for a task's coroutine while scopes of ours are open in the task, and sees a cancellation arrive."""

    __slots__ = ("_coro", "_task", "asked", "scopes")

    def __init__(self, task: Any) -> None:
        self._task = task
        self._coro = task.coro
        self.scopes: list[TrioMemberScope] = []
        """Outermost first."""
        self.asked: TrioPoliteScope | None = None
        """One that has something to spare, and is cancelled: asked before each step."""
        task.coro = self

    @classmethod
    def of(cls, task: Any) -> _Stepper:
        return task.coro if isinstance(task.coro, cls) else cls(task)

    def remove(self, scope: TrioMemberScope) -> None:
        self.scopes.remove(scope)
        if self.asked is scope:
            self.asked = None
        if not self.scopes and self._task.coro is self:
            self._task.coro = self._coro

    def send(self, value: Any) -> Any:
        if _is_cancelled(value) or self._is_told_by_children():
            self.tell()
        elif self.asked is not None:
            self.asked.spare_handler(value)
        try:
            return self._coro.send(value)
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        """Take away what was put around all of the task, which has ended."""
        for scope in list(self.scopes):
            if isinstance(scope, TrioTaskScope):
                scope.take_away()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coro, name)

    def _is_told_by_children(self) -> bool:
        # A task that waits at the end of a nursery is never sent a cancellation: it hears of it from its children.
        nurseries = self._task._child_nurseries
        return bool(nurseries) and nurseries[-1]._closed and any(map(_has_cancelled, nurseries[-1]._pending_excs))

    def tell(self) -> None:
        """A cancellation is on its way through the task: the outermost scope that it may have come from has delivered it."""
        visible = []
        status = self._task._cancel_status
        while status is not None:
            visible.append(status)
            if status._scope.shield:
                break
            status = status._parent
        for index, scope in enumerate(self.scopes):
            if scope.status in visible and scope.is_struck:
                if not scope.is_delivered:
                    scope.deliver(self.scopes[index + 1 :])
                return
        for status in visible:
            if type(status) is CancelStatus:
                status.__class__ = _HandingOn


class _Passing(CancelStatus):
    """That of a scope that was open when a cancellation of ours was delivered through it, which is not its own."""

    __slots__ = ()

    @property
    def parent_cancellation_is_visible_to_us(self) -> bool:
        return _is_closing(self) or _is_visible(self)


class _HandingOn(CancelStatus):
    """That of a scope in which another's cancellation has been delivered.

    One of ours that strikes before the scope is left is not delivered again: the scope lets what it has pass for ours.
    """

    __slots__ = ()

    @property
    def parent_cancellation_is_visible_to_us(self) -> bool:
        is_visible = _is_visible(self)
        if is_visible and _is_closing(self) and _has_cancelled(sys.exc_info()[1]):
            stepper = trio.lowlevel.current_task().coro
            if isinstance(stepper, _Stepper):
                stepper.tell()
        return is_visible


def _is_visible(status: Any) -> bool:
    is_visible: bool = CancelStatus.parent_cancellation_is_visible_to_us.fget(status)  # type: ignore[attr-defined]
    return is_visible


def _is_closing(status: Any) -> bool:
    """Nobody is left inside: it is the scope that asks, and not trio on behalf of the tasks inside."""
    return not status._tasks and not status._children


def _let_pass(status: Any) -> None:
    """Whatever is open inside of ``status`` now lets a cancellation pass, in child tasks as well."""
    todo = list(status._children)
    while todo:
        inner = todo.pop()
        if not inner._scope.shield:
            inner.__class__ = _Passing
            todo += inner._children


def _is_cancelled(value: Any) -> bool:
    """Whether what is sent to a task raises ``trio.Cancelled``, or hands on one that a worker thread has raised."""
    if type(value) is outcome.Value:
        value = value.value
    return type(value) is outcome.Error and isinstance(value.error, trio.Cancelled)


def _has_cancelled(exc: BaseException | None) -> bool:
    if isinstance(exc, BaseExceptionGroup):
        return any(map(_has_cancelled, exc.exceptions))
    return isinstance(exc, trio.Cancelled)


class TrioMemberScope(HookedMemberScope):
    """A scope around a task that is shielded once a cancellation of ours has been delivered, until the grace is over.

    It is asked by trio in place of its ``trio.CancelScope``.
    """

    __slots__ = (
        "_grace",
        "_is_ours",
        "_loop",
        "_scope",
        "_stepper",
        "_task",
        "_unwinding",
        "is_delivered",
        "status",
    )

    def __init__(self, loop: EventLoop, grace: float, is_ours: IsOurs) -> None:
        self._loop = loop
        self._grace = grace
        self._is_ours = is_ours
        self._scope: Any = trio.CancelScope()
        self._task: Any = trio.lowlevel.current_task()
        self._unwinding: Unwinding | None = None
        self.is_delivered = False

    def begin(self) -> None:
        self._scope.__enter__()
        self.status: Any = self._scope._cancel_status
        self.status._scope = self
        self._stepper = _Stepper.of(self._task)
        self._stepper.scopes.append(self)

    def end(self, exc: BaseException | None) -> BaseException | None:
        stepper = self._stepper
        stepper.remove(self)
        self._end_unwinding()
        if self._scope.shield:
            self._scope.shield = False
        remaining = leave(self._scope, exc)
        # They know us: cycles, and there is no more to ask or tell.
        self.status._scope = self._scope
        del self._stepper, self.status
        self._is_ours = _nothing_is_ours
        if remaining is not None and stepper.scopes and _has_cancelled(remaining):
            stepper.tell()
        return remaining

    # What trio asks of the scope.

    @property
    def deadline(self) -> float:
        deadline: float = self._scope.deadline
        return deadline

    @property
    def shield(self) -> bool:
        return self._scope.shield or (self._is_told_by_error and self._comes_from_ours())

    @property
    def cancel_called(self) -> bool:
        is_cancelled: bool = self._scope.cancel_called
        return is_cancelled

    @property
    def _cancel_reason(self) -> Any:
        return self._scope._cancel_reason

    @_cancel_reason.setter
    def _cancel_reason(self, reason: Any) -> None:
        self._scope._cancel_reason = reason

    # Telling the task.

    @property
    def is_struck(self) -> bool:
        """Whether a cancellation of ours, from this scope or through it, is to reach the task."""
        if self._scope.cancel_called or (not self.is_delivered and type(self.status) is _Passing):
            return True
        return self.status.parent_cancellation_is_visible_to_us and self._comes_from_ours()

    def _comes_from_ours(self) -> bool:
        """Whether what is cancelled around this scope, as far as a cancellation is visible, is one of ours."""
        status = self.status
        while status is not None:
            scope = status._scope
            if isinstance(scope, TrioMemberScope) and scope.strikes:
                return True
            if status is not self.status and scope.shield:
                return False
            status = status._parent
        return False

    @property
    def strikes(self) -> bool:
        return self._scope.cancel_called or self._is_ours(None)

    def deliver(self, inside: list[TrioMemberScope]) -> None:
        """The task has the cancellation; what it does now is its cleanup, also where it stands in scopes ``inside``."""
        self.is_delivered = True
        self._end_unwinding()
        if self._grace > 0:
            _let_pass(self.status)
            until = self._loop.time() + self._grace
            for scope in inside:
                scope.cover(until)
            self._withdraw()
            self._leave_alone(until)

    def _leave_alone(self, until: float) -> None:
        self._scope.shield = True
        self._scope.deadline = until

    @property
    def is_told(self) -> bool:
        """Whether the task cleans up after a cancellation that this scope has delivered."""
        is_shielded: bool = self._scope.shield
        return is_shielded

    def cover(self, until: float) -> None:
        """A scope further out has told the task. Between that one and this something may strike beside: a task group."""
        self.is_delivered = True
        self._end_unwinding()
        self._withdraw()
        self._leave_alone(until)

    def _withdraw(self) -> None:
        """Take the scope's own cancellation back until the grace is over, so that it is not repeated at once."""
        if self._scope.cancel_called:
            self._scope._cancel_called = False
            self.status.recalculate()

    def take_for_delivered(self) -> None:
        if not self.is_delivered and self._grace > 0:
            self.is_delivered = True
            self._end_unwinding()
            self._leave_alone(self._loop.time() + self._grace)

    # A task that an exception has told.

    @property
    def _is_told_by_error(self) -> bool:
        return self._unwinding is not None and self._unwinding.is_active

    def note_unwinding(self, error: BaseException) -> None:
        if not self.is_delivered and self._grace > 0:
            if self._unwinding is None:
                self._unwinding = Unwinding(self._loop, self._grace, self._error_was_caught, self._grace_has_ended)
            self._unwinding.add(error)
            self._withdraw()
            self.status.recalculate()
            if self._is_inside_of_others():
                self._unwinding.start_timer()

    def _is_inside_of_others(self) -> bool:
        """Whether scopes of ours in another task may strike us, of which we are not told beforehand."""
        status: Any = self.status._parent
        while status is not None and not isinstance(status._scope, TrioMemberScope):
            status = status._parent
        return status is not None and self._stepper.scopes[0] is self

    def _error_was_caught(self) -> None:
        """Whoever has caught the exception works on, and can be stopped."""
        self._unwinding = None
        self.status.recalculate()

    def _grace_has_ended(self) -> None:
        """The exception is still on its way, and the grace is over."""
        self._unwinding = None
        if _is_visible(self.status) and self._comes_from_ours():
            self.is_delivered = True
            self._scope.cancel()

    def _end_unwinding(self) -> None:
        if self._unwinding is not None:
            self._unwinding.end()
            self._unwinding = None


class TrioTaskScope(TrioMemberScope):
    """A gate around all that is left of a task that is not ours, put there while the task runs."""

    __slots__ = ("_ended",)

    def put_around(self, ended: Callable[[bool], object]) -> None:
        """Enter belatedly, inside of the nursery that the task was started in; ``ended(False)`` is called at its end."""
        self._ended = ended
        task = self._task
        nursery = task.parent_nursery
        outer = None if nursery is None else nursery._cancel_status
        inner, status = None, task._cancel_status
        while status is not None and status is not outer:
            inner, status = status, status._parent
        if status is None:
            # No task of a nursery's, or one that was moved to another one: nothing is known of its scopes.
            return
        self.status = self._scope._cancel_status = CancelStatus(scope=self._scope, parent=outer)
        self.status._scope = self
        if inner is None:
            task._activate_cancel_status(self.status)
        else:
            inner.parent = self.status
        self._stepper = _Stepper.of(task)
        self._stepper.scopes.insert(0, self)

    def take_away(self) -> None:
        self._end_unwinding()
        self._stepper.remove(self)
        self._scope.deadline = math.inf
        if self._task._cancel_status is self.status:
            self._task._activate_cancel_status(self.status._parent)
        self.status.close()
        self.status._scope = self._scope
        self._scope._cancel_status = None
        ended = self._ended
        del self._stepper, self.status, self._ended
        self._is_ours = _nothing_is_ours
        ended(False)


class TrioPoliteScope(TrioMemberScope):
    __slots__ = ("_asked", "_deadline", "_held", "_is_covered", "spares")

    # What is open inside when it delivers is made to let it pass.
    is_lost = False

    def __init__(self, loop: EventLoop, grace: float) -> None:
        super().__init__(loop, grace, _nothing_is_ours)
        self._deadline = math.inf
        self._asked = self._held = self._is_covered = False
        self.spares: Callable[..., bool] | None = None

    def begin(self, deadline: float = math.inf, late: Late | None = None) -> None:
        self._deadline = deadline
        super().begin()

    @property
    def task(self) -> object:
        return self._task

    def end(self, exc: BaseException | None) -> BaseException | None:
        if self._asked and not self._is_covered and exc is not None:
            self._scope.cancel()
        return super().end(exc)

    @property
    def deadline(self) -> float:
        return super().deadline if self.is_delivered else min(super().deadline, self._deadline)

    def cancel_politely(self, why: str) -> None:
        if self._unwinding is not None:
            self._unwinding.drop_caught()
        self._asked = True
        if self._held or self.is_delivered:
            return
        if self._unwinding is not None and self._unwinding.is_active:
            self._unwinding.start_timer()
        elif self.spares is None or not self.spares():
            if self.spares is not None:
                self._stepper.asked = self
            self._scope.cancel(why)

    def spare_handler(self, value: Any) -> None:
        """Hold the cancellation if the task is about to go on from the thread of a handler, which so returns."""
        # Not when it has gone on: half-way into trio's checkpoint there must be something to raise.
        if (
            self.spares is None
            or self.is_delivered
            or self._held
            or (isinstance(getattr(value, "value", None), outcome.Outcome) and self.spares(self._task))
        ):
            self._stepper.asked = None

    def reaches(self, inner: TrioPoliteScope) -> bool:
        status = inner.status._parent
        while status is not None and status is not self.status:
            if status._scope.shield and not isinstance(status._scope, TrioMemberScope):
                return False
            status = status._parent
        return True

    def deliver(self, inside: list[TrioMemberScope]) -> None:
        if not self._scope.cancel_called:
            # It came from outside, and goes on there.
            self._is_covered = True
            if self._grace > 0:
                self.status.__class__ = _Passing
        super().deliver(inside)

    def cover(self, until: float) -> None:
        self._is_covered = True
        super().cover(until)

    def take_for_delivered(self) -> None:
        # Not shielded: whoever catches the exception works on, and whatever else strikes may stop that.
        if not self.is_delivered and self._grace > 0 and not self._is_about_to_be_told:
            self.is_delivered = True
            self._end_unwinding()
            self._withdraw()
            self._scope.deadline = self._loop.time() + self._grace

    @property
    def _is_told_by_error(self) -> bool:
        # Also by `check()`, which this block was to answer for.
        is_told = self.is_delivered and not self._is_covered and self._grace > 0 and not self._scope.cancel_called
        return is_told or super()._is_told_by_error

    def _error_was_caught(self) -> None:
        super()._error_was_caught()
        if self._asked and not self._held:
            self._scope.cancel()

    def _grace_has_ended(self) -> None:
        self._unwinding = None
        if self._asked and not self._held:
            self.is_delivered = True
            self._scope.cancel()
        else:
            self.status.recalculate()

    @property
    def _is_about_to_be_told(self) -> bool:
        """Whether another task asks, and this one is scheduled: trio's checkpoint, half-way, must find what it saw."""
        is_scheduled = self._task._next_send_fn is not None and self._task is not _current_task()
        return is_scheduled and bool(self._scope.cancel_called)

    def hold(self) -> None:
        if not self.is_delivered and not self._is_about_to_be_told:
            self._held = True
            self._withdraw()

    def resume(self) -> None:
        if self._held:
            self._held = False
            if self._asked:
                self.cancel_politely("what it was held for has begun")

    def release(self) -> None:
        self._deadline = math.inf
        self._held = True
        self.is_delivered = self._is_covered = False
        self._scope.deadline = math.inf
        self._withdraw()
        self._scope.shield = False

    def move_deadline(self, deadline: float) -> None:
        self._deadline = deadline


def tell(loop: EventLoop, error: BaseException) -> None:
    """The current task has been told to stop by ``error``, which is on its way through its scopes."""
    stepper: Any = trio.lowlevel.current_task().coro
    if isinstance(stepper, _Stepper):
        for scope in reversed(stepper.scopes):
            if scope.is_told:
                # When it is left, it tells those around it.
                return
            scope.note_unwinding(error)


def _current_task() -> object:
    return trio.lowlevel.current_task() if trio.lowlevel.in_trio_task() else None


def _nothing_is_ours(origin: object) -> bool:
    return False


def polite_scope(loop: EventLoop, grace: float) -> PoliteScope:
    scope: PoliteScope = TrioPoliteScope(loop, grace)
    return scope


def member_scope(loop: EventLoop, grace: float, is_ours: IsOurs) -> MemberScope:
    return TrioMemberScope(loop, grace, is_ours)


def task_scope(loop: EventLoop, grace: float, is_ours: IsOurs) -> TaskScope:
    return TrioTaskScope(loop, grace, is_ours)


def told_scope(loop: EventLoop, scope: CancelScope, member_scopes: dict[Any, MemberScope]) -> CancelScope:
    """``scope`` itself: the hook tells the gates."""
    return scope


def task_finder(loop: Any) -> None:
    """No function: scopes are entered at once."""
