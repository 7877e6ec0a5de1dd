"""A block of work that a token, a deadline or a condition can stop."""

from __future__ import annotations

import inspect
import math
from contextvars import ContextVar, Token, copy_context
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio
import anyio.lowlevel

from ._backend import EventLoop, Timer, Worker, current_loop, logger
from ._exceptions import collapse, raise_as_it_is
from ._polite import PoliteScope, polite_scope
from .errors import CancelationError, ParentCancelation
from .reasons import CancelationReason
from .settings import seconds, settings
from .token import Callback, CancelationToken, Cause, call_logged

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import timedelta
    from types import TracebackType

C = TypeVar("C", bound="Callable[..., object]")

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

    :param timeout: seconds (or a ``timedelta``) from entering the block; ``None`` for no limit.
    :param token: another source of cancellation, which several blocks may share.
    :param name: for your own logs and ``repr()``.
    :param cleanup_grace: seconds; the default is that of `configure`.
    :raises ValueError: for a timeout or grace that is negative or NaN, :exc:`TypeError` for one that is no number.
    """

    # Class attributes stand for what most blocks never set: a request pays for each attribute it writes.
    _name: str | None = None
    _timeout: float | None = None
    _grace: float | None = None
    _upstream: CancelationToken | None = None
    _condition: _Condition | None = None
    _loop: EventLoop | None = None
    _task: object = None
    _started: float = math.nan
    _ended: float | None = None
    _deadline: float = math.inf
    _scope: PoliteScope | None = None
    _timer: Timer | None = None
    _parent: Cancelable | None = None
    _children: list[Cancelable] | None = None
    _fired = False
    _deferred = False
    _only_marked = False
    _group_scope: anyio.CancelScope | None = None
    _late: Timer | None = None
    _outside: Token[Cancelable | None]
    _callbacks: tuple[Callback, ...] = ()
    _to_await: tuple[Awaitable[object], ...] = ()
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
        block._condition = _Condition(predicate, interval)
        return block

    def __repr__(self) -> str:
        name = f" {self._name!r}" if self._name else ""
        return f"<{type(self).__name__}{name} {self._token.cause or self._state}>"

    @property
    def _state(self) -> str:
        if self._loop is None:
            return "not entered"
        return "active" if self._scope is not None else "left"

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
        return self._scope is not None

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

    def cancel_nowait(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """Stop the block, from any thread, without waiting for its end. Before it is entered: entering will raise.

        ``message`` reaches the client as the response's detail.

        :return: whether this call did it; ``False`` if it was cancelled before, or the block has been left.
        """
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
            self._is_told(self._token.cause)
            self._token.check()
        if self._parent is not None:
            self._parent.check()

    def _is_told(self, cause: Cause) -> None:
        """The task has, or is about to get, the error; what it then cleans up is not to be hit as well."""
        if self._loop is None or not self._loop.is_running_here() or self._loop.current_task() is not self._task:
            return
        block: Cancelable | None = self
        while block is not None:
            if block._scope is not None and block._token.cause is cause:
                block._scope.take_for_delivered()
            block = block._parent

    def shield(self) -> _Shield:
        """``with cancel.shield():`` (or ``async with``) finish this section: a cancellation waits until after it."""
        return _Shield()

    def on_cancel(self, callback: C) -> C:
        """Call ``callback(cancelable)`` when the block is cancelled; at once if it already is. Serves as a decorator.

        It is called at the moment of cancelling, in the thread that cancels. What an ``async`` one returns is awaited
        when the block is left, before the error is raised, shielded, with ``cleanup_grace`` seconds for all of them; if
        the block is not entered it is closed. What a callback raises is logged and goes no further.
        """
        if not callable(callback):
            raise TypeError(f"on_cancel takes a function of one argument, the Cancelable, not {callback!r}")
        listener = Callback(lambda token: self._call_back(callback))
        self._callbacks = (*self._callbacks, listener)
        self._token.listen(listener)
        return callback

    def _call_back(self, callback: Callable[..., object]) -> None:
        result = callback(self)
        if inspect.isawaitable(result):
            if self._scope is None:
                close = getattr(result, "close", None)
                if close is not None:
                    close()
            else:
                self._to_await = (*self._to_await, result)

    def on_progress(self, callback: C) -> C:
        """Call ``callback(message, metadata)`` at each `report_progress`; it may be ``async``. Serves as a decorator.

        What it raises is logged and goes no further: watching work must not end it.
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
        for callback in self._progress_callbacks or ():
            result = call_logged(callback, message, metadata or {})
            if inspect.isawaitable(result):
                await _logged(result, callback)

    async def __aenter__(self) -> Self:
        self._enter()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outcome = await self._exit(exc)
        if outcome is not None and outcome is not exc:
            raise_as_it_is(outcome)

    async def _exit(self, exc: BaseException | None) -> BaseException | None:
        """Close the block, await its callbacks, and say which exception leaves it."""
        outcome = self._leave(exc)
        if self._condition is not None:
            await self._condition.join()
        if self._to_await:
            await self._settle()
        return outcome

    def _enter(self) -> None:
        if self._loop is not None:
            raise RuntimeError(
                f"{self!r} was entered before: a Cancelable serves one block. Make another one for another block, "
                "or share a CancelationToken between several."
            )
        loop = self._loop = current_loop()
        self._started = loop.time()
        if self._timeout is not None:
            self._deadline = self._started + self._timeout
        self._task = loop.current_task()
        self._token.listen(self)
        if self._upstream is not None:
            self._upstream.listen(self)
        if self._timeout == 0:
            self._expire()
        if self._token.is_cancelled:
            self._unlisten()
            self._ended = self._started
            self._refused()
            parent = _current.get()
            if parent is not None and self._token.cause is not None:
                parent._is_told(self._token.cause)
            self._token.check()
        self._begin(loop)

    def _begin(self, loop: EventLoop) -> None:
        parent = _current.get()
        if parent is not None and parent._scope is not None and parent._runs_in(self._task):
            self._parent = parent
            parent._children = [*(parent._children or ()), self]
        self._scope = polite_scope(loop, self._cleanup_grace, self._expire)
        self._scope.begin(self._deadline)
        self._outside = _current.set(self)
        self._watch(loop)

    def _runs_in(self, task: object) -> bool:
        """Whether ``task`` is the one that a cancellation of this block reaches first."""
        return task is self._task

    @property
    def _cleanup_grace(self) -> float:
        return settings.cleanup_grace if self._grace is None else self._grace

    def _watch(self, loop: EventLoop) -> None:
        """Start what can stop the block while it is open."""
        self._start_timer()
        if self._condition is not None:
            self._condition.start(self, loop)

    def _unwatch(self) -> None:
        self._stop_timers()
        if self._condition is not None:
            self._condition.stop()

    def _stop_timers(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _start_timer(self) -> None:
        if self._deadline < math.inf and self._timer is None and self._loop is not None and self._scope is not None:
            self._timer = self._loop.call_at(self._deadline, self._expire)

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

    def _fire(self, cause: Cause) -> None:
        if self._scope is None or self._fired:
            return
        self._fired = True
        children = self._children or ()
        if any(child._answers(cause) for child in children):
            # The innermost block of a task answers; the same cancellation twice would hit the cleanup of the first.
            self._deferred = True
            return
        # First: a gate further in looks whether its block is cancelled when the cancellation comes by.
        for child in children:
            child._mark(f"The enclosing {self!r}")
        self._stop(self._scope, cause)

    def _answers(self, cause: Cause) -> bool:
        return self._token.cause is cause or any(child._answers(cause) for child in self._children or ())

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
        self._token.cancel_nowait(CancelationReason.PARENT, message)

    def _leave(self, exc: BaseException | None) -> BaseException | None:
        """Close the block; the exception that should leave it, which is ``exc`` itself if nothing is to be changed."""
        assert self._scope is not None
        assert self._loop is not None
        self._unwatch()
        scope, self._scope = self._scope, None
        self._ended = self._loop.time()
        self._unlisten()
        _current.reset(self._outside)
        remaining = scope.end(exc)
        outcome = None
        if exc is not None or scope.swallowed:
            outcome = self._outcome(exc, remaining)
        if self._parent is not None:
            self._leave_parents(scope.is_delivered or isinstance(outcome, CancelationError))
            if isinstance(outcome, CancelationError) and self._token.cause is not None:
                self._parent._is_told(self._token.cause)
        return outcome

    def _outcome(self, exc: BaseException | None, remaining: BaseException | None) -> BaseException:
        if remaining is None:
            return self._stopped(exc)
        remaining = collapse(remaining)
        if isinstance(remaining, ParentCancelation) and self._token.is_cancelled:
            return self._stopped(remaining)
        return remaining

    def _stopped(self, exc: BaseException | None) -> BaseException:
        if not self._token.is_cancelled:
            # The loop was blocked for so long that the scope's trailing deadline overtook our timer.
            self._expire()
        assert self._token.cause is not None
        error = self._token.cause.error()
        error.__cause__ = exc
        return error

    def _refused(self) -> None:
        """The block was cancelled before it was entered, and raises on entering."""

    def _unlisten(self) -> None:
        self._token.unlisten(self)
        for callback in self._callbacks:
            self._token.unlisten(callback)
        if self._upstream is not None:
            self._upstream.unlisten(self)

    def _leave_parents(self, answered: bool) -> None:
        parent = self._parent
        assert parent is not None
        if parent._children is not None:
            parent._children = [child for child in parent._children if child is not self]
        while parent is not None:
            parent._stop_what_is_left(answered)
            parent = parent._parent

    def _stop_what_is_left(self, answered: bool) -> None:
        """A block inside, which was to answer for this one, has been left."""
        cause = self._token.cause
        if not self._deferred or cause is None or any(child._answers(cause) for child in self._children or ()):
            return
        self._deferred = False
        if not answered:
            self._fire_at_last()
        elif self._loop is not None:
            # Whoever catches the error and works on here may do so for as long as a cleanup.
            self._late = self._loop.call_at(self._loop.time() + self._cleanup_grace, self._fire_at_last)

    async def _settle(self) -> None:
        """Await the async callbacks of a block that was cancelled and has been left."""
        with anyio.move_on_after(self._cleanup_grace, shield=True):
            for awaitable in self._to_await:
                await _logged(awaitable, awaitable)


async def _logged(awaitable: Awaitable[object], callback: object) -> None:
    try:
        await awaitable
    except Exception:
        logger.exception("a callback failed: %r", callback)


class _Shield:
    """An anyio scope with ``shield=True`` that ``with`` and ``async with`` both take."""

    def __enter__(self) -> Self:
        self._scope = anyio.CancelScope(shield=True)
        self._scope.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._scope.__exit__(exc_type, exc, traceback)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(exc_type, exc, traceback)


class _Condition:
    """Asks a predicate again and again while a block is open."""

    def __init__(self, predicate: Callable[[], bool | Awaitable[bool]], interval: float | timedelta) -> None:
        if not callable(predicate):
            raise TypeError(f"a condition must be a function without arguments that returns a bool, not {predicate!r}")
        self._predicate = predicate
        self._interval = seconds(interval, "interval")
        self._worker: Worker | None = None

    def start(self, block: Cancelable, loop: EventLoop) -> None:
        async def ask() -> None:
            await self._ask(block)

        self._worker = loop.spawn(ask, copy_context())

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.cancel()

    async def join(self) -> None:
        if self._worker is not None:
            with anyio.CancelScope(shield=True):
                await self._worker.join()

    async def _ask(self, block: Cancelable) -> None:
        try:
            while not await self._is_true():  # noqa: ASYNC110 - nobody could set an event for a predicate
                await anyio.sleep(self._interval)
        except Exception as exc:
            block.cancel_nowait(CancelationReason.ERROR, f"The condition failed: {exc!r}")
        else:
            block.cancel_nowait(CancelationReason.CONDITION, "The condition came true")

    async def _is_true(self) -> bool:
        answer = self._predicate()
        return bool(await answer) if inspect.isawaitable(answer) else bool(answer)
