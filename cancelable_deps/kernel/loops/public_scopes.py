"""Polite cancellation by public API alone, for an anyio or a trio whose private parts are not those that we know.

An outer scope is cancelled, and the inner one shielded as soon as the task has seen it. What tells us that it has is a
watch of the backend's: `public_asyncio.AsyncioWatch` asks `asyncio.Task.cancelling`, `public_trio.TrioWatch` is an instrument.
Nothing is watched before something is cancelled, and then only until the task has been told.

Until then the inner scope is closed as well, but for the moments in which the watch offers the cancellation: so only
what the watch sees can deliver, and whatever else cancels or counts at the same time is not mistaken for it.

What costs more, or is less exact, than with the hooks:

* A block of a request has two scopes from its beginning on, also if its task never waits.
* While a cancellation of ours waits to be delivered, one that comes from further out waits with it.
* Where asyncio does not tell what a task waits for (an awaitable that is no future), it is offered every hundredth of
  a second: what follows a shielded section may run for so long.
* A scope whose shield is lifted by another task is noticed after a twentieth of a second.
* ``anyio.current_effective_deadline()`` does not tell the deadline of a block; `Cancelable.deadline` does.
* A task of somebody else's that sends a stream gets no gate: anyio repeats its cancellation in the stream's cleanup.
* `Cancelable.check` has told a task: what others strike waits for the end of its grace, if ours has struck as well.
* ``anyio.from_thread.check_cancelled()`` is true on asyncio only in the moments of an offer; `Cancelable.check` always.
* Tasks of plain groups, which have no gate, may be told several times, as ever.
* An anyio in which a group takes for its own what only passes through it (before 4.16) loses cancellations.

The files of this path use no private name of anyio, asyncio or trio.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import anyio
import anyio.to_thread

from .unwinding import Unwinding, leave

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from types import TracebackType

    from .base import EventLoop, IsOurs, Late, MemberScope

# By which the deadline of a group's own scope, which anyio acts upon, trails our timer, which tells the gates first.
_TRAIL = 0.05


_around: ContextVar[tuple[_Pair, ...]] = ContextVar("cancelable_deps.pairs", default=())
"""All pairs of scopes that the current task, or the one that started it, has entered."""


def _open_pairs(loop: EventLoop) -> dict[object, list[_Pair]]:
    """By their tasks, outermost first."""
    pairs: dict[object, list[_Pair]] = loop.extras.setdefault(_open_pairs, {})
    return pairs


def _remove_pair(loop: EventLoop, task: object, pair: _Pair) -> None:
    pairs = _open_pairs(loop)
    pairs[task].remove(pair)
    if not pairs[task]:
        del pairs[task]


def tell(loop: EventLoop, error: BaseException) -> None:
    """The current task has been told to stop by ``error``, which is on its way through its scopes."""
    for pair in reversed(_open_pairs(loop).get(loop.current_task(), ())):
        if pair.is_left_alone:
            # When it is left, it tells those around it.
            return
        pair.note_unwinding(error)


class Watch(Protocol):
    """Offers the cancellation of a pair to its task, until that has seen it."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def guard(self) -> None:
        """Stop offering, but see to it that no nursery loses the cancellation."""


