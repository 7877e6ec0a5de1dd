from __future__ import annotations

import itertools
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from fastapi import APIRouter, FastAPI, Request
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelableStreamingResponse,
    CancelationError,
    CancelationReason,
    RequestCancelable,
    RequestCancelationMiddleware,
    TimeoutCancelation,
    cancelable_streaming_response,
    with_cancelation,
)
from cancelable_deps.request.sse import format_sse
from cancelable_deps.testing import advance
from tests import asgi
from tests.calls import get, movable_clock, running
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio

LONG_HANDLER = 0.03  # longer than `listen_after`, so that the handler is listened to


class Body:
    """A stream that stands still after its first chunk, and journals how it ends."""

    def __init__(self, chunks: int = 1) -> None:
        self.chunks = chunks
        self.waiting = anyio.Event()
        self.journal: list[str] = []
        self.tasks: set[int] = set()

    async def __call__(self, cancel: Cancelable | None = None) -> AsyncIterator[str]:
        self._note_task()
        try:
            async with cancel or nullcontext():
                for number in range(self.chunks):
                    yield f"chunk {number} "
                self.waiting.set()
                await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            self.journal.append("cancelled")
            raise
        except CancelationError as exc:
            self.journal.append(f"stopped:{exc.reason}")
            raise
        finally:
            await anyio.sleep(0.01)
            self._note_task()
            self.journal.append("cleaned up")

    def _note_task(self) -> None:
        self.tasks.add(anyio.get_current_task().id)


DOORS = ("none", "decorator", "middleware", "given handle", "handle inside", "middleware, handle inside")


def app_for(door: str, body: Body, **options: Any) -> FastAPI:
    app = FastAPI()

    if "inside" in door:

        @app.get("/")
        async def inside(cancel: RequestCancelable) -> Any:
            return cancelable_streaming_response(body(cancel), **options)

    elif door == "given handle":

        @app.get("/")
        async def given(cancel: RequestCancelable) -> Any:
            await anyio.sleep(LONG_HANDLER)
            return cancelable_streaming_response(body(), cancel, **options)

    elif door == "decorator":

        @app.get("/")
        @with_cancelation
        async def decorated() -> Any:
            await anyio.sleep(LONG_HANDLER)
            return cancelable_streaming_response(body(), **options)

    else:

        @app.get("/")
        async def bare() -> Any:
            return cancelable_streaming_response(body(), **options)

    if "middleware" in door:
        app.add_middleware(RequestCancelationMiddleware)
    return app


