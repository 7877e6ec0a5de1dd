"""The spans. Importing this file imports the API of OpenTelemetry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.context import Context, attach
from opentelemetry.trace import (
    Link,
    SpanKind,
    Status,
    StatusCode,
    get_current_span,
    get_tracer,
    set_span_in_context,
)

from ..hosts.fastapi import span_of_request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.trace import Span, SpanContext, TracerProvider

    from ..kernel.events import ObservedEvent


class Spans:
    """What is added to the span of a request, and the spans of background work."""

    def __init__(self, version: str, provider: TracerProvider | None) -> None:
        self._tracer = get_tracer("cancelable_deps", version, provider)
        self._accepted: dict[str, SpanContext] = {}
        """The spans in which background work was accepted whose turn has not come, by its id."""

        self._running: dict[str, Span] = {}
        """The spans of background work, by its id."""

    def add(self, event: ObservedEvent) -> None:
        """Note an event in a span, or begin or end one."""
        id = event.id
        match event.what:
            case "cancelled":
                span = self._running.get(id) if event.kind == "background" and id is not None else _span_of(event)
                if span is not None:
                    _note(span, event)
            case "started" if id is not None:
                self._accept(id)
            case "running" if id is not None:
                self._begin(id, event.name)
            case "ended" if id is not None and event.kind == "background":
                self._end(id, event)
            case _:
                pass

    def _accept(self, id: str) -> None:
        where = get_current_span().get_span_context()
        if where.is_valid:
            self._accepted[id] = where

    def _begin(self, id: str, name: str | None) -> None:
        where = self._accepted.pop(id, None)
        links = [] if where is None else [Link(where)]
        # A trace of its own: that of the request is over long before.
        span = self._running[id] = self._tracer.start_span(name or "background work", Context(), links=links)
        # The task runs nothing but this work, so that nobody has to detach it.
        attach(set_span_in_context(span))

    def _end(self, id: str, event: ObservedEvent) -> None:
        self._accepted.pop(id, None)
        span = self._running.pop(id, None)
        if span is None:
            return
        if event.error is not None:
            span.record_exception(event.error)
            span.set_attribute("error.type", type(event.error).__qualname__)
            span.set_status(Status(StatusCode.ERROR))
        span.end()


def _note(span: Span, event: ObservedEvent) -> None:
    attributes = {"cancelation.reason": str(event.reason)}
    if event.message is not None:
        attributes["cancelation.message"] = event.message
    span.set_attributes(attributes)
    span.add_event("cancelation", attributes)


def _span_of(event: ObservedEvent) -> Span | None:
    """Return the server span of a request, or the span that is nearest to it and records."""
    recording = [span for span in _spans_around(event) if span.is_recording()]
    # The API has no name for the kind of a span; the SDK has.
    server = [span for span in recording if getattr(span, "kind", None) is SpanKind.SERVER]
    return next(iter(server + recording), None)


def _spans_around(event: ObservedEvent) -> Iterator[Span]:
    """Yield the spans that may be that of the request, the likeliest first."""
    if event.scope is not None:
        of_fastapi = span_of_request(event.scope)
        if of_fastapi is not None:
            yield of_fastapi
    for context in event.contexts:
        yield context.run(get_current_span)
    yield get_current_span()
