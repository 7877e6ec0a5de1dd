"""`Cancelable`: a block of work that a token, a deadline or a condition can stop. The part that users see."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar, TypeVarTuple
from weakref import ref

import anyio.lowlevel

from .block import Block, current
from .condition import Condition
from .detached import Detached, detach
from .interrupting import Interrupting
from .options import NotADependency, checked_work, name_of_work, seconds
from .reasons import CancelationReason
from .remaining import Hidden, seconds_left
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
    """Return the innermost `Cancelable` whose block encloses the caller at any depth; ``None`` outside of all blocks.

    Tasks and threads that are started inside the block get it too. A task that outlives the block still gets it, with
    ``is_active`` false.
    """
    block = current.get()
    return None if block is None else cancelable_of(block)


class _Observable:
    """The callbacks of a `Cancelable`."""

    _block: Block

    def on_cancel(self, callback: C) -> C:
        """Register ``callback(cancelable)`` to be called when the block is cancelled; at once if it already is.

        The callback is called once, at the moment of the cancellation and in the thread that cancels. If it is
        ``async``, the block awaits it when it is left, shielded and before the error is raised; all such callbacks
        together have ``cleanup_grace`` seconds. If the block is not open, the coroutine is closed without running.

        An exception of a callback is logged and not raised, including the ``CancelledError`` of a task that it awaits.
        ``KeyboardInterrupt`` and ``SystemExit`` are raised once all callbacks have been called. Undo the registration
        with `remove_callback`.

        :return: the callback, so that this method can be used as a decorator.
        :raises TypeError: if ``callback`` is not callable.
        """
        if not callable(callback):
            raise TypeError(f"on_cancel takes a function of one argument, the Cancelable, not {callback!r}")
        self._block.call_back(Callback(callback, self._call))
        return callback

    def _call(self, callback: Callable[..., object], token: CancelationToken) -> None:
        self._block.await_at_the_end(call_logged(callback, self))

    def remove_callback(self, callback: Callable[..., object]) -> int:
        """Remove all registrations of ``callback`` with `on_cancel` and `on_progress`.

        May be called in any thread, and by another callback: a callback that is removed before its turn is not called.

        :return: the number of registrations removed. A callback of `on_cancel` that has been called no longer counts.
        """
        before = self._block.progress_callbacks or []
        self._block.progress_callbacks = [other for other in before if other != callback] or None
        return self._block.take_back(callback) + len(before) - len(self._block.progress_callbacks or ())

    def on_progress(self, callback: C) -> C:
        """Register ``callback(message, metadata)`` to be called at each `report_progress`; it may be ``async``.

        An exception of the callback is logged and not raised, as with `on_cancel`: an observer must not end the work.
        Undo the registration with `remove_callback`.

        :return: the callback, so that this method can be used as a decorator.
        :raises TypeError: if ``callback`` is not callable.
        """
        if not callable(callback):
            raise TypeError(f"on_progress takes a function of a message and its metadata, not {callback!r}")
        self._block.progress_callbacks = [*(self._block.progress_callbacks or ()), callback]
        return callback

    async def report_progress(self, message: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        """Call every `on_progress` callback, and await the ``async`` ones.

        This is a checkpoint: a pending cancellation is raised here, before any callback is called.
        """
        await anyio.lowlevel.checkpoint()
        await self._block.report_progress(message, metadata)


class _Elsewhere(_Observable):
    """The work of a `Cancelable` outside of its own task."""

    def detach(
        self,
        work: Callable[[Cancelable, *Ts], Awaitable[R]],
        *args: *Ts,
        name: str | None = None,
        timeout: float | timedelta | None = None,
    ) -> Detached[R]:
        """Start ``work(cancelable, *args)`` and let it go on without this block and its request, in a task of its own.

        For work that must not stop when the client leaves, and for which nobody has to wait: an audit record, a cache
        that is filled, what a cleanup has to send. ``await detached.result()`` waits for it all the same; a caller that is
        cancelled meanwhile leaves it running. Call this anywhere: before a cancellation, in the cleanup after one, and in
        a ``def`` endpoint.

        The work gets a `Cancelable` of its own, which has been entered. Its context variables are those of the caller.
        Give it nothing that ends with the request: sessions and files of dependencies, the body.

        At shutdown it is waited for, and cancelled with reason ``SIGNAL`` together with the background tasks: after the
        ``grace`` and the ``background_grace`` of `cancelation_lifespan`. Its cleanup has its grace then. Without that
        lifespan the event loop cancels it when it ends. It is lost if the process is killed: there is no record of it, as
        there is of work that ``Operations.start`` starts. Open ``Operations`` list it, with the owner of the request.

        :param work: an async function.
        :param name: for logs and lists; the default is the name of the function.
        :param timeout: seconds that it may run.
        :return: a handle of the work. An exception that nobody waits for is logged as an ERROR.
        :raises TypeError: if ``work`` is not an async function that takes these arguments.
        :raises RuntimeError: in a thread that no event loop has started.
        """
        checked_work(work, len(args))
        cancelable = Cancelable(timeout=timeout, name=name_of_work(work) if name is None else name)
        return detach(self._block, cancelable, partial(work, cancelable, *args))

    async def run_in_thread(
        self,
        func: Callable[[*Ts], R],
        *args: *Ts,
        abandon_on_cancel: bool = False,
        limiter: CapacityLimiter | None = None,
    ) -> R:
        """Run ``func(*args)`` in a worker thread, inside of this block: ``current_cancelable().check()`` works there.

        A cancellation while the call waits for a free thread is raised at once. A thread that is running is awaited: it
        ends at its next `check` (or ``anyio.from_thread.check_cancelled()``). If it completes all the same, its result
        is returned.

        :param abandon_on_cancel: raise a cancellation at once, and let the thread run on. It keeps its token of the
            limiter until it has ended, unlike with anyio. Its result is discarded; its exception is logged.
        :param limiter: limits how many threads may run at once; the default is anyio's limiter for all threads (40).
        :return: the result of ``func``.
        :raises RuntimeError: if the block is not open.
        :raises TypeError: if ``func`` is ``async``.
        """
        result: R = await run_in_thread(self._block, func, args, abandon_on_cancel, limiter)
        return result

    async def run_in_process(self, func: Callable[[*Ts], R], *args: *Ts, limiter: CapacityLimiter | None = None) -> R:
        """Run ``func(*args)`` in a process of its own; a cancellation kills the process and all that it has started.

        For work that cannot call `check`, such as one long call into C. The process is killed with SIGKILL, so none of
        its cleanup runs. The function, its arguments and its result are pickled. An exception of the function is raised
        here, with the traceback of the process as a note. The function's standard output goes to the server's standard
        error. The function has no access to this block, nor to any other object in the server's memory.

        The process is kept for the next call. It is ended after a minute without one, when the event loop ends, and
        when the server is killed.

        :param limiter: limits how many processes may run at once; the default is that of ``anyio.to_process`` (one per
            CPU).
        :return: the result of ``func``.
        :raises RuntimeError: if the block is not open.
        :raises TypeError: if ``func`` is ``async``, or if ``func``, an argument or the result cannot be pickled (a
            lambda, a closure, an open file).
        :raises anyio.BrokenWorkerProcess: if the process ends by itself, for example by a crash.
        """
        result: R = await run_in_process(self._block, func, args, limiter)
        return result


class Cancelable(_Elsewhere):
    """A block of work that a token, a deadline or ``cancel()`` can stop. It is entered once, with ``async with``.

    A cancellation is raised at the work's current ``await``, as the exception of the backend
    (``asyncio.CancelledError``, ``trio.Cancelled``), through an anyio cancel scope; a shielded section is finished
    first. The cleanup of the work then has ``cleanup_grace`` seconds in which its own awaits are not interrupted; after
    that, the cancellation is repeated at every ``await``. Leaving the block raises the reason's `CancelationError`.

    A block whose work completes in spite of the cancellation raises nothing. A block whose cleanup raises another
    exception raises that exception. A cancellation from elsewhere (the server, an outer scope) passes through.

    In a worker thread (a ``def`` endpoint or dependency, ``run_in_thread``, a thread of a script) the block is entered
    with a plain ``with``. A thread cannot be interrupted: its work is stopped where it calls `check`.

    :param timeout: seconds (or a ``timedelta``) from entering the block; ``None`` for no limit.
    :param token: a further source of cancellation, which several blocks may share. The block does not cancel it.
    :param name: a name for your own logs and for ``repr()``.
    :param cleanup_grace: seconds; the default is that of `configure`.
    :raises ValueError: if ``timeout`` or ``cleanup_grace`` is negative or NaN.
    :raises TypeError: if ``timeout`` or ``cleanup_grace`` is not a number, or ``token`` is not a `CancelationToken`.
    """

    __signature__ = NotADependency(
        "Depends(Cancelable) would turn its limits into query parameters. Write `cancel: RequestCancelable`, or "
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
        # A weak reference, because a strong one would make a cycle that only the garbage collector can free.
        block.face = ref(self)

    @classmethod
    def with_timeout(cls, timeout: float | timedelta, *, name: str | None = None) -> Self:
        """Return a block that is cancelled ``timeout`` seconds after it is entered, with reason ``TIMEOUT``."""
        return cls(timeout=timeout, name=name)

    @classmethod
    def with_token(cls, token: CancelationToken, *, name: str | None = None) -> Self:
        """Return a block that is cancelled when ``token`` is, with the token's reason and message."""
        return cls(token=token, name=name)

    @classmethod
    def with_condition(
        cls,
        predicate: Callable[[], bool | Awaitable[bool]],
        interval: float | timedelta = 0.1,
        *,
        name: str | None = None,
    ) -> Self:
        """Return a block that is cancelled when ``predicate()`` is true, with reason ``CONDITION``.

        The predicate is called for the first time when the block is entered, then every ``interval`` seconds. It may be
        ``async``; a plain function runs in the event loop and must not block. If it raises, the block is cancelled with
        reason ``ERROR``.

        :raises TypeError: if ``predicate`` is not callable, or ``interval`` is not a number.
        :raises ValueError: if ``interval`` is negative or NaN.
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
        """The block's own token. Cancelling it stops this block only, and not the others that share ``token=``."""
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
        """The reason of the cancellation, recorded at the moment of it; ``None`` while the block is not cancelled."""
        cause = self._block.cause
        return None if cause is None else cause.reason

    @property
    def message(self) -> str | None:
        """The message that was given to ``cancel()``, or a text that names the limit passed; ``None`` if neither."""
        cause = self._block.cause
        return None if cause is None else cause.message

    @property
    def elapsed(self) -> float:
        """The seconds from entering the block until now, or until it was left; 0 before it is entered."""
        return self._block.elapsed

    @property
    def deadline(self) -> float:
        """The time at which this block, an enclosing block in the same task, or its request times out.

        A time of the clock ``anyio.current_time()``; ``math.inf`` if there is no timeout. The timeout of this block counts
        from when it is entered.
        """
        return self._block.deadline

    def remaining(self) -> float:
        """Return the seconds that are left until `deadline`; 0 when it has passed, ``math.inf`` without a timeout.

        Before the block is entered, this is its own timeout, or the rest of the time of the request that the handle
        belongs to, if that is less.
        """
        return seconds_left(self._block)

    def extend(self, by: float | timedelta) -> bool:
        """Move the timeout ``by`` seconds later. May be called in any thread.

        If the block has no timeout of its own, this moves the timeout of the nearest enclosing block that has one. In a
        handler that is the timeout of the decorator, route class or middleware; the handle that the handler was given
        need not be entered for that.

        The time that the client of a request gives (see ``ClientTimeout``) is not moved: a timeout is moved up to it.

        :return: ``True`` if the timeout was moved; ``False`` if there is none, if it is the client's, or if its block was
            already cancelled or left.
        :raises ValueError: if ``by`` is negative or NaN.
        :raises TypeError: if ``by`` is not a number.
        """
        return self._block.move_timeout(seconds(by, "extend"))

    def disable_timeout(self) -> bool:
        """Remove the timeout: the same as `extend` by an infinite time, with the same result."""
        return self._block.move_timeout(math.inf)

    def cancel_nowait(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """Cancel the block and return at once, without waiting for its end. May be called in any thread.

        If the block has not been entered yet, entering it raises the `CancelationError`.

        :param message: the ``detail`` of the response. The client gets a fixed sentence instead if the reason is
            ``PARENT`` or ``ERROR``.
        :return: ``True`` if this call cancelled the block; ``False`` if it was already cancelled or left.
        :raises TypeError: if ``reason`` is not a `CancelationReason`, or ``message`` is neither a string nor ``None``.
        """
        check_reason(reason, message)
        return self._block.cancel_nowait(reason, message)

    async def cancel(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """Cancel the block like `cancel_nowait`, then pass a checkpoint.

        Called inside the block itself, the cancellation is raised here and not at the next ``await``.
        """
        done = self.cancel_nowait(reason, message)
        await anyio.lowlevel.checkpoint()
        return done

    def check(self) -> None:
        """Raise a `CancelationError` if this block or an enclosing one is cancelled or past its deadline.

        For work that does not await: a deadline is noticed here even if the event loop has had no chance to run. May be
        called in any thread.

        :raises CancelationError: the error of the reason.
        """
        self._block.check()

    def shield(self) -> Shield:
        """Return a context manager around a section that must be finished: a cancellation is delivered after it.

        Takes ``with`` and ``async with``. There is no limit to how long the section may delay the cancellation. Calls to
        other services in it are not given the deadlines of the blocks around it (see ``forward_deadline``).
        """
        return Shield(current.get(), Hidden())

    def defer_disconnect(self) -> Deferral:
        """Return a context manager in which the client's disconnect is recorded, and cancels the request at its end.

        For work that must be finished though nobody reads the result, such as a call to a service that charges when its
        response has ended. A timeout and every other reason still cancel at once. Inside, `is_cancelled` stays false
        after a disconnect, and `client_has_left` is true.

        Takes ``with`` and ``async with``. Such sections may be nested, and left in any order: a recorded disconnect
        cancels when the last one is left, at the next ``await``. Outside of a request this does nothing.
        """
        return Deferral(self._block.owner_of_client)

    @property
    def client_has_left(self) -> bool:
        """Whether the client is known to have disconnected, even while `defer_disconnect` delays the cancellation."""
        owner = self._block.owner_of_client
        return self.reason is CancelationReason.DISCONNECT if owner is None else owner.has_left

    def interrupting(self, stop: Callable[[], object], *, discard: Callable[[], object] | None = None) -> Interrupting:
        """Return a context manager around a blocking call, which ``stop()`` interrupts when the block is cancelled.

        For drivers that block a thread, and that another thread can interrupt: psycopg (``connection.cancel_safe``),
        sqlite3 (``connection.interrupt``), PyMySQL (a ``KILL QUERY`` by a second connection). Use a plain ``with`` in
        the thread, or ``async with`` around `run_in_thread`.

        ``stop`` is called in a thread of its own, as it may connect to a server; and again every now and then (after
        0.25 seconds, 0.5, 1, ... 4) until the section is left, as it has no effect before the call has reached the
        server. **Leaving the section waits for it**, and afterwards it is not called, so that it never interrupts the
        next query on the connection. If leaving has waited for ``cleanup_grace`` seconds, an error is logged and
        ``discard`` is called, for example ``connection.close``; without ``discard``, leaving goes on waiting.
        Exceptions of both are logged and not raised.

        If the interrupted call raises an exception (the error of the driver, but no ``HTTPException``), the
        `CancelationError` of the reason is raised in its place, with the exception as its ``__cause__``. A call that
        completes all the same has completed: nothing is raised.

        A cancellation by this block, its deadline or a block around it calls ``stop``; `shield` delays that. Any other
        cancellation of the task (an anyio scope, ``task.cancel()``) calls it when it leaves an ``async with``. With
        ``abandon_on_cancel`` the section belongs into the function that runs in the thread.

        Sections may be nested; the innermost is interrupted first.

        :param stop: a plain function without arguments. It must leave an idle connection alone.
        :param discard: a plain function without arguments, called where the section is left. It must not block.
        :raises TypeError: if ``stop`` or ``discard`` is not a plain function; on entering, if a plain ``with`` stands
            in an event loop.
        :raises RuntimeError: on entering, if the block is not open, or the section has been entered before.
        :raises CancelationError: on entering, if the block is cancelled already; ``stop`` is not called then.
        """
        return Interrupting(self._block, stop, discard)

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
                del outcome  # Its traceback refers to this frame: a cycle while the frame refers to it.

    def __enter__(self) -> Self:
        """Enter the block in a worker thread.

        :raises TypeError: if an event loop runs in this thread.
        """
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
                del outcome  # Its traceback refers to this frame: a cycle while the frame refers to it.


def cancelable_of(block: Block) -> Cancelable:
    """Return the `Cancelable` of ``block``, which is created on the first call."""
    known: Cancelable | None = None if block.face is None else block.face()
    if known is None:
        known = Cancelable.__new__(Cancelable)
        known._block = block
        block.face = ref(known)
    return known


def block_of(cancelable: Cancelable) -> Block:
    """Return the block behind ``cancelable``."""
    return cancelable._block