class _Pair:
    """An outer scope to cancel, and directly inside of it one to shield."""

    _new_watch: ClassVar[Any]

    __slots__ = (
        "_above",
        "_cancelling",
        "_counted",
        "_grace",
        "_inner",
        "_is_cancelled",
        "_is_covered",
        "_is_held",
        "_is_left_alone",
        "_is_reached_from_above",
        "_member_scopes",
        "_outer",
        "_outside",
        "_task",
        "_unwinding",
        "_watch",
        "_why",
        "is_delivered",
        "loop",
        "nurseries",
        "spares",
    )

    def __init__(self, loop: EventLoop, grace: float) -> None:
        self.loop = loop
        self._grace = grace
        self._outer = anyio.CancelScope()
        self._inner = anyio.CancelScope()
        self._task: Any = None
        self._watch: Watch | None = None
        self._member_scopes: dict[PublicMemberScope, None] = {}
        self.spares: Callable[..., bool] | None = None
        self._unwinding: Unwinding | None = None
        self._is_cancelled = self._is_held = self.is_delivered = self._is_covered = self._is_left_alone = False
        self._is_reached_from_above = True
        self._counted = 0
        self._why = ""

    @property
    def task(self) -> object:
        return self._task

    def _enter(self) -> None:
        self._task = self.loop.current_task()
        self._cancelling = 0
        if not self.loop.is_trio:
            self._cancelling = self._task.cancelling()
            if end_of_group not in self.loop.extras:
                self.loop.extras[end_of_group] = end_of_group()
        self.nurseries = Nurseries(self._task)
        self._above = _around.get()
        self._outside = _around.set((*self._above, self))
        pairs = _open_pairs(self.loop).setdefault(self._task, [])
        if pairs:
            self._is_reached_from_above = pairs[-1].is_seen_here()
        pairs.append(self)
        self._outer.__enter__()
        self._inner.__enter__()

    def end(self, exc: BaseException | None) -> BaseException | None:
        self._stop_watching()
        self._end_unwinding()
        _remove_pair(self.loop, self._task, self)
        with suppress(ValueError):
            # Entered in one context and left in another, as a generator may be.
            _around.reset(self._outside)
        remaining = self._leave(exc)
        if self._is_covered and remaining is None:
            # It is that of a scope further out.
            remaining = exc
        if remaining is not exc:
            self.is_delivered = True
        self.nurseries.forget()
        self._task = None
        self._member_scopes.clear()
        self._above = ()
        return remaining

    def _leave(self, exc: BaseException | None) -> BaseException | None:
        remaining = leave(self._inner, exc)
        if self.loop.is_trio or not (self._outer.cancel_called or self.is_delivered):
            return leave(self._outer, remaining)
        for _ in range(self._counted):
            self._task.uncancel()
        # Shielded, anyio takes back what it has added to the count of this task. It would hand it on to a scope of
        # another task else, where it would hide somebody else's `Task.cancel()`.
        self._outer.shield = True
        remaining = self._without_ours(leave(self._outer, remaining))
        if remaining is not exc and anyio.current_effective_deadline() == -math.inf:
            # A scope further out is cancelled as well, and is to see it.
            return exc
        return remaining

    def _without_ours(self, exc: BaseException | None) -> BaseException | None:
        """Take cancellations out of ``exc`` that nobody else has asked for, whatever their words.

        A cleanup that we interrupt may raise what it was cleaning up for, such as the cancellation by
        ``asyncio.timeout()``, which withdraws its own when it sees that there is one more.
        """
        if not (self._outer.cancel_called and self.is_delivered) or self._task.cancelling() > self._cancelling:
            return exc
        if isinstance(exc, BaseExceptionGroup):
            return exc.split(asyncio.CancelledError)[1]
        return None if isinstance(exc, asyncio.CancelledError) else exc

    def cancel_politely(self, why: str) -> None:
        if self._unwinding is not None:
            self._unwinding.drop_caught()
        self._is_cancelled = True
        self._why = self._why or f"cancelled by cancelable_deps: {why}"
        if self._is_held or self.is_delivered:
            return
        if self._unwinding is not None and self._unwinding.is_active:
            self.close()
            self._unwinding.start_timer()
        else:
            self._offer()

    def _offer(self) -> None:
        if self.spares is not None and self.spares():
            return
        for pair in self._pairs_inside():
            pair.close_if_told_by_error()
        # Innermost first: what a gate has been told does not reach its task a second time from here.
        for member in reversed(self._member_scopes):
            member.is_passed_by = member.is_passed_by or self._is_outside_of(member)
            member.fire()
        if self._grace <= 0 or self.is_delivered or any(member.task is self._task for member in self._member_scopes):
            # Of a grace that is over; or a gate in the same task stands in between, and tells us.
            self.open()
        elif self._watch is None:
            watch: Watch = self._new_watch(self, self._task)
            self._watch = watch
            watch.start()

    def _is_outside_of(self, member: PublicMemberScope) -> bool:
        """Whether the group of ``gate`` is inside of this."""
        return True

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def open(self) -> None:
        """Let the cancellation through. anyio and trio deliver it within this call, if the task is where it can be."""
        if not self._outer.cancel_called:
            self._outer.cancel(self._why)
        self._inner.shield = False

    def close(self) -> None:
        self._inner.shield = True

    def reopen(self) -> None:
        """Let through whatever comes from further out."""
        self._inner.shield = False

    def count_once_more(self) -> None:
        """Directly after anyio has cancelled the task, and before its next step, where two become one.

        A scope or group further in, with our shield above it, believes a cancellation in anyio's words to be its own
        unless more is counted than when it was entered; and one whose child has handed its count on takes one off. It
        has anyio's words too, as it may be this one that arrives, and a scope further out has to know it.
        """
        self._counted += 1
        self._task.cancel(f"Cancelled via cancel scope {id(self._outer):x}; {self._why}")

    def was_delivered(self) -> None:
        """The watch, or whoever steps the task, has seen it."""
        inside = self._pairs_inside()
        self._leave_alone()
        for pair in self._above:
            if pair.task is self._task and pair._is_cancelled and not pair.is_delivered:
                pair._leave_alone()
        if self._grace > 0:
            for pair in inside:
                pair.cover(self.loop.time() + self._grace)

    def _leave_alone(self) -> None:
        """The task has been told, and what it does now is its cleanup."""
        if self.is_delivered:
            return
        self.is_delivered = True
        self._end_unwinding()
        if self._grace > 0:
            self._is_left_alone = True
            self.close()
            self._set_deadline(self._inner, self.loop.time() + self._grace)
            self.nurseries.are_passed()
        if self._watch is not None and self.nurseries.are_open:
            self._watch.guard()
        else:
            self._stop_watching()

    def take_for_delivered(self) -> None:
        self._leave_alone()

    def cover(self, until: float) -> None:
        """A pair further out has told the task. Between that one and this something may strike beside: a task group."""
        self.is_delivered = self._is_covered = self._is_left_alone = True
        self._end_unwinding()
        self._stop_watching()
        self.close()
        self._set_deadline(self._inner, until)

    def _pairs_inside(self) -> list[_Pair]:
        """Those further in that are open in the same task, outermost first."""
        pairs = _open_pairs(self.loop).get(self._task, [])
        return pairs[pairs.index(self) + 1 :] if self in pairs else []

    @property
    def is_left_alone(self) -> bool:
        """Whether the task cleans up after a cancellation that has been delivered."""
        return self._is_left_alone

    def close_if_told_by_error(self) -> None:
        """Something of ours further out strikes, and is not to disturb the cleanup of what `Cancelable.check` raised."""
        if self.is_delivered and not self._is_left_alone and self._grace > 0:
            self.close()

    # A task that an exception has told.

    def note_unwinding(self, error: BaseException) -> None:
        if self.is_delivered or self._grace <= 0:
            return
        if self._unwinding is None:
            self._unwinding = Unwinding(self.loop, self._grace, self._error_was_caught, self._grace_has_ended)
        self._unwinding.add(error)
        if self._is_cancelled:
            self._stop_watching()
            self.close()
            self._unwinding.start_timer()

    def _error_was_caught(self) -> None:
        """Whoever has caught the exception works on, and can be stopped."""
        self._unwinding = None
        if self._is_cancelled and not self._is_held and not self.is_delivered:
            self._offer()

    def _grace_has_ended(self) -> None:
        """The exception is still on its way, and the grace is over."""
        self._unwinding = None
        if self._is_cancelled and not self._is_held:
            self.is_delivered = True
            self.open()

    def _end_unwinding(self) -> None:
        if self._unwinding is not None:
            self._unwinding.end()
            self._unwinding = None

    def is_seen_here(self) -> bool:
        """Whether the calling code, further in in the same task, would see a cancellation: no shield stands between.

        No public API tells, but a deadline is seen from where a cancellation is.
        """
        before, now, seen = self._inner.deadline, self.loop.time(), anyio.current_effective_deadline()
        if seen < now + _TRAIL:
            return True
        probe = now + min(seen - now, _TRAIL * 1000) / 2
        self._set_deadline(self._inner, probe)
        try:
            return anyio.current_effective_deadline() == probe
        finally:
            self._set_deadline(self._inner, before)

    def was_lost(self) -> None:
        """A nursery has taken the cancellation for its own: once more."""
        self.is_delivered = self._is_left_alone = False
        self.nurseries.lose()
        self._set_deadline(self._inner, math.inf)

    def _set_deadline(self, scope: anyio.CancelScope, deadline: float) -> None:
        # In a context of nothing: asyncio keeps the timer for its time, also a cancelled one, and with it the request.
        Context().run(setattr, scope, "deadline", deadline)

    @property
    def is_lost(self) -> bool:
        return self.nurseries.have_swallowed and not self._is_covered


