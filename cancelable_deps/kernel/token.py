"""One cancellation that can happen once."""

from __future__ import annotations

import inspect
import threading
from asyncio import isfuture
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, final

import anyio
import anyio.lowlevel

from .errors import CancelationError
from .foreign import EXITS
from .log import logger
from .loops.current import current_loop
from .options import runs_only_when_awaited
from .reasons import CancelationReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from .errors import AnswerPolicy


class Cause:
    """The first reason, as it was recorded at the moment of cancelling. Two causes are the same if they are one object.

    :param status_code: replaces the status of the reason.
    :param headers: replace those of the reason.
    :param policy: the timeout policy that answers.
    """

    __slots__ = ("_headers", "_policy", "_status_code", "at", "message", "reason")

    def __init__(
        self,
        reason: CancelationReason,
        message: str | None,
        *,
        status_code: int | None = None,
        headers: Mapping[str, str] | None = None,
        policy: AnswerPolicy | None = None,
    ) -> None:
        self.reason = reason
        self._status_code = status_code
        self._headers = headers
        self._policy = policy
        # Half a surrogate pair, as JSON may bring it in, can go into no response, close frame or log.
        self.message = message.encode(errors="replace").decode() if message else message
        self.at = datetime.now(UTC)

    def error(self) -> CancelationError:
        """Return a new error of the reason, with the status, headers and policy of this cause."""
        error = CancelationError.for_reason(self.reason, self.message)
        if self._status_code is not None:
            error.status_code = self._status_code
        if self._headers is not None:
            error.headers = dict(self._headers)
        if self._policy is not None:
            error.policy = self._policy
        return error

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}" if self.message else str(self.reason)


class Listener(Protocol):
    """Whom a token tells. Called in the thread that cancels, once; what it raises is logged."""

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None: ...


class _Claim:
    """Stands among the listeners of a token while it is being cancelled, with the cause that came first."""

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None: ...


_CLAIM: Final = _Claim()


class _Telling(threading.local):
    exits: list[BaseException] | None = None
    """While this thread tells several listeners: what some of them have raised that ends the process."""


_telling: Final = _Telling()


@contextmanager
def telling_everybody() -> Iterator[None]:
    """Keep back what a listener raises that ends the process, and raise it at the end; of several, the first."""
    if _telling.exits is not None:
        # The outermost raises it.
        yield
        return
    exits = _telling.exits = []
    try:
        yield
    finally:
        _telling.exits = None
    if exits:
        raise exits[0]


C = TypeVar("C", bound="Callable[[CancelationToken], object]")


