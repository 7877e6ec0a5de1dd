"""What leaving a cancelled block raises.

starlette.exceptions.HTTPException
└── CancelationError            also raised itself, for CancelationReason.ERROR
    ├── DisconnectCancelation   499
    ├── ManualCancelation       499
    ├── TimeoutCancelation      504, a TimeoutError too
    ├── SignalCancelation       503 with Retry-After
    ├── ConditionCancelation    500
    └── ParentCancelation       500
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from starlette.exceptions import HTTPException

from .reasons import CancelationReason

if TYPE_CHECKING:
    from collections.abc import Callable

RETRY_AFTER_SECONDS = 5

_TOLD_TO_NOBODY = frozenset({CancelationReason.ERROR, CancelationReason.PARENT})
"""Whose message may hold the text of an exception, or the name of a block: it is for the application, not for a client."""


class AnswerPolicy(Protocol):
    """A timeout policy, as far as its error knows it."""

    @property
    def response(self) -> Callable[[Any, Any], Any] | None:
        """The function of the request and the error that writes the response."""


class CancelationError(HTTPException):
    """A block of work was stopped by us, for ``reason``.

    Starlette and FastAPI answer it with ``status_code`` and ``{"detail": ...}``, with nothing installed. The detail is
    ``message``, so what you pass to ``cancel(message=...)`` reaches the client; of ``ERROR`` and ``PARENT`` it is a fixed
    sentence, because the message there tells of what is inside. ``message`` is as it was given.

    On a WebSocket it is a ``WebSocketException`` too, with the close code of the reason as its ``code``, and once the
    socket is accepted as its ``status_code``.
    """

    reason: CancelationReason = CancelationReason.ERROR
    policy: AnswerPolicy | None = None
    """The `TimeoutPolicy` whose time was up, if it was that of one."""

    _classes: ClassVar[dict[CancelationReason, type[CancelationError]]] = {}

    def __init__(self, message: str | None = None) -> None:
        hidden = message is None or self.reason in _TOLD_TO_NOBODY
        super().__init__(self.reason.status_code, self.reason.text if hidden else message)
        self.message = message

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # The first class of a reason is ours; a user's subclass must not replace it.
        CancelationError._classes.setdefault(cls.reason, cls)

    @staticmethod
    def for_reason(reason: CancelationReason, message: str | None = None) -> CancelationError:
        """The error of the class that belongs to ``reason``."""
        return CancelationError._classes.get(reason, CancelationError)(message)


CancelationError._classes[CancelationReason.ERROR] = CancelationError


class DisconnectCancelation(CancelationError):
    """The client left."""

    reason = CancelationReason.DISCONNECT


class ManualCancelation(CancelationError):
    """The application called ``cancel()``."""

    reason = CancelationReason.MANUAL


class TimeoutCancelation(CancelationError, TimeoutError):
    """A deadline passed. ``except TimeoutError`` catches it as well."""

    reason = CancelationReason.TIMEOUT


class SignalCancelation(CancelationError):
    """The server is shutting down; the response tells the client to come back (``Retry-After``, in seconds)."""

    reason = CancelationReason.SIGNAL

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message)
        self.headers = {"retry-after": str(RETRY_AFTER_SECONDS)}


class ConditionCancelation(CancelationError):
    """A condition that the application gave came true."""

    reason = CancelationReason.CONDITION


class ParentCancelation(CancelationError):
    """An enclosing operation was cancelled."""

    reason = CancelationReason.PARENT
