"""Polite cancellation on asyncio: three private hooks into anyio's ``CancelScope``.

* ``_deliver_cancellation`` walks down the tree of scopes and calls ``Task.cancel()``. Ours looks whether it was reached.
* A scope that is left asks ``_parent_cancellation_is_visible_to_us``, and if not takes what passes for its own. With our
  shield above it, it would, and the code behind it run as if all had been done. So those that are open at the moment of
  delivery are made to say yes.
* A scope of a request is put into that tree when the request is some milliseconds old, or when something strikes before
  that. To enter one costs a request an eighth of all that FastAPI does for it, and most are over by then.
"""

from __future__ import annotations

import math
from asyncio import CancelledError, current_task, get_running_loop
from contextvars import Context
from typing import TYPE_CHECKING, Any
from weakref import ref

from anyio._backends import _asyncio as anyio_asyncio
from anyio._backends._asyncio import CancelScope

from .unwinding import HookedMemberScope, Unwinding, leave

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from anyio import CancelScope as AnyCancelScope

    from .base import EventLoop, IsOurs, Late, MemberScope, PoliteScope, TaskScope

_states: Any = anyio_asyncio._task_states
_make_state: Any = anyio_asyncio.TaskState
_threadlocals: Any = anyio_asyncio.threadlocals  # type: ignore[attr-defined]


def task_finder(loop: asyncio.AbstractEventLoop) -> Callable[[], object]:
    """A function that returns the running task, if no scope of anyio's is open in it: then ours may be entered later."""
    # Its parts looked up once: a request calls it. The dictionary inside of anyio's weak one, for the same reason.
    find = _states.data.get

    def task_without_scope() -> object:
        task: Any = current_task(loop)
        if task is None:
            raise RuntimeError("enter a request's block in a task of the event loop that serves the request")
        state = find(ref(task))
        if (state is None or state.cancel_scope is None) and not task.cancelling():
            return task
        return None

    return task_without_scope


class _AskedByThread(CancelScope):
    """anyio's own scope around the waiting for a worker thread, which had begun before ours was put around it.

    The thread was given this scope to ask, as there was none around it; and as it is a shield, it asks no further.
    """

    __slots__ = ()

    @property
    def cancel_called(self) -> bool:
        if self._cancel_called or getattr(_threadlocals, "current_cancel_scope", None) is not self:
            return self._cancel_called
        scope = self._parent_scope
        while scope is not None:
            if scope.cancel_called:
                return True
            scope = None if scope.shield else scope._parent_scope
        return False


class _Passing(CancelScope):
    """One that was open when a cancellation of ours was delivered through it, which is not its own."""

    __slots__ = ()

    @property
    def _parent_cancellation_is_visible_to_us(self) -> bool:
        return True


def _is_visible(scope: CancelScope) -> bool:
    is_visible: bool = CancelScope._parent_cancellation_is_visible_to_us.fget(scope)  # type: ignore[attr-defined]
    return is_visible


def _let_pass(scope: CancelScope) -> None:
    """Whatever is open inside of ``scope`` now lets a cancellation pass, in child tasks as well."""
    todo = list(scope._child_scopes)
    while todo:
        inner = todo.pop()
        if not inner.shield:
            if type(inner) is CancelScope:
                inner.__class__ = _Passing
            todo += inner._child_scopes