@pytest.mark.parametrize("disconnect", ["repeats", "once"])
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("door", DOORS)
async def test_a_hang_up_stops_the_generator_which_cleans_up_in_its_task(
    door: str, spec_version: str, disconnect: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    body = Body()
    async with nothing_left(), running(app_for(door, body), disconnect=disconnect, spec_version=spec_version) as call:
        await body.waiting.wait()
        await call.hang_up()
    how = "stopped:disconnect" if "inside" in door else "cancelled"
    assert body.journal == [how, "cleaned up"]
    assert len(body.tasks) == 1
    assert call.most_readers == 1
    assert (call.is_complete, call.body) == (False, b"chunk 0 ")
    assert [record.levelname for record in caplog.records if record.name == "cancelable_deps"] == ["INFO"]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize("door", DOORS)
async def test_a_hang_up_reaches_a_generator_at_its_yield(door: str) -> None:
    body = Body(chunks=2)
    async with nothing_left(), running(app_for(door, body)) as call:
        call.stop_reading(after=1)
        await call.response_started()
        await call.listened_to()
        assert not body.waiting.is_set()
        await call.hang_up()
    how = "stopped:disconnect" if "inside" in door else "cancelled"
    assert body.journal == [how, "cleaned up"]
    assert len(body.tasks) == 1


@pytest.mark.parametrize("door", DOORS)
async def test_a_client_that_stops_reading_is_timed_out_and_has_not_left(door: str) -> None:
    body = Body(chunks=2)
    app = app_for(door, body, send_timeout=0.05, media_type="text/event-stream")
    async with nothing_left():
        with pytest.raises((TimeoutCancelation, RuntimeError)) as raised:
            async with running(app) as call:
                call.stop_reading(after=1)
    assert body.journal[-1] == "cleaned up"
    error = raised.value
    assert "read nothing for 0.05 seconds" in f"{error} {error.__cause__} {error.__context__}"


@pytest.mark.parametrize("limit", ["timeout", "gap_timeout"])
async def test_a_timeout_cuts_the_stream_visibly(limit: str) -> None:
    body = Body()
    options: dict[str, Any] = {limit: 0.05}
    response = CancelableStreamingResponse(body(), **options)
    async with nothing_left():
        call = await get(response, raise_app_exceptions=False)
    assert isinstance(call.exception, TimeoutCancelation)
    assert not call.is_complete
    assert body.journal == ["cancelled", "cleaned up"]


@movable_clock
async def test_a_gap_begins_anew_with_each_chunk() -> None:
    async def paced() -> AsyncIterator[str]:
        for _ in range(8):
            await advance(10)
            yield "."

    call = await get(CancelableStreamingResponse(paced(), gap_timeout=70))
    assert (call.body, call.is_complete) == (b"........", True)


@pytest.mark.parametrize("door", DOORS)
async def test_an_event_stream_says_why_it_ends(door: str) -> None:
    body = Body()
    call = await get(app_for(door, body, timeout=0.05, media_type="text/event-stream"))
    # Half an event, as of an upstream whose bytes are passed on as they come.
    event, data = call.body.decode().removeprefix("chunk 0 \n\n").strip().split("\n")
    assert event == "event: cancelled"
    assert json.loads(data.removeprefix("data: ")) == {"reason": "timeout", "message": "Timed out after 0.05 seconds"}
    assert call.is_complete


@pytest.mark.parametrize(("sent", "between"), [("", ""), ("data: 1\n\n", ""), ("data: 1\r\n\r\n", ""), ("da", "\n\n")])
@pytest.mark.parametrize("door", ["response", "middleware"])
async def test_the_last_event_is_one_of_its_own(door: str, sent: str, between: str) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b""
        yield sent.encode()
        yield b""
        await anyio.sleep_forever()

    async def app(*asgi: Any) -> None:
        await StreamingResponse(body(), media_type="text/event-stream")(*asgi)

    if door == "response":
        call = await get(CancelableStreamingResponse(body(), media_type="text/event-stream", timeout=0.05))
    else:
        call = await get(RequestCancelationMiddleware(app, default_timeout=0.05))
    assert call.body.decode().startswith(f"{sent}{between}event: cancelled\n")


async def test_a_given_cancelable_stops_the_stream() -> None:
    body = Body()
    cancel = Cancelable()
    async with running(CancelableStreamingResponse(body(), cancel=cancel), raise_app_exceptions=False) as call:
        await body.waiting.wait()
        cancel.cancel_nowait(message="enough")
    assert isinstance(call.exception, CancelationError)
    assert (call.exception.reason, call.exception.detail) == (CancelationReason.MANUAL, "enough")
    assert body.journal == ["cancelled", "cleaned up"]


async def test_a_cancelable_that_runs_elsewhere_stops_the_stream() -> None:
    body = Body()
    cancel = Cancelable()
    entered = anyio.Event()

    async def elsewhere() -> None:
        with suppress(CancelationError):
            async with cancel:
                entered.set()
                await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(elsewhere)
        await entered.wait()
        async with running(CancelableStreamingResponse(body(), cancel=cancel), raise_app_exceptions=False) as call:
            await body.waiting.wait()
            cancel.cancel_nowait(CancelationReason.CONDITION)
        assert isinstance(call.exception, CancelationError)
        assert call.exception.reason is CancelationReason.CONDITION
    assert body.journal == ["cancelled", "cleaned up"]


async def test_a_complete_stream_is_no_disconnect(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    done = anyio.Event()

    async def short() -> AsyncIterator[bytes]:
        yield b"one "
        await anyio.sleep(0.03)
        yield b"two"

    async def after() -> None:
        await anyio.sleep(0.03)
        done.set()

    call = await get(CancelableStreamingResponse(short(), background=BackgroundTask(after)))
    assert (call.body, call.is_complete) == (b"one two", True)
    assert done.is_set()
    assert not caplog.records


@pytest.mark.parametrize("door", ["none", "middleware", "route"])
async def test_background_work_runs_to_its_end_though_the_client_has_left(door: str) -> None:
    done: list[str] = []
    app = FastAPI()
    covered = CancelableRoute.with_timeout(None, cleanup_grace=0.02)
    router = APIRouter(route_class=covered) if door == "route" else APIRouter()

    async def after() -> None:
        for _ in range(3):
            await anyio.sleep(0.02)  # longer than the grace
        done.append("background")

    body = Body()

    @router.get("/")
    async def start() -> Any:
        background = BackgroundTask(after)
        return CancelableStreamingResponse(body(), background=background, cleanup_grace=0.02)

    app.include_router(router)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, cleanup_grace=0.02)
    async with nothing_left(), running(app) as call:
        await body.waiting.wait()
        await call.listened_to()
        await call.hang_up()
    assert (call.reason, done) == (CancelationReason.DISCONNECT, ["background"])


async def test_a_plain_iterator_runs_in_a_thread_and_is_closed() -> None:
    closed: list[str] = []
    enough = anyio.Event()

    def plain() -> Iterator[str]:
        try:
            for number in itertools.count():
                if number == 5:
                    anyio.from_thread.run_sync(enough.set)
                yield "x"
        finally:
            closed.append("closed")

    async with running(CancelableStreamingResponse(plain())) as call:
        await enough.wait()
        await call.hang_up()
    assert closed == ["closed"]
    assert not call.is_complete


async def test_a_generator_behind_a_plain_iterable_is_closed() -> None:
    events: list[str] = []
    started = anyio.Event()

    class Rows:
        def __iter__(self) -> Iterator[bytes]:
            try:
                yield b"one"
                anyio.from_thread.run_sync(started.set)
                while True:
                    yield b"more"
            finally:
                anyio.from_thread.run_sync(events.append, "closed in a thread")

    async with running(CancelableStreamingResponse(Rows())) as call:
        await started.wait()
        await call.hang_up()
    assert events == ["closed in a thread"]


async def test_an_error_of_the_generator_is_its_own() -> None:
    async def broken() -> AsyncIterator[str]:
        yield "a"
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await get(CancelableStreamingResponse(broken()))


@pytest.mark.parametrize("limit", ["timeout", "gap_timeout", "send_timeout", "cleanup_grace"])
def test_wrong_limits_are_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=limit):
        CancelableStreamingResponse(iter(["x"]), **{limit: -1})  # type: ignore[arg-type]