class PublicScope(_Pair):
    """A `PoliteScope`."""

    __slots__ = ()

    def begin(self, deadline: float = math.inf, late: Late | None = None) -> None:
        self._enter()

    def reaches(self, inner: PublicScope) -> bool:
        for pair in self._pairs_inside():
            if not pair._is_reached_from_above:
                return False
            if pair is inner:
                break
        return True

    def take_for_delivered(self) -> None:
        # Not shielded, if that can be: whoever catches the exception works on, and what others strike may stop that.
        if self.is_delivered or self._grace <= 0:
            return
        self.is_delivered = True
        self._end_unwinding()
        self._stop_watching()
        if self._outer.cancel_called:
            self.close()
        self._set_deadline(self._inner, self.loop.time() + self._grace)

    def hold(self) -> None:
        if not self.is_delivered:
            self._is_held = True
            self._stop_watching()
            if self._outer.cancel_called:
                self.close()

    def resume(self) -> None:
        if not self._is_held:
            return
        self._is_held = False
        if self._is_cancelled:
            self._offer()

    def release(self) -> None:
        self._is_held = True
        self._stop_watching()
        self._set_deadline(self._inner, math.inf)
        self.is_delivered = self._is_covered = self._is_left_alone = False
        if self._outer.cancel_called:
            self.close()
        else:
            self.reopen()

    def move_deadline(self, deadline: float) -> None:
        # A deadline of anyio's strikes, also what we let finish, and where a timer of ours comes too late. None is told.
        pass


