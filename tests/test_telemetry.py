"""Metrics and spans of OpenTelemetry, with its SDK and whatever makes the spans of requests."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import anyio
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    DisconnectCancelation,
    ManualCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    TimeoutPolicy,
    cancelable_with_timeout,
    configure,
    with_cancelation,
)
from cancelable_deps.observability import CancelationTelemetry
from cancelable_deps.operations import Operations, RequestOperations
from cancelable_deps.testing import CancelableClient, advance
from tests.calls import CEILING, connected, get, hang_up, movable_clock, running
from tests.operations import until

pytestmark = pytest.mark.anyio

SHORT = 0.02
DOORS = ("middleware", "route class", "decorator", "handle")
MAKERS = ("by hand, outside", "by hand, inside", "fastapi", "starlette, outside", "starlette, inside")


class Kept:
    """Spans and metrics that are kept in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)

    def spans(self, kind: SpanKind = SpanKind.SERVER) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.kind is kind]

    def touched(self) -> list[ReadableSpan]:
        """The spans that say something of a cancellation."""
        return [
            span
            for span in self.exporter.get_finished_spans()
            if any("cancelation." in key for key in span.attributes or {})
        ]

    def points(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        """The attributes and the value (of a histogram: the count and the sum) of each point of a metric."""
        data: Any = self.reader.get_metrics_data()
        found = [
            (dict(point.attributes), point.value if hasattr(point, "value") else (point.count, point.sum))
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == f"cancelable_deps.{name}"
            for point in metric.data.data_points
        ]
        return sorted(found, key=str)


@contextmanager
def keeping() -> Iterator[Kept]:
    """Keep what the telemetry tells."""
    kept = Kept()
    configure(on_event=CancelationTelemetry(tracer_provider=kept.tracers, meter_provider=kept.meters))
    yield kept
    configure(on_event=())
    kept.tracers.shutdown()
    kept.meters.shutdown()


@pytest.fixture
def kept() -> Iterator[Kept]:
    with keeping() as kept:
        yield kept


class Traced:
    """The least that a tracing middleware does."""

    def __init__(self, app: Any, tracer_provider: TracerProvider) -> None:
        self.app = app
        self.tracer = tracer_provider.get_tracer("by hand")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        with self.tracer.start_as_current_span("request", kind=SpanKind.SERVER) as span:

            async def send_noted(message: Any) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            async def receive_traced() -> Any:
                with self.tracer.start_as_current_span("receive"):
                    return await receive()

            await self.app(scope, receive_traced, send_noted)


def traced(kept: Kept, maker: str, door: str, timeout: float | None = None, **options: Any) -> FastAPI:
    """An application of one route, behind a door and with somebody who makes spans."""
    name, _, place = maker.partition(", ")
    if name == "fastapi":
        if "telemetry" not in inspect.signature(FastAPI).parameters:
            pytest.skip("FastAPI makes spans since 0.165")
        options["telemetry"] = {"tracer_provider": kept.tracers}
    app = FastAPI(**options)
    middleware: list[Callable[[], None]] = []
    if door == "middleware":
        middleware.append(lambda: app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout))
    if name == "by hand":
        middleware.append(lambda: app.add_middleware(Traced, tracer_provider=kept.tracers))
    if name == "starlette":
        if not find_spec("starlette.middleware.opentelemetry"):
            pytest.skip("Starlette has such a middleware since 1.10")
        from starlette.middleware.opentelemetry import OpenTelemetryMiddleware

        middleware.append(lambda: app.add_middleware(OpenTelemetryMiddleware, tracer_provider=kept.tracers))
    # The one that is added last stands outside.
    for add in reversed(middleware) if place == "inside" else middleware:
        add()
    if door == "route class":
        app.router.route_class = CancelableRoute.with_timeout(timeout)

    async def plain(name: str) -> None:
        await anyio.sleep_forever()

    limited = cancelable_with_timeout(60 if timeout is None else timeout)

    async def with_handle(name: str, cancel: Cancelable = Depends(limited)) -> None:
        async with cancel:
            await anyio.sleep_forever()

    if door == "handle":
        app.get("/work/{name}")(with_handle)
    else:
        app.get("/work/{name}")(with_cancelation(timeout=timeout)(plain) if door == "decorator" else plain)
    return app


