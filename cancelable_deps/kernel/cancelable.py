"""A block of work that a token, a deadline or a condition can stop."""

from __future__ import annotations

import inspect
import math
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar, TypeVarTuple

import anyio
import anyio.lowlevel

from .condition import Condition
from .errors import CancelationError, ParentCancelation
from .foreign import EXITS, ThisTask, is_anothers
from .log import logger
from .loops.current import current_loop
from .members import Members, with_one_more, without
from .options import NotADependency
from .reasons import CancelationReason
from .settings import seconds, settings
from .shields import Deferral, Shield
from .timeouts import CLOSE, new_line, wait_alone, wait_belatedly
from .token import Callback, CancelationToken, Cause, call_logged, check_reason, close_unawaited, telling_everybody
from .unwrap import answer_of_group, carries_cancelation, collapse, raise_as_it_is

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import timedelta
    from types import TracebackType

    from anyio import CapacityLimiter

    from .loops.base import EventLoop, Gate, Mark, PoliteScope, Timer
    from .shields import OwnerOfClient
    from .timeouts import Line
    from .token import Listener

C = TypeVar("C", bound="Callable[..., object]")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

_current: ContextVar[Cancelable | None] = ContextVar("cancelable_deps.current", default=None)


def current_cancelable() -> Cancelable | None:
    """The innermost `Cancelable` whose block encloses the caller, however deep below; ``None`` outside of any.

    Tasks started inside the block see it too, also one that outlives it: it then is no longer active.
    """
    return _current.get()


