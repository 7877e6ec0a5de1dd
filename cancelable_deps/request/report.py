"""What the hooks of ``configure(on_event=...)`` are told of requests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..hosts.starlette import route_template
from ..kernel.events import ObservedEvent
from ..kernel.settings import settings
from .naming import OPERATION_ID_KEY

if TYPE_CHECKING:
    from contextvars import Context

    from starlette.types import Scope

    from ..kernel.events import What, WorkKind
    from ..kernel.loops.base import EventLoop
    from ..kernel.reasons import CancelationReason


class Reported:
    """A request, as far as it is reported."""

    scope: Scope
    loop: EventLoop
    started: float
    context: Context
    operation: Any = None
    """The request as an operation that can be listed and stopped from elsewhere, once somebody has asked for that."""

    inner_contexts: tuple[Context, ...] = ()
    """The context variables further in than the first door, if somebody may want to know."""

    report: Report | None = None
    """The report on its cancellation, until its end."""

    @property
    def is_in_flight(self) -> bool:
        """Whether the end of the request is still to come, and will be noticed."""
        raise NotImplementedError

    def end_report(self) -> None:
        """Tell that the request, which was cancelled, is over."""
        raise NotImplementedError

    @property
    def names(self) -> dict[str, Any]:
        """The names of the request as an operation, as far as they are known."""
        running = self.operation
        if running is None:
            return {"id": self.scope.get(OPERATION_ID_KEY), "owner": None, "key": None}
        return {"id": running.known_id, "owner": running.owner, "key": running.key}


class Report:
    """What is known of the cancellation of one request, from its line in the log until its end."""

    __slots__ = ("_delivered_at", "_message", "_reason", "_struck_at")

    def __init__(
        self, reason: CancelationReason, message: str | None, struck_at: float | None, delivered_at: float | None
    ) -> None:
        self._reason = reason
        self._message = message
        self._struck_at = struck_at
        self._delivered_at = delivered_at

    def begin(self, request: Reported, outcome: str, elapsed: float) -> None:
        """Tell that the request was cancelled; if it is over already, tell that as well."""
        request.report = self
        self._tell("cancelled", request, outcome, elapsed)
        if not request.is_in_flight:
            request.end_report()

    def note_delivery(self, delivered_at: float | None) -> None:
        """Note when the work has received the cancellation, if that was not known: a WebSocket is reported before."""
        if self._delivered_at is None:
            self._delivered_at = delivered_at

    def end(self, request: Reported, outcome: str) -> None:
        """Tell that the request is over."""
        self._tell("ended", request, outcome, request.loop.time() - request.started)

    def _tell(self, what: What, request: Reported, outcome: str, elapsed: float) -> None:
        struck_at, delivered_at = self._struck_at, self._delivered_at
        event = _event(
            what,
            request.scope,
            **request.names,
            contexts=(request.context, *request.inner_contexts),
            seconds=elapsed,
            reason=self._reason,
            message=self._message,
            outcome=outcome,
            cancel_seconds=None if struck_at is None else time.monotonic() - struck_at,
            cleanup_seconds=None if delivered_at is None else request.loop.time() - delivered_at,
        )
        settings.tell(event)


def tell_refused(scope: Scope, reason: CancelationReason, message: str | None) -> None:
    """Tell that a request was refused before any code of the application has run."""
    if settings.hooks:
        settings.tell(_event("cancelled", scope, reason=reason, message=message, outcome="cancelled"))


def tell_exceeded(scope: Scope, elapsed: float, limit: float) -> None:
    """Tell that a request took longer than a limit that is not enforced."""
    if settings.hooks:
        settings.tell(_event("exceeded", scope, seconds=elapsed, limit=limit))


def _event(what: What, scope: Scope, **more: Any) -> ObservedEvent:
    kind: WorkKind = "websocket" if scope["type"] == "websocket" else "request"
    names = {"id": scope.get(OPERATION_ID_KEY), **more}
    return ObservedEvent(
        what=what, kind=kind, method=scope.get("method"), route=route_template(scope), scope=scope, **names
    )
