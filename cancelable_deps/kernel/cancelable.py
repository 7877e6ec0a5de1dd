"""A block of work that a token, a deadline or a condition can stop, as users see it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self, TypeVar, TypeVarTuple
from weakref import ref

import anyio.lowlevel

from .block import Block, current
from .condition import Condition
from .options import NotADependency, seconds
from .reasons import CancelationReason
from .shields import Deferral, Shield
from .threads import enter_in_thread, leave_in_thread, run_in_process, run_in_thread
from .token import Callback, CancelationToken, call_logged, check_reason
from .unwrap import raise_as_it_is

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import timedelta
    from types import TracebackType

    from anyio import CapacityLimiter

C = TypeVar("C", bound="Callable[..., object]")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


def current_cancelable() -> Cancelable | None:
    """Return the innermost `Cancelable` whose block encloses the caller, however deep below; ``None`` outside of any.

    Tasks started inside the block see it too, also one that outlives it: it then is no longer active.
    """
    block = current.get()
    return None if block is None else cancelable_of(block)


class _Observable:
    """The part of a `Cancelable` that calls back."""

    _block: Block

    def on_cancel(self, callback: C) -> C:
        """Call ``callback(cancelable)`` when the block is cancelled; at once if it already is. Serves as a decorator.

        It is called at the moment of cancelling, in the thread that cancels. What an ``async`` one returns is awaited
        when the block is left, before the error is raised, shielded, with ``cleanup_grace`` seconds for all of them; if
        the block is not entered it is closed. What a callback raises is logged and goes no further, also if that is the
        ``CancelledError`` of a task that it awaits; ``KeyboardInterrupt`` and ``SystemExit`` are raised when all others
        have been called. `remove_callback` takes it back.
        """
        if not callable(callback):
            raise TypeError(f"on_cancel takes a function of one argument, the Cancelable, not {callback!r}")
        self._block.call_back(Callback(callback, self._call))
        return callback

    def _call(self, callback: Callable[..., object], token: CancelationToken) -> None:
        self._block.await_at_the_end(call_logged(callback, self))

    def remove_callback(self, callback: Callable[..., object]) -> int:
        """Take back what `on_cancel` or `on_progress` was given: all registrations of ``callback``.

        From any thread, and in a callback as well: one that is removed there, before its turn, is not called any more.

        :return: how many registrations that were; 0 if there is none. One of `on_cancel` that was called is none.
        """
        before = self._block.progress_callbacks or []
        self._block.progress_callbacks = [other for other in before if other != callback] or None
        return self._block.take_back(callback) + len(before) - len(self._block.progress_callbacks or ())

    def on_progress(self, callback: C) -> C:
        """Call ``callback(message, metadata)`` at each `report_progress`; it may be ``async``. Serves as a decorator.

        What it raises is logged and goes no further, as with `on_cancel`: watching work must not end it.
        `remove_callback` takes it back.
        """
        if not callable(callback):
            raise TypeError(f"on_progress takes a function of a message and its metadata, not {callback!r}")
        self._block.progress_callbacks = [*(self._block.progress_callbacks or ()), callback]
        return callback

    async def report_progress(self, message: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        """Tell every `on_progress` callback, and wait for the ``async`` ones.

        Also a point where a cancellation is seen, so that work which reports can be stopped.
        """
        await anyio.lowlevel.checkpoint()
        await self._block.report_progress(message, metadata)


class Cancelable(_Observable):
    """A block of work, entered once with ``async with``, that a token, a deadline or ``cancel()`` can stop.

    The work is stopped at the ``await`` where it stands, by its backend's own cancellation (``asyncio.CancelledError``,
    ``trio.Cancelled``) through an anyio cancel scope, so shielded sections are finished first. Its cleanup then has
    ``cleanup_grace`` seconds in which its own awaits run undisturbed; after that the cancellation is repeated at every
    ``await``. Leaving the block raises the `CancelationError` of the reason.

    A block that finishes all the same has finished, and one that raises something else during its cleanup raises that.
    A cancellation that is not ours (the server's, an outer scope's) passes through.

    In a worker thread (a ``def`` endpoint or dependency, ``run_in_thread``, a thread of a script) it is entered by a
    plain ``with``. A thread cannot be interrupted: there the work is stopped where it calls `check`.

    :param timeout: seconds (or a ``timedelta``) from entering the block; ``None`` for no limit.
    :param token: another source of cancellation, which several blocks may share.
    :param name: for your own logs and ``repr()``.
    :param cleanup_grace: seconds; the default is that of `configure`.
    :raises ValueError: for a timeout or grace that is negative or NaN, :exc:`TypeError` for one that is no number.
    """

    __signature__ = NotADependency(
        "Depends(Cancelable) would make query parameters of its limits. Write `cancel: RequestCancelable`, or "
        "Annotated[Cancelable, Depends(cancelable_with_timeout(30))]."
    )

    def __init__(
        self,
        *,
        timeout: float | timedelta | None = None,
        token: CancelationToken | None = None,
        name: str | None = None,
        cleanup_grace: float | None = None,
    ) -> None:
        block = Block()
        if timeout is not None:
            block.timeout = seconds(timeout, "timeout")
        if token is not None:
            if not isinstance(token, CancelationToken):
                raise TypeError(f"token must be a CancelationToken, not {token!r}")
            block.upstream = token
        if name is not None:
            block.name = name
        if cleanup_grace is not None:
            block.grace = seconds(cleanup_grace, "cleanup_grace")
        if type(self) is not Cancelable:
            block.kind = type(self).__name__
        self._show(block)

    def _show(self, block: Block) -> None:
        self._block = block
        # Weakly: each would keep the other, and be garbage that only the collector finds.
        block.face = ref(self)

    @classmethod
    def with_timeout(cls, timeout: float | timedelta, *, name: str | None = None) -> Self:
        """A block that is stopped ``timeout`` seconds after it is entered."""
        return cls(timeout=timeout, name=name)

    @classmethod
    def with_token(cls, token: CancelationToken, *, name: str | None = None) -> Self:
        """A block that is stopped when ``token`` is cancelled, for the token's reason."""
        return cls(token=token, name=name)

    @classmethod
    def with_condition(
        cls,
        predicate: Callable[[], bool | Awaitable[bool]],
        interval: float | timedelta = 0.1,
        *,
        name: str | None = None,
    ) -> Self:
        """A block that is stopped when ``predicate()`` is true; asked every ``interval`` seconds, on entering first.

        The predicate may be ``async``; a plain one runs in the event loop and must not block. One that raises stops
        the block with ``CancelationReason.ERROR``.
        """
        made = cls(name=name)
        made._block.condition = Condition(predicate, interval)
        return made

    def __repr__(self) -> str:
        return repr(self._block)

    @property
    def name(self) -> str | None:
        """The name that was given to the block, for logs and ``repr()``."""
        return self._block.name

    @property
    def token(self) -> CancelationToken:
        """This block's own token. Cancelling it stops this block, and no other that shares the token given to it."""
        return self._block.token

    @property
    def is_active(self) -> bool:
        """Whether the block has been entered and not yet left."""
        return self._block.is_open

    @property
    def is_cancelled(self) -> bool:
        """Whether the block has been cancelled, even if its work has not stopped yet."""
        return self._block.cause is not None

    @property
    def reason(self) -> CancelationReason | None:
        """Why it was cancelled, as recorded at that moment; ``None`` while it is not."""
        cause = self._block.cause
        return None if cause is None else cause.reason

    @property
    def message(self) -> str | None:
        """What was given to ``cancel()``, or says which limit was passed; ``None`` if there is nothing to say."""
        cause = self._block.cause
        return None if cause is None else cause.message

    @property
    def elapsed(self) -> float:
        """Seconds since the block was entered, up to when it was left; 0 before."""
        return self._block.elapsed

    @property
    def deadline(self) -> float:
        """When the block, or one that encloses it in the same task, times out; ``math.inf`` for never.

        On the clock of ``anyio.current_time()``, and known once the block is entered.
        """
        return self._block.deadline

    def remaining(self) -> float:
        """Return the seconds until `deadline`, never negative; ``math.inf`` without one. Before entering: the timeout."""
        block = self._block
        if block.loop is None:
            return math.inf if block.timeout is None else block.timeout
        return max(0.0, block.deadline - block.loop.time())

    def extend(self, by: float | timedelta) -> bool:
        """Give the block ``by`` more seconds; from any thread.

        If it has no timeout of its own, the nearest block around it that has one is given them: in a handler that is the
        timeout of the decorator, route class or middleware. A handle need not be entered for that.

        :return: whether that came in time; ``False`` if there is no timeout, or the block was cancelled or left before.
        """
        return self._block.move_timeout(seconds(by, "extend"))

    def disable_timeout(self) -> bool:
        """Remove the timeout; the same as extending it without end."""
        return self._block.move_timeout(math.inf)

    def cancel_nowait(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """Stop the block, from any thread, without waiting for its end. Before it is entered: entering will raise.

        ``message`` reaches the client as the response's detail; not that of ``PARENT`` and ``ERROR``, for which the
        client reads a fixed sentence.

        :return: whether this call did it; ``False`` if it was cancelled before, or the block has been left.
        :raises TypeError: if ``reason`` is not a `CancelationReason`, or ``message`` is neither a string nor ``None``.
        """
        check_reason(reason, message)
        return self._block.cancel_nowait(reason, message)

    async def cancel(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """As `cancel_nowait`; called inside the block itself, the cancellation arrives right here."""
        done = self.cancel_nowait(reason, message)
        await anyio.lowlevel.checkpoint()
        return done

    def check(self) -> None:
        """Raise the `CancelationError` of the reason if the block, or one around it, is cancelled or past its deadline.

        For work that has no ``await``: it sees a deadline although the event loop had no chance to. From any thread.
        """
        self._block.check()

    def shield(self) -> Shield:
        """``with cancel.shield():`` (or ``async with``) finish this section: a cancellation waits until after it."""
        return Shield()

    def defer_disconnect(self) -> Deferral:
        """``with cancel.defer_disconnect():`` past this point the client's leaving is recorded, and acted on at the end.

        For what must be finished though nobody reads the result: an upstream that bills by its last frame. A timeout
        and every other reason still act at once. Inside it, `is_cancelled` stays false and `client_has_left` tells. It
        may be nested, and left in any order; the recorded disconnect acts when the last is left, at the next ``await``.
        Outside of a request it does nothing.
        """
        return Deferral(self._block.owner_of_client)

    @property
    def client_has_left(self) -> bool:
        """Whether the client has been seen to leave, also while `defer_disconnect` keeps that from stopping the block."""
        owner = self._block.owner_of_client
        return self.reason is CancelationReason.DISCONNECT if owner is None else owner.has_left

    async def __aenter__(self) -> Self:
        self._block.enter()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        block = self._block
        outcome = block.leave(exc)
        if block.is_unsettled:
            await block.settle()
        if outcome is not None and outcome is not exc:
            try:
                raise_as_it_is(outcome)
            finally:
                del outcome  # Its traceback knows this frame: a cycle, as long as this frame knows it.

    def __enter__(self) -> Self:
        """In a worker thread: raises :exc:`TypeError` where an event loop runs."""
        enter_in_thread(self._block)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outcome = leave_in_thread(self._block, exc)
        if outcome is not None and outcome is not exc:
            try:
                raise_as_it_is(outcome)
            finally:
                del outcome  # Its traceback knows this frame: a cycle, as long as this frame knows it.

    async def run_in_thread(
        self,
        func: Callable[[*Ts], R],
        *args: *Ts,
        abandon_on_cancel: bool = False,
        limiter: CapacityLimiter | None = None,
    ) -> R:
        """Run ``func(*args)`` in a worker thread, inside of this block: ``current_cancelable().check()`` works there.

        A cancellation ends the waiting for a thread, but a thread that works is waited for; it ends at its next
        `check` (or ``anyio.from_thread.check_cancelled()``). If it finishes anyway, its result is returned.

        :param abandon_on_cancel: leave the thread alone instead, and be cancelled at once. It keeps its place in the
            limiter until it has ended, unlike anyio's own. What it returns is dropped; what it raises is logged.
        :param limiter: how many threads may run at once; the default is anyio's for all threads (40).
        :raises RuntimeError: outside of the block, :exc:`TypeError` for an ``async`` function.
        """
        result: R = await run_in_thread(self._block, func, args, abandon_on_cancel, limiter)
        return result

    async def run_in_process(self, func: Callable[[*Ts], R], *args: *Ts, limiter: CapacityLimiter | None = None) -> R:
        """Run ``func(*args)`` in a process that runs nothing else; a cancellation kills it, and all it has started.

        For work that never yields. Function, arguments and result are pickled; an exception arrives as itself, with the
        traceback of the process as a note. What the function prints goes to the standard error. It has no access to
        this block, nor to anything else of the server's memory. It is killed by SIGKILL: nothing of its cleanup runs.

        A process that has finished its job is used again for the next one, or ended after a minute, or with the event
        loop, or when the server is killed.

        :param limiter: how many processes may work at once; the default is ``anyio.to_process``'s (one a CPU).
        :raises RuntimeError: outside of the block.
        :raises TypeError: for what cannot be pickled: a lambda, a closure, an open file.
        :raises anyio.BrokenWorkerProcess: if the process ends by itself, as by a crash.
        """
        result: R = await run_in_process(self._block, func, args, limiter)
        return result


def cancelable_of(block: Block) -> Cancelable:
    """Return the face of ``block``, which is made for the first who asks."""
    known: Cancelable | None = None if block.face is None else block.face()
    if known is None:
        known = Cancelable.__new__(Cancelable)
        known._show(block)
    return known


def block_of(cancelable: Cancelable) -> Block:
    """Return the block behind ``cancelable``."""
    return cancelable._block
