"""Polite cancellation on asyncio, with three private hooks into anyio's ``CancelScope``.

* ``_deliver_cancellation`` walks down the tree of scopes and calls ``Task.cancel()``. Our override checks whether that
  has reached its task.
* A scope that is left reads ``_parent_cancellation_is_visible_to_us``. If that is false, it swallows a cancellation as
  its own, and the code behind it runs as if its work were complete. That would happen with our shield around it, so the
  scopes that are open at the moment of delivery are made to answer yes.
* The scope of a request is inserted into that tree when the request is some milliseconds old, or when it is cancelled
  before. Entering a scope costs a request an eighth of FastAPI's own work for it, and most requests have ended by then.
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
    """Return a function that returns the running task if no scope of anyio is open in it; ours may come later then."""
    # Each request calls it, so its parts are looked up once, and it reads the dict inside anyio's weak dictionary.
    states = _states.data
    find = states.get

    def task_without_scope() -> object:
        task: Any = current_task(loop)
        if task is None:
            raise RuntimeError("enter a request's block in a task of the event loop that serves the request")
        # Often no task of the application has a scope open: the reference costs more than all else here.
        state = find(ref(task)) if states else None
        if (state is None or state.cancel_scope is None) and not task.cancelling():
            return task
        return None

    return task_without_scope


class _AskedByThread(CancelScope):
    """The scope of anyio around the wait for a worker thread, if it was entered before our scope was put around it.

    The thread was given this scope to check, as there was none around it. It is shielded, so the thread would not check
    the scopes around it.
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
    """A scope that was open when a cancellation from further out was delivered, and must let it pass."""

    __slots__ = ()

    @property
    def _parent_cancellation_is_visible_to_us(self) -> bool:
        return True


def _is_visible(scope: CancelScope) -> bool:
    is_visible: bool = CancelScope._parent_cancellation_is_visible_to_us.fget(scope)  # type: ignore[attr-defined]
    return is_visible


def _let_pass(scope: CancelScope) -> None:
    """Make all scopes that are open inside ``scope`` let a cancellation pass, in child tasks as well."""
    todo = list(scope._child_scopes)
    while todo:
        inner = todo.pop()
        if not inner.shield:
            if type(inner) is CancelScope:
                inner.__class__ = _Passing
            todo += inner._child_scopes