class _OurScope(CancelScope):
    """What scopes and gates have in common."""

    __slots__ = ("_grace", "_loop", "_unwinding", "is_delivered")

    _grace: float
    _loop: EventLoop
    _unwinding: Unwinding | None
    is_delivered: bool

    # Asked by anyio when it looks whether a cancellation from outside is visible; for delivering it there is our method.
    @property
    def shield(self) -> bool:
        if self._shield or (self._unwinding is None and not self.is_delivered):
            return self._shield
        return self._is_told_by_error and self._comes_from_ours()

    @shield.setter
    def shield(self, value: bool) -> None:
        CancelScope.shield.fset(self, value)  # type: ignore[attr-defined]

    @property
    def strikes(self) -> bool:
        """Whether a cancellation comes from here."""
        return self._cancel_called

    def _comes_from_ours(self) -> bool:
        """Whether what is cancelled around this scope, as far as a cancellation is visible, is one of ours."""
        scope: CancelScope | None = self
        while scope is not None:
            if isinstance(scope, _OurScope):
                if scope.strikes:
                    return True
            elif isinstance(scope, _Passing) and scope._cancel_called:
                return True
            if scope is not self and scope._shield:
                return False
            scope = scope._parent_scope
        return False

    def _deliver_from_outside(self, origin: Any) -> bool:
        if not self._comes_from_ours():
            return CancelScope._deliver_cancellation(self, origin)
        if self._is_told_by_error:
            return False
        if self.is_delivered:
            return CancelScope._deliver_cancellation(self, origin)
        if self._grace > 0 and self._is_passing_on():
            self.deliver()
            return False
        return _deliver(self, origin)

    def _is_passing_on(self) -> bool:
        """Whether a scope further in, cancelled in the same tick, has let its cancellation pass for ours."""
        if self._host_task is current_task():
            # It is just leaving that scope, which has yet to ask whether ours is visible.
            return False
        host: Any = self._host_task
        if host.cancelling() <= self._cancelling_at_enter:
            # What was handed on is that of a child's task.
            return False
        state = _states.get(self._host_task)
        scope = self if state is None else state.cancel_scope
        while scope is not None and scope is not self:
            is_told = isinstance(scope, _OurScope) and scope.is_delivered
            if scope._shield or is_told:
                break
            if scope._pending_uncancellations and (isinstance(scope, _OurScope) or not scope._cancel_called):
                return True
            scope = scope._parent_scope
        return bool(self._pending_uncancellations)

    def deliver(self) -> None:
        """The task has the cancellation; what it does now is its cleanup."""
        self.is_delivered = True
        self._end_unwinding()
        if self._grace > 0:
            _let_pass(self)
            until = self._loop.time() + self._grace
            for scope in _ours_in(self._host_task):
                if scope is self:
                    break
                scope.cover(until)
            self._withdraw()
            self._leave_alone(until)

    def _leave_alone(self, until: float) -> None:
        self._shield = True
        self._end_grace_at(until)

    def cover(self, until: float) -> None:
        """A scope further out has told the task. Between that one and this something may strike beside: a task group."""
        self.is_delivered = True
        self._end_unwinding()
        self._withdraw()
        self._leave_alone(until)

    def _withdraw(self) -> None:
        """Take the scope's own cancellation back until the grace is over, so that it is not repeated at once."""
        self._cancel_called = False
        if self._cancel_handle is not None:
            self._cancel_handle.cancel()
            self._cancel_handle = None

    def _end_grace_at(self, until: float) -> None:
        # Not through the property: asyncio keeps a timer that was cancelled, and with anyio's the request's context.
        self._deadline = until
        self._stop_timer()
        if self._deadline < math.inf:
            timer: Any = self._loop.call_at(self._deadline, self._become_firm)
            self._timeout_handle = timer

    def _stop_timer(self) -> None:
        if self._timeout_handle is not None:
            self._timeout_handle.cancel()
            self._timeout_handle = None

    def _become_firm(self) -> None:
        raise NotImplementedError

    @property
    def _is_told_by_error(self) -> bool:
        return self._unwinding is not None and self._unwinding.is_active

    def note_unwinding(self, error: BaseException) -> None:
        if not self.is_delivered and self._grace > 0:
            if self._unwinding is None:
                self._unwinding = Unwinding(self._loop, self._grace, self._error_was_caught, self._grace_has_ended)
            self._unwinding.add(error)
            self._withdraw()
            if self._is_inside_of_others():
                self._unwinding.start_timer()

    def _is_inside_of_others(self) -> bool:
        """Whether scopes of ours in another task may strike us, of which we are not told beforehand."""
        scope = self._parent_scope
        while scope is not None and not isinstance(scope, _OurScope):
            scope = scope._parent_scope
        return scope is not None and scope._host_task is not self._host_task

    def _error_was_caught(self) -> None:
        """Whoever has caught the exception works on, and can be stopped."""
        self._unwinding = None
        self._restart_cancellation_in_parent()

    def _grace_has_ended(self) -> None:
        """The exception is still on its way, and the grace is over."""
        self._unwinding = None
        parent = self._parent_scope
        if parent is not None and parent._effectively_cancelled and self._comes_from_ours():
            self.is_delivered = True
            self.cancel()

    def _end_unwinding(self) -> None:
        if self._unwinding is not None:
            self._unwinding.end()
            self._unwinding = None

    def _leave(self, exc: BaseException | None) -> BaseException | None:
        if self._pending_uncancellations:
            self._keep_count_in_task()
        task = self._host_task
        remaining = leave(self, exc)
        if remaining is not None and _has_cancelled(remaining):
            _pass_on(task)
        return remaining

    @property
    def is_struck(self) -> bool:
        """Whether a cancellation of ours, from this scope or through it, is to reach the task."""
        if self.is_delivered or self._cancel_called:
            return not self.is_delivered
        return _is_visible(self) and self._comes_from_ours()

    def _keep_count_in_task(self) -> None:
        """Take back now what anyio would hand on to a scope of another task.

        A task group that has been cancelled as well would take it off the count of its own task, and somebody else's
        ``Task.cancel()`` of that one be forgotten.
        """
        task: Any = self._host_task
        scope = self._parent_scope
        while scope is not None and scope._host_task is task:
            if scope._cancel_called or scope._shield or (isinstance(scope, AsyncioPoliteScope) and scope._asked):
                return
            scope = scope._parent_scope
        if scope is not None:
            for _ in range(self._pending_uncancellations or 0):
                task.uncancel()
            self._pending_uncancellations = 0


