"""The hooks of ``configure(on_event=...)``: what they are told, and that they change nothing."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import FrozenInstanceError, replace
from typing import Any

import anyio
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelationReason,
    CancelationToken,
    DisconnectCancelation,
    ManualCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    SignalCancelation,
    TimeoutCancelation,
    TimeoutPolicy,
    begin_shutdown,
    cancelable_streaming_response,
    cancelable_with_timeout,
    cancelation_lifespan,
    configure,
    create_request_task_group,
    with_cancelation,
)
from cancelable_deps.deadlines import ClientTimeout
from cancelable_deps.kernel.settings import settings
from cancelable_deps.observability import ObservedEvent
from cancelable_deps.operations import Operations, OperationsUnavailable, RequestOperation
from cancelable_deps.testing import CancelableClient
from tests.calls import CEILING, connected, get, hang_up, running
from tests.operations import Steps, ended, endless, until

pytestmark = pytest.mark.anyio

SHORT = 0.02
DOORS = ("middleware", "route class", "decorator", "handle", "middleware and decorator", "def handler")


@pytest.fixture
def told() -> Iterator[list[ObservedEvent]]:
    """The events, in their order; without what would keep the request in memory."""
    events: list[ObservedEvent] = []
    configure(on_event=lambda event: events.append(replace(event, scope=None, contexts=())))
    yield events
    configure(on_event=())


def of(events: list[ObservedEvent], what: str) -> ObservedEvent:
    """The only event of this kind."""
    [event] = [event for event in events if event.what == what]
    return event


def behind(door: str, timeout: float | None = None) -> FastAPI:
    """An application of one route, whose handler never ends by itself."""
    app = FastAPI()
    if door.startswith("middleware"):
        app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)
    if door == "route class":
        app.router.route_class = CancelableRoute.with_timeout(timeout)
    limited = cancelable_with_timeout(60 if timeout is None else timeout)

    async def plain(name: str) -> None:
        await anyio.sleep_forever()

    async def with_handle(name: str, cancel: Cancelable = Depends(limited)) -> None:
        async with cancel:
            await anyio.sleep_forever()

    def in_thread(cancel: RequestCancelable, name: str) -> None:
        with cancel:
            while True:
                cancel.check()

    handler: Callable[..., Any] = with_handle if door == "handle" else in_thread if door == "def handler" else plain
    if door.endswith("decorator") or door == "def handler":
        handler = with_cancelation(timeout=timeout)(handler)
    app.get("/work/{name}")(handler)
    return app


# Requests


@pytest.mark.parametrize("door", DOORS)
async def test_a_hang_up_is_told_once_and_so_is_its_end(told: list[ObservedEvent], door: str) -> None:
    assert (await hang_up(behind(door), "/work/secret")).status == 499
    assert [event.what for event in told] == ["cancelled", "ended"]
    for event in told:
        assert (event.kind, event.method, event.route) == ("request", "GET", "/work/{name}")
        assert (event.reason, event.message, event.outcome) == (CancelationReason.DISCONNECT, None, "cancelled")
        unknown = {event.id, event.owner, event.key, event.name, event.error, event.limit}
        assert unknown == {None}
    first, last = told
    assert first.cancel_seconds is not None
    assert last.cancel_seconds is not None
    assert 0 <= first.cancel_seconds <= last.cancel_seconds < CEILING
    assert 0 <= first.seconds <= last.seconds < CEILING
    if door != "def handler":
        # A thread gets no cancellation: it asks.
        assert last.cleanup_seconds is not None
        assert 0 <= last.cleanup_seconds < CEILING


@pytest.mark.parametrize("door", DOORS)
async def test_a_timeout_is_told_with_its_message(told: list[ObservedEvent], door: str) -> None:
    assert (await get(behind(door, SHORT), "/work/secret")).status == 504
    assert [event.what for event in told] == ["cancelled", "ended"]
    for event in told:
        assert event.reason is CancelationReason.TIMEOUT
        assert event.message == f"Timed out after {SHORT:g} seconds"
        assert event.cancel_seconds is not None
    assert told[0].seconds >= SHORT


@pytest.mark.parametrize("door", DOORS)
async def test_no_time_at_all_is_told_as_well(told: list[ObservedEvent], door: str) -> None:
    """Such a request is never listened to."""
    assert (await get(behind(door, 0), "/work/secret")).status == 504
    assert [event.what for event in told] == ["cancelled", "ended"]


async def test_a_request_that_is_not_cancelled_is_not_told(told: list[ObservedEvent]) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, default_timeout=60)

    @app.get("/work")
    @with_cancelation
    async def work(cancel: RequestCancelable) -> str:
        async with cancel:
            await anyio.sleep(SHORT)
        return "done"

    assert (await get(app, "/work")).status == 200
    assert told == []


async def test_a_block_in_the_handler_that_times_out_is_told_with_how_long_it_took(told: list[ObservedEvent]) -> None:
    app = FastAPI()

    @app.get("/work")
    @with_cancelation
    async def work() -> None:
        async with Cancelable(timeout=SHORT):
            await anyio.sleep_forever()

    assert (await get(app, "/work")).status == 504
    assert [(event.what, event.reason) for event in told] == [
        ("cancelled", CancelationReason.TIMEOUT),
        ("ended", CancelationReason.TIMEOUT),
    ]
    assert all(event.cancel_seconds is not None for event in told)


async def test_a_request_whose_end_nobody_reports_is_over_with_its_last_block(told: list[ObservedEvent]) -> None:
    async def work(request: Request) -> Response:
        async with create_request_task_group(request):
            await anyio.sleep_forever()
        raise AssertionError

    assert (await hang_up(Starlette(routes=[Route("/work/{name}", work)]), "/work/secret")).status == 499
    assert [event.what for event in told] == ["cancelled", "ended"]


async def test_a_handler_that_finishes_in_spite_of_it_has_finished(told: list[ObservedEvent]) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)

    @app.get("/work")
    async def work(cancel: RequestCancelable) -> str:
        with suppress(DisconnectCancelation):
            async with cancel:
                await anyio.sleep_forever()
        return "done"

    assert (await hang_up(app, "/work")).status == 200
    assert [(event.what, event.outcome) for event in told] == [("cancelled", "cancelled"), ("ended", "finished")]


async def test_a_shielded_handler_has_finished_when_the_log_says_that_its_client_has_left(
    told: list[ObservedEvent], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)
    may_end = anyio.Event()

    @app.get("/work")
    async def work(cancel: RequestCancelable) -> str:
        async with cancel.shield():
            await may_end.wait()
            return "done"

    async with running(app, "/work") as call:
        await call.listened_to()
        await call.hang_up()
        may_end.set()
    assert call.status == 200
    assert [(event.what, event.outcome) for event in told] == [("cancelled", "finished"), ("ended", "finished")]
    [line] = caplog.records
    assert vars(line)["outcome"] == "finished"


async def test_the_end_comes_after_the_background_tasks(told: list[ObservedEvent]) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)
    may_end = anyio.Event()

    @app.get("/work")
    async def work(cancel: RequestCancelable, background: BackgroundTasks) -> str:
        background.add_task(may_end.wait)
        with suppress(DisconnectCancelation):
            async with cancel:
                await anyio.sleep_forever()
        return "done"

    async with running(app, "/work") as call:
        await call.listened_to()
        await call.hang_up()
        await until(lambda: told)
        assert [event.what for event in told] == ["cancelled"]
        may_end.set()
    assert [event.what for event in told] == ["cancelled", "ended"]


@pytest.mark.parametrize("kind", ["plain", "cancelable"])
async def test_a_stream(told: list[ObservedEvent], kind: str) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)

    async def numbers() -> AsyncIterator[str]:
        yield "1"
        await anyio.sleep_forever()

    @app.get("/numbers")
    async def stream(cancel: RequestCancelable) -> Any:
        return (
            cancelable_streaming_response(numbers(), cancel) if kind == "cancelable" else StreamingResponse(numbers())
        )

    async with running(app, "/numbers") as call:
        await call.listened_to()
        await call.hang_up()
    assert [(event.what, event.reason) for event in told] == [
        ("cancelled", CancelationReason.DISCONNECT),
        ("ended", CancelationReason.DISCONNECT),
    ]


async def test_a_websocket_whose_client_drops_is_stopping_until_its_handler_has_ended(
    told: list[ObservedEvent],
) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)

    @app.websocket("/talk/{name}")
    async def talk(websocket: WebSocket, name: str) -> None:
        await websocket.accept()
        await anyio.sleep_forever()

    async with connected(app, "/talk/ann") as socket:
        await socket.accepted()
        await socket.listened_to()
    assert [(event.what, event.outcome) for event in told] == [("cancelled", "stopping"), ("ended", "cancelled")]
    assert {(event.kind, event.route, event.method) for event in told} == {("websocket", "/talk/{name}", None)}
    assert [event.cleanup_seconds is None for event in told] == [True, False]


async def test_a_shutdown(told: list[ObservedEvent]) -> None:
    app = FastAPI(lifespan=cancelation_lifespan(grace=0, refuse_new=True))
    app.add_middleware(RequestCancelationMiddleware)

    @app.get("/work")
    async def work() -> None:
        await anyio.sleep_forever()

    async with CancelableClient(app, ceiling=CEILING) as client:
        async with client.start("GET", "/work") as call:
            await call.listened_to()
            begin_shutdown()
        assert call.status == 503
        assert (await client.get("/work")).status_code == 503
    assert [(event.what, event.reason) for event in told] == [
        ("cancelled", CancelationReason.SIGNAL),
        ("ended", CancelationReason.SIGNAL),
    ] * 2


async def test_a_client_that_gives_too_little(told: list[ObservedEvent]) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, client_timeout=ClientTimeout(["prefer"], minimum=5))
    assert (await get(app, "/", headers={"prefer": "wait=1"})).status == 504
    assert [(event.what, event.reason) for event in told] == [("cancelled", CancelationReason.TIMEOUT)]


async def test_advisory_limits(told: list[ObservedEvent]) -> None:
    app = FastAPI()
    app.add_middleware(
        RequestCancelationMiddleware,
        default_policy=TimeoutPolicy(SHORT, advisory=True),
        client_timeout=ClientTimeout(["x-budget"], advisory=True),
    )

    @app.get("/work/{name}")
    async def work(name: str) -> None:
        await anyio.sleep(2 * SHORT)

    assert (await get(app, "/work/secret", headers={"x-budget": f"{SHORT / 2}"})).status == 200
    assert [(event.what, event.limit, event.route) for event in told] == [
        ("exceeded", SHORT / 2, "/work/{name}"),
        ("exceeded", SHORT, "/work/{name}"),
    ]
    assert all(event.seconds >= 2 * SHORT and event.reason is None for event in told)


async def test_scope_and_contexts_of_a_request() -> None:
    events: list[ObservedEvent] = []
    configure(on_event=events.append)
    try:
        await hang_up(behind("middleware"), "/work/secret")
    finally:
        configure(on_event=())
    assert [(event.scope or {})["path"] for event in events] == ["/work/secret"] * 2
    assert all(len(event.contexts) == 1 for event in events)
    assert "secret" not in repr(events)


# Operations


async def test_background_work(told: list[ObservedEvent]) -> None:
    async with Operations() as operations:
        job = await operations.start(Steps(), name="export", owner="ann", key="k")
        await until(lambda: len(told) == 2)
        assert (await operations.cancel(job.id, message="enough")).outcome == "cancelled"
    assert [event.what for event in told] == ["started", "running", "cancelled", "ended", "cancel"]
    for event in told:
        assert (event.kind, event.name, event.id, event.owner, event.key) == (
            "background",
            "export",
            job.id,
            "ann",
            "k",
        )
    for event in told[2:4]:
        assert (event.reason, event.message, event.outcome) == (CancelationReason.MANUAL, "enough", "cancelled")
        assert event.cancel_seconds is not None
        assert event.cleanup_seconds is not None
    assert (told[4].outcome, told[4].reason) == ("cancelled", None)


async def test_background_work_that_ends_by_itself(told: list[ObservedEvent]) -> None:
    done, failing = Steps(), Steps()
    failing.error = ZeroDivisionError()
    async with Operations() as operations:
        for steps in (done, failing):
            job = await operations.start(steps, name="work")
            await steps.begun.wait()
            steps.go_on.set()
            await ended(operations, job)
    ends = [event for event in told if event.what == "ended"]
    assert [event.what for event in told] == ["started", "running", "ended"] * 2
    assert [(event.outcome, event.reason, event.cancel_seconds) for event in ends] == [
        ("finished", None, None),
        ("failed", None, None),
    ]
    assert ends[0].error is None
    assert isinstance(ends[1].error, ZeroDivisionError)


async def test_background_work_that_has_not_begun_at_the_shutdown(told: list[ObservedEvent]) -> None:
    async with Operations(background_grace=0) as operations:
        await operations.start(endless, name="first", key="k", when_busy="wait")
        await operations.start(endless, name="second", key="k", when_busy="wait")
        await until(lambda: any(event.what == "running" for event in told))
    assert {(event.name, event.reason) for event in told if event.what == "cancelled"} == {
        ("first", CancelationReason.SIGNAL),
        ("second", CancelationReason.SIGNAL),
    }
    assert sorted(event.name or "" for event in told if event.what == "ended") == ["first", "second"]


async def test_detached_work(told: list[ObservedEvent]) -> None:
    async def quick(cancel: Cancelable) -> None: ...

    async def failing(cancel: Cancelable) -> None:
        raise ZeroDivisionError

    async def slow(cancel: Cancelable) -> None:
        await anyio.sleep_forever()

    async with Operations() as operations:
        for work in (quick, failing):
            detached = Cancelable().detach(work)
            with suppress(ZeroDivisionError):
                await detached.result()
        detached = Cancelable().detach(slow)
        [listed] = (await operations.list(kind="detached")).items
        await operations.cancel(listed.id, message="enough", wait=CEILING)
    assert [(event.what, event.outcome, event.reason) for event in told if event.what != "cancel"] == [
        ("ended", "finished", None),
        ("ended", "failed", None),
        ("cancelled", "cancelled", CancelationReason.MANUAL),
        ("ended", "cancelled", CancelationReason.MANUAL),
    ]
    assert {event.kind for event in told} == {"detached"}
    assert [event.name for event in told[:2]] == ["quick", "failing"]
    assert isinstance(told[1].error, ZeroDivisionError)
    stopped = [event for event in told if event.what == "ended"][-1]
    assert (stopped.id, stopped.message) == (listed.id, "enough")


async def test_tracked_work(told: list[ObservedEvent]) -> None:
    async with Operations() as operations:
        async with operations.track(name="quick"):
            pass
        with suppress(TimeoutCancelation):
            async with operations.track(id="job-1", timeout=SHORT):
                await anyio.sleep_forever()
        with suppress(ZeroDivisionError):
            async with operations.track(name="failing"):
                raise ZeroDivisionError
    assert [(event.what, event.outcome, event.reason) for event in told] == [
        ("ended", "finished", None),
        ("cancelled", "cancelled", CancelationReason.TIMEOUT),
        ("ended", "cancelled", CancelationReason.TIMEOUT),
        ("ended", "failed", None),
    ]
    assert {event.kind for event in told} == {"tracked"}
    assert told[1].id == "job-1"
    assert isinstance(told[3].error, ZeroDivisionError)


@pytest.mark.parametrize("around", ["block", "scope"])
async def test_tracked_work_that_is_stopped_with_what_is_around_it(told: list[ObservedEvent], around: str) -> None:
    token = CancelationToken()
    async with Operations() as operations:
        with anyio.CancelScope() as scope, suppress(ManualCancelation):
            async with Cancelable(token=token), operations.track(name="inside") as cancel:
                if around == "scope":
                    cancel.cancel_nowait()
                    scope.cancel()
                else:
                    token.cancel_nowait()
                await anyio.sleep_forever()
    reason = CancelationReason.MANUAL if around == "scope" else CancelationReason.PARENT
    assert [(event.what, event.outcome, event.reason) for event in told if event.name == "inside"] == [
        ("cancelled", "cancelled", reason),
        ("ended", "cancelled", reason),
    ]


async def test_tracked_work_that_another_stops_has_failed(told: list[ObservedEvent]) -> None:
    async with Operations() as operations:
        with anyio.CancelScope() as scope:
            async with operations.track(name="inside"):
                scope.cancel()
                await anyio.sleep_forever()
    assert [(event.what, event.outcome, event.reason) for event in told] == [("ended", "failed", None)]


async def test_cancels(told: list[ObservedEvent]) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")

    @app.get("/work/{name}")
    async def work(name: str, operation: RequestOperation) -> None:
        operation.claim("ann")
        await anyio.sleep_forever()

    async with CancelableClient(app, ceiling=CEILING) as client:
        async with client.start("GET", "/work/secret", headers={"operation-id": "mine"}) as call:
            await call.listened_to()
            assert (await operations.cancel("mine", owner="bob")).outcome == "unknown"
            assert (await operations.cancel("mine")).outcome == "cancelled"
        assert call.status == 499
    assert [(event.what, event.outcome) for event in told] == [
        ("cancel", "unknown"),
        ("cancelled", "cancelled"),
        ("ended", "cancelled"),
        ("cancel", "cancelled"),
    ]
    assert [(event.id, event.owner) for event in told] == [("mine", None), *[("mine", "ann")] * 3]
    assert [event.route for event in told] == [None, *["/work/{name}"] * 3]


async def test_a_request_that_was_cancelled_before_it_came(told: list[ObservedEvent]) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")
    async with CancelableClient(app, ceiling=CEILING) as client:
        assert (await operations.cancel("mine")).outcome == "unknown"
        assert (await client.get("/", headers={"operation-id": "mine"})).status_code == 499
    assert [(event.what, event.reason, event.id) for event in told[1:]] == [
        ("cancelled", CancelationReason.MANUAL, "mine"),
        ("ended", CancelationReason.MANUAL, "mine"),
    ]


async def test_a_cancel_without_a_store(told: list[ObservedEvent], monkeypatch: pytest.MonkeyPatch) -> None:
    async with Operations() as operations:

        async def cancel(*args: object) -> None:
            raise OperationsUnavailable

        monkeypatch.setattr(operations.worker.cancels, "cancel", cancel)
        with pytest.raises(OperationsUnavailable):
            await operations.cancel("mine")
    assert (of(told, "cancel").outcome, of(told, "cancel").id) == ("unavailable", "mine")


# The hooks themselves


async def test_what_a_hook_raises_changes_nothing_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "cancelable_deps")
    told: list[str] = []

    def fails(event: ObservedEvent) -> None:
        raise ZeroDivisionError

    def cancels(event: ObservedEvent) -> None:
        raise CancelledError

    configure(on_event=[fails, cancels, lambda event: told.append(event.what)])
    try:
        for _ in range(2):
            assert (await hang_up(behind("middleware and decorator"), "/work/1")).status == 499
    finally:
        configure(on_event=())
    assert told == ["cancelled", "ended"] * 2
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == ["an on_event hook failed"] * 2
    assert all(record.exc_info for record in caplog.records)


async def test_a_hook_whose_result_would_have_to_be_awaited(caplog: pytest.LogCaptureFixture) -> None:
    async def later(event: ObservedEvent) -> None: ...

    configure(on_event=lambda event: later(event))
    try:
        assert (await hang_up(behind("decorator"), "/work/1")).status == 499
    finally:
        configure(on_event=())
    [record] = caplog.records
    assert record.exc_info is not None
    assert "must be a plain function" in str(record.exc_info[1])


async def on_event_async(event: ObservedEvent) -> None: ...


@pytest.mark.parametrize("wrong", [3, [print, 3], lambda: None, on_event_async, [on_event_async]])
def test_a_wrong_hook_is_refused_and_the_others_stay(told: list[ObservedEvent], wrong: Any) -> None:
    before = settings.hooks
    with pytest.raises(TypeError, match="plain function of an ObservedEvent"):
        configure(on_event=wrong)
    assert settings.hooks is before


def test_other_settings_leave_the_hooks_alone(told: list[ObservedEvent]) -> None:
    before = settings.hooks
    configure(listen_after=0.005)
    assert settings.hooks is before
    configure(on_event=())
    assert settings.hooks == ()


def test_an_event_is_frozen() -> None:
    event = ObservedEvent(what="cancelled")
    with pytest.raises(FrozenInstanceError):
        event.what = "ended"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


# The log


async def test_the_line_of_the_log_has_what_is_known(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")

    @app.get("/work/{name}")
    async def work(name: str, operation: RequestOperation) -> None:
        operation.claim("ann")
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(SHORT)

    async with (
        CancelableClient(app, ceiling=CEILING) as client,
        client.start("GET", "/work/secret", headers={"operation-id": "mine"}) as call,
    ):
        await call.listened_to()
        await call.hang_up()
    [line] = caplog.records
    facts = vars(line)
    assert (facts["operation_id"], facts["owner"], facts["key"]) == ("mine", "ann", None)
    assert (facts["outcome"], facts["reason"], facts["route"]) == ("cancelled", "disconnect", "/work/{name}")
    assert SHORT <= facts["cleanup"] < CEILING


@pytest.mark.parametrize("door", DOORS)
async def test_what_is_not_known_is_none(door: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    assert (await hang_up(behind(door), "/work/secret")).status == 499
    [line] = caplog.records
    facts = vars(line)
    assert facts["operation_id"] is facts["owner"] is facts["key"] is None
    assert (facts["cleanup"] is None) is (door == "def handler")


async def test_an_error_of_the_applications_own_is_told_without_a_time(told: list[ObservedEvent]) -> None:
    app = FastAPI()

    @app.get("/work")
    @with_cancelation
    async def work() -> None:
        raise SignalCancelation("we close early")

    assert (await get(app, "/work")).status == 503
    assert [(event.what, event.message, event.cancel_seconds) for event in told] == [
        ("cancelled", "we close early", None),
        ("ended", "we close early", None),
    ]