class PublicMemberScope(_Pair):
    """A `MemberScope`. It is fired by the scopes around it, which know it, or finds out by stepping its task."""

    _step: ClassVar[Any]

    __slots__ = ("_in_task", "_is_ours", "is_passed_by")

    def __init__(self, loop: EventLoop, grace: float, is_ours: IsOurs) -> None:
        super().__init__(loop, grace)
        self.is_passed_by = False
        self._is_ours = is_ours

    def begin(self) -> None:
        self._enter()
        for pair in self._above:
            pair._member_scopes[self] = None
        if anyio.current_effective_deadline() == -math.inf and self._is_ours(None):
            # It was told before it had begun.
            self.is_passed_by = any(pair._is_cancelled and pair._is_outside_of(self) for pair in self._above)
            self.fire()

    def end(self, exc: BaseException | None) -> BaseException | None:
        above, task, told = self._above, self._task, self.is_delivered
        self._in_task = tuple(pair for pair in above if pair.task is task)
        for pair in above:
            pair._member_scopes.pop(self, None)
        remaining = super().end(exc)
        # They know us, or our task does: cycles, and there is no more to ask.
        self._is_ours = _nothing_is_ours
        for pair in reversed(self._in_task):
            if not told and pair._is_cancelled and not pair._is_held and not pair.is_delivered:
                pair._offer()
        return remaining

    def pass_on(self) -> None:
        for pair in self._in_task:
            if pair._is_cancelled and pair.task is not None:
                pair._leave_alone()

    def fire(self) -> None:
        if not self._is_cancelled and self._task is not None:
            self.cancel_politely("what is around it was cancelled")

    def expect(self, is_cancelled: Callable[[], bool]) -> None:
        if self._is_cancelled or self.is_delivered or self._task is None:
            return
        self.close()

        def look() -> None:
            if self._task is None or self._is_cancelled or self.is_delivered:
                return
            if is_cancelled():
                self.fire()
            else:
                self.reopen()

        self.loop.call_from_thread(self.loop.call_from_thread, look)

    def watch(self, coro: Awaitable[Any]) -> Any:
        return self._step(coro, self)

    def _is_outside_of(self, member: PublicMemberScope) -> bool:
        # Those of one group ask the same one.
        return self.is_passed_by or self._is_ours != member._is_ours

    @property
    def is_open_to_us(self) -> bool:
        """Whether a cancellation that arrives in its task just now is ours, and the first."""
        return self._grace > 0 and not self.is_delivered and self._task is not None and self._is_ours(None)


def _nothing_is_ours(origin: object) -> bool:
    return False


