"""The trio part of `public_scopes.py`: a watch that is an instrument.

An instrument is called when a task is scheduled, and before and after each of its steps. trio delivers a cancellation
by scheduling the task, either within the call that cancels or directly after the step in which the task has begun to
wait. At these two moments nothing else can have scheduled it.

`trio.lowlevel.checkpoint` delivers in a scope of its own, and must see the cancellation until it has left that scope.
So a task that is cancelled in it is unprotected for one step: its cleanup is interrupted if its first ``await`` has to
wait and is not a checkpoint. A member scope, which steps its coroutine, does not have this gap.

The instrument is installed only while a cancellation waits for its delivery, because it costs time at each step of each
task. A system operation that cannot be aborted, and ends later with the cancellation (on Windows), is cancelled twice.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import outcome
import trio

from .public_scopes import PublicMemberScope, PublicScope, Stepped, TellingScope
from .public_scopes import tell as tell  # noqa: PLC0414 - a part of the family

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio import CancelScope

    from .base import EventLoop, IsOurs, MemberScope, PoliteScope, TaskScope
    from .public_scopes import Pair


class TrioWatch:
    """A `Watch` that offers a cancellation while the task runs, and at the moments when trio delivers."""

    __slots__ = ("_instrument", "_is_guarding", "_is_in_checkpoint", "_is_scheduled", "_is_struck", "_pair", "task")

    def __init__(self, pair: Pair, task: Any) -> None:
        self._pair = pair
        self.task = task
        self._is_struck = self._is_in_checkpoint = self._is_scheduled = self._is_guarding = False
        self._instrument = _Instrument.of(pair.loop.extras)

    def start(self) -> None:
        self._instrument.add(self)
        if _current_task() is self.task:
            # The cancellation is delivered when the task begins to wait.
            self._pair.open()
        else:
            self._offer()

    def stop(self) -> None:
        self._instrument.remove(self)

    def shorten_grace(self, grace: float) -> None: ...

    def guard(self) -> None:
        self._is_guarding = True

    def _offer(self) -> None:
        # It stays open while the task waits where only others can be reached, such as the children of a nursery.
        self._is_scheduled = False
        self._pair.open()
        if self._is_scheduled:
            self._was_reached()

    def _was_reached(self) -> None:
        self._is_struck = True
        self._is_in_checkpoint = is_in_checkpoint(self.task)
        if not self._is_in_checkpoint:
            self._pair.close()

    def is_scheduled(self) -> None:
        """Note that the task has been scheduled."""
        self._is_scheduled = True

    def before_step(self) -> None:
        """Open or close the pair for the step of the task that begins."""
        self._is_scheduled = False
        if self._is_guarding:
            return
        if not self._is_struck:
            # Open only if the task has just yielded: a nursery that it leaves would pass on its children's
            # cancellation.
            self._pair.nurseries.note()
            if _innermost(self.task) is _PASSING and _end_of_nursery() not in _codes_of(self.task):
                self._pair.open()
            else:
                self._pair.close()
        elif self._is_in_checkpoint:
            self._pair.open()
        elif is_anothers(self._pair):
            # Closed until the scope that the cancellation belongs to has seen it.
            self._is_struck = False
        else:
            self._pair.was_delivered()

    def after_step(self) -> None:
        """Offer the cancellation again after a step of the task, or note its delivery."""
        if self._is_guarding:
            if self._pair.nurseries.have_swallowed:
                self._is_guarding = self._is_struck = False
                self._pair.was_lost()
                self._offer()
        elif self._is_struck:
            self._pair.was_delivered()
        elif _innermost(self.task) is _PASSING:
            pass
        elif self._is_scheduled:
            self._was_reached()
        else:
            self._offer()


class _Instrument(trio.abc.Instrument):
    """The instrument of a run of trio, for all its watches."""

    def __init__(self) -> None:
        self._watches: dict[Any, tuple[TrioWatch, ...]] = {}

    @classmethod
    def of(cls, extras: dict[Any, Any]) -> _Instrument:
        """Return the instrument of a loop with these `EventLoop.extras`."""
        instrument: _Instrument | None = extras.get(cls)
        if instrument is None:
            instrument = extras[cls] = cls()
        return instrument

    def add(self, watch: TrioWatch) -> None:
        if not self._watches:
            trio.lowlevel.add_instrument(self)
        self._watches[watch.task] = (*self._watches.get(watch.task, ()), watch)

    def remove(self, watch: TrioWatch) -> None:
        left = tuple(other for other in self._watches.pop(watch.task, ()) if other is not watch)
        if left:
            self._watches[watch.task] = left
        if not self._watches:
            trio.lowlevel.remove_instrument(self)

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        for watch in self._watches.get(task, ()):
            watch.is_scheduled()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        for watch in self._watches.get(task, ()):
            watch.before_step()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        for watch in self._watches.get(task, ()):
            watch.after_step()


class _Exits(trio.abc.Instrument):
    """An instrument for the end of tasks only, which costs nothing at a step."""

    def __init__(self) -> None:
        self.ended: dict[trio.lowlevel.Task, Callable[[bool], object]] = {}

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        ended = self.ended.pop(task, None)
        if not self.ended:
            trio.lowlevel.remove_instrument(self)
        if ended is not None:
            ended(False)


def tell_at_exit(extras: dict[Any, Any], task: trio.lowlevel.Task, ended: Callable[[bool], object]) -> None:
    """Call ``ended(False)`` when ``task`` has ended."""
    exits = extras.setdefault(_Exits, _Exits())
    if not exits.ended:
        trio.lowlevel.add_instrument(exits)
    exits.ended[task] = ended


class TrioStepped(Stepped):
    """A wrapper of a coroutine that notifies its member scope of a cancellation before it sends that in."""

    __slots__ = ("_member_scope",)

    def __init__(self, coro: Any, member_scope: PublicMemberScope) -> None:
        super().__init__(coro)
        self._member_scope = member_scope

    def send(self, value: Any) -> Any:
        scope = self._member_scope
        is_cancelled = isinstance(value, outcome.Error) and isinstance(value.error, trio.Cancelled)
        if not is_cancelled or not scope.is_open_to_us:
            return super().send(value)
        if is_in_checkpoint(scope.task):
            message = super().send(value)
            # Before trio learns what the task waits for next.
            if scope.is_open_to_us:
                scope.was_delivered()
        elif is_anothers(scope):
            message = super().send(value)
            scope.reopen()
        else:
            scope.was_delivered()
            message = super().send(value)
        return message


def _current_task() -> trio.lowlevel.Task | None:
    try:
        return trio.lowlevel.current_task()
    except RuntimeError:
        # Between two steps, for example in a signal handler.
        return None


def is_anothers(pair: Pair) -> bool:
    """Close ``pair``, in the current task, and return whether an inner scope is cancelled as well.

    The inner scope swallows the cancellation, and ours follows.
    """
    pair.close()
    return trio.current_effective_deadline() == -math.inf


def is_in_checkpoint(task: Any) -> bool:
    """Return whether ``task`` is being cancelled in the scope inside ``trio.lowlevel.checkpoint``."""
    return _IN_CHECKPOINT in pairwise(_codes_of(task))


def _codes_of(task: Any) -> list[Any]:
    return [frame.f_code for frame, _ in task.iter_await_frames()]


def _innermost(task: Any) -> Any:
    codes = _codes_of(task)
    # The innermost frame is a generator that yields, inside these functions of trio.
    return next((code for code in reversed(codes) if code in (_PASSING, _WAITING)), None)


@cache
def _end_of_nursery() -> Any:
    """Return the code that runs at the end of a nursery. Works only where trio runs, which the lookup requires."""
    return type(trio.open_nursery()).__aexit__.__code__


_PASSING, _WAITING, _CHECKPOINT = (
    getattr(function, "__code__", None)
    for function in (
        trio.lowlevel.cancel_shielded_checkpoint,
        trio.lowlevel.wait_task_rescheduled,
        trio.lowlevel.checkpoint,
    )
)
_IN_CHECKPOINT = (_CHECKPOINT, _WAITING)


class TrioPublicScope(PublicScope):
    __slots__ = ()

    _new_watch = TrioWatch


class TrioPublicMemberScope(PublicMemberScope):
    __slots__ = ()

    _new_watch = TrioWatch
    _step = TrioStepped


class _TrioTaskEnd:
    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop

    def put_around(self, ended: Callable[[bool], object]) -> None:
        task: Any = self._loop.current_task()
        tell_at_exit(self._loop.extras, task, ended)


def polite_scope(loop: EventLoop, grace: float) -> PoliteScope:
    return TrioPublicScope(loop, grace)


def member_scope(loop: EventLoop, grace: float, is_ours: IsOurs) -> MemberScope:
    return TrioPublicMemberScope(loop, grace, is_ours)


def task_scope(loop: EventLoop, grace: float, is_ours: IsOurs) -> TaskScope:
    """Return an object that only notices the end of the task: public API cannot insert a scope."""
    return _TrioTaskEnd(loop)


def told_scope(loop: EventLoop, scope: CancelScope, member_scopes: dict[Any, MemberScope]) -> CancelScope:
    """Return a scope in place of ``scope`` that notifies ``member_scopes`` when cancelled, as no hook does."""
    return TellingScope(loop, scope, member_scopes)


def task_finder(loop: Any) -> None:
    """Return ``None``: scopes are always entered at once."""
