"""`CancelationToken`, the cause of a cancellation, and the listeners of a token."""

from __future__ import annotations

import inspect
import threading
import time
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
    """The reason, message and time of a cancellation, recorded when it happens. Causes are compared by identity.

    :param status_code: replaces the status of the reason.
    :param headers: replace the headers of the reason.
    :param policy: the timeout policy that makes the response.
    """

    __slots__ = ("_headers", "_policy", "_status_code", "at", "message", "reason", "struck_at")

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
        # A lone surrogate, which JSON may contain, cannot be encoded in a response, a close frame or a log.
        self.message = message.encode(errors="replace").decode() if message else message
        self.at = datetime.now(UTC)
        self.struck_at = time.monotonic()

    def error(self) -> CancelationError:
        """Return a new error of the reason, with the status, headers and policy of this cause."""
        error = CancelationError.for_reason(self.reason, self.message)
        error.struck_at = self.struck_at
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
    """An object that a token calls once, in the thread that cancels. Its exceptions are logged."""

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None: ...


class _Claim:
    """The key among the listeners of a token under which the first cause is recorded while the token is cancelled."""

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None: ...


_CLAIM: Final = _Claim()


class _Telling(threading.local):
    exits: list[BaseException] | None = None
    """The `EXITS` that listeners have raised while this thread calls several of them; ``None`` at other times."""


_telling: Final = _Telling()