def only_span(kept: Kept) -> ReadableSpan:
    [span] = kept.spans()
    assert kept.touched() == [span]
    return span


# Spans


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("maker", MAKERS)
async def test_the_span_of_a_hang_up_says_so_and_is_no_error(kept: Kept, maker: str, door: str) -> None:
    call = await hang_up(traced(kept, maker, door), "/work/secret")
    assert call.status == 499
    span = only_span(kept)
    attributes = dict(span.attributes or {})
    assert attributes["cancelation.reason"] == "disconnect"
    assert attributes["http.response.status_code"] == 499
    assert span.status.status_code is StatusCode.UNSET
    assert [event.name for event in span.events] == ["cancelation"]
    assert dict(span.events[0].attributes or {}) == {"cancelation.reason": "disconnect"}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("maker", MAKERS)
async def test_the_span_of_a_timeout_says_so_and_is_an_error(kept: Kept, maker: str, door: str) -> None:
    call = await get(traced(kept, maker, door, SHORT), "/work/secret")
    assert call.status == 504
    span = only_span(kept)
    attributes = dict(span.attributes or {})
    assert (attributes["cancelation.reason"], attributes["cancelation.message"]) == (
        "timeout",
        f"Timed out after {SHORT:g} seconds",
    )
    assert span.status.status_code is StatusCode.ERROR
    assert [event.name for event in span.events] == ["cancelation"]


async def test_a_request_that_is_not_cancelled_leaves_its_span_alone(kept: Kept) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)
    app.add_middleware(Traced, tracer_provider=kept.tracers)

    @app.get("/")
    async def quick() -> str:
        return "done"

    assert (await get(app)).status == 200
    assert len(kept.spans()) == 1
    assert kept.touched() == []
    assert kept.points("cancelations") == []


@pytest.mark.parametrize("place", ["outside", "inside"])
async def test_the_span_of_the_request_is_meant_and_not_one_of_the_handler(kept: Kept, place: str) -> None:
    app = FastAPI()
    if place == "inside":
        app.add_middleware(Traced, tracer_provider=kept.tracers)
    app.add_middleware(RequestCancelationMiddleware)
    if place == "outside":
        app.add_middleware(Traced, tracer_provider=kept.tracers)

    @app.get("/")
    async def work(cancel: RequestCancelable) -> None:
        with kept.tracers.get_tracer("handler").start_as_current_span("step"):
            async with cancel:
                await anyio.sleep_forever()

    assert (await hang_up(app)).status == 499
    only_span(kept)
    assert {span.name for span in kept.spans(SpanKind.INTERNAL)} - {"receive"} == {"step"}


async def test_a_span_of_receive_is_not_meant(kept: Kept) -> None:
    """Somebody traces `receive()` as well, in which we wait when the timeout strikes."""
    app = FastAPI()
    app.add_middleware(Traced, tracer_provider=kept.tracers)

    @app.get("/")
    async def work(cancel: RequestCancelable) -> None:
        with kept.tracers.get_tracer("handler").start_as_current_span("step"):
            async with cancel:
                await anyio.sleep(SHORT)
                cancel.cancel_nowait()
                await anyio.sleep_forever()

    assert (await get(app)).status == 499
    only_span(kept)


