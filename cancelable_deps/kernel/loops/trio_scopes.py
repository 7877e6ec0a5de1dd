"""Polite cancellation on trio, with four private hooks.

* Values and exceptions are sent to a task through ``Task.coro``. While scopes of this package are open in a task, that
  is a `_Stepper`, which sees a ``trio.Cancelled`` arrive. This is the moment of delivery, and no shield may be set
  before: until then, ``trio.lowlevel.checkpoint()`` and every nursery check whether the cancellation came from outside.
* A scope that closes asks its ``CancelStatus`` whether a cancellation from outside is visible. If not, it swallows a
  cancellation as its own, and the code behind it runs as if its work were complete. That would happen with our shield
  around it, so the scopes that are open at the moment of delivery are made to answer yes.
* A task that waits for the children of a nursery is sent no cancellation: it gets the children's exceptions, in
  ``Nursery._pending_excs``.
* A ``CancelStatus`` reads "any object with attributes `deadline`, `shield`, and `cancel_called`". It reads our object
  in place of its scope, which reports the deadline of our timer; only that timer may cancel for it.
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
    from collections.abc import Callable, Iterator

    from anyio import CancelScope

    from .base import EventLoop, IsOurs, Late, MemberScope, PoliteScope, TaskScope


class _Stepper:
    """Replaces the coroutine of a task while scopes of this package are open in it, and sees a cancellation arrive."""

    __slots__ = ("_coro", "_task", "asked", "scopes")

    def __init__(self, task: Any) -> None:
        self._task = task
        self._coro = task.coro
        self.scopes: list[TrioMemberScope] = []
        """The open scopes of this package, outermost first."""
        self.asked: TrioPoliteScope | None = None
        """A cancelled scope with a `spares` function, which is called before each step."""
        task.coro = self

    @classmethod
    def of(cls, task: Any) -> _Stepper:
        """Return the stepper of ``task``, which is installed if there is none."""
        return task.coro if isinstance(task.coro, cls) else cls(task)

    def remove(self, scope: TrioMemberScope) -> None:
        """Remove a scope, and the stepper from its task with the last one."""
        self.scopes.remove(scope)
        if self.asked is scope:
            self.asked = None
        if not self.scopes and self._task.coro is self:
            self._task.coro = self._coro

    def send(self, value: Any) -> Any:
        """Step the coroutine; a cancellation is noted first."""
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
        """Remove the scopes around all of the task, which has ended."""
        for scope in list(self.scopes):
            if isinstance(scope, TrioTaskScope):
                scope.take_away()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coro, name)

    def _is_told_by_children(self) -> bool:
        # A task that waits at the end of a nursery is never sent a cancellation: it gets those of its children.
        nurseries = self._task._child_nurseries
        return bool(nurseries) and nurseries[-1]._closed and any(map(_has_cancelled, nurseries[-1]._pending_excs))

    def tell(self) -> None:
        """Note that a cancellation unwinds the task: the outermost scope that may have caused it has delivered it."""
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
    """The status of a scope that was open when a cancellation from further out was delivered, and must let it pass."""

    __slots__ = ()

    @property
    def parent_cancellation_is_visible_to_us(self) -> bool:
        return _is_closing(self) or _is_visible(self)


class _HandingOn(CancelStatus):
    """The status of a scope in which a cancellation from elsewhere has been delivered.

    If this package cancels before the scope is left, nothing is delivered a second time: the cancellation that unwinds
    the scope counts as ours.
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
    """Return whether the scope itself is asking, as it closes and is empty, and not trio for the tasks inside."""
    return not status._tasks and not status._children


def _let_pass(status: Any) -> None:
    """Make all scopes that are open inside ``status`` let a cancellation pass, in child tasks as well."""
    todo = list(status._children)
    while todo:
        inner = todo.pop()
        if not inner._scope.shield:
            inner.__class__ = _Passing
            todo += inner._children


def _ours_inside(status: Any) -> Iterator[TrioMemberScope]:
    """Yield the scopes of this package that are open inside ``status``, in any task, and that no other's shield hides."""
    todo = list(status._children)
    while todo:
        inner = todo.pop()
        if isinstance(inner._scope, TrioMemberScope):
            yield inner._scope
        elif inner._scope.shield:
            continue
        todo += inner._children