def test_wrong_cancel_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a Cancelable"):
        cancelable_streaming_response(iter(["x"]), 3)  # type: ignore[arg-type]


def test_data_of_several_lines() -> None:
    assert format_sse("a\nb\r\nc", "x") == b"event: x\ndata: a\ndata: b\ndata: c\n\n"


async def test_a_given_cancelable_may_be_entered_inside_once() -> None:
    body = Body()
    cancel = Cancelable(timeout=0.2)
    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            await get(CancelableStreamingResponse(body(cancel), cancel=cancel))
    assert body.journal == ["stopped:timeout", "cleaned up"]


async def test_a_given_handle_may_be_entered_inside_once() -> None:
    body = Body()
    app = FastAPI()

    @app.get("/")
    async def both(cancel: RequestCancelable) -> Any:
        return cancelable_streaming_response(body(cancel), cancel)

    async with nothing_left(), running(app) as call:
        await body.waiting.wait()
        await call.hang_up()
    assert body.journal == ["stopped:disconnect", "cleaned up"]
    assert not call.is_complete


@movable_clock
@pytest.mark.parametrize("disconnect", ["repeats", "once"])
@pytest.mark.parametrize("where", ["before the first chunk", "in the cleanup", "after the last chunk"])
async def test_a_hang_up_at_any_moment(where: str, disconnect: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    here, waiting, may_end = anyio.Event(), anyio.Event(), anyio.Event()
    journal: list[str] = []
    app = FastAPI()

    in_cleanup = where == "in the cleanup"

    async def stop_here(moment: str) -> None:
        if moment == where:
            here.set()
            await (may_end.wait() if in_cleanup else anyio.sleep_forever())
        elif in_cleanup and moment == "after the last chunk":
            waiting.set()
            await anyio.sleep_forever()

    async def tokens(cancel: Cancelable) -> AsyncIterator[str]:
        try:
            async with cancel:
                await stop_here("before the first chunk")
                yield "one"
                await stop_here("after the last chunk")
        finally:
            await stop_here("in the cleanup")
            journal.append("cleaned up")

    @app.get("/")
    async def stream(cancel: RequestCancelable) -> Any:
        timeout = 20 if in_cleanup else None
        return cancelable_streaming_response(tokens(cancel), cancel, timeout=timeout, media_type="text/event-stream")

    async with nothing_left(), running(app, disconnect=disconnect) as call:
        if in_cleanup:
            await waiting.wait()
            await advance(20)
        await here.wait()
        await call.listened_to()
        call.hang_up_nowait()
        await anyio.wait_all_tasks_blocked()
        may_end.set()
    assert journal == ["cleaned up"]
    assert (b'"timeout"' in call.body) == call.is_complete == in_cleanup
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_a_client_that_stops_reading_is_no_disconnect(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running(app_for("none", Body(chunks=2), send_timeout=0.05), raise_app_exceptions=False) as call:
        call.stop_reading(after=1)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "cancelable_deps"]
    assert line.endswith("timeout: The client read nothing for 0.05 seconds")


async def test_a_client_that_leaves_before_the_empty_end_is_no_error() -> None:
    ran: list[str] = []

    async def body() -> AsyncIterator[str]:
        yield "all there is"
        call.hang_up_nowait()

    app = CancelableStreamingResponse(body(), background=BackgroundTask(ran.append, "background"))
    async with nothing_left(), running(app, spec_version="2.4", send_raises=True) as call:
        pass
    assert (call.outcome, ran) == ("returned", ["background"])


@pytest.mark.parametrize(
    ("media_type", "is_seen"), [("text/event-stream", False), ("text/event-stream", True), (None, True)]
)
@pytest.mark.parametrize("door", ["none", "middleware"])
async def test_a_client_that_leaves_a_stream_while_it_is_being_cut_is_no_error(
    door: str, media_type: str | None, is_seen: bool
) -> None:
    cleaning_up, go = anyio.Event(), anyio.Event()

    async def body() -> AsyncIterator[str]:
        try:
            yield "first "
            await anyio.sleep_forever()
        finally:
            cleaning_up.set()
            await go.wait()

    async def app(*asgi: Any) -> None:
        await CancelableStreamingResponse(body(), media_type=media_type, timeout=0.05)(*asgi)

    covered = RequestCancelationMiddleware(app) if door == "middleware" else app
    async with nothing_left(), running(covered, spec_version="2.4", send_raises=True) as call:
        await cleaning_up.wait()
        call.hang_up_nowait()
        if is_seen:
            await anyio.wait_all_tasks_blocked()
        go.set()
    assert call.outcome == "returned"


async def test_a_given_cancelable_that_was_cancelled_before_is_answered_with_its_status() -> None:
    body = Body()
    app = FastAPI()

    @app.get("/")
    async def start() -> Any:
        given = Cancelable()
        with suppress(CancelationError):
            async with given:
                await given.cancel(message="too late")
        return cancelable_streaming_response(body(), given, "text/event-stream")

    async with nothing_left():
        call = await get(app)
    assert (call.status, call.json(), body.journal) == (499, {"detail": "too late"}, [])


@pytest.mark.parametrize("media_type", [None, "text/event-stream"])
async def test_the_disconnect_of_another_requests_client_cuts_visibly(media_type: str | None) -> None:
    body = Body()
    handles: list[Cancelable] = []
    entered = anyio.Event()
    app = FastAPI()

    @app.get("/other")
    async def other(cancel: RequestCancelable) -> None:
        async with cancel:
            handles.append(cancel)
            entered.set()
            await anyio.sleep_forever()

    @app.get("/")
    async def follow() -> Any:
        return cancelable_streaming_response(body(), handles[0], media_type)

    async with nothing_left(), running(app, "/other") as first:
        await entered.wait()
        async with running(app, raise_app_exceptions=False) as second:
            await body.waiting.wait()
            await first.hang_up()
    assert body.journal == ["cancelled", "cleaned up"]
    if media_type is None:
        assert second.exception is not None
    else:
        assert b'{"reason": "disconnect"' in second.body
        assert (second.exception, second.is_complete) == (None, True)


@pytest.mark.parametrize("decorated", [False, True])
async def test_a_response_that_the_handler_throws_away_changes_nothing(
    decorated: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    app = FastAPI()

    async def change_its_mind(cancel: RequestCancelable) -> str:
        async with cancel:
            await anyio.sleep(LONG_HANDLER)
        cancelable_streaming_response(Body()(), cancel)
        return "something else"

    app.get("/")(with_cancelation(change_its_mind) if decorated else change_its_mind)
    async with nothing_left():
        call = await get(app)
    assert (call.status, call.json()) == (200, "something else")
    assert not [record for record in caplog.records if record.name == "cancelable_deps"]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("is_entered", [False, True])
async def test_a_stream_with_the_handle_of_its_handler_may_read_the_body(is_entered: bool) -> None:
    app = FastAPI()

    @app.post("/")
    async def echo(request: Request, cancel: RequestCancelable) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            async for chunk in request.stream():
                await anyio.lowlevel.checkpoint()
                yield chunk

        if is_entered:
            async with cancel:
                await anyio.wait_all_tasks_blocked()
        return CancelableStreamingResponse(chunks(), cancel=cancel)

    pieces = [b"%d," % index for index in range(10)]
    call = await asgi.get(app, method="POST", body=pieces)
    assert (call.error, call.body) == (None, b"".join(pieces))
    assert call.most_readers == 1