@final
class CancelationToken:
    """A cancellation that several blocks of work, in any task, thread or event loop, can share.

    It can be cancelled once, from any thread or signal handler, before or after a block with it is entered; the first
    reason stays. A block that is entered with a cancelled token raises at once. Cancelling a block leaves its token
    alone, and so the other blocks that share it.
    """

    __slots__ = ("__weakref__", "_cause", "_listeners")

    def __init__(self) -> None:
        self._cause: Cause | None = None
        self._listeners: dict[Listener, Cause | None] = {}

    def __repr__(self) -> str:
        return f"<CancelationToken {self._cause or 'not cancelled'}>"

    @property
    def is_cancelled(self) -> bool:
        """Whether the token has been cancelled."""
        return self._cause is not None

    @property
    def reason(self) -> CancelationReason | None:
        """Why it was cancelled; ``None`` while it is not."""
        cause = self._cause
        return None if cause is None else cause.reason

    @property
    def message(self) -> str | None:
        """What was given to ``cancel()``; ``None`` while it is not cancelled, or when nothing was."""
        cause = self._cause
        return None if cause is None else cause.message

    @property
    def cancelled_at(self) -> datetime | None:
        """When it was cancelled (UTC); ``None`` while it is not."""
        cause = self._cause
        return None if cause is None else cause.at

    def cancel_nowait(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """Cancel, from any thread, without waiting for anything to end.

        :return: whether this call did it; ``False`` if the token was cancelled before.
        :raises TypeError: if ``reason`` is not a `CancelationReason`, or ``message`` is neither a string nor ``None``.
        """
        check_reason(reason, message)
        return self.cancel_because(Cause(reason, message))

    async def cancel(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """As `cancel_nowait`; called from inside a block that it cancels, it raises the cancellation right here."""
        done = self.cancel_nowait(reason, message)
        await anyio.lowlevel.checkpoint()
        return done

    def cancel_because(self, cause: Cause) -> bool:
        """Cancel with a cause recorded elsewhere, so that several tokens have one and the same."""
        if not self._is_first(cause):
            return False
        with telling_everybody():
            # Innermost first: a block inside another one was entered later, and stops before the outer one need be told.
            for listener in reversed(list(self._listeners)):
                call_logged(listener.token_cancelled, self, cause)
        return True

    def _is_first(self, cause: Cause) -> bool:
        """Record ``cause`` if there is none yet.

        Without a lock: a signal handler may strike in here, and would wait for ever for one that its own thread holds.
        ``setdefault`` cannot be divided, neither by a signal nor by another thread, without the GIL either.
        """
        if self._cause is not None:
            return False
        first = self._listeners.setdefault(_CLAIM, cause)
        if self._cause is None:
            # Also for whoever was first, and has not come so far: from here on the token is cancelled.
            self._cause = first
            if first is not cause:
                return False
        # The claim is withdrawn when the cause stands: who claims after that sees the cause, and withdraws it as well.
        if first is cause:
            self._listeners.pop(_CLAIM, None)
        return self._cause is cause

    def check(self) -> None:
        """Raise the `CancelationError` of the reason if the token is cancelled; from any thread."""
        if self._cause is not None:
            raise self._cause.error()

    async def wait(self) -> CancelationReason:
        """Wait until the token is cancelled, and return the reason."""
        waiter = _Waiter()
        self.listen(waiter)
        try:
            await waiter.event.wait()
        finally:
            self.unlisten(waiter)
        assert self._cause is not None
        return self._cause.reason

    def on_cancel(self, callback: C) -> C:
        """Call ``callback(token)`` when the token is cancelled, in the thread that cancels; at once if it already is.

        What the callback raises is logged and goes no further, a ``CancelledError`` included; ``KeyboardInterrupt`` and
        ``SystemExit`` are raised when all callbacks have been called. Returns the callback, so it serves as a decorator;
        `remove_callback` takes it back.

        :raises TypeError: for an ``async`` function or a generator: there is nobody to await it.
        """
        if not callable(callback):
            raise TypeError(f"on_cancel takes a function of one argument, the token, not {callback!r}")
        if runs_only_when_awaited(callback):
            raise TypeError(
                f"on_cancel of a token takes a plain function, and nobody would await {callback!r}: a token may be "
                "cancelled in any thread. Register it by on_cancel() of a Cancelable, which awaits it when its block is "
                "left; or `await token.wait()` in a task of your own."
            )
        self.listen(Callback(callback, call_in_passing))
        return callback

    def remove_callback(self, callback: Callable[[CancelationToken], object]) -> int:
        """Take back what `on_cancel` was given: all registrations of ``callback`` that have not been called yet.

        From any thread, and in a callback as well: one that is removed there, before its turn, is not called any more.

        :return: how many registrations that were; 0 if there is none, or they have been called.
        """
        listeners = [each for each in list(self._listeners) if isinstance(each, Callback) and each.is_of(callback)]
        for listener in listeners:
            self.unlisten(listener)
        return sum(listener.take() is not None for listener in listeners)

    def listen(self, listener: Listener) -> None:
        """Tell ``listener``; at once if the token is cancelled already. A listener may be told twice in that race."""
        self._listeners[listener] = None
        if self._cause is not None:
            listener.token_cancelled(self, self._cause)

    def unlisten(self, listener: Listener) -> None:
        """Remove ``listener``; without effect if the token does not know it."""
        self._listeners.pop(listener, None)

    @property
    def cause(self) -> Cause | None:
        """Reason, message and time in one."""
        return self._cause


class _Waiter:
    def __init__(self) -> None:
        self.event = anyio.Event()
        self._loop = current_loop()

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None:
        if self._loop.is_running_here():
            self.event.set()
            self._loop.wake()
        else:
            self._loop.call_from_thread(self.event.set)


class Callback:
    """A user's function as a listener; called once, however often it is told."""

    __slots__ = ("_call", "_callback")

    def __init__(
        self, callback: Callable[..., object], call: Callable[[Callable[..., object], CancelationToken], object]
    ) -> None:
        # A list, for `pop` cannot be divided: two threads may tell it at once, or one take it back.
        self._callback = [callback]
        self._call = call

    def is_of(self, callback: object) -> bool:
        """Whether it has still to call ``callback``; methods are compared by what they are methods of."""
        return callback in self._callback

    def take(self) -> Callable[..., object] | None:
        """Return the function to the first who asks."""
        try:
            return self._callback.pop()
        except IndexError:
            return None

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None:
        callback = self.take()
        if callback is not None:
            self._call(callback, token)


def check_reason(reason: object, message: object) -> None:
    """Refuse what is no reason to cancel, or no message."""
    if not isinstance(reason, CancelationReason):
        raise TypeError(f"reason must be a CancelationReason, such as CancelationReason.MANUAL, not {reason!r}")
    if message is not None and not isinstance(message, str):
        raise TypeError(f"message must be a string, or None for the sentence of the reason, not {message!r}: use str()")


def call_in_passing(callback: Callable[..., object], token: CancelationToken) -> None:
    """Call a function of which nobody awaits what it returns."""
    result = call_logged(callback, token)
    # A task or future goes on by itself.
    if inspect.isawaitable(result) and not isfuture(result):
        logger.error("what a callback returned is not awaited: %r must be a plain function", callback)
        close_unawaited(result)


def close_unawaited(awaitable: object) -> None:
    """Close a coroutine that was not begun, or Python would complain of it later."""
    close = getattr(awaitable, "close", None)
    if close is not None:
        call_logged(close)


def call_logged(callback: Callable[..., object], *args: object) -> object:
    """Call what a user gave us at a moment when nobody could take its exception.

    It awaits nothing, so a ``CancelledError`` out of it is no cancellation of whatever runs here.
    """
    try:
        return callback(*args)
    except EXITS as exc:
        if _telling.exits is None:
            raise
        _telling.exits.append(exc)
    except BaseException:
        logger.exception("a callback failed: %r", callback)
    return None
