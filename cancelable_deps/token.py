"""One cancellation that can happen once."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol, TypeVar, final

import anyio
import anyio.lowlevel

from ._backend import current_loop, logger
from .errors import CancelationError
from .reasons import CancelationReason

if TYPE_CHECKING:
    from collections.abc import Callable


class Cause:
    """The first reason, as it was recorded at the moment of cancelling. Two causes are the same if they are one object."""

    __slots__ = ("at", "message", "reason")

    def __init__(self, reason: CancelationReason, message: str | None) -> None:
        self.reason = reason
        # Half a surrogate pair, as JSON may bring it in, can go into no response, close frame or log.
        self.message = message.encode(errors="replace").decode() if message else message
        self.at = datetime.now(UTC)

    def error(self) -> CancelationError:
        return CancelationError.for_reason(self.reason, self.message)

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}" if self.message else str(self.reason)


class Listener(Protocol):
    """Whom a token tells. Called in the thread that cancels, once; must not raise."""

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None: ...


# One lock for all tokens: it is taken only to cancel, which is rare, and a lock a request is not free.
_cancelling = threading.Lock()

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
        self._listeners: dict[Listener, None] = {}

    def __repr__(self) -> str:
        return f"<CancelationToken {self._cause or 'not cancelled'}>"

    @property
    def is_cancelled(self) -> bool:
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
        :raises TypeError: if ``reason`` is not a `CancelationReason`.
        """
        if not isinstance(reason, CancelationReason):
            raise TypeError(f"reason must be a CancelationReason, such as CancelationReason.MANUAL, not {reason!r}")
        return self.cancel_because(Cause(reason, message))

    async def cancel(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """As `cancel_nowait`; called from inside a block that it cancels, it raises the cancellation right here."""
        done = self.cancel_nowait(reason, message)
        await anyio.lowlevel.checkpoint()
        return done

    def cancel_because(self, cause: Cause) -> bool:
        """Cancel with a cause recorded elsewhere, so that several tokens have one and the same."""
        with _cancelling:
            if self._cause is not None:
                return False
            self._cause = cause
        # Innermost first: a block inside another one was entered later, and stops before the outer one need be told.
        for listener in reversed(list(self._listeners)):
            listener.token_cancelled(self, cause)
        return True

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

        What the callback raises is logged and goes no further. Returns the callback, so it serves as a decorator.
        """
        if not callable(callback):
            raise TypeError(f"on_cancel takes a function of one argument, the token, not {callback!r}")
        self.listen(Callback(callback))
        return callback

    def listen(self, listener: Listener) -> None:
        """Tell ``listener``; at once if the token is cancelled already. A listener may be told twice in that race."""
        self._listeners[listener] = None
        if self._cause is not None:
            listener.token_cancelled(self, self._cause)

    def unlisten(self, listener: Listener) -> None:
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

    def __init__(self, callback: Callable[[CancelationToken], object]) -> None:
        self._callback: Callable[[CancelationToken], object] | None = callback

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            call_logged(callback, token)


def call_logged(callback: Callable[..., object], *args: object) -> object:
    """Call what a user gave us at a moment when nobody could take its exception."""
    try:
        return callback(*args)
    except Exception:
        logger.exception("a callback failed: %r", callback)
        return None