class _OurScope(CancelScope):
    """The base of the scopes of this package."""

    __slots__ = ("_grace", "_loop", "_unwinding", "delivered_at", "is_delivered")

    _grace: float
    _loop: EventLoop
    _unwinding: Unwinding | None
    delivered_at: float
    is_delivered: bool

    # anyio reads this to see whether a cancellation from outside is visible. For the delivery it calls our method.
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
        """Whether a cancellation by this package comes from this scope."""
        return self._cancel_called

    def _comes_from_ours(self) -> bool:
        """Return whether this scope, or a scope around it that no shield hides, is cancelled by this package."""
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
        """Return whether an inner scope, cancelled in the same pass of the loop, passes its cancellation on as ours."""
        if self._host_task is current_task():
            # The task is leaving that scope, which has not checked yet whether our cancellation is visible.
            return False
        host: Any = self._host_task
        if host.cancelling() <= self._cancelling_at_enter:
            # The cancellation that was passed on is that of a child task.
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

    def _note_delivery(self) -> None:
        if not self.is_delivered:
            self.is_delivered = True
            self.delivered_at = self._loop.time()

    def deliver(self) -> None:
        """Note that the task has received the cancellation and cleans up now, also in inner scopes."""
        self._note_delivery()
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
        """Note that a scope further out has delivered. A task group between the two might cancel this one as well."""
        self._note_delivery()
        self._end_unwinding()
        self._withdraw()
        self._leave_alone(until)

    def _withdraw(self) -> None:
        """Undo the cancellation of the scope until the grace is over, so that it is not repeated at once."""
        self._cancel_called = False
        if self._cancel_handle is not None:
            self._cancel_handle.cancel()
            self._cancel_handle = None

    def _end_grace_at(self, until: float) -> None:
        # Not through the property: asyncio keeps cancelled timers, and a timer of anyio keeps the request's context.
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

    def shorten_grace(self, grace: float) -> None:
        """Give the cleanup in this scope, and in our scopes inside, at most ``grace`` seconds."""
        for scope in (self, *_ours_inside(self)):
            scope._shorten_own_grace(grace)

    def _shorten_own_grace(self, grace: float) -> None:
        # Without a shield if an exception has stopped the task; with one also if the grace is that of a scope around.
        is_cleaning_up = self.is_delivered and not self._cancel_called and (self._shield or self._grace > 0)
        self._grace = min(self._grace, grace)
        if self._unwinding is not None:
            self._unwinding.shorten_grace(grace)
        until = self._loop.time() + grace
        if is_cleaning_up and until < self._deadline:
            self._end_grace_at(until)

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
            if self._is_inside_of_others():
                self._unwinding.start_timer()

    def _is_inside_of_others(self) -> bool:
        """Return whether a scope of this package in another task is around, which may cancel without notice."""
        scope = self._parent_scope
        while scope is not None and not isinstance(scope, _OurScope):
            scope = scope._parent_scope
        return scope is not None and scope._host_task is not self._host_task

    def _error_was_caught(self) -> None:
        """Allow cancellations again, because the exception has been caught and the work continues."""
        self._unwinding = None
        self._restart_cancellation_in_parent()

    def _grace_has_ended(self) -> None:
        """Cancel now, because the grace is over and the exception still unwinds the task."""
        self._unwinding = None
        parent = self._parent_scope
        if parent is not None and parent._effectively_cancelled and self._comes_from_ours():
            self._note_delivery()
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
        """Whether a cancellation by this package, from this scope or a scope around it, is to reach the task."""
        if self.is_delivered or self._cancel_called:
            return not self.is_delivered
        return _is_visible(self) and self._comes_from_ours()

    def _keep_count_in_task(self) -> None:
        """Uncancel the task now, by the count that anyio would pass on to a scope of another task.

        A task group that is cancelled as well would subtract it from the count of its own task, and so lose a
        ``Task.cancel()`` of that task by other code.
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
    """A scope that is cancelled until the delivery, and shielded from then on; `end` marks it as cancelled again."""

    __slots__ = ("_asked", "_children", "_held", "_is_covered", "spares")

    # Scopes that are open inside at the delivery are made to let the cancellation pass.
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
        # Not through the property, because our own timer cancels at the deadline, and records the reason.
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
    # Most scopes have no children, and an empty set takes a twentieth of the memory of a waiting request.
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
        """Whether only this scope has cancelled the task, by the count of asyncio."""
        task: Any = self._host_task
        asked = self._pending_uncancellations or 0
        return asked > 0 and task.cancelling() - asked <= self._cancelling_at_enter

    def _reword(self, exc: BaseException | None, is_any_ours: bool) -> None:
        """Give our cancellation in ``exc`` the message by which anyio recognizes its own.

        It may have another message: a cleanup that we interrupt may raise the cancellation that it handles, such as
        that of ``asyncio.timeout()``, which undoes its own cancellation when it sees another one.
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
            # Not the message by which anyio recognizes its own cancellation: with our shield around it, an inner scope
            # would swallow this one too, and the work would continue by mistake. `end` sets that message.
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
        """Enter later: directly inside ``outer``, around all scopes that the task has entered since."""
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
            # The scope has been held since anyio scheduled this retry.
            self._cancel_handle = None
            return False
        if self.is_delivered or not self._active:
            return CancelScope._deliver_cancellation(self, origin)
        if self._grace > 0 and self._is_passing_on():
            self.deliver()
            return False
        task: Any = self._host_task
        if task is not current_task() and getattr(task.get_coro(), "cr_running", False):
            # A task that it has started eagerly cancels this scope. `Task.cancel()` would take effect at the next
            # await, which may come after the end of this scope.
            self._cancel_handle = get_running_loop().call_soon(self._deliver_cancellation, self)
            return True
        if self.spares is not None and self.spares():
            return False
        return _deliver(self, origin)

    def deliver(self) -> None:
        if not self._cancel_called:
            # The cancellation came from further out, and must reach that scope.
            self._is_covered = True
        super().deliver()

    def cover(self, until: float) -> None:
        self._is_covered = True
        super().cover(until)

    def take_for_delivered(self) -> None:
        # Without a shield: code that catches the exception continues its work, and another cancellation may stop it.
        if not self.is_delivered and self._grace > 0:
            self._note_delivery()
            self._end_unwinding()
            self._withdraw()
            self._end_grace_at(self._loop.time() + self._grace)

    def _become_firm(self) -> None:
        self._timeout_handle = None
        if not self._asked:
            # An exception has stopped the task, and an inner or outer block was to deliver the cancellation.
            self.cancel_politely("the grace is over")
        self._cancel_called = True
        self._deliver_cancellation(self)

    @property
    def _is_told_by_error(self) -> bool:
        # Also by an error of `check()`, which replaces the cancellation of this block.
        is_told = self.is_delivered and not self._is_covered and self._grace > 0 and not self._cancel_called
        return is_told or (self._unwinding is not None and self._unwinding.is_active)

    def _error_was_caught(self) -> None:
        super()._error_was_caught()
        self._strike()

    def _grace_has_ended(self) -> None:
        self._unwinding = None
        if self._asked and not self._held:
            self._note_delivery()
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
                self.cancel_politely("it is no longer held")

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
    """A scope inside others, entered by anyio, that is shielded when a cancellation by this package has reached it."""

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
            # Its own cancellation: the grace is over, or anyio calls this for a scope that has just been left.
            return CancelScope._deliver_cancellation(self, origin)
        return self._deliver_from_outside(origin)

    def take_for_delivered(self) -> None:
        if not self.is_delivered and self._grace > 0:
            self._note_delivery()
            self._end_unwinding()
            self._leave_alone(self._loop.time() + self._grace)

    def _become_firm(self) -> None:
        self._timeout_handle = None
        self.cancel()