@contextmanager
def telling_everybody() -> Iterator[None]:
    """Delay an exception of `EXITS` by a listener until the end of the ``with``; of several, the first is raised."""
    if _telling.exits is not None:
        # The outermost of nested calls raises it.
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
    """A source of cancellation that several blocks of work, in any task, thread or event loop, can share.

    A token is cancelled once, in any thread or signal handler, and keeps its first reason. This cancels all open blocks
    that were given the token. A block that is entered with a cancelled token raises its `CancelationError` at once.
    Cancelling a block does not cancel a token that it was given, nor the other blocks that share the token.
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
        """The reason of the cancellation; ``None`` while the token is not cancelled."""
        cause = self._cause
        return None if cause is None else cause.reason

    @property
    def message(self) -> str | None:
        """The message that was given to ``cancel()``; ``None`` if there is none, or the token is not cancelled."""
        cause = self._cause
        return None if cause is None else cause.message

    @property
    def cancelled_at(self) -> datetime | None:
        """The time of the cancellation, in UTC; ``None`` while the token is not cancelled."""
        cause = self._cause
        return None if cause is None else cause.at

    def cancel_nowait(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """Cancel the token and return at once, without waiting for the end of any block. May be called in any thread.

        :param message: the ``detail`` of the response to a request that this cancels. The client gets a fixed sentence
            instead if the reason is ``PARENT`` or ``ERROR``.
        :return: ``True`` if this call cancelled the token; ``False`` if it was already cancelled.
        :raises TypeError: if ``reason`` is not a `CancelationReason`, or ``message`` is neither a string nor ``None``.
        """
        check_reason(reason, message)
        return self.cancel_because(Cause(reason, message))

    async def cancel(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """Cancel the token like `cancel_nowait`, then pass a checkpoint.

        Called inside a block that the token cancels, the cancellation is raised here and not at the next ``await``.
        """
        done = self.cancel_nowait(reason, message)
        await anyio.lowlevel.checkpoint()
        return done

    def cancel_because(self, cause: Cause) -> bool:
        """Cancel with a cause that was recorded elsewhere, so that several tokens have the same cause."""
        if not self._is_first(cause):
            return False
        with telling_everybody():
            # Innermost first: an inner block was entered later than its outer block, and is to be cancelled before it.
            for listener in reversed(list(self._listeners)):
                call_logged(listener.token_cancelled, self, cause)
        return True

    def _is_first(self, cause: Cause) -> bool:
        """Record ``cause`` if there is none yet, and return whether it was recorded.

        Uses no lock, because a signal handler may run in the middle of this method, and would wait for ever for a lock
        that its own thread holds. ``setdefault`` is atomic with regard to signals and threads, also without the GIL.
        """
        if self._cause is not None:
            return False
        first = self._listeners.setdefault(_CLAIM, cause)
        if self._cause is None:
            # The thread with the first cause may not have come this far yet: from here on the token is cancelled.
            self._cause = first
            if first is not cause:
                return False
        # The claim is removed only once the cause is set: a later claim finds the cause, and is removed too.
        if first is cause:
            self._listeners.pop(_CLAIM, None)
        return self._cause is cause

    def check(self) -> None:
        """Raise the `CancelationError` of the reason if the token is cancelled. May be called in any thread.

        :raises CancelationError: the error of the reason.
        """
        if self._cause is not None:
            raise self._cause.error()

    async def wait(self) -> CancelationReason:
        """Wait until the token is cancelled, and return the reason. Returns at once if it already is."""
        waiter = _Waiter()
        self.listen(waiter)
        try:
            await waiter.event.wait()
        finally:
            self.unlisten(waiter)
        assert self._cause is not None
        return self._cause.reason

    def on_cancel(self, callback: C) -> C:
        """Register ``callback(token)`` to be called when the token is cancelled; at once if it already is.

        The callback is called once, in the thread that cancels. Its exception is logged and not raised, even a
        ``CancelledError``. ``KeyboardInterrupt`` and ``SystemExit`` are raised once all callbacks have been called.
        Undo the registration with `remove_callback`.

        :return: the callback, so that this method can be used as a decorator.
        :raises TypeError: if ``callback`` is not callable, ``async`` or a generator: nothing would await its result.
        """
        if not callable(callback):
            raise TypeError(f"on_cancel takes a function of one argument, the token, not {callback!r}")
        if runs_only_when_awaited(callback):
            raise TypeError(
                f"on_cancel of a token takes a plain function, as nothing would await {callback!r}: a token may be "
                "cancelled in any thread. Register it with on_cancel() of a Cancelable, which awaits it when its block "
                "is left; or `await token.wait()` in a task of your own."
            )
        self.listen(Callback(callback, call_in_passing))
        return callback

    def remove_callback(self, callback: Callable[[CancelationToken], object]) -> int:
        """Remove all registrations of ``callback`` with `on_cancel` that have not been called yet.

        May be called in any thread, and by another callback: a callback that is removed before its turn is not called.

        :return: the number of registrations removed; 0 if there is none, or all have been called.
        """
        listeners = [each for each in list(self._listeners) if isinstance(each, Callback) and each.is_of(callback)]
        for listener in listeners:
            self.unlisten(listener)
        return sum(listener.take() is not None for listener in listeners)

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` when the token is cancelled; at once if it already is. A race may make it two calls."""
        self._listeners[listener] = None
        if self._cause is not None:
            listener.token_cancelled(self, self._cause)

    def unlisten(self, listener: Listener) -> None:
        """Remove ``listener``; without effect if the token does not know it."""
        self._listeners.pop(listener, None)

    @property
    def cause(self) -> Cause | None:
        """The reason, message and time of the cancellation; ``None`` while the token is not cancelled."""
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
    """A listener that calls a function of the user, once at most."""

    __slots__ = ("_call", "_callback")

    def __init__(
        self, callback: Callable[..., object], call: Callable[[Callable[..., object], CancelationToken], object]
    ) -> None:
        # A list, because `pop` is atomic: two threads may call the listener at once, or one may remove it meanwhile.
        self._callback = [callback]
        self._call = call

    def is_of(self, callback: object) -> bool:
        """Return whether the listener has still to call ``callback``; equal bound methods are the same callback."""
        return callback in self._callback

    def take(self) -> Callable[..., object] | None:
        """Return the function to the first caller, and ``None`` to all others."""
        try:
            return self._callback.pop()
        except IndexError:
            return None

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None:
        callback = self.take()
        if callback is not None:
            self._call(callback, token)


def check_reason(reason: object, message: object) -> None:
    """Raise `TypeError` if ``reason`` is not a `CancelationReason`, or ``message`` is neither a string nor ``None``."""
    if not isinstance(reason, CancelationReason):
        raise TypeError(f"reason must be a CancelationReason, such as CancelationReason.MANUAL, not {reason!r}")
    if message is not None and not isinstance(message, str):
        raise TypeError(f"message must be a string, or None for the sentence of the reason, not {message!r}: use str()")


def call_in_passing(callback: Callable[..., object], token: CancelationToken) -> None:
    """Call a function whose result nothing awaits."""
    result = call_logged(callback, token)
    # A task or future does not have to be awaited in order to run.
    if inspect.isawaitable(result) and not isfuture(result):
        logger.error("the awaitable returned by a callback is not awaited: %r must be a plain function", callback)
        close_unawaited(result)


def close_unawaited(awaitable: object) -> None:
    """Close a coroutine that was not started, because Python would warn that it was never awaited."""
    close = getattr(awaitable, "close", None)
    if close is not None:
        call_logged(close)


def call_logged(callback: Callable[..., object], *args: object) -> object:
    """Call a function of the user where no caller could handle its exception: log the exception, and return ``None``.

    The function is called and not awaited, so a ``CancelledError`` from it is no cancellation of the running task.
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
