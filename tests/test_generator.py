"""FastAPI's own generator endpoints under every door."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelationError,
    CancelationReason,
    RequestCancelable,
    RequestCancelationMiddleware,
    TimeoutCancelation,
    TimeoutPolicy,
    begin_shutdown,
    cancelation_lifespan,
    current_cancelable,
    with_cancelation,
)
from cancelable_deps.testing import Call, CancelableClient, advance
from tests.calls import get, movable_clock, running
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio
sse: Any = pytest.importorskip("fastapi.sse", reason="generator endpoints came with FastAPI 0.135")

DOORS = ("decorator", "middleware", "route", "decorator under middleware")
KINDS = ("sse", "jsonl", "raw")


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


class Journal:
    """What became of the generator of one request."""

    def __init__(self) -> None:
        self.waiting = anyio.Event()
        self.events: list[str] = []
        self.tasks: set[int] = set()

    def note_task(self) -> None:
        self.tasks.add(anyio.get_current_task().id)


def app_for(door: str, kind: str, journal: Journal, *, timeout: float | None = None, inside: bool = False) -> FastAPI:
    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute.with_timeout(timeout)) if door == "route" else APIRouter()

    async def items(cancel: RequestCancelable) -> AsyncIterator[str]:
        journal.note_task()
        try:
            yield "one"
            if inside:
                async with cancel:
                    yield "two"
                    journal.waiting.set()
                    await anyio.sleep_forever()
            journal.waiting.set()
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            journal.events.append("cancelled")
            raise
        except CancelationError as exc:
            journal.events.append(f"stopped:{exc.reason}")
            raise
        finally:
            journal.note_task()
            if door != "middleware" or kind != "sse":
                await anyio.sleep(0.01)
            journal.events.append("cleaned up")

    endpoint: Any = items
    if door == "decorator":
        endpoint = with_cancelation(timeout=timeout)(items)
    elif "decorator" in door:
        endpoint = with_cancelation(items)
    options: dict[str, Any] = {
        "sse": {"response_class": sse.EventSourceResponse},
        "jsonl": {},
        "raw": {"response_class": StreamingResponse},
    }[kind]
    router.get("/", **options)(endpoint)
    app.include_router(router)
    if "middleware" in door:
        app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)
    return app


@pytest.mark.parametrize("disconnect", ["repeats", "once"])
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", DOORS)
async def test_a_hang_up_stops_the_generator(
    door: str, kind: str, spec_version: str, disconnect: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    journal = Journal()
    app = app_for(door, kind, journal)
    async with nothing_left(), running(app, disconnect=disconnect, spec_version=spec_version) as call:
        await journal.waiting.wait()
        await call.listened_to()
        await call.hang_up()
    assert journal.events == ["cancelled", "cleaned up"]
    assert len(journal.tasks) == 1
    assert call.most_readers == 1
    assert [record.levelname for record in caplog.records if record.name == "cancelable_deps"] == ["INFO"]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", ["decorator", "decorator under middleware"])
async def test_a_block_inside_the_generator(door: str, kind: str) -> None:
    journal = Journal()
    async with nothing_left(), running(app_for(door, kind, journal, inside=True)) as call:
        await journal.waiting.wait()
        await call.listened_to()
        await call.hang_up()
    assert journal.events == ["stopped:disconnect", "cleaned up"]
    assert len(journal.tasks) == 1


async def timed_out(door: str, kind: str, journal: Journal, **options: Any) -> Call:
    async with running(app_for(door, kind, journal, timeout=5), **options) as call:
        await journal.waiting.wait()
        await advance(5)
    return call


@movable_clock
@pytest.mark.parametrize("kind", ["jsonl", "raw"])
@pytest.mark.parametrize("door", DOORS)
async def test_a_timeout_cuts_the_stream(door: str, kind: str) -> None:
    journal = Journal()
    async with nothing_left():
        call = await timed_out(door, kind, journal, raise_app_exceptions=False)
    assert journal.events == ["cancelled", "cleaned up"]
    assert b"one" in call.body
    assert not call.is_complete
    # Where a door sees the whole response it is silent; alone, the decorator can only raise, except under uvicorn.
    assert (call.exception is not None) == (door == "decorator")


@movable_clock
@pytest.mark.parametrize("door", DOORS)
async def test_an_event_stream_says_why_it_ends(door: str) -> None:
    journal = Journal()
    async with nothing_left():
        call = await timed_out(door, "sse", journal)
    assert journal.events == ["cancelled", "cleaned up"]
    event, data = call.body.decode().strip().split("\n\n")[-1].split("\n")
    assert event == "event: cancelled"
    assert json.loads(data.removeprefix("data: ")) == {"reason": "timeout", "message": "Timed out after 5 seconds"}
    assert call.is_complete


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", DOORS)
async def test_a_generator_that_ends_is_complete(door: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute) if door == "route" else APIRouter()

    async def items() -> AsyncIterator[str]:
        yield "one"
        await anyio.sleep(0.03)
        yield "two"

    options: dict[str, Any] = {"jsonl": {}, "raw": {"response_class": StreamingResponse}}.get(
        kind, {"response_class": sse.EventSourceResponse}
    )
    router.get("/", **options)(with_cancelation(items) if "decorator" in door else items)
    app.include_router(router)
    if "middleware" in door:
        app.add_middleware(RequestCancelationMiddleware)
    async with nothing_left():
        call = await get(app)
    bodies = {"sse": b'data: "one"\n\ndata: "two"\n\n', "jsonl": b'"one"\n"two"\n', "raw": b"onetwo"}
    assert (call.body, call.is_complete) == (bodies[kind], True)
    assert not caplog.records


@pytest.mark.parametrize("error", [KeyError("mine"), OSError("mine")])
async def test_an_error_of_the_generator_is_its_own(error: Exception) -> None:
    app = FastAPI()

    @app.get("/", response_class=StreamingResponse)
    @with_cancelation
    async def items() -> AsyncIterator[str]:
        yield "one"
        raise error

    async with nothing_left():
        with pytest.raises(type(error), match="mine"):
            await get(app)


async def test_the_generator_sees_its_block_and_its_context() -> None:
    app = FastAPI()
    seen: list[object] = []

    @app.get("/", response_class=StreamingResponse)
    @with_cancelation(timeout=30)
    async def items() -> AsyncIterator[str]:
        cancel = current_cancelable()
        seen.append(cancel is not None and 29 < cancel.remaining() <= 30)
        yield "one"
        seen.append(current_cancelable() is cancel)

    await get(app)
    assert seen == [True, True]


async def test_without_a_request_the_generator_runs_with_the_timeout_alone() -> None:
    @with_cancelation(timeout=0.05)
    async def items() -> AsyncIterator[str]:
        yield "one"
        await anyio.sleep_forever()

    received: list[str] = []
    async with nothing_left():
        generator = items()
        received.append(await anext(generator))
        with pytest.raises(TimeoutCancelation):
            await anext(generator)
    assert received == ["one"]


async def test_closing_the_generator_stops_it_and_waits_for_its_cleanup() -> None:
    events: list[str] = []

    @with_cancelation
    async def items() -> AsyncIterator[str]:
        try:
            yield "one"
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.01)
            events.append("cleaned up")

    async with nothing_left():
        running: Any = items()
        assert await anext(running) == "one"
        await running.aclose()
        assert events == ["cleaned up"]
        with pytest.raises(StopAsyncIteration):
            await anext(running)
        unused: Any = items()
        await unused.aclose()


async def test_a_callback_is_told() -> None:
    reasons: list[CancelationReason | None] = []
    app = FastAPI()

    @app.get("/", response_class=StreamingResponse)
    @with_cancelation(timeout=0.02, on_cancel=lambda cancel: reasons.append(cancel.reason))
    async def items() -> AsyncIterator[str]:
        yield "one"
        await anyio.sleep_forever()

    await get(app, raise_app_exceptions=False)
    assert reasons == [CancelationReason.TIMEOUT]


@pytest.mark.parametrize("error", [OSError("disk"), TimeoutError("slow"), KeyError("mine")])
@pytest.mark.parametrize("door", ["middleware", "route"])
async def test_an_error_of_a_plain_stream_is_not_taken_for_a_disconnect(door: str, error: Exception) -> None:
    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute) if door == "route" else APIRouter()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        raise error

    @router.get("/")
    async def stream() -> StreamingResponse:
        return StreamingResponse(chunks())

    app.include_router(router)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    async with (
        nothing_left(),
        CancelableClient(app, raise_app_exceptions=False) as client,
        client.start("GET", "/") as call,
    ):
        await call.ended()
    assert (call.exception, call.reason) == (error, None)


@pytest.mark.parametrize("by", ["hang-up", "cancel"])
@pytest.mark.parametrize("door", ["middleware", "middleware around another", "route"])
async def test_an_error_of_a_block_inside_a_plain_stream_is_ours(
    door: str, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute) if door == "route" else APIRouter()
    waiting = anyio.Event()

    async def chunks(cancel: Cancelable) -> AsyncIterator[bytes]:
        async with cancel:
            yield b"one"
            waiting.set()
            if by == "cancel":
                await cancel.cancel()
            await anyio.sleep_forever()

    @router.get("/")
    async def stream(cancel: RequestCancelable) -> StreamingResponse:
        return StreamingResponse(chunks(Cancelable() if by == "cancel" else cancel))

    app.include_router(router)
    if "another" in door:
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    if "middleware" in door:
        app.add_middleware(RequestCancelationMiddleware)
    async with nothing_left(), running(app) as call:
        await waiting.wait()
        if by == "hang-up":
            await call.hang_up()
    assert (call.outcome, call.is_complete, call.body) == ("returned", False, b"one")
    assert [record.levelname for record in caplog.records if record.name == "cancelable_deps"] == ["INFO"]


@pytest.mark.parametrize("around_another", [False, True])
async def test_an_error_of_a_background_task_is_its_own(around_another: bool) -> None:
    app = FastAPI()

    async def task() -> None:
        async with Cancelable(timeout=0):
            raise AssertionError

    @app.get("/")
    async def stream() -> StreamingResponse:
        return StreamingResponse(iter(["one"]), background=BackgroundTask(task))

    if around_another:
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    app.add_middleware(RequestCancelationMiddleware)
    async with nothing_left():
        call = await get(app, raise_app_exceptions=False)
    assert (call.is_complete, call.body) == (True, b"one")
    assert "response already started" in str(call.exception)


# Starlette leaves the generator of a response to the garbage collector, of which trio complains.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*chunks:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("door", ["middleware", "route"])
async def test_a_server_whose_send_raises_is_one_that_tells_of_a_disconnect(door: str, defer: bool) -> None:
    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute) if door == "route" else APIRouter()
    events: list[str] = []
    gone = anyio.Event()

    async def chunks(cancel: Cancelable) -> AsyncIterator[bytes]:
        with cancel.defer_disconnect() if defer else nullcontext():
            yield b"one"
            await gone.wait()
            yield b"two"
            events.append("past the point")

    @router.get("/")
    async def stream(cancel: RequestCancelable) -> StreamingResponse:
        return StreamingResponse(chunks(cancel))

    app.include_router(router)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    async with (
        nothing_left(),
        CancelableClient(app, send_raises=True, spec_version="2.4") as client,
        client.start("GET", "/") as call,
    ):
        await call.running()
        gone.set()
        await call.hang_up()
    assert (call.reason, call.outcome) == (CancelationReason.DISCONNECT, "returned")
    assert events == ["past the point"] * defer


@pytest.mark.parametrize("kind", KINDS)
async def test_one_that_is_stopped_before_it_begins_is_answered_with_a_status(kind: str) -> None:
    app = FastAPI(lifespan=cancelation_lifespan(refuse_new=True))
    options: dict[str, Any] = {"jsonl": {}, "raw": {"response_class": StreamingResponse}}.get(
        kind, {"response_class": sse.EventSourceResponse}
    )

    @app.get("/", **options)
    @with_cancelation(status_codes={CancelationReason.SIGNAL: 529})
    async def items() -> AsyncIterator[str]:
        yield "never"

    async with nothing_left(), CancelableClient(app) as client:
        begin_shutdown()
        response = await client.get("/")
    assert (response.status_code, response.json()) == (529, {"detail": "The server is shutting down"})


async def test_an_advisory_policy_judges_a_generator(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = FastAPI()
    policy = TimeoutPolicy(0.01, advisory=True)

    @app.get("/")
    @with_cancelation(policy=policy)
    async def items() -> AsyncIterator[str]:
        yield "one"
        await anyio.sleep(0.02)

    async with nothing_left(), CancelableClient(app) as client:
        assert (await client.get("/")).content == b'"one"\n'
    assert policy.exceeded == 1
    assert "longer than its advisory limit of 0.01 s" in caplog.messages[0]