class Cancelable:
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

    # Class attributes stand for what most blocks never set: a request pays for each attribute it writes.
    _name: str | None = None
    _timeout: float | None = None
    _grace: float | None = None
    _upstream: CancelationToken | None = None
    _condition: Condition | None = None
    _loop: EventLoop | None = None
    _started: float = math.nan
    _ended: float | None = None
    _deadline: float = math.inf
    _may_begin_late = False
    _is_unsettled = False
    """Whether something of this block, which has been left, is still to be awaited."""

    _instead_of_entering_twice = "Make another one for another block, or share a CancelationToken between several."
    _lends_itself = False
    _inner: Cancelable | None = None
    """While it is open already: the block of whoever may enter it once more."""

    _position: Mark | None = None
    _scope: PoliteScope | None = None
    _line: Line | None = None
    """Where it waits for its deadline."""

    _parent: Cancelable | None = None
    _children: Members[Cancelable] = ()
    _fired = False
    _deferred = False
    _only_marked = False
    takes_groups_apart = True
    """Whether somebody else's group that has an ``HTTPException`` leaves as that."""

    _has_task_group = False
    _group_scope: anyio.CancelScope | None = None
    _group_gates: dict[object, Gate] | None = None
    _late: Timer | None = None
    _told_by_parent: Listener | None = None
    _outside: Token[Cancelable | None]
    _callbacks: Members[Callback] = ()
    _to_await: list[Awaitable[object]] | None = None
    _progress_callbacks: list[Callable[[str | None, Mapping[str, Any]], object]] | None = None

    def __init__(
        self,
        *,
        timeout: float | timedelta | None = None,
        token: CancelationToken | None = None,
        name: str | None = None,
        cleanup_grace: float | None = None,
    ) -> None:
        self._token = CancelationToken()
        if timeout is not None:
            self._timeout = seconds(timeout, "timeout")
        if token is not None:
            if not isinstance(token, CancelationToken):
                raise TypeError(f"token must be a CancelationToken, not {token!r}")
            self._upstream = token
        if name is not None:
            self._name = name
        if cleanup_grace is not None:
            self._grace = seconds(cleanup_grace, "cleanup_grace")

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
        block = cls(name=name)
        block._condition = Condition(predicate, interval)
        return block

    def __repr__(self) -> str:
        name = f" {self._name!r}" if self._name else ""
        return f"<{type(self).__name__}{name} {self._token.cause or self._state}>"

    @property
    def _state(self) -> str:
        if self._loop is None:
            return "not entered"
        return "active" if self.is_active else "left"

    @property
    def name(self) -> str | None:
        return self._name

    @property
    def token(self) -> CancelationToken:
        """This block's own token. Cancelling it stops this block, and no other that shares the token given to it."""
        return self._token

    @property
    def is_active(self) -> bool:
        """Whether the block has been entered and not yet left."""
        return self._scope is not None or self._position is not None

    @property
    def is_cancelled(self) -> bool:
        return self._token.is_cancelled

    @property
    def reason(self) -> CancelationReason | None:
        """Why it was cancelled, as recorded at that moment; ``None`` while it is not."""
        return self._token.reason

    @property
    def message(self) -> str | None:
        """What was given to ``cancel()``, or says which limit was passed; ``None`` if there is nothing to say."""
        return self._token.message

    @property
    def elapsed(self) -> float:
        """Seconds since the block was entered, up to when it was left; 0 before."""
        if self._loop is None:
            return 0.0
        return (self._loop.time() if self._ended is None else self._ended) - self._started

    @property
    def deadline(self) -> float:
        """When the block, or one that encloses it in the same task, times out; ``math.inf`` for never.

        On the clock of ``anyio.current_time()``, and known once the block is entered.
        """
        return self._deadline if self._parent is None else min(self._deadline, self._parent.deadline)

    def remaining(self) -> float:
        """Seconds until `deadline`, never negative; ``math.inf`` without one. Before entering: the timeout."""
        if self._loop is None:
            return math.inf if self._timeout is None else self._timeout
        return max(0.0, self.deadline - self._loop.time())

    def extend(self, by: float | timedelta) -> bool:
        """Give the block ``by`` more seconds; from any thread.

        If it has no timeout of its own, the nearest block around it that has one is given them: in a handler that is the
        timeout of the decorator, route class or middleware. A handle need not be entered for that.

        :return: whether that came in time; ``False`` if there is no timeout, or the block was cancelled or left before.
        """
        return self._move_timeout(seconds(by, "extend"))

    def disable_timeout(self) -> bool:
        """Stop the timer, as `extend` by for ever."""
        return self._move_timeout(math.inf)

    def _move_timeout(self, by: float) -> bool:
        block: Cancelable | None = self
        while block is not None and block._timeout is None:
            # A handle that is not entered stands for the handler that it was given to.
            block = _current.get() if block._loop is None else block._parent
        if block is None or block._timeout is None or block._ended is not None or block._token.cause is not None:
            return False
        block._timeout += by
        loop = block._loop
        if loop is not None:
            block._deadline += by
            if loop.is_running_here() and loop.current_task() is not None:
                block._rearm()
            else:
                loop.call_from_thread(block._rearm)
        return True

    def _rearm(self) -> None:
        """Wait for the deadline that is set now, if the block is open and not stopped yet."""
        if self._line is not None:
            self._leave_line()
        loop, scope = self._loop, self._scope
        if scope is not None:
            scope.move_deadline(self._deadline)
        elif self._position is None:
            return
        if self._timeout is None or loop is None or self._deadline == math.inf or self._token.cause is not None:
            return
        if self._deadline <= loop.time():
            # A timer would be a pass of the loop late, and the work that it is to stop be done by then.
            self._expire()
        else:
            self._line = wait_belatedly(loop, self._timeout, self, self._deadline)

    def cancel_nowait(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """Stop the block, from any thread, without waiting for its end. Before it is entered: entering will raise.

        ``message`` reaches the client as the response's detail; not that of ``PARENT`` and ``ERROR``, for which the
        client reads a fixed sentence.

        :return: whether this call did it; ``False`` if it was cancelled before, or the block has been left.
        :raises TypeError: if ``reason`` is not a `CancelationReason`, or ``message`` is neither a string nor ``None``.
        """
        check_reason(reason, message)
        return self._ended is None and self._token.cancel_nowait(reason, message)

    async def cancel(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """As `cancel_nowait`; called inside the block itself, the cancellation arrives right here."""
        done = self.cancel_nowait(reason, message)
        await anyio.lowlevel.checkpoint()
        return done

    def check(self) -> None:
        """Raise the `CancelationError` of the reason if the block, or one around it, is cancelled or past its deadline.

        For work that has no ``await``: it sees a deadline although the event loop had no chance to. From any thread.
        """
        if self._deadline < math.inf and self._loop is not None and self._loop.time() >= self._deadline:
            self._expire()
        if self._token.cause is not None:
            error = self._token.cause.error()
            self._is_told(self._token.cause, error)
            raise error
        if self._parent is not None:
            self._parent.check()

    def _is_told(self, cause: Cause, error: BaseException | None) -> None:
        """The task has, or is about to get, the error; what it then cleans up is not to be hit as well."""
        loop = self._loop
        if loop is None or not loop.is_running_here():
            return
        task = loop.current_task()
        if task is None:
            return
        self._take_for_delivered(cause, task)
        if error is not None:
            loop.scopes.tell(loop, error)

    def _take_for_delivered(self, cause: Cause, task: object) -> None:
        gate = None if self._group_gates is None else self._group_gates.get(task)
        if gate is not None and self._token.cause is cause:
            gate.take_for_delivered()
        block: Cancelable | None = self
        while block is not None and not block.is_active:
            block = block._parent
        if block is None or block._task is not task:
            return
        while block is not None:
            scope = block._begun_scope()
            if scope is not None and block._token.cause is cause:
                scope.take_for_delivered()
            block = block._parent

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
        return Deferral(self._owner_of_client)

    @property
    def client_has_left(self) -> bool:
        """Whether the client has been seen to leave, also while `defer_disconnect` keeps that from stopping the block."""
        owner = self._owner_of_client
        return self.reason is CancelationReason.DISCONNECT if owner is None else owner.has_left

    @property
    def _owner_of_client(self) -> OwnerOfClient | None:
        """The request that this block, or one around it in the same task, belongs to."""
        return None if self._parent is None else self._parent._owner_of_client

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
        listener = Callback(callback, self._call_back)
        self._callbacks = with_one_more(self._callbacks, listener)
        self._token.listen(listener)
        return callback

    def remove_callback(self, callback: Callable[..., object]) -> int:
        """Take back what `on_cancel` or `on_progress` was given: all registrations of ``callback``.

        From any thread, and in a callback as well: one that is removed there, before its turn, is not called any more.

        :return: how many registrations that were; 0 if there is none. One of `on_cancel` that was called is none.
        """
        count = 0
        for listener in [each for each in tuple(self._callbacks) if each.is_of(callback)]:
            self._token.unlisten(listener)
            self._callbacks = without(self._callbacks, listener)
            count += listener.take() is not None
        before = self._progress_callbacks or []
        self._progress_callbacks = [other for other in before if other != callback] or None
        return count + len(before) - len(self._progress_callbacks or ())

    def _call_back(self, callback: Callable[..., object], token: CancelationToken) -> None:
        result = call_logged(callback, self)
        if inspect.isawaitable(result):
            if not self.is_active:
                close_unawaited(result)
            else:
                if self._to_await is None:
                    self._to_await = []
                self._to_await.append(result)

    def on_progress(self, callback: C) -> C:
        """Call ``callback(message, metadata)`` at each `report_progress`; it may be ``async``. Serves as a decorator.

        What it raises is logged and goes no further, as with `on_cancel`: watching work must not end it.
        `remove_callback` takes it back.
        """
        if not callable(callback):
            raise TypeError(f"on_progress takes a function of a message and its metadata, not {callback!r}")
        self._progress_callbacks = [*(self._progress_callbacks or ()), callback]
        return callback

    async def report_progress(self, message: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        """Tell every `on_progress` callback, and wait for the ``async`` ones.

        Also a point where a cancellation is seen, so that work which reports can be stopped.
        """
        await anyio.lowlevel.checkpoint()
        exits: list[BaseException] = []
        for callback in self._progress_callbacks or ():
            try:
                result = call_logged(callback, message, metadata or {})
                if inspect.isawaitable(result):
                    await _logged(result, callback)
            except EXITS as exc:
                exits.append(exc)
        if exits:
            raise exits[0]

    async def __aenter__(self) -> Self:
        self._enter()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outcome = self._leave(exc)
        if self._is_unsettled:
            await self._settle()
        if outcome is not None and outcome is not exc:
            try:
                raise_as_it_is(outcome)
            finally:
                del outcome  # Its traceback knows this frame: a cycle, as long as this frame knows it.

    def __enter__(self) -> Self:
        """In a worker thread: raises :exc:`TypeError` where an event loop runs."""
        from .threads import enter

        enter(self)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        from .threads import leave

        outcome = leave(self, exc)
        if outcome is not None and outcome is not exc:
            try:
                raise_as_it_is(outcome)
            finally:
                del outcome  # Its traceback knows this frame: a cycle, as long as this frame knows it.

    def _home(self) -> EventLoop | None:
        """The event loop in which what stops this block happens, if it is entered in a thread."""
        return None

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
        from .threads import run_in_thread

        result: R = await run_in_thread(self, func, args, abandon_on_cancel, limiter)
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
        from .threads import run_in_process

        result: R = await run_in_process(self, func, args, limiter)
        return result

    def _enter(self, loop: EventLoop | None = None) -> None:
        if self._loop is not None:
            if self._lends_itself:
                return self._enter_inner()
            raise self._entered_before()
        loop = self._loop = current_loop() if loop is None else loop
        self._started = loop.time()
        if self._timeout is not None:
            self._deadline = self._started + self._timeout
        self._token.listen(self)
        if self._upstream is not None:
            self._upstream.listen(self)
        if self._timeout == 0:
            self._expire()
        parent = _current.get()
        if self._token.cause is not None:
            self._refuse(parent, self._token.cause)
        if parent is not None and parent._runs_in(loop.current_task()):
            self._link_to(parent)
        self._outside = _current.set(self)
        if loop.mark is None or not self._may_begin_late:
            self._begin(loop)
        else:
            self._position = loop.mark()
            loop.newcomers[self] = None
            if not loop.is_awaiting_step:
                loop.await_step()
        if self._timeout is not None and self._deadline < math.inf:
            # From here on, whether it has begun or not: the loop may be blocked until the time is up.
            # Here, as below on leaving, without a call: a request pays for each.
            if self._timeout <= CLOSE:
                self._line = wait_alone(loop, self, self._deadline)
            else:
                line = self._line = loop.lines.get(self._timeout) or new_line(loop, self._timeout)
                line.waiting[self] = self._deadline
                if line.looked_at_by is None:
                    line.begin()

    def _link_to(self, parent: Cancelable) -> None:
        self._parent = parent
        parent._children = with_one_more(parent._children, self)

    def _entered_before(self) -> RuntimeError:
        return RuntimeError(
            f"{self!r} was entered before: a Cancelable serves one block. {self._instead_of_entering_twice}"
        )

    def _enter_inner(self) -> None:
        """A streaming response has entered it around the generator that was to."""
        self._lends_itself = False
        self._inner = Cancelable(token=self._token, cleanup_grace=self._grace)
        self._inner._enter()

    def step_is_over(self) -> None:
        """The loop tells us; not for users."""
        self._begun_scope()

    def _begun_scope(self) -> PoliteScope | None:
        """The scope of an open block, begun now if it has not been yet."""
        if self._scope is None and self._position is not None and self._loop is not None:
            self._begin(self._loop)
        return self._scope

    def _begin(self, loop: EventLoop) -> None:
        self._scope = loop.scopes.polite_scope(loop, self._cleanup_grace)
        self._scope.begin(self._deadline, self._position)
        self._position = None
        self._watch(loop)

    @property
    def _task(self) -> object:
        """The task in which the block is open."""
        if self._position is not None:
            return self._position[0]
        return None if self._scope is None else self._scope.task

    def _refuse(self, parent: Cancelable | None, cause: Cause) -> NoReturn:
        """The block was cancelled before it was entered."""
        self._unlisten()
        self._ended = self._started
        self._note(cause)
        error = cause.error()
        if parent is not None:
            parent._is_told(cause, error)
        raise error

    def _runs_in(self, task: object) -> bool:
        """Whether ``task`` is the one that a cancellation of this block reaches first."""
        return self._task is task

    @property
    def _cleanup_grace(self) -> float:
        return settings.cleanup_grace if self._grace is None else self._grace

    def _watch(self, loop: EventLoop) -> None:
        """Start what can stop the block while it is open."""
        if self._condition is not None:
            self._condition.start(self.cancel_nowait, loop)

    def _unwatch(self) -> None:
        if self._condition is not None:
            self._condition.stop()

    def _stop_timers(self) -> None:
        if self._line is not None:
            self._leave_line()
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _leave_line(self) -> None:
        line = self._line
        if line is not None:
            self._line = None
            line.waiting.pop(self, None)
            if line.timer is not None and not line.waiting:
                line.end()

    def time_is_up(self, now: float) -> None:
        """The line in which we wait tells us; not for users."""
        # One that has been moved since, by a thread that has not got through to the loop yet, is waited for anew.
        if self._deadline <= now:
            self._expire()

    def _expire(self) -> None:
        limit = "" if self._timeout is None else f" after {self._timeout:g} seconds"
        self._token.cancel_nowait(CancelationReason.TIMEOUT, f"Timed out{limit}")

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None:
        """A token of ours tells us; not for users."""
        if token is not self._token:
            self._token.cancel_because(cause)
        elif self._loop is not None and not self._loop.is_running_here():
            self._loop.call_from_thread(self._fire, cause)
        else:
            self._fire(cause)
            if self._loop is not None:
                self._loop.wake()

    def _fire(self, cause: Cause) -> None:
        scope = self._begun_scope()
        if scope is None or self._fired:
            return
        self._fired = True
        children = self._open_children()
        if any(child._answers(cause) for child in children):
            # The innermost block of a task answers; the same cancellation twice would hit the cleanup of the first.
            self._deferred = True
            return
        with telling_everybody():
            # First: a gate further in looks whether its block is cancelled when the cancellation comes by.
            self._mark_children(scope)
            self._stop(scope, cause)

    def _open_children(self) -> list[Cancelable]:
        # A copy: those in a thread come and go while another one cancels.
        return list(self._children)

    def _hold(self) -> None:
        """Let no cancellation of the block reach its task until `_resume`."""
        scope = self._begun_scope()
        if scope is not None:
            scope.hold()

    def _resume(self) -> None:
        if self._scope is not None:
            self._scope.resume()

    def _answers(self, cause: Cause) -> bool:
        return self._token.cause is cause or any(child._answers(cause) for child in self._open_children())

    def _fire_at_last(self) -> None:
        if self._scope is not None and self._token.cause is not None:
            self._stop(self._scope, self._token.cause)

    def _stop(self, scope: PoliteScope, cause: Cause) -> None:
        if not self._only_marked:
            scope.cancel_politely(str(cause))
        if self._group_scope is not None:
            # Or a child that is shielded just now would not be reached before the body has cleaned up.
            self._group_scope.cancel()

    def _mark(self, message: str) -> None:
        # Its scopes stand inside those of the parent, which delivers; here only cause and callbacks are still missing.
        self._only_marked = True
        # First: one that listens to our token would take the cause for its own, and deliver a second time.
        self._mark_children(self._scope)
        self._token.cancel_nowait(CancelationReason.PARENT, message)

    def _mark_children(self, scope: PoliteScope | None) -> None:
        for child in self._open_children():
            inner = child._begun_scope()
            # One that is finished first, in a shield, has its own limits until then.
            if scope is None or inner is None or scope.reaches(inner):
                child._mark(f"The enclosing {self!r}")

    def _leave(self, exc: BaseException | None) -> BaseException | None:
        """Close the block; the exception that should leave it, which is ``exc`` itself if nothing is to be changed."""
        assert self._loop is not None
        if self._inner is not None:
            inner, self._inner = self._inner, None
            return inner._leave(exc)
        scope, self._scope = self._scope, None
        self._position = None
        self._ended = self._loop.time()
        line = self._line
        if line is not None:
            self._line = None
            line.waiting.pop(self, None)
            if line.timer is not None and not line.waiting:
                line.end()
        self._token.unlisten(self)
        if self._upstream is not None or self._callbacks:
            self._unlisten()
        _current.reset(self._outside)
        del self._outside
        if scope is None:
            self._loop.newcomers.pop(self, None)
            self._forget()
            outcome = None if exc is None else self._outcome(exc, exc)
        else:
            self._unwatch()
            outcome = self._end(scope, exc)
            self._is_unsettled = self._has_to_settle()
        if self._parent is not None:
            is_told = isinstance(outcome, CancelationError)
            self._leave_parents(self._parent, is_told or (scope is not None and scope.is_delivered))
            if is_told and self._token.cause is not None:
                self._parent._take_for_delivered(self._token.cause, self._loop.current_task())
        if outcome is not None and (
            isinstance(outcome, CancelationError) or (scope is not None and scope.is_delivered)
        ):
            self._loop.scopes.tell(self._loop, outcome)
        if not self._is_unsettled:
            self._let_go()
        return outcome

    def _let_go(self) -> None:
        """The block is left for good, and is to keep nothing of what it served.

        Whatever outlives it knows it as long as it lives: a task that the work has started and the context of a timer,
        even a cancelled one, have it for their `current_cancelable`.
        """
        if self._upstream is not None:
            self._upstream = None
        if self._is_unsettled:
            self._to_await = None
            self._condition = None
        if self._progress_callbacks is not None:
            self._progress_callbacks = None

    def _forget(self) -> None:
        """The block is left before it has begun in earnest."""

    def _end(self, scope: PoliteScope, exc: BaseException | None) -> BaseException | None:
        self._stop_timers()
        remaining = scope.end(exc)
        return None if exc is None and not scope.is_lost else self._outcome(exc, remaining)

    def _outcome(self, exc: BaseException | None, remaining: BaseException | None) -> BaseException:
        if remaining is None:
            return self._stopped(exc)
        remaining = self._take_apart(remaining)
        is_ours_to_tell = self._token.is_cancelled and not self._only_marked
        if is_ours_to_tell and self._loop is not None and is_anothers(remaining, self._loop):
            # Such as a future that a callback has cancelled, before our own cancellation has come so far.
            return self._stopped(remaining)
        if isinstance(remaining, ParentCancelation) and self._token.is_cancelled:
            return self._stopped(remaining)
        return remaining

    def _take_apart(self, exc: BaseException) -> BaseException:
        """Return the exception that a group on its way out stands for, if it is a group of ours."""
        if not isinstance(exc, BaseExceptionGroup):
            return exc
        if self._has_task_group or self._token.is_cancelled or carries_cancelation(exc):
            return collapse(exc)
        return answer_of_group(exc) if self.takes_groups_apart else exc

    def _stopped(self, exc: BaseException | None) -> BaseException:
        assert self._token.cause is not None
        self._note(self._token.cause)
        error = self._token.cause.error()
        error.__cause__ = exc
        return error

    def _note(self, cause: Cause) -> None:
        """The error of ``cause`` is about to leave the block, or is raised on entering it."""

    def _unlisten(self) -> None:
        self._token.unlisten(self)
        if self._callbacks:
            for callback in self._callbacks:
                self._token.unlisten(callback)
            self._callbacks = ()  # They know us: cycles.
        if self._upstream is not None:
            self._upstream.unlisten(self)

    def _leave_parents(self, parent: Cancelable | None, answered: bool) -> None:
        if parent is not None and parent._children:
            parent._children = without(parent._children, self)
        while parent is not None:
            parent._stop_what_is_left(answered)
            parent = parent._parent

    def _stop_what_is_left(self, answered: bool) -> None:
        """A block inside, which was to answer for this one, has been left."""
        cause = self._token.cause
        if not self._deferred or cause is None or any(child._answers(cause) for child in self._open_children()):
            return
        self._deferred = False
        if not answered:
            self._fire_at_last()
        elif self._loop is not None:
            # Whoever catches the error and works on here may do so for as long as a cleanup.
            self._late = self._loop.call_at(self._loop.time() + self._cleanup_grace, self._fire_at_last)

    def _has_to_settle(self) -> bool:
        return bool(self._to_await) or self._condition is not None

    async def _settle(self) -> None:
        try:
            await self._end_what_is_left()
        finally:
            self._let_go()

    async def _end_what_is_left(self) -> None:
        if self._condition is not None:
            await self._condition.join()
        if self._to_await:
            await self._await_callbacks()

    async def _await_callbacks(self) -> None:
        left, self._to_await = self._to_await or [], None
        left.reverse()
        exits: list[BaseException] = []
        try:
            with anyio.move_on_after(self._cleanup_grace, shield=True):
                while left:
                    awaitable = left.pop()
                    try:
                        await _logged(awaitable, awaitable)
                    except EXITS as exc:
                        exits.append(exc)
        finally:
            for awaitable in left:
                logger.warning("an async on_cancel callback of %r was not awaited: the grace is over", self)
                close_unawaited(awaitable)
        if exits:
            raise exits[0]


async def _logged(awaitable: Awaitable[object], callback: object) -> None:
    this_task = ThisTask()
    try:
        await awaitable
    except BaseException as exc:
        if this_task.is_ended_by(exc):
            raise
        logger.exception("a callback failed: %r", callback)