async def test_a_span_around_everything_is_not_meant(kept: Kept) -> None:
    app = FastAPI()
    app.add_middleware(Traced, tracer_provider=kept.tracers)
    app.add_middleware(RequestCancelationMiddleware)

    @app.get("/")
    async def work() -> None:
        await anyio.sleep_forever()

    async def gateway(scope: Any, receive: Any, send: Any) -> None:
        with kept.tracers.get_tracer("gateway").start_as_current_span("gateway"):
            await app(scope, receive, send)

    assert (await hang_up(gateway)).status == 499
    only_span(kept)
    assert {span.name for span in kept.spans(SpanKind.INTERNAL)} >= {"gateway"}


async def test_the_span_of_a_websocket(kept: Kept) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)
    app.add_middleware(Traced, tracer_provider=kept.tracers)

    @app.websocket("/talk/{name}")
    async def talk(websocket: WebSocket, name: str) -> None:
        await websocket.accept()
        await anyio.sleep_forever()

    async with connected(app, "/talk/ann") as socket:
        await socket.accepted()
        await socket.listened_to()
    assert dict(only_span(kept).attributes or {})["cancelation.reason"] == "disconnect"
    assert kept.points("cancelations") == [
        ({"reason": "disconnect", "http.route": "/talk/{name}", "kind": "websocket"}, 1)
    ]


async def test_without_a_span_nothing_happens(kept: Kept) -> None:
    assert (await hang_up(traced(kept, "nobody", "middleware"), "/work/1")).status == 499
    assert kept.exporter.get_finished_spans() == ()


# Metrics


@pytest.mark.parametrize("door", DOORS)
async def test_what_is_counted(kept: Kept, door: str) -> None:
    assert (await hang_up(traced(kept, "nobody", door), "/work/secret")).status == 499
    assert (await hang_up(traced(kept, "nobody", door), "/work/other")).status == 499
    assert (await get(traced(kept, "nobody", door, SHORT), "/work/third")).status == 504
    of_hang_ups = {"reason": "disconnect", "http.route": "/work/{name}", "kind": "request"}
    of_timeouts = {**of_hang_ups, "reason": "timeout"}
    assert kept.points("cancelations") == [(of_hang_ups, 2), (of_timeouts, 1)]
    for name in ("cancelation.duration", "cleanup.duration"):
        points = kept.points(name)
        assert [(attributes, count) for attributes, (count, _) in points] == [(of_hang_ups, 2), (of_timeouts, 1)]
        assert all(0 <= total < CEILING for _, (_, total) in points)


async def test_the_cleanup_is_a_part_of_what_a_cancellation_takes(kept: Kept) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)
    may_end = anyio.Event()
    has_left: list[Callable[[], bool]] = []

    @app.get("/")
    async def work(cancel: RequestCancelable) -> None:
        has_left.append(lambda: cancel.client_has_left)
        try:
            async with cancel.shield():
                await may_end.wait()
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(SHORT)

    async with running(app) as call:
        await call.listened_to()
        await call.hang_up()
        await until(lambda: has_left[0]())
        await anyio.sleep(3 * SHORT)
        may_end.set()
    [(_, (_, duration))] = kept.points("cancelation.duration")
    [(_, (_, cleanup))] = kept.points("cleanup.duration")
    assert cleanup >= SHORT
    assert duration >= cleanup + 3 * SHORT


async def test_a_cancellation_lasts_until_the_background_tasks_have_ended(kept: Kept) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)
    is_asked = anyio.Event()

    async def later() -> None:
        await is_asked.wait()

    @app.get("/")
    async def work(cancel: RequestCancelable, background: BackgroundTasks) -> str:
        background.add_task(later)
        # It finishes in spite of it.
        with suppress(DisconnectCancelation):
            async with cancel:
                await anyio.sleep_forever()
        return "done"

    async with CancelableClient(app, ceiling=CEILING) as client, client.start("GET", "/") as call:
        await call.listened_to()
        await call.hang_up()
        await until(lambda: bool(kept.points("cancelations")))
        assert kept.points("cancelation.duration") == []
        is_asked.set()
    assert len(kept.points("cancelation.duration")) == 1


