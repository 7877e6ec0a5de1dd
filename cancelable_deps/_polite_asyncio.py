"""Polite cancellation on asyncio: two private hooks into anyio's ``CancelScope``.

* ``_deliver_cancellation`` walks down the tree of scopes and calls ``Task.cancel()``. Ours looks whether it was reached.
* A scope is put into that tree when the task has waited for the first time: what never waits cannot be cancelled, and
  entering a scope costs a request an eighth of all that FastAPI does for it.
"""

from __future__ import annotations

import math
from asyncio import CancelledError, current_task, get_running_loop
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import ref

from anyio._backends import _asyncio as anyio_asyncio
from anyio._backends._asyncio import CancelScope

from ._polite import HookedGate, leave

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from ._backend import EventLoop
    from ._polite import IsOurs, Mark

_states: Any = anyio_asyncio._task_states
_make_state: Any = anyio_asyncio.TaskState

_serials = count()


def make_marker(loop: asyncio.AbstractEventLoop) -> Callable[[], Mark]:
    """A function that marks the place in which a scope may be put later."""
    # Its parts looked up once: a request calls it. The dictionary inside of anyio's weak one, for the same reason.
    serials = _serials.__next__

    def mark() -> Mark:
        task: Any = current_task(loop)
        if task is None:
            raise RuntimeError("enter a request's block in a task of the event loop that serves the request")
        state = find(ref(task))
        return task, None if state is None else state.cancel_scope, serials(), task.cancelling()

    find = _states.data.get
    return mark


class AsyncioPoliteScope(CancelScope):
    """Both scopes in one: cancelled, and from the delivery on shielded and not cancelled.

    So what is further in sees, as with two, a shield and the end of the grace; `end` shows anyio the whole truth.
    """

    __slots__ = (
        "_asked",
        "_children",
        "_grace",
        "_held",
        "_loop",
        "_serial",
        "is_delivered",
    )

    def __new__(cls, *args: object) -> Any:
        return object.__new__(cls)

    def __init__(self, loop: EventLoop, grace: float, overdue: Callable[[], object]) -> None:
        CancelScope.__init__(self)
        self._loop = loop
        self._grace = grace
        self._asked = self._held = self.is_delivered = False

    def begin(self, deadline: float, mark: Mark | None) -> None:
        if mark is None:
            self._serial = next(_serials)
            self.__enter__()
        else:
            self._place(*mark)
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
        if self._asked:
            self._cancel_called = True
            self._shield = False
            if exc is not None:
                self._reword(exc, self._is_only_one)
            if self._pending_uncancellations:
                self._keep_count_in_task()
        return leave(self, exc)

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

    def _keep_count_in_task(self) -> None:
        """Take back now what anyio would hand on to a scope of another task.

        A task group that has been cancelled as well would take it off the count of its own task, and somebody else's
        ``Task.cancel()`` of that one be forgotten.
        """
        task: Any = self._host_task
        scope = self._parent_scope
        while scope is not None and scope._host_task is task:
            if scope._cancel_called or scope._shield:
                return
            scope = scope._parent_scope
        if scope is not None:
            for _ in range(self._pending_uncancellations or 0):
                task.uncancel()
            self._pending_uncancellations = 0

    def cancel_politely(self, why: str) -> None:
        self._asked = True
        if self._cancel_reason is None:
            # Not as anyio words it, by which it knows its own: with our shield above it, a scope further in would take
            # this for its own as well, and the work go on in error. `end` words it so.
            self._cancel_reason = f"cancelled by cancelable_deps: {why} ({id(self):x})"
        if not self._held and not self.is_delivered:
            self._cancel_called = True
            self._deliver_cancellation(self)

    def _place(self, task: Any, base: Any, serial: int, cancelling: int) -> None:
        """Enter belatedly: around what was entered since the mark was made, inside what was entered before."""
        self._serial = serial
        self._host_task = task
        self._cancelling_at_enter = cancelling
        self._active = True

        def is_outside(scope: Any) -> bool:
            if scope is None or scope is base:
                return True
            return isinstance(scope, AsyncioPoliteScope) and scope._serial < serial

        state = _states.get(task)
        if state is None:
            state = _states[task] = _make_state(None, None)
        if is_outside(state.cancel_scope):
            self._place_below(state.cancel_scope)
            state.cancel_scope = self
            self._tasks.add(task)
            return
        inner = state.cancel_scope
        while not is_outside(inner._parent_scope):
            inner = inner._parent_scope
        self._place_below(inner._parent_scope)
        if self._parent_scope is not None:
            self._parent_scope._child_scopes.remove(inner)
        inner._parent_scope = self
        self._child_scopes.add(inner)

    def _place_below(self, parent: Any) -> None:
        self._parent_scope = parent
        if parent is not None:
            parent._child_scopes.add(self)
            parent._tasks.discard(self._host_task)

    def _deliver_cancellation(self, origin: Any) -> bool:
        if origin is self and not self._cancel_called:
            # Held in the meantime; anyio had this retry scheduled.
            self._cancel_handle = None
            return False
        if origin is not self or self.is_delivered or not self._active:
            return CancelScope._deliver_cancellation(self, origin)
        if self._pending_uncancellations and self._grace > 0:
            # A scope further in, cancelled in the same tick, has let its cancellation pass for ours.
            self.take_for_delivered()
            return False
        task: Any = self._host_task
        if task is not current_task() and getattr(task.get_coro(), "cr_running", False):
            # A task that it starts eagerly cancels us. Asked now, it would hear of it at an await that may come after us.
            self._cancel_handle = get_running_loop().call_soon(self._deliver_cancellation, self)
            return True
        return _deliver(self, origin)

    def take_for_delivered(self) -> None:
        if self.is_delivered:
            return
        self.is_delivered = True
        if self._grace > 0:
            self._cancel_called = False
            self._shield = True
            self._stop_retrying()
            self._deadline = self._loop.time() + self._grace
            if self._deadline < math.inf:
                timer: Any = self._loop.call_at(self._deadline, self._become_firm)
                self._timeout_handle = timer

    def _become_firm(self) -> None:
        self._timeout_handle = None
        if not self._asked:
            # The task was told by an exception, and a block inside or around this one was to deliver.
            self.cancel_politely("the grace is over")
        self._cancel_called = True
        self._deliver_cancellation(self)

    def _stop_retrying(self) -> None:
        if self._cancel_handle is not None:
            self._cancel_handle.cancel()
            self._cancel_handle = None

    def hold(self) -> None:
        if not self._shield:
            self._held = True
            self._cancel_called = False

    def resume(self) -> None:
        if self._held:
            self._held = False
            if self._asked:
                self._cancel_called = True
                self._deliver_cancellation(self)

    def release(self) -> None:
        self._held = True
        self._cancel_called = False
        self._deadline = math.inf
        if self._timeout_handle is not None:
            self._timeout_handle.cancel()
            self._timeout_handle = None

    def move_deadline(self, deadline: float) -> None:
        if not self.is_delivered:
            self._deadline = deadline

    @property
    def swallowed(self) -> bool:
        # Our cancellation is worded so that no scope of anyio's takes it for its own.
        return False


