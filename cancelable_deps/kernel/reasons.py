"""The reasons of a cancellation, each with its HTTP status, WebSocket close code and text for the client."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class CancelationReason(StrEnum):
    """The reason of a cancellation. Every cancellation by this package has exactly one; there are no others."""

    DISCONNECT = "disconnect"
    """The client disconnected."""
    MANUAL = "manual"
    """``cancel()`` was called by the application, an operator or a newer request."""
    TIMEOUT = "timeout"
    """A deadline passed."""
    SIGNAL = "signal"
    """The server is shutting down."""
    CONDITION = "condition"
    """The condition of a block became true."""
    PARENT = "parent"
    """An enclosing block was cancelled."""
    ERROR = "error"
    """A source of cancellation failed, such as a condition that raised."""

    @property
    def status_code(self) -> int:
        """The HTTP status of the response to a request that was cancelled for this reason."""
        return _OUTCOMES[self].status_code

    @property
    def close_code(self) -> int | None:
        """The WebSocket close code for this reason; ``None`` if the socket is closed already."""
        return _OUTCOMES[self].close_code

    @property
    def is_error(self) -> bool:
        """Whether metrics should count the cancellation as an error: a disconnect or a manual cancellation is none."""
        return _OUTCOMES[self].is_error

    @property
    def text(self) -> str:
        """The sentence for the client if the cancellation has no message."""
        return _OUTCOMES[self].text


class _Outcome(NamedTuple):
    status_code: int
    close_code: int | None
    is_error: bool
    text: str


# 499 is the status of nginx for a client that has disconnected. Not 408, because clients may repeat the request then.
_OUTCOMES = {
    CancelationReason.DISCONNECT: _Outcome(499, None, False, "Client closed the request"),
    CancelationReason.MANUAL: _Outcome(499, 4499, False, "The request was cancelled"),
    CancelationReason.TIMEOUT: _Outcome(504, 4504, True, "The request timed out"),
    CancelationReason.SIGNAL: _Outcome(503, 1012, True, "The server is shutting down"),
    CancelationReason.CONDITION: _Outcome(500, 1011, True, "The request was stopped by a condition"),
    CancelationReason.PARENT: _Outcome(500, 1011, True, "An enclosing operation was cancelled"),
    CancelationReason.ERROR: _Outcome(500, 1011, True, "A source of cancellation failed"),
}