async def test_an_unknown_path_is_no_attribute(kept: Kept) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await anyio.sleep_forever()

    assert (await hang_up(RequestCancelationMiddleware(app), "/secret/17")).status == 499
    assert kept.points("cancelations") == [({"reason": "disconnect", "http.route": "", "kind": "request"}, 1)]


async def test_advisory_limits(kept: Kept) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, default_policy=TimeoutPolicy(SHORT, advisory=True))

    @app.get("/work/{name}")
    async def work(name: str) -> None:
        await anyio.sleep(2 * SHORT)

    assert (await get(app, "/work/secret")).status == 200
    assert kept.points("timeouts.advisory") == [({"http.route": "/work/{name}", "kind": "request"}, 1)]
    assert kept.points("cancelations") == []


async def test_operations_that_run(kept: Kept) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware)

    @app.get("/work")
    async def work() -> None:
        await anyio.sleep_forever()

    @app.websocket("/talk")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep_forever()

    def active() -> dict[str, int]:
        return {attributes["kind"]: value for attributes, value in kept.points("operations.active")}

    async with CancelableClient(app, ceiling=CEILING) as client:
        before = active()
        async with client.websocket("/talk") as socket, client.start("GET", "/work") as call:
            await socket.accepted()
            await socket.listened_to()
            await call.listened_to()
            job = await operations.start(sleep_forever)
            async with operations.track():
                now = active()
                assert {kind: now[kind] - before[kind] for kind in now} == {
                    "request": 1,
                    "websocket": 1,
                    "detached": 0,
                    "background": 1,
                    "tracked": 1,
                }
            await call.hang_up()
        assert (await operations.cancel(job.id)).outcome == "cancelled"
        await until(lambda: active() == before)


async def sleep_forever(cancel: Cancelable) -> None:
    await anyio.sleep_forever()


async def test_cancels_are_counted_by_what_becomes_of_them(kept: Kept) -> None:
    async with Operations() as operations:
        job = await operations.start(sleep_forever, name="export")
        assert (await operations.cancel(job.id, message="enough")).outcome == "cancelled"
        assert (await operations.cancel(job.id)).outcome == "cancelled"
        assert (await operations.cancel("unheard-of")).outcome == "unknown"
        await operations.start(sleep_forever, key="k")
        assert len(await operations.cancel_all(key="k")) == 1
        await until(lambda: len(kept.points("cancelations")) == 1 and kept.points("cancelations")[0][1] == 2)
    assert kept.points("cancels.sent") == [
        ({"outcome": "cancelled"}, 3),
        ({"outcome": "unknown"}, 1),
    ]
    assert kept.points("cancelations") == [({"reason": "manual", "http.route": "", "kind": "background"}, 2)]


async def test_the_age_of_the_lease(kept: Kept) -> None:
    others = kept.points("lease.age")
    async with Operations():
        assert [attributes for attributes, _ in kept.points("lease.age")] == [{}]
        [(_, age)] = kept.points("lease.age")
        assert 0 <= age < CEILING
    assert kept.points("lease.age") == others == []


@movable_clock
async def test_the_lease_is_young_again_after_a_sign_of_life(kept: Kept) -> None:
    async with Operations() as operations:
        operations.worker.exchange.beaten_at -= 1000
        [(_, age)] = kept.points("lease.age")
        assert age >= 1000
        await advance(6)
        await until(lambda: kept.points("lease.age")[0][1] < 1000)


# Background work