class AsyncioTaskScope(AsyncioMemberScope):
    """A scope around the rest of a task of another author, inserted while the task runs."""

    __slots__ = ()

    def put_around(self, ended: Callable[[bool], object]) -> None:
        """Enter later: around the scopes that the task has entered itself, and inside those that it was started in.

        ``ended(was_cancelled)`` is called when the task has ended.
        """
        task: Any = current_task()
        # A task that anyio does not know is cancelled once only, and needs no scope.
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
    """Note that ``error`` stops the current task, and unwinds its scopes."""
    for scope in _ours_in(current_task()):
        if scope._shield:
            # It has delivered before. When it is left, it notifies the scopes around it.
            return
        scope.note_unwinding(error)


def _ours_in(task: Any) -> Iterator[_OurScope]:
    """Return the scopes of this package that are open in ``task``, innermost first."""
    return (scope for scope in _scopes_in(task) if isinstance(scope, _OurScope))


def _ours_inside(scope: CancelScope) -> Iterator[_OurScope]:
    """Yield the scopes of this package that are open inside ``scope``, in any task, and that no other's shield hides."""
    todo = list(scope._child_scopes)
    while todo:
        inner = todo.pop()
        if isinstance(inner, _OurScope):
            yield inner
        elif inner._shield:
            continue
        todo += inner._child_scopes


def _scopes_in(task: Any) -> Iterator[CancelScope]:
    state = None if task is None else _states.get(task)
    scope = None if state is None else state.cancel_scope
    while scope is not None and scope._host_task is task:
        yield scope
        scope = scope._parent_scope


def _pass_on(task: Any) -> None:
    """Note that a cancellation unwinds the task: the outermost scope that may have caused it has delivered it."""
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
    """Deliver a cancellation as anyio does, and notify the scope if that has reached its task."""
    before = _cancellations(scope)
    retry = CancelScope._deliver_cancellation(scope, origin)
    if _cancellations(scope) > before:
        scope.deliver()
    return retry


def _cancellations(scope: Any) -> int:
    """Return how often the task of ``scope`` was cancelled, or a task in the loop that its worker thread waits for."""
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
    """Return whether anyio has started ``task`` for ``from_thread.run()``.

    Apart from the scope's own task, only these have a state and no parent.
    """
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
    """Return ``scope`` itself: the hook notifies the member scopes."""
    return scope
