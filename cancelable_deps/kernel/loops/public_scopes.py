"""Polite cancellation with public API only, for versions of anyio or trio with other private parts than expected.

An outer scope is cancelled, and an inner scope is shielded as soon as the task has received the cancellation. A watch
of the backend notices that: `public_asyncio.AsyncioWatch` reads `asyncio.Task.cancelling`, `public_trio.TrioWatch` is
an instrument. A watch runs only from a cancellation until its delivery.

In that time the inner scope is shielded ("closed") as well, except for the moments in which the watch offers the
cancellation ("open"). So a cancellation can be delivered only where the watch sees it, and no other cancellation or
change of a count at the same time is mistaken for it.

The costs and limits, in comparison with the hooks:

* The block of a request has two scopes from its beginning, even if its task never waits.
* While a cancellation by this package waits for delivery, so does one from further out.
* If asyncio does not show the future that a task waits for (with another awaitable), the cancellation is offered every
  hundredth of a second. The work that follows a shielded section may run for that long.
* If another task removes the shield of a scope, that is noticed after up to a twentieth of a second.
* ``anyio.current_effective_deadline()`` does not include the deadline of a block; `Cancelable.deadline` does.
* A task of another author that sends a stream gets no scope: anyio repeats its cancellation in the stream's cleanup.
* After `Cancelable.check` has raised, cancellations by others wait for the end of the grace if ours has come as well.
* ``anyio.from_thread.check_cancelled()`` raises on asyncio only during an offer; `Cancelable.check` always does.
* Tasks of plain groups, which have no member scopes, may be cancelled several times, as without this package.
* With anyio before 4.16, in which a group swallows a cancellation that only passes through it, cancellations are lost.

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

# The seconds by which the deadline of a group's own scope, at which anyio cancels, is later than our timer, which
# notifies the member scopes first.
_TRAIL = 0.05


_around: ContextVar[tuple[Pair, ...]] = ContextVar("cancelable_deps.pairs", default=())
"""All pairs of scopes around the current task: its own, and those of the tasks that have started it."""


def _open_pairs(loop: EventLoop) -> dict[object, list[Pair]]:
    """Return the open pairs of each task, outermost first."""
    pairs: dict[object, list[Pair]] = loop.extras.setdefault(_open_pairs, {})
    return pairs


def _remove_pair(loop: EventLoop, task: object, pair: Pair) -> None:
    pairs = _open_pairs(loop)
    pairs[task].remove(pair)
    if not pairs[task]:
        del pairs[task]


def tell(loop: EventLoop, error: BaseException) -> None:
    """Note that ``error`` stops the current task, and unwinds its scopes."""
    for pair in reversed(_open_pairs(loop).get(loop.current_task(), ())):
        if pair.is_left_alone:
            # When this pair is left, it notifies the pairs around it.
            return
        pair.note_unwinding(error)


class Watch(Protocol):
    """An object that offers the cancellation of a pair to its task, until the task has received it."""

    def start(self) -> None:
        """Start to offer the cancellation."""

    def stop(self) -> None:
        """Stop offering it."""

    def shorten_grace(self, grace: float) -> None:
        """Wait at most ``grace`` seconds from now for what cleans up before the cancellation is offered again."""

    def guard(self) -> None:
        """Stop offering it, and offer it again if a nursery loses it."""


class Pair:
    """An outer scope, which is cancelled, and directly inside it an inner scope, which is shielded."""

    _new_watch: ClassVar[Any]

    __slots__ = (
        "_above",
        "_cancelling",
        "_counted",
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
        "delivered_at",
        "grace",
        "is_delivered",
        "loop",
        "nurseries",
        "spares",
    )

    delivered_at: float

    def __init__(self, loop: EventLoop, grace: float) -> None:
        self.loop = loop
        self.grace = grace
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
            # A generator may be entered in one context and left in another.
            _around.reset(self._outside)
        remaining = self._leave(exc)
        if self._is_covered and remaining is None:
            # The cancellation is that of a scope further out.
            remaining = exc
        if remaining is not exc:
            _note_delivery(self)
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
        # With a shield, anyio subtracts its own cancellations from the count of this task. Without one it would pass
        # them on to a scope of another task, where they would hide a `Task.cancel()` by other code.
        self._outer.shield = True
        remaining = self._without_ours(leave(self._outer, remaining))
        if remaining is not exc and anyio.current_effective_deadline() == -math.inf:
            # A scope further out is cancelled as well, and must receive it.
            return exc
        return remaining

    def _without_ours(self, exc: BaseException | None) -> BaseException | None:
        """Return ``exc`` without the cancellations that no other code has requested, whatever their messages.

        A cleanup that we interrupt may raise the cancellation that it handles, such as that of ``asyncio.timeout()``,
        which undoes its own cancellation when it sees another one.
        """
        if not (self._outer.cancel_called and self.is_delivered) or self._task.cancelling() > self._cancelling:
            return exc
        if isinstance(exc, BaseExceptionGroup):
            return exc.split(asyncio.CancelledError)[1]
        return None if isinstance(exc, asyncio.CancelledError) else exc

    def cancel_politely(self, why: str) -> None:
        """Cancel the pair: deliver the cancellation once, and repeat it when the grace is over."""
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
        # Innermost first: a member scope that has been notified shields its task from this cancellation.
        for member in reversed(self._member_scopes):
            member.is_passed_by = member.is_passed_by or self._is_outside_of(member)
            member.fire()
        if self.grace <= 0 or self.is_delivered or any(member.task is self._task for member in self._member_scopes):
            # The grace is over; or a member scope in the same task is in between, and will notify this pair.
            self.open()
        elif self._watch is None:
            watch: Watch = self._new_watch(self, self._task)
            self._watch = watch
            watch.start()

    def _is_outside_of(self, member: PublicMemberScope) -> bool:
        """Return whether the group of ``member`` is inside this pair."""
        return True

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def open(self) -> None:
        """Let the cancellation through. anyio and trio deliver it within this call, if the task can be reached."""
        if not self._outer.cancel_called:
            self._outer.cancel(self._why)
        self._inner.shield = False

    def close(self) -> None:
        """Let no cancellation through, neither ours nor one from further out."""
        self._inner.shield = True

    def reopen(self) -> None:
        """Let through cancellations from further out."""
        self._inner.shield = False

    def count_once_more(self) -> None:
        """Cancel the task once more, directly after anyio has, before the next step of the task merges the two.

        An inner scope or group, with our shield around it, swallows a cancellation with anyio's message unless the
        count of the task is higher than on entering; and it subtracts one if a child has passed its count on. The
        message is anyio's, because this cancellation may be the one that arrives, and an outer scope must recognize it.
        """
        self._counted += 1
        self._task.cancel(f"Cancelled via cancel scope {id(self._outer):x}; {self._why}")

    def was_delivered(self) -> None:
        """Note that the task has received the cancellation, as the watch or a `Stepped` has seen."""
        inside = self._pairs_inside()
        self._leave_alone()
        for pair in self._above:
            if pair.task is self._task and pair._is_cancelled and not pair.is_delivered:
                pair._leave_alone()
        if self.grace > 0:
            for pair in inside:
                pair.cover(self.loop.time() + self.grace)

    def _leave_alone(self) -> None:
        """Shield the task, which has received the cancellation and cleans up now."""
        if self.is_delivered:
            return
        _note_delivery(self)
        self._end_unwinding()
        if self.grace > 0:
            self._is_left_alone = True
            self.close()
            self._set_deadline(self._inner, self.loop.time() + self.grace)
            self.nurseries.are_passed()
        if self._watch is not None and self.nurseries.are_open:
            self._watch.guard()
        else:
            self._stop_watching()

    def take_for_delivered(self) -> None:
        """Note that the task cleans up already, because it has been stopped in another way."""
        self._leave_alone()

    def cover(self, until: float) -> None:
        """Note that a pair further out has delivered. A task group between the two might cancel this one as well."""
        _note_delivery(self)
        self._is_covered = self._is_left_alone = True
        self._end_unwinding()
        self._stop_watching()
        self.close()
        self._set_deadline(self._inner, until)

    def _pairs_inside(self) -> list[Pair]:
        """Return the inner pairs that are open in the same task, outermost first."""
        pairs = _open_pairs(self.loop).get(self._task, [])
        return pairs[pairs.index(self) + 1 :] if self in pairs else []

    @property
    def is_left_alone(self) -> bool:
        """Whether the task is shielded because it cleans up after the delivery."""
        return self._is_left_alone

    def close_if_told_by_error(self) -> None:
        """Protect the cleanup after `Cancelable.check` from a cancellation further out."""
        if self.is_delivered and not self._is_left_alone and self.grace > 0:
            self.close()

    def shorten_grace(self, grace: float) -> None:
        """Give the cleanup in this pair, and in those inside that are known, at most ``grace`` seconds."""
        for outer in (self, *self._member_scopes):
            for pair in _reached_pairs(outer):
                _shorten_grace_of(pair, grace)

    # A task that is stopped by an exception.

    def note_unwinding(self, error: BaseException) -> None:
        """Delay cancellations while ``error`` unwinds the task."""
        if self.is_delivered or self.grace <= 0:
            return
        if self._unwinding is None:
            self._unwinding = Unwinding(self.loop, self.grace, self._error_was_caught, self._grace_has_ended)
        self._unwinding.add(error)
        if self._is_cancelled:
            self._stop_watching()
            self.close()
            self._unwinding.start_timer()

    def _error_was_caught(self) -> None:
        """Allow cancellations again, because the exception has been caught and the work continues."""
        self._unwinding = None
        if self._is_cancelled and not self._is_held and not self.is_delivered:
            self._offer()

    def _grace_has_ended(self) -> None:
        """Cancel now, because the grace is over and the exception still unwinds the task."""
        self._unwinding = None
        if self._is_cancelled and not self._is_held:
            _note_delivery(self)
            self.open()

    def _end_unwinding(self) -> None:
        if self._unwinding is not None:
            self._unwinding.end()
            self._unwinding = None

    def is_seen_here(self) -> bool:
        """Return whether no shield is between this pair and the caller, in the same task.

        No public API tells that directly, but a deadline is visible to the caller exactly if a cancellation is.
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
        """Prepare to deliver again, because a nursery has swallowed the cancellation as its own."""
        self.is_delivered = self._is_left_alone = False
        self.nurseries.lose()
        self._set_deadline(self._inner, math.inf)

    def _set_deadline(self, scope: anyio.CancelScope, deadline: float) -> None:
        # In an empty context, because asyncio keeps even a cancelled timer until its time, and so its context.
        Context().run(setattr, scope, "deadline", deadline)

    @property
    def is_lost(self) -> bool:
        return self.nurseries.have_swallowed and not self._is_covered


