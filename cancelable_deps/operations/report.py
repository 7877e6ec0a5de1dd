"""What the hooks of ``configure(on_event=...)`` are told of operations without a request, and of cancels."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..kernel.cancelable import block_of
from ..kernel.events import ObservedEvent
from ..kernel.reasons import CancelationReason
from ..kernel.settings import settings
from .errors import OperationsUnavailable
from .model import OperationState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..kernel.events import What
    from .model import Cancelation
    from .running import RunningBlock


def tell_work(what: What, running: RunningBlock) -> None:
    """Tell what has become of background or tracked work."""
    if settings.hooks:
        _tell(what, running)


def tell_end(running: RunningBlock, state: OperationState, error: BaseException | None = None) -> None:
    """Tell that background or tracked work is over, and, if so, that it was cancelled.

    :param error: what it has raised.
    """
    if not settings.hooks:
        return
    about: dict[str, Any] = {"outcome": str(state)}
    cause = running.cause
    if state is OperationState.CANCELLED:
        # Work that had not begun when the server shut down has no cause of its own.
        about["reason"] = CancelationReason.SIGNAL if cause is None else cause.reason
    if cause is not None:
        delivered_at = block_of(running.cancelable).delivered_at
        about["message"] = cause.message
        about["cancel_seconds"] = time.monotonic() - cause.struck_at
        about["cleanup_seconds"] = None if delivered_at is None else running.home.loop.time() - delivered_at
    if state is OperationState.CANCELLED:
        _tell("cancelled", running, **about)
    elif error is not None:
        about["error"] = error
    _tell("ended", running, **about)


def _tell(what: What, running: RunningBlock, **about: Any) -> None:
    event = ObservedEvent(
        what=what,
        kind=running.kind,
        seconds=running.elapsed,
        name=running.name,
        id=running.known_id,
        owner=running.owner,
        key=running.key,
        **about,
    )
    settings.tell(event)


def tell_cancel(id: str | None, cancelation: Cancelation, asked_at: float) -> None:
    """Tell what has become of a cancel.

    :param asked_at: when it was asked for, on the clock ``time.monotonic()``.
    """
    if not settings.hooks:
        return
    operation = cancelation.operation
    about: dict[str, Any] = {"id": id}
    if operation is not None:
        names = ("kind", "name", "method", "route", "id", "owner", "key")
        about = {name: getattr(operation, name) for name in names}
    _tell_cancel(cancelation.outcome, asked_at, about)


@contextmanager
def unavailable_told(id: str | None, asked_at: float) -> Iterator[None]:
    """Tell of a cancel inside if the store of the operations cannot be reached."""
    try:
        yield
    except OperationsUnavailable:
        if settings.hooks:
            _tell_cancel("unavailable", asked_at, {"id": id})
        raise


def _tell_cancel(outcome: str, asked_at: float, about: dict[str, Any]) -> None:
    seconds = time.monotonic() - asked_at
    settings.tell(ObservedEvent(what="cancel", outcome=outcome, cancel_seconds=seconds, **about))