class AsyncioPoliteScope(_OurScope):
    """A scope that is cancelled, and from the delivery on shielded and not cancelled; `end` shows anyio the whole truth."""

    __slots__ = ("_asked", "_children", "_held", "_is_covered", "spares")

    # What is open inside when it delivers is made to let it pass.
    is_lost = False

    def __new__(cls, *args: object) -> Any:
        return object.__new__(cls)

    def __init__(self, loop: EventLoop, grace: float) -> None:
        CancelScope.__init__(self)
        self._loop = loop
        self._grace = grace
        self._unwinding = None
        self._asked = self._held = self.is_delivered = self._is_covered = False
        self.spares: Callable[..., bool] | None = None

    def begin(self, deadline: float, late: Late | None) -> None:
        if late is None:
            self.__enter__()
        else:
            self._place(*late)
        # Not through the property: there is a timer for it, which records the reason.
        self._deadline = deadline

    @property
    def task(self) -> object:
        return self._host_task

    def _get_children(self) -> set[CancelScope]:
        if self._children is None:
            self._children = set()
        return self._children

    def _set_children(self, children: set[CancelScope]) -> None:
        self._children = children or None

    _children: set[CancelScope] | None
    # Most have none, and an empty set is a twentieth of what a waiting request takes.
    _child_scopes: Any = property(_get_children, _set_children)  # pyright: ignore[reportIncompatibleVariableOverride]

    def end(self, exc: BaseException | None) -> BaseException | None:
        if self._unwinding is not None:
            self._end_unwinding()
        if self._asked and not self._is_covered:
            self._cancel_called = True
            self._shield = False
            if exc is not None:
                self._reword(exc, self._is_only_one)
        return self._leave(exc)

    @property
    def _parent_cancellation_is_visible_to_us(self) -> bool:
        return self._is_covered or _is_visible(self)

    @property
    def _is_only_one(self) -> bool:
        """Whether nobody but us has asked the task to end, as asyncio counts it."""
        task: Any = self._host_task
        asked = self._pending_uncancellations or 0
        return asked > 0 and task.cancelling() - asked <= self._cancelling_at_enter

    def _reword(self, exc: BaseException | None, is_any_ours: bool) -> None:
        """Make our cancellation in ``exc`` one that anyio knows.

        It may have another's words: a cleanup that we interrupt may raise what it was cleaning up for, such as the
        cancellation by ``asyncio.timeout()``, which withdraws its own when it sees that there is one more.
        """
        if isinstance(exc, BaseExceptionGroup):
            for leaf in exc.exceptions:
                self._reword(leaf, is_any_ours)
        while isinstance(exc, CancelledError):
            if is_any_ours or exc.args == (self._cancel_reason,):
                exc.args = (f"Cancelled via cancel scope {id(self):x}; {self._cancel_reason}",)
            exc = exc.__context__

    def cancel_politely(self, why: str) -> None:
        if self._unwinding is not None:
            self._unwinding.drop_caught()
        self._asked = True
        if self._cancel_reason is None:
            # Not as anyio words it, by which it knows its own: with our shield above it, a scope further in would take
            # this for its own as well, and the work go on in error. `end` words it so.
            self._cancel_reason = f"cancelled by cancelable_deps: {why} ({id(self):x})"
        if self._held or self.is_delivered:
            return
        if self._unwinding is not None and self._unwinding.is_active:
            self._unwinding.start_timer()
        else:
            self._cancel_called = True
            self._deliver_cancellation(self)

    def reaches(self, inner: AsyncioPoliteScope) -> bool:
        scope = inner._parent_scope
        while scope is not None and scope is not self:
            if scope._shield and not isinstance(scope, _OurScope):
                return False
            scope = scope._parent_scope
        return True

    def _place(self, task: Any, outer: Any) -> None:
        """Enter belatedly: directly inside of ``outer``, around all that the task has entered since."""
        self._host_task = task
        self._cancelling_at_enter = 0
        self._active = True
        state = _states.get(task)
        if state is None:
            state = _states[task] = _make_state(None, None)
        inner = state.cancel_scope
        if inner is outer:
            self._place_below(outer)
            state.cancel_scope = self
            self._tasks.add(task)
            return
        while inner._parent_scope is not outer:
            inner = inner._parent_scope
        self._place_below(outer)
        if outer is not None:
            outer._child_scopes.remove(inner)
        elif type(inner) is CancelScope and inner._shield:
            inner.__class__ = _AskedByThread
        inner._parent_scope = self
        self._child_scopes.add(inner)

    def _place_below(self, parent: Any) -> None:
        self._parent_scope = parent
        if parent is not None:
            parent._child_scopes.add(self)
            parent._tasks.discard(self._host_task)

    def _deliver_cancellation(self, origin: Any) -> bool:
        if origin is not self:
            if not self._active or origin._host_task is self._host_task:
                return CancelScope._deliver_cancellation(self, origin)
            return self._deliver_from_outside(origin)
        if not self._cancel_called:
            # Held in the meantime; anyio had this retry scheduled.
            self._cancel_handle = None
            return False
        if self.is_delivered or not self._active:
            return CancelScope._deliver_cancellation(self, origin)
        if self._grace > 0 and self._is_passing_on():
            self.deliver()
            return False
        task: Any = self._host_task
        if task is not current_task() and getattr(task.get_coro(), "cr_running", False):
            # A task that it starts eagerly cancels us. Asked now, it would hear of it at an await that may come after us.
            self._cancel_handle = get_running_loop().call_soon(self._deliver_cancellation, self)
            return True
        if self.spares is not None and self.spares():
            return False
        return _deliver(self, origin)

    def deliver(self) -> None:
        if not self._cancel_called:
            # It came from outside, and goes on there.
            self._is_covered = True
        super().deliver()

    def cover(self, until: float) -> None:
        self._is_covered = True
        super().cover(until)

    def take_for_delivered(self) -> None:
        # Not shielded: whoever catches the exception works on, and whatever else strikes may stop that.
        if not self.is_delivered and self._grace > 0:
            self.is_delivered = True
            self._end_unwinding()
            self._withdraw()
            self._end_grace_at(self._loop.time() + self._grace)

    def _become_firm(self) -> None:
        self._timeout_handle = None
        if not self._asked:
            # The task was told by an exception, and a block inside or around this one was to deliver.
            self.cancel_politely("the grace is over")
        self._cancel_called = True
        self._deliver_cancellation(self)

    @property
    def _is_told_by_error(self) -> bool:
        # Also by `check()`, which this block was to answer for.
        is_told = self.is_delivered and not self._is_covered and self._grace > 0 and not self._cancel_called
        return is_told or (self._unwinding is not None and self._unwinding.is_active)

    def _error_was_caught(self) -> None:
        super()._error_was_caught()
        self._strike()

    def _grace_has_ended(self) -> None:
        self._unwinding = None
        if self._asked and not self._held:
            self.is_delivered = True
            self._strike()
        else:
            self._restart_cancellation_in_parent()

    def _strike(self) -> None:
        if self._asked and not self._held and self._active:
            self._cancel_called = True
            self._deliver_cancellation(self)

    def hold(self) -> None:
        if not self.is_delivered:
            self._held = True
            self._withdraw()

    def resume(self) -> None:
        if self._held:
            self._held = False
            if self._asked:
                self.cancel_politely("what it was held for has begun")

    def release(self) -> None:
        self._held = True
        self.is_delivered = self._is_covered = False
        self._withdraw()
        self._shield = False
        self._deadline = math.inf
        self._stop_timer()

    def move_deadline(self, deadline: float) -> None:
        if not self.is_delivered:
            self._deadline = deadline