def _is_cancelled(value: Any) -> bool:
    """Return whether ``value``, sent to a task, raises ``trio.Cancelled`` in it, also one from a worker thread."""
    if type(value) is outcome.Value:
        value = value.value
    return type(value) is outcome.Error and isinstance(value.error, trio.Cancelled)


def _has_cancelled(exc: BaseException | None) -> bool:
    if isinstance(exc, BaseExceptionGroup):
        return any(map(_has_cancelled, exc.exceptions))
    return isinstance(exc, trio.Cancelled)


class TrioMemberScope(HookedMemberScope):
    """A scope around a task that is shielded from the delivery of a cancellation until the grace is over.

    trio reads this object in place of its ``trio.CancelScope``.
    """

    __slots__ = (
        "_grace",
        "_is_ours",
        "_loop",
        "_scope",
        "_stepper",
        "_task",
        "_unwinding",
        "delivered_at",
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
        # They refer to this scope: cycles, and nothing needs them any more.
        self.status._scope = self._scope
        del self._stepper, self.status
        self._is_ours = _nothing_is_ours
        if remaining is not None and stepper.scopes and _has_cancelled(remaining):
            stepper.tell()
        return remaining

    # The attributes that trio reads.

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

    # Delivery to the task.

    @property
    def is_struck(self) -> bool:
        """Whether a cancellation by this package, from this scope or a scope around it, is to reach the task."""
        if self._scope.cancel_called or (not self.is_delivered and type(self.status) is _Passing):
            return True
        return self.status.parent_cancellation_is_visible_to_us and self._comes_from_ours()

    def _comes_from_ours(self) -> bool:
        """Return whether this scope, or a scope around it that no shield hides, is cancelled by this package."""
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
        """Whether a cancellation by this package comes from this scope."""
        return self._scope.cancel_called or self._is_ours(None)

    def _note_delivery(self) -> None:
        if not self.is_delivered:
            self.is_delivered = True
            self.delivered_at = self._loop.time()

    def deliver(self, inside: list[TrioMemberScope]) -> None:
        """Note that the task has received the cancellation and cleans up now, also in the scopes ``inside``."""
        self._note_delivery()
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
        """Note that a scope further out has delivered. A task group between the two might cancel this one as well."""
        self._note_delivery()
        self._end_unwinding()
        self._withdraw()
        self._leave_alone(until)

    def _withdraw(self) -> None:
        """Undo the cancellation of the scope until the grace is over, so that it is not repeated at once."""
        if self._scope.cancel_called:
            self._scope._cancel_called = False
            self.status.recalculate()

    def take_for_delivered(self) -> None:
        """Note that the task cleans up already, because it has been stopped in another way."""
        if not self.is_delivered and self._grace > 0:
            self._note_delivery()
            self._end_unwinding()
            self._leave_alone(self._loop.time() + self._grace)

    def shorten_grace(self, grace: float) -> None:
        """Give the cleanup in this scope, and in our scopes inside, at most ``grace`` seconds."""
        for scope in (self, *_ours_inside(self.status)):
            scope._shorten_own_grace(grace)

    def _shorten_own_grace(self, grace: float) -> None:
        scope = self._scope
        # Without a shield if an exception has stopped the task; with one also if the grace is that of a scope around.
        is_cleaning_up = self.is_delivered and not scope.cancel_called and (scope.shield or self._grace > 0)
        self._grace = min(self._grace, grace)
        if self._unwinding is not None:
            self._unwinding.shorten_grace(grace)
        until = self._loop.time() + grace
        if is_cleaning_up and until < scope.deadline:
            scope.deadline = until

    # A task that is stopped by an exception.

    @property
    def _is_told_by_error(self) -> bool:
        return self._unwinding is not None and self._unwinding.is_active

    def note_unwinding(self, error: BaseException) -> None:
        """Delay cancellations while ``error`` unwinds the task."""
        if not self.is_delivered and self._grace > 0:
            if self._unwinding is None:
                self._unwinding = Unwinding(self._loop, self._grace, self._error_was_caught, self._grace_has_ended)
            self._unwinding.add(error)
            self._withdraw()
            self.status.recalculate()
            if self._is_inside_of_others():
                self._unwinding.start_timer()

    def _is_inside_of_others(self) -> bool:
        """Return whether a scope of this package in another task is around, which may cancel without notice."""
        status: Any = self.status._parent
        while status is not None and not isinstance(status._scope, TrioMemberScope):
            status = status._parent
        return status is not None and self._stepper.scopes[0] is self

    def _error_was_caught(self) -> None:
        """Allow cancellations again, because the exception has been caught and the work continues."""
        self._unwinding = None
        self.status.recalculate()

    def _grace_has_ended(self) -> None:
        """Cancel now, because the grace is over and the exception still unwinds the task."""
        self._unwinding = None
        if _is_visible(self.status) and self._comes_from_ours():
            self._note_delivery()
            self._scope.cancel()

    def _end_unwinding(self) -> None:
        if self._unwinding is not None:
            self._unwinding.end()
            self._unwinding = None


class TrioTaskScope(TrioMemberScope):
    """A scope around the rest of a task of another author, inserted while the task runs."""

    __slots__ = ("_ended",)

    def put_around(self, ended: Callable[[bool], object]) -> None:
        """Enter later, directly inside the nursery of the task; ``ended(False)`` is called when the task ends."""
        self._ended = ended
        task = self._task
        nursery = task.parent_nursery
        outer = None if nursery is None else nursery._cancel_status
        inner, status = None, task._cancel_status
        while status is not None and status is not outer:
            inner, status = status, status._parent
        if status is None:
            # The task has no nursery, or was moved to another one: its scopes cannot be told from those around it.
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
        """Remove the scope, as the task has ended."""
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

    # Scopes that are open inside at the delivery are made to let the cancellation pass.
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
        """Hold the cancellation if the task is about to continue after the thread of a handler, which so returns."""
        # Not when the task has continued: in the middle of a checkpoint of trio, a cancellation must not vanish.
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
            # The cancellation came from further out, and must reach that scope.
            self._is_covered = True
            if self._grace > 0:
                self.status.__class__ = _Passing
        super().deliver(inside)

    def cover(self, until: float) -> None:
        self._is_covered = True
        super().cover(until)

    def take_for_delivered(self) -> None:
        # Without a shield: code that catches the exception continues its work, and another cancellation may stop it.
        if not self.is_delivered and self._grace > 0 and not self._is_about_to_be_told:
            self._note_delivery()
            self._end_unwinding()
            self._withdraw()
            self._scope.deadline = self._loop.time() + self._grace

    @property
    def _is_told_by_error(self) -> bool:
        # Also by an error of `check()`, which replaces the cancellation of this block.
        is_told = self.is_delivered and not self._is_covered and self._grace > 0 and not self._scope.cancel_called
        return is_told or super()._is_told_by_error

    def _error_was_caught(self) -> None:
        super()._error_was_caught()
        if self._asked and not self._held:
            self._scope.cancel()

    def _grace_has_ended(self) -> None:
        self._unwinding = None
        if self._asked and not self._held:
            self._note_delivery()
            self._scope.cancel()
        else:
            self.status.recalculate()

    @property
    def _is_about_to_be_told(self) -> bool:
        """Whether another task is running and this one is scheduled, perhaps in a checkpoint that saw the cancellation.

        In the middle of its checkpoint, trio must still find the cancellation.
        """
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
                self.cancel_politely("it is no longer held")

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
    """Note that ``error`` stops the current task, and unwinds its scopes."""
    stepper: Any = trio.lowlevel.current_task().coro
    if isinstance(stepper, _Stepper):
        for scope in reversed(stepper.scopes):
            if scope.is_told:
                # When this scope is left, it notifies the scopes around it.
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
    """Return ``scope`` itself: the hook notifies the member scopes."""
    return scope


def task_finder(loop: Any) -> None:
    """Return ``None``: scopes are always entered at once."""