def _note_delivery(pair: Pair) -> None:
    if not pair.is_delivered:
        pair.is_delivered = True
        pair.delivered_at = pair.loop.time()


def _reached_pairs(outer: Pair) -> Iterator[Pair]:
    """Yield ``outer`` and the inner pairs in the same task that no shield hides."""
    yield outer
    for pair in outer._pairs_inside():
        if not pair._is_reached_from_above:
            return
        yield pair


def _shorten_grace_of(pair: Pair, grace: float) -> None:
    # Without a shield if an exception has stopped the task; left alone also if the grace is that of a pair around.
    is_protected = pair._inner.shield or not pair._outer.cancel_called
    is_cleaning_up = pair.is_delivered and (pair._is_left_alone or (is_protected and pair.grace > 0))
    pair.grace = min(pair.grace, grace)
    if pair._unwinding is not None:
        pair._unwinding.shorten_grace(grace)
    until = pair.loop.time() + grace
    if is_cleaning_up and until < pair._inner.deadline:
        pair._set_deadline(pair._inner, until)
    if pair._watch is not None and not pair.is_delivered:
        if pair.grace > 0:
            pair._watch.shorten_grace(grace)
        else:
            # Without a grace, a cancellation is not offered, but let through.
            pair._stop_watching()
            pair.open()