class AsyncioMemberScope(HookedMemberScope, _OurScope):
    """A scope inside of others, entered by anyio, that is shielded when a cancellation of ours has come through."""

    __slots__ = ("_is_ours",)

    def __new__(cls, *args: object) -> Any:
        return object.__new__(cls)

    def __init__(self, loop: EventLoop, grace: float, is_ours: IsOurs) -> None:
        CancelScope.__init__(self)
        self._loop = loop
        self._grace = grace
        self._is_ours = is_ours
        self._unwinding = None
        self.is_delivered = False

    def begin(self) -> None:
        self.__enter__()

    def end(self, exc: BaseException | None) -> BaseException | None:
        self._end_unwinding()
        return self._leave(exc)

    @property
    def strikes(self) -> bool:
        return self._cancel_called or self._is_ours(None)

    def _deliver_cancellation(self, origin: Any) -> bool:
        if origin is self or not self._active:
            # Its own: the grace is over, or this is anyio's last look at a scope that has been left.
            return CancelScope._deliver_cancellation(self, origin)
        return self._deliver_from_outside(origin)

    def take_for_delivered(self) -> None:
        if not self.is_delivered and self._grace > 0:
            self.is_delivered = True
            self._end_unwinding()
            self._leave_alone(self._loop.time() + self._grace)

    def _become_firm(self) -> None:
        self._timeout_handle = None
        self.cancel()