async def test_background_work_has_a_span_that_is_linked_to_its_request(kept: Kept) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware)
    app.add_middleware(Traced, tracer_provider=kept.tracers)
    inside: list[str] = []

    async def export(cancel: Cancelable) -> str:
        with kept.tracers.get_tracer("work").start_as_current_span("step"):
            inside.append("here")
        return "done"

    @app.post("/exports", status_code=202)
    async def start(operations: RequestOperations) -> str:
        return (await operations.start(export)).id

    async with CancelableClient(app, ceiling=CEILING) as client:
        id = (await client.post("/exports")).json()
        assert await operations.result(id) == "done"
    [request] = kept.spans()
    spans = {span.name: span for span in kept.spans(SpanKind.INTERNAL)}
    work, step = spans["export"], spans["step"]
    assert request.context is not None
    assert work.context is not None
    assert step.parent is not None
    assert [link.context.span_id for link in work.links] == [request.context.span_id]
    assert work.parent is None
    assert work.context.trace_id != request.context.trace_id
    assert step.parent.span_id == work.context.span_id
    assert work.status.status_code is StatusCode.UNSET
    assert id not in str(work.attributes)


async def test_background_work_is_no_part_of_the_start_of_the_application(kept: Kept) -> None:
    with kept.tracers.get_tracer("server").start_as_current_span("startup"):
        async with Operations() as operations:
            job = await operations.start(sleep_forever, name="job")
            await operations.cancel(job.id)
    [work] = [span for span in kept.spans(SpanKind.INTERNAL) if span.name == "job"]
    assert work.parent is None


async def test_the_span_of_background_work_that_was_stopped_or_failed(kept: Kept) -> None:
    async def fail(cancel: Cancelable) -> None:
        raise ZeroDivisionError("nothing to divide by")

    async with Operations() as operations:
        stopped = await operations.start(sleep_forever, name="stopped")
        await operations.cancel(stopped.id, message="enough")
        failed = await operations.start(fail)
        with pytest.raises(ZeroDivisionError):
            await operations.result(failed.id)
    spans = {span.name: span for span in kept.spans(SpanKind.INTERNAL)}
    assert dict(spans["stopped"].attributes or {}) == {
        "cancelation.reason": "manual",
        "cancelation.message": "enough",
    }
    assert spans["stopped"].status.status_code is StatusCode.UNSET
    assert dict(spans["fail"].attributes or {}) == {"error.type": "ZeroDivisionError"}
    assert spans["fail"].status.status_code is StatusCode.ERROR
    assert [event.name for event in spans["fail"].events] == ["exception"]


async def test_background_work_that_never_begins_leaves_nothing_behind(kept: Kept) -> None:
    telemetry: list[Any] = []
    async with Operations(background_grace=0) as operations:
        first = await operations.start(sleep_forever, key="k", when_busy="wait")
        second = await operations.start(sleep_forever, key="k", when_busy="wait")
        assert (await operations.cancel(second.id)).outcome == "cancelled"
        await operations.cancel(first.id)
    assert telemetry == []
    assert [span.name for span in kept.spans(SpanKind.INTERNAL)] == ["sleep_forever"]
    assert kept.points("cancelations") == [({"reason": "manual", "http.route": "", "kind": "background"}, 2)]


async def test_tracked_work_is_told_in_the_span_around_it(kept: Kept) -> None:
    tracer = kept.tracers.get_tracer("consumer")
    async with Operations() as operations:
        with tracer.start_as_current_span("message", kind=SpanKind.CONSUMER), suppress(ManualCancelation):
            async with operations.track(id="job-1") as cancel:
                cancel.cancel_nowait()
                await anyio.sleep_forever()
    [span] = kept.spans(SpanKind.CONSUMER)
    assert dict(span.attributes or {}) == {"cancelation.reason": "manual"}


# Without OpenTelemetry


def test_nothing_needs_opentelemetry_but_the_telemetry() -> None:
    code = (
        # FastAPI brings the API along since 0.165.
        "import sys, fastapi; sys.modules['opentelemetry.metrics'] = None\n"
        "from cancelable_deps.observability import CancelationTelemetry, current_operation_id\n"
        "assert current_operation_id() is None\n"
        "try: CancelationTelemetry()\n"
        "except ImportError as exc: print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'CancelationTelemetry needs opentelemetry-api: pip install "cancelable-deps[otel]"'
