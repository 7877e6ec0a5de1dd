"""The errors that leaving a cancelled block raises.

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
"""The reasons whose message may hold the text of an exception or the name of a block, and is not sent to a client."""


class AnswerPolicy(Protocol):
    """The part of a timeout policy that its error uses."""

    @property
    def response(self) -> Callable[[Any, Any], Any] | None:
        """The function that makes the response from the request and the error; ``None`` for the default response."""


class CancelationError(HTTPException):
    """The error of a block that was cancelled, for ``reason``. The base class of the errors of all reasons.

    Starlette and FastAPI turn it into a response with ``status_code`` and ``{"detail": ...}``, without an exception
    handler of yours. The detail is the ``message`` of ``cancel(message=...)``, or a fixed sentence if there is none. It
    is always the fixed sentence with ``ERROR`` and ``PARENT``, because their message may show internals; the attribute
    ``message`` is unchanged.

    On a WebSocket the error is a ``WebSocketException`` as well, with the close code of the reason as its ``code``; it
    is its ``status_code`` too once the socket is accepted.
    """

    reason: CancelationReason = CancelationReason.ERROR
    """The reason of the cancellation."""

    policy: AnswerPolicy | None = None
    """The `TimeoutPolicy` whose timeout has passed; ``None`` if it was another timeout, or another reason."""

    struck_at: float | None = None
    """The time of the cancellation on the clock ``time.monotonic()``; ``None`` for an error that you have made."""

    _classes: ClassVar[dict[CancelationReason, type[CancelationError]]] = {}

    def __init__(self, message: str | None = None) -> None:
        hidden = message is None or self.reason in _TOLD_TO_NOBODY
        super().__init__(self.reason.status_code, self.reason.text if hidden else message)
        self.message = message

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # The first class of each reason is one of the package; a subclass of the user must not replace it.
        CancelationError._classes.setdefault(cls.reason, cls)

    @staticmethod
    def for_reason(reason: CancelationReason, message: str | None = None) -> CancelationError:
        """Return a new error of the class for ``reason``, with ``message``."""
        return CancelationError._classes.get(reason, CancelationError)(message)


CancelationError._classes[CancelationReason.ERROR] = CancelationError


class DisconnectCancelation(CancelationError):
    """The error of a block that was cancelled because the client disconnected (status 499, which nobody receives)."""

    reason = CancelationReason.DISCONNECT


class ManualCancelation(CancelationError):
    """The error of a block that the application cancelled with ``cancel()`` (status 499)."""

    reason = CancelationReason.MANUAL


class TimeoutCancelation(CancelationError, TimeoutError):
    """The error of a block whose deadline has passed (status 504). ``except TimeoutError`` catches it as well."""

    reason = CancelationReason.TIMEOUT


class SignalCancelation(CancelationError):
    """The error of a block that was cancelled because the server is shutting down (status 503).

    The response has a ``Retry-After`` header of 5 seconds.
    """

    reason = CancelationReason.SIGNAL

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message)
        self.headers = {"retry-after": str(RETRY_AFTER_SECONDS)}


class ConditionCancelation(CancelationError):
    """The error of a block whose condition became true (status 500); see `Cancelable.with_condition`."""

    reason = CancelationReason.CONDITION


class ParentCancelation(CancelationError):
    """The error of a block that was cancelled because an enclosing block was (status 500)."""

    reason = CancelationReason.PARENT