class AsyncioTaskScope(AsyncioMemberScope):
    """A gate around all that is left of a task that is not ours, put there while the task runs."""

    __slots__ = ()

    def put_around(self, ended: Callable[[bool], object]) -> None:
        """Enter belatedly: around every scope that the task has entered itself, inside of those it was started in.

        ``ended(was_cancelled)`` is called when the task has ended.
        """
        task: Any = current_task()
        # A task that is not anyio's is cancelled once, and needs no gate.
        is_in_place = task in _states
        if is_in_place:
            self._put_around(task, _states[task])

        def task_ended(_: object) -> None:
            if is_in_place:
                self._take_away()
            ended(task.cancelled())

        task.add_done_callback(task_ended, context=Context())

    def _put_around(self, task: Any, state: Any) -> None:
        inner, outer = None, state.cancel_scope
        while outer is not None and outer._host_task is task:
            inner, outer = outer, outer._parent_scope
        self._host_task = task
        self._cancelling_at_enter = task.cancelling()
        self._active = True
        self._parent_scope = outer
        if outer is not None:
            outer._child_scopes.add(self)
        if inner is None:
            state.cancel_scope = self
            self._tasks.add(task)
            if outer is not None:
                outer._tasks.discard(task)
        else:
            inner._parent_scope = self
            self._child_scopes.add(inner)
            if outer is not None:
                outer._child_scopes.discard(inner)

    def _take_away(self) -> None:
        self._end_unwinding()
        self._active = False
        for handle in (self._timeout_handle, self._cancel_handle):
            if handle is not None:
                handle.cancel()
        self._timeout_handle = self._cancel_handle = None
        if self._parent_scope is not None:
            self._parent_scope._child_scopes.discard(self)
        self._host_task = self._parent_scope = None


