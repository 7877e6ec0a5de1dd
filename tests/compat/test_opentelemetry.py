"""`CancelationTelemetry` with OpenTelemetry's own instrumentations, whoever comes first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
from fastapi import Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    RequestCancelationMiddleware,
    begin_shutdown,
    cancelable_with_timeout,
    cancelation_lifespan,
    with_cancelation,
)
from cancelable_deps.operations import Operations, RequestOperations
from cancelable_deps.testing import CancelableClient
from tests.calls import CEILING, connected, get, hang_up
from tests.test_telemetry import Kept, keeping

OpenTelemetryMiddleware: Any = pytest.importorskip("opentelemetry.instrumentation.asgi").OpenTelemetryMiddleware
FastAPIInstrumentor: Any = pytest.importorskip("opentelemetry.instrumentation.fastapi").FastAPIInstrumentor

pytestmark = pytest.mark.anyio

SHORT = 0.02
INSTRUMENTED = ("fastapi, first", "fastapi, last", "asgi, first", "asgi, last", "asgi, around")
DOORS = ("middleware", "route class", "decorator", "handle", "middleware and decorator")


@pytest.fixture
def kept() -> Iterator[Kept]:
    with keeping() as kept:
        yield kept


class Site:
    """An application behind a door, which the instrumentation comes to before or after our middleware."""

    def __init__(self, kept: Kept, instrumented: str, door: str, timeout: float | None = None, **options: Any) -> None:
        name, _, place = instrumented.partition(", ")
        self.api = FastAPI(**options)
        self.app: Any = self.api
        self.tracer = kept.tracers.get_tracer("handler")

        def instrument() -> None:
            if name == "fastapi":
                FastAPIInstrumentor.instrument_app(self.api, tracer_provider=kept.tracers, meter_provider=kept.meters)
            elif place != "around":
                self.api.add_middleware(
                    OpenTelemetryMiddleware, tracer_provider=kept.tracers, meter_provider=kept.meters
                )

        if place == "first":
            instrument()
        if door.startswith("middleware"):
            self.api.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)
        if place == "last":
            instrument()
        if place == "around":
            self.app = OpenTelemetryMiddleware(self.api, tracer_provider=kept.tracers, meter_provider=kept.meters)
        if door == "route class":
            self.api.router.route_class = CancelableRoute.with_timeout(timeout)
        limited = cancelable_with_timeout(60 if timeout is None else timeout)

        async def plain(name: str) -> None:
            await self.work()

        async def with_handle(name: str, cancel: Cancelable = Depends(limited)) -> None:
            with self.tracer.start_as_current_span("a step"):
                async with cancel:
                    await self.work()

        handler: Any = with_handle if door == "handle" else plain
        if door.endswith("decorator"):
            handler = with_cancelation(timeout=timeout)(handler)
        self.api.get("/work/{name}")(handler)

    async def work(self) -> None:
        with self.tracer.start_as_current_span("further in"):
            await anyio.sleep_forever()


def said_of(kept: Kept, status: int) -> ReadableSpan:
    """The one server span, which alone says something of a cancellation."""
    [span] = kept.spans(SpanKind.SERVER)
    attributes = dict(span.attributes or {})
    assert attributes.get("http.status_code", attributes.get("http.response.status_code")) == status
    assert kept.touched() == [span]
    assert [event.name for event in span.events if event.name == "cancelation"] == ["cancelation"]
    return span


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("instrumented", INSTRUMENTED)
async def test_a_hang_up(kept: Kept, instrumented: str, door: str) -> None:
    assert (await hang_up(Site(kept, instrumented, door).app, "/work/secret")).status == 499
    span = said_of(kept, 499)
    assert dict(span.attributes or {})["cancelation.reason"] == "disconnect"
    assert span.status.status_code is StatusCode.UNSET
    assert "error.type" not in (span.attributes or {})
    assert [event.name for event in span.events] == ["cancelation"]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("instrumented", INSTRUMENTED)
async def test_a_timeout(kept: Kept, instrumented: str, door: str) -> None:
    assert (await get(Site(kept, instrumented, door, SHORT).app, "/work/secret")).status == 504
    span = said_of(kept, 504)
    assert dict(span.attributes or {})["cancelation.message"] == f"Timed out after {SHORT:g} seconds"
    assert span.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("instrumented", INSTRUMENTED)
async def test_a_shutdown(kept: Kept, instrumented: str, door: str) -> None:
    site = Site(kept, instrumented, door, lifespan=cancelation_lifespan(grace=0))
    async with CancelableClient(site.app, ceiling=CEILING) as client:
        async with client.start("GET", "/work/secret") as call:
            await call.listened_to()
            begin_shutdown()
        assert call.status == 503
    span = said_of(kept, 503)
    assert dict(span.attributes or {})["cancelation.reason"] == "signal"
    assert span.status.status_code is StatusCode.ERROR


@pytest.mark.parametrize("instrumented", INSTRUMENTED)
async def test_a_stream_whose_client_has_left(kept: Kept, instrumented: str) -> None:
    site = Site(kept, instrumented, "middleware")

    async def numbers() -> AsyncIterator[str]:
        yield "1"
        await site.work()

    @site.api.get("/numbers")
    async def stream() -> StreamingResponse:
        return StreamingResponse(numbers())

    async with CancelableClient(site.app, ceiling=CEILING) as client, client.start("GET", "/numbers") as call:
        await call.listened_to()
        await call.hang_up()
    span = said_of(kept, 200)
    assert dict(span.attributes or {})["cancelation.reason"] == "disconnect"
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("instrumented", INSTRUMENTED)
async def test_a_websocket(kept: Kept, instrumented: str) -> None:
    site = Site(kept, instrumented, "middleware")

    @site.api.websocket("/talk/{name}")
    async def talk(websocket: WebSocket, name: str) -> None:
        await websocket.accept()
        await site.work()

    async with connected(site.app, "/talk/ann") as socket:
        await socket.accepted()
        await socket.listened_to()
    [span] = kept.touched()
    assert span.kind is SpanKind.SERVER
    assert dict(span.attributes or {})["cancelation.reason"] == "disconnect"
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("instrumented", INSTRUMENTED)
async def test_background_work_is_linked_to_its_request(kept: Kept, instrumented: str) -> None:
    operations = Operations()
    site = Site(kept, instrumented, "middleware", lifespan=operations.lifespan())

    async def export(cancel: Cancelable) -> str:
        with site.tracer.start_as_current_span("in the work"):
            return "done"

    @site.api.post("/exports")
    async def start(operations: RequestOperations) -> str:
        return (await operations.start(export)).id

    async with CancelableClient(site.app, ceiling=CEILING) as client:
        assert await operations.result((await client.post("/exports")).json()) == "done"
    [request] = kept.spans(SpanKind.SERVER)
    spans = {span.name: span for span in kept.spans(SpanKind.INTERNAL)}
    work = spans["export"]
    assert [link.context for link in work.links] == [request.context]
    assert work.parent is None
    assert spans["in the work"].parent == work.context


async def test_a_request_that_is_not_cancelled(kept: Kept) -> None:
    site = Site(kept, "fastapi, first", "middleware")

    @site.api.get("/quick")
    async def quick() -> str:
        return "done"

    assert (await get(site.app, "/quick")).status == 200
    assert len(kept.spans(SpanKind.SERVER)) == 1
    assert kept.touched() == []