class PublicScope(Pair):
    """A `PoliteScope` made of a pair."""

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
        # If possible without a shield: code that catches the exception continues, and another cancellation may stop it.
        if self.is_delivered or self.grace <= 0:
            return
        _note_delivery(self)
        self._end_unwinding()
        self._stop_watching()
        if self._outer.cancel_called:
            self.close()
        self._set_deadline(self._inner, self.loop.time() + self.grace)

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
        # anyio would cancel at a deadline, also work that is to be finished, and before a late timer of ours. So no
        # deadline is reported.
        pass


class PublicMemberScope(Pair):
    """A `MemberScope`. Pairs around it notify it of their cancellation; it sees others by stepping its task."""

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
            # The task was cancelled before the scope was entered.
            self.is_passed_by = any(pair._is_cancelled and pair._is_outside_of(self) for pair in self._above)
            self.fire()

    def end(self, exc: BaseException | None) -> BaseException | None:
        above, task, told = self._above, self._task, self.is_delivered
        self._in_task = tuple(pair for pair in above if pair.task is task)
        for pair in above:
            pair._member_scopes.pop(self, None)
        remaining = super().end(exc)
        # It refers to this scope, or our task does: a cycle, and nothing needs it any more.
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
        # The member scopes of one group have the same function.
        return self.is_passed_by or self._is_ours != member._is_ours

    @property
    def is_open_to_us(self) -> bool:
        """Whether a cancellation that arrives in the task now is the first one by this package."""
        return self.grace > 0 and not self.is_delivered and self._task is not None and self._is_ours(None)


