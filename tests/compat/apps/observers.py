"""Those who watch the answers: Prometheus, OpenTelemetry, Sentry and correlation ids, inside of our middleware and outside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import sentry_sdk
from asgi_correlation_id import CorrelationIdFilter, CorrelationIdMiddleware
from fastapi import FastAPI, Request
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import Instrumentator
from sentry_sdk.integrations.fastapi import FastApiIntegration
from sentry_sdk.integrations.starlette import StarletteIntegration
from sentry_sdk.transport import Transport

from tests.compat.doors import SHORT, Door, ends_with_its_server, say, work

Observe = Callable[[FastAPI], object]


class Said(SpanExporter):
    """Says how each span of a server ended."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            attributes = span.attributes or {}
            status = attributes.get("http.status_code", attributes.get("http.response.status_code"))
            path = str(attributes.get("http.target", attributes.get("url.path")))
            if span.kind.name == "SERVER":
                say("otel", path.rpartition("/")[2], span.name, status, span.status.status_code.name)
        return SpanExportResult.SUCCESS


class SaidEvents(Transport):
    """Says what would be sent to Sentry."""

    def capture_envelope(self, envelope: Any) -> None:
        for item in envelope.items:
            event = item.payload.json or {}
            if item.type == "event":
                kind = event["exception"]["values"][-1]["type"]
                say("sentry", "event", event["request"]["url"].rpartition("/")[2], event["level"], kind)
            elif item.type == "transaction":
                trace = event["contexts"]["trace"]
                status = trace.get("data", {}).get("http.response.status_code", event.get("tags", {}))
                say("sentry", "transaction", event["request"]["url"].rpartition("/")[2], trace.get("status"), status)


def prometheus(app: FastAPI) -> None:
    registry = CollectorRegistry()
    Instrumentator(should_group_status_codes=False, registry=registry).instrument(app).expose(app)


def opentelemetry(app: FastAPI) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Said()))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, exclude_spans=["receive", "send"])


def correlation(app: FastAPI) -> None:
    app.add_middleware(CorrelationIdMiddleware)


def sentry(app: FastAPI) -> None:
    """It is installed for the whole process."""


OBSERVERS: tuple[Observe, ...] = (prometheus, opentelemetry, correlation, sentry)


def build(observe: Observe, door: Door, *, inside: bool = True) -> FastAPI:
    """``inside``: whether the observer stands inside of our middleware."""
    app = door.app(lifespan=ends_with_its_server())

    @app.get("/work/{name}")
    @door.decorate
    async def endless(request: Request, name: str) -> None:
        await work(request.headers["x-id"])

    @app.get("/ping")
    @door.decorate
    async def ping() -> str:
        return "pong"

    if inside:
        observe(app)
        return door.cover(app)
    door.cover(app)
    observe(app)
    return app


def apps() -> dict[str, Any]:
    sentry_sdk.init(
        dsn="http://public@127.0.0.1/1",
        transport=SaidEvents,
        traces_sample_rate=1.0,
        # Those of FastAPI alone: to find out which others apply, it imports whatever is installed.
        auto_enabling_integrations=False,
        integrations=[StarletteIntegration(), FastApiIntegration()],
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(CorrelationIdFilter(uuid_length=32))
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s [id %(correlation_id)s]"))
    made: dict[str, Any] = {}
    for observe in OBSERVERS:
        name = observe.__name__
        for timeout in (None, SHORT):
            timed = "" if timeout is None else "timed-"
            made[f"{name}-{timed}inside"] = build(observe, Door("mw", timeout))
            made[f"{name}-{timed}outside"] = build(observe, Door("mw", timeout), inside=False)
            made[f"{name}-{timed}route"] = build(observe, Door("route", timeout))
            made[f"{name}-{timed}deco"] = build(observe, Door("deco", timeout))
    return made