def tell(loop: EventLoop, error: BaseException) -> None:
    """The current task has been told to stop by ``error``, which is on its way through its scopes."""
    for scope in _ours_in(current_task()):
        if scope._shield:
            # It has told the task before, and when it is left tells those around it.
            return
        scope.note_unwinding(error)


def _ours_in(task: Any) -> Iterator[_OurScope]:
    """The scopes of ours that are open in ``task``, the innermost first."""
    return (scope for scope in _scopes_in(task) if isinstance(scope, _OurScope))


def _scopes_in(task: Any) -> Iterator[CancelScope]:
    state = None if task is None else _states.get(task)
    scope = None if state is None else state.cancel_scope
    while scope is not None and scope._host_task is task:
        yield scope
        scope = scope._parent_scope


def _pass_on(task: Any) -> None:
    """A cancellation is on its way through the task: the outermost scope that it may have come from has delivered it."""
    struck = None
    for scope in _scopes_in(task):
        if isinstance(scope, _OurScope) and scope.is_struck:
            struck = scope
        if scope._shield:
            break
    if struck is not None:
        struck.deliver()


def _has_cancelled(exc: BaseException) -> bool:
    if isinstance(exc, BaseExceptionGroup):
        return any(map(_has_cancelled, exc.exceptions))
    return isinstance(exc, CancelledError)


def _deliver(scope: _OurScope, origin: Any) -> bool:
    """As anyio does it; and the scope is told if its task was reached."""
    before = _cancellations(scope)
    retry = CancelScope._deliver_cancellation(scope, origin)
    if _cancellations(scope) > before:
        scope.deliver()
    return retry


def _cancellations(scope: Any) -> int:
    """How often the task of ``scope`` was cancelled; or what its worker thread runs in the loop, which it waits for."""
    host = scope._host_task
    count: int = host.cancelling()
    scopes = [scope]
    for inner in scopes:
        count += sum(task.cancelling() for task in inner._tasks if task is not host and _runs_for_thread(task))
        for child in inner._child_scopes:
            if child._host_task is host:
                scopes.append(child)
            elif _runs_for_thread(child._host_task):
                count += child._host_task.cancelling()
    return count


def _runs_for_thread(task: Any) -> bool:
    """Whether anyio has started ``task`` for ``from_thread.run()``: beside the scope's own, the only ones of no group."""
    state = _states.get(task)
    return state is not None and state.parent_id is None


def polite_scope(loop: EventLoop, grace: float) -> PoliteScope:
    scope: PoliteScope = AsyncioPoliteScope(loop, grace)
    return scope


def member_scope(loop: EventLoop, grace: float, is_ours: IsOurs) -> MemberScope:
    return AsyncioMemberScope(loop, grace, is_ours)


def task_scope(loop: EventLoop, grace: float, is_ours: IsOurs) -> TaskScope:
    return AsyncioTaskScope(loop, grace, is_ours)


def told_scope(loop: EventLoop, scope: AnyCancelScope, member_scopes: dict[Any, MemberScope]) -> AnyCancelScope:
    """``scope`` itself: the hook tells the gates."""
    return scope