class AsyncioGate(HookedGate, CancelScope):
    """A scope inside of others, entered by anyio, that is shielded when a cancellation of ours has come through."""

    __slots__ = ("_grace", "_is_ours", "_loop", "is_delivered")

    swallowed = False
    """As that of `AsyncioPoliteScope`."""

    def __new__(cls, *args: object) -> Any:
        return object.__new__(cls)

    def __init__(self, loop: EventLoop, grace: float, is_ours: IsOurs) -> None:
        CancelScope.__init__(self)
        self._loop = loop
        self._grace = grace
        self._is_ours = is_ours
        self.is_delivered = False

    def begin(self) -> None:
        self.__enter__()

    def end(self, exc: BaseException | None) -> BaseException | None:
        return leave(self, exc)

    def _deliver_cancellation(self, origin: Any) -> bool:
        if origin is self or not self._is_ours(origin):
            # Its own: the grace is over, or this is anyio's last look at a scope that has been left.
            return CancelScope._deliver_cancellation(self, origin)
        if self._pending_uncancellations and self._grace > 0:
            self.take_for_delivered()
            return False
        return _deliver(self, origin)

    def take_for_delivered(self) -> None:
        self.is_delivered = True
        if self._grace > 0 and not self._shield:
            self.shield = True
            # Not through the property: asyncio keeps a timer that was cancelled, and with anyio's the request's context.
            self._deadline = self._loop.time() + self._grace
            if self._deadline < math.inf:
                timer: Any = self._loop.call_at(self._deadline, self.cancel)
                self._timeout_handle = timer


def _deliver(scope: AsyncioPoliteScope | AsyncioGate, origin: Any) -> bool:
    """As anyio does it; and the scope is told if its task was reached."""
    before = _cancellations(scope)
    retry = CancelScope._deliver_cancellation(scope, origin)
    if _cancellations(scope) > before:
        scope.take_for_delivered()
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