def _nothing_is_ours(origin: object) -> bool:
    return False


class TellingScope(anyio.CancelScope):
    """A replacement for the scope of a group that, when cancelled, first notifies the member scopes."""

    def __new__(cls, *args: object) -> Any:
        # anyio's own `__new__` would create the scope of a backend.
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
        """The scope for the block around the group, which cancels only after the block has cancelled its own task.

        A group at its end gets the cancellation in the task of the block, and would swallow it as its own.
        """
        return _Late(self._loop, self)

    @property
    def deadline(self) -> float:
        return self._deadline

    @deadline.setter
    def deadline(self, value: float) -> None:
        # At its own deadline anyio would cancel without notifying the member scopes, so that one is later than ours.
        self._scope.deadline = value + _TRAIL
        self._deadline = value
        self.drop_timer()
        if value < math.inf:
            self._timer = self._loop.call_at(value, lambda: self.cancel("deadline exceeded"))

    def drop_timer(self) -> None:
        """Stop the timer of the deadline, when it is moved or the group has ended."""
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
    """Stop the timer of ``scope``, which `told_scope` has returned, as its group has ended."""
    if isinstance(scope, TellingScope):
        scope.drop_timer()


class _Late:
    def __init__(self, loop: EventLoop, scope: TellingScope) -> None:
        self._loop = loop
        self._scope = scope

    def cancel(self) -> None:
        self._loop.call_from_thread(self._scope.cancel)


class Stepped:
    """A wrapper of an awaited coroutine that passes on everything between it and the event loop."""

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
        # A tool that inspects the task sees the coroutine.
        return getattr(self._coro, name)


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def end_of_group() -> Any:
    """Return the code that runs at the end of anyio's groups. Works only in a task, as anyio looks for its backend."""
    return type(anyio.create_task_group()).__aexit__.__code__


class Nurseries:
    """The nurseries of trio that a task has opened inside a pair, at the moment of delivery.

    A nursery cancels itself when a cancellation passes through its body or reaches it at its end. With our shield
    around it, it swallows that cancellation as its own, and the work would continue without the results of the
    children. anyio's groups on asyncio recognize that by the count of the task, and are not needed here.
    """

    __slots__ = ("_before", "_is_lost", "_open", "_task")

    def __init__(self, task: Any) -> None:
        self._task = task
        self._before = len(getattr(task, "childnurseries", ()))
        self._open: list[Any] = []
        self._is_lost = False

    def note(self) -> None:
        """Remember the nurseries that are open now: one that is about to end is no longer listed, but may swallow."""
        for nursery in list(getattr(self._task, "child_nurseries", ()))[self._before :]:
            if nursery not in self._open:
                self._open.append(nursery)

    def are_passed(self) -> None:
        """Forget cancellations that were swallowed before the delivery."""
        self._is_lost = False
        self._open = [nursery for nursery in self._open if not nursery.cancel_scope.cancelled_caught]
        self.note()

    def lose(self) -> None:
        """Note that a nursery has swallowed the cancellation, and start again."""
        self._is_lost = True
        self._open = []

    def forget(self) -> None:
        """Drop the reference to the task."""
        self._task = None

    @property
    def are_open(self) -> bool:
        """Whether any of the nurseries might still swallow the cancellation."""
        return bool(self._open)

    @property
    def have_swallowed(self) -> bool:
        """Whether a nursery has swallowed the cancellation."""
        return self._is_lost or any(nursery.cancel_scope.cancelled_caught for nursery in self._open)
