"""Why a request ends early, and what each reason becomes on the wire."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class CancelationReason(StrEnum):
    """Why work was stopped. The set is closed: every cancellation of ours has exactly one of these."""

    DISCONNECT = "disconnect"
    """The client left."""
    MANUAL = "manual"
    """``cancel()`` was called by the application, an operator or a newer request."""
    TIMEOUT = "timeout"
    """A deadline passed."""
    SIGNAL = "signal"
    """The server is shutting down."""
    CONDITION = "condition"
    """A condition that the application gave came true."""
    PARENT = "parent"
    """An enclosing operation was cancelled."""
    ERROR = "error"
    """A source of cancellation failed."""

    @property
    def status_code(self) -> int:
        """The HTTP status that answers a request stopped for this reason."""
        return _OUTCOMES[self].status_code

    @property
    def close_code(self) -> int | None:
        """The WebSocket close code; ``None`` where the socket is closed already."""
        return _OUTCOMES[self].close_code

    @property
    def is_error(self) -> bool:
        """Whether error rates should count it: a client that left, or a manual cancel, is no error."""
        return _OUTCOMES[self].is_error

    @property
    def text(self) -> str:
        """The sentence a client reads when nobody gave a better one."""
        return _OUTCOMES[self].text


class _Outcome(NamedTuple):
    status_code: int
    close_code: int | None
    is_error: bool
    text: str


# 499 is nginx's: the client left and nobody reads the status. Never 408: clients repeat the request.
_OUTCOMES = {
    CancelationReason.DISCONNECT: _Outcome(499, None, False, "Client closed the request"),
    CancelationReason.MANUAL: _Outcome(499, 4499, False, "The request was cancelled"),
    CancelationReason.TIMEOUT: _Outcome(504, 4504, True, "The request timed out"),
    CancelationReason.SIGNAL: _Outcome(503, 1012, True, "The server is shutting down"),
    CancelationReason.CONDITION: _Outcome(500, 1011, True, "The request was stopped by a condition"),
    CancelationReason.PARENT: _Outcome(500, 1011, True, "An enclosing operation was cancelled"),
    CancelationReason.ERROR: _Outcome(500, 1011, True, "A source of cancellation failed"),
}