class TellingScope(anyio.CancelScope):
    """Stands for the scope of a group: what is inside of it is told first when it is cancelled."""

    def __new__(cls, *args: object) -> Any:
        # Not that of a backend, as anyio would make it.
        return object.__new__(cls)

    def __init__(self, loop: EventLoop, scope: anyio.CancelScope, member_scopes: dict[Any, MemberScope]) -> None:
        self._loop = loop
        self._scope = scope
        self._member_scopes = member_scopes
        self._deadline = scope.deadline
        self._timer: Any = None

    def cancel(self, reason: str | None = None) -> None:
        for member in reversed(list(self._member_scopes.values())):
            member.fire()
        self._scope.cancel(reason)

    @property
    def late(self) -> Any:
        """What the block around the group cancels: not before the block itself has told its task.

        A group that is at its end is told as the task of the block, and would take it for its own.
        """
        return _Late(self._loop, self)

    @property
    def deadline(self) -> float:
        return self._deadline

    @deadline.setter
    def deadline(self, value: float) -> None:
        # anyio's own would cancel without telling anybody, so it comes after ours.
        self._scope.deadline = value + _TRAIL
        self._deadline = value
        self.drop_timer()
        if value < math.inf:
            self._timer = self._loop.call_at(value, lambda: self.cancel("deadline exceeded"))

    def drop_timer(self) -> None:
        """Also when the group has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def cancel_called(self) -> bool:
        return self._scope.cancel_called

    @property
    def cancelled_caught(self) -> bool:
        return self._scope.cancelled_caught

    @property
    def shield(self) -> bool:
        return self._scope.shield

    @shield.setter
    def shield(self, value: bool) -> None:
        self._scope.shield = value

    def __enter__(self) -> Any:
        return self._scope.__enter__()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        return bool(self._scope.__exit__(exc_type, exc, traceback))


def stop_telling(scope: anyio.CancelScope) -> None:
    """The group of ``scope``, which `told_scope` has returned, has ended."""
    if isinstance(scope, TellingScope):
        scope.drop_timer()


class _Late:
    def __init__(self, loop: EventLoop, scope: TellingScope) -> None:
        self._loop = loop
        self._scope = scope

    def cancel(self) -> None:
        self._loop.call_from_thread(self._scope.cancel)


class Stepped:
    """Stands for a coroutine that somebody awaits, and passes on what comes from the loop and goes there."""

    __slots__ = ("_coro",)

    def __init__(self, coro: Any) -> None:
        self._coro = coro if hasattr(coro, "throw") else _await(coro)

    def __await__(self) -> Iterator[Any]:
        return self

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        return self._coro.send(value)

    def throw(self, exc: Any, *details: Any) -> Any:
        return self._coro.throw(exc, *details)

    def close(self) -> None:
        self._coro.close()

    def __getattr__(self, name: str) -> Any:
        # Whoever looks into a task looks through us.
        return getattr(self._coro, name)


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def end_of_group() -> Any:
    """Return the code that runs at the end of anyio's groups. Only in a task, as anyio asks which backend runs."""
    return type(anyio.create_task_group()).__aexit__.__code__


class Nurseries:
    """trio's nurseries that a task has opened inside of a pair, at the moment when a cancellation was delivered.

    One cancels itself when a cancellation passes through its body or reaches it at its end. With the shield above it, it
    believes that one to be its own, and ends as if nothing had been: the work would go on without its children's
    results. anyio's groups on asyncio tell by the count of the task, and have none here.
    """

    __slots__ = ("_before", "_is_lost", "_open", "_task")

    def __init__(self, task: Any) -> None:
        self._task = task
        self._before = len(getattr(task, "childnurseries", ()))
        self._open: list[Any] = []
        self._is_lost = False

    def note(self) -> None:
        """Remember those that are open now: one that is about to end is not shown any more, and swallows yet."""
        for nursery in list(getattr(self._task, "child_nurseries", ()))[self._before :]:
            if nursery not in self._open:
                self._open.append(nursery)

    def are_passed(self) -> None:
        """The cancellation has been delivered: what was swallowed before that does not count any more."""
        self._is_lost = False
        self._open = [nursery for nursery in self._open if not nursery.cancel_scope.cancelled_caught]
        self.note()

    def lose(self) -> None:
        self._is_lost = True
        self._open = []

    def forget(self) -> None:
        self._task = None

    @property
    def are_open(self) -> bool:
        return bool(self._open)

    @property
    def have_swallowed(self) -> bool:
        return self._is_lost or any(nursery.cancel_scope.cancelled_caught for nursery in self._open)
