"""Whatever waits in ``receive()`` inside an application is told of the disconnect before the work is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
import sniffio
from fastapi import BackgroundTasks, FastAPI, Request
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelable_deps import (
    CancelableRoute,
    CancelableStreamingResponse,
    CancelationReason,
    RequestCancelable,
    RequestCancelationMiddleware,
    configure,
    current_cancelable,
)
from cancelable_deps.testing import Call, HangUp
from tests.calls import get, hang_up, running
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio

DOORS = ["middleware", "route", "middleware around a BaseHTTPMiddleware"]
VERSIONS = ["2.1", "2.3", "2.4"]


def application(door: str, **options: Any) -> FastAPI:
    app = FastAPI()
    if door == "route":
        app.router.route_class = CancelableRoute.with_timeout(options.get("default_timeout"))
        return app
    if "BaseHTTPMiddleware" in door:

        @app.middleware("http")
        async def pass_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            return await call_next(request)

    app.add_middleware(RequestCancelationMiddleware, **options)
    return app


class Ticks:
    """A stream that stands still after its first chunk, and what became of it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.waiting = anyio.Event()
        self.stop: Callable[[], object] | None = None

    async def __call__(self) -> AsyncGenerator[bytes]:
        try:
            yield b"tick"
            self.waiting.set()
            if self.stop is not None:
                self.stop()
            await anyio.sleep_forever()
        finally:
            try:
                for _ in range(3):
                    await anyio.sleep(0.005)
                self.events.append("cleaned up")
            except BaseException as exc:
                self.events.append(f"disturbed by {type(exc).__name__}")
                raise

    async def background(self) -> None:
        await anyio.sleep(0.005)
        self.events.append("background")


def stopper() -> Callable[[], object]:
    """Return what does as the timeout of the door would, in which this is called."""
    block = current_cancelable()
    assert block is not None
    return lambda: block.token.cancel_nowait(CancelationReason.TIMEOUT)


async def hang_up_in_stream(app: ASGIApp, ticks: Ticks, **options: Any) -> Call:
    """A request whose client leaves when the stream stands still and somebody listens."""
    async with running(app, **options) as call:
        await ticks.waiting.wait()
        await call.listened_to()
        await call.hang_up()
    return call


@pytest.mark.parametrize("spec_version", VERSIONS)
@pytest.mark.parametrize("disconnect", ["repeats", "once"])
@pytest.mark.parametrize("door", DOORS)
async def test_the_background_of_a_stream_runs_after_its_cleanup(door: str, disconnect: str, spec_version: str) -> None:
    app, ticks = application(door), Ticks()

    @app.get("/")
    async def stream() -> StreamingResponse:
        return StreamingResponse(ticks(), background=BackgroundTask(ticks.background))

    async with nothing_left():
        call = await hang_up_in_stream(app, ticks, disconnect=disconnect, spec_version=spec_version)
    assert (call.outcome, call.exception) == ("returned", None)
    assert str(call.reason) == "disconnect"
    assert ticks.events == ["cleaned up", "background"]


@pytest.mark.parametrize("door", DOORS)
async def test_a_server_that_says_so_by_an_error_of_send(door: str) -> None:
    app, ticks = application(door), Ticks()

    @app.get("/")
    async def stream() -> StreamingResponse:
        return StreamingResponse(ticks(), background=BackgroundTask(ticks.background))

    async with nothing_left():
        call = await hang_up_in_stream(app, ticks, send_raises=True, spec_version="2.4")
    assert (call.outcome, call.exception) == ("returned", None)
    assert ticks.events == ["cleaned up", "background"]


@pytest.mark.parametrize("door", DOORS)
async def test_injected_background_tasks_run(door: str) -> None:
    app, ticks = application(door), Ticks()

    @app.get("/")
    async def stream(tasks: BackgroundTasks) -> StreamingResponse:
        tasks.add_task(ticks.background)
        return StreamingResponse(ticks())

    await hang_up_in_stream(app, ticks)
    assert ticks.events == ["cleaned up", "background"]


@pytest.mark.parametrize("door", DOORS)
async def test_a_background_that_takes_longer_than_a_cleanup_is_spared(door: str) -> None:
    app, ended = application(door, cleanup_grace=0.05), []
    if door == "route":
        configure(cleanup_grace=0.05)

    async def background() -> None:
        await anyio.sleep(0.2)
        ended.append(True)

    @app.get("/")
    async def stream() -> StreamingResponse:
        return StreamingResponse(Ticks()(), background=BackgroundTask(background))

    try:
        await hang_up(app)
    finally:
        configure(cleanup_grace=5)
    assert ended


@pytest.mark.parametrize("door", DOORS)
async def test_an_overridden_listener_is_called(door: str) -> None:
    app, told = application(door), []

    class Listening(StreamingResponse):
        async def listen_for_disconnect(self, receive: Receive) -> None:
            await super().listen_for_disconnect(receive)
            await anyio.sleep(0.005)
            told.append(True)

    @app.get("/")
    async def stream() -> StreamingResponse:
        return Listening(Ticks()())

    call = await hang_up(app)
    assert (told, call.outcome) == ([True], "returned")


@pytest.mark.parametrize("door", DOORS)
async def test_a_stream_that_is_out_of_time_ends_by_itself_and_is_cut(door: str) -> None:
    app, ticks = application(door), Ticks()

    @app.get("/")
    async def stream() -> StreamingResponse:
        ticks.stop = stopper()
        return StreamingResponse(ticks(), background=BackgroundTask(ticks.background))

    async with nothing_left():
        call = await get(app)
    assert (str(call.reason), call.status, call.is_complete) == ("timeout", 200, False)
    assert ticks.events == ["cleaned up", "background"]


@pytest.mark.parametrize("door", DOORS)
async def test_an_event_stream_that_is_out_of_time_says_so_behind_its_background(door: str) -> None:
    app, ticks = application(door), Ticks()

    @app.get("/")
    async def stream() -> StreamingResponse:
        ticks.stop = stopper()
        return StreamingResponse(ticks(), media_type="text/event-stream", background=BackgroundTask(ticks.background))

    call = await get(app)
    assert b"event: cancelled" in call.body
    assert call.is_complete
    assert ticks.events == ["cleaned up", "background"]


class Listener:
    """An application of plain ASGI that works in one task and listens in another."""

    def __init__(self, *, reacts: bool) -> None:
        self.events: list[str] = []
        self._reacts = reacts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        async with anyio.create_task_group() as group:
            group.start_soon(self._work)
            assert (await receive())["type"] == "http.disconnect"
            self.events.append("told")
            if self._reacts:
                group.cancel_scope.cancel()
            else:
                await self._wait()

    async def _wait(self) -> None:
        try:
            await anyio.sleep_forever()
        except BaseException:
            self.events.append("the listener was cancelled")
            raise

    async def _work(self) -> None:
        try:
            await anyio.sleep_forever()
        except BaseException:
            self.events.append("the work was cancelled")
            raise


async def test_a_listener_is_told_before_the_work_is_cancelled() -> None:
    listener = Listener(reacts=True)
    call = await hang_up(RequestCancelationMiddleware(listener))
    assert listener.events == ["told", "the work was cancelled"]
    assert (call.status, str(call.reason)) == (499, "disconnect")


async def test_what_does_not_end_by_itself_is_cancelled() -> None:
    listener = Listener(reacts=False)
    call = await hang_up(RequestCancelationMiddleware(listener, cleanup_grace=0.05))
    assert listener.events[0] == "told"
    assert sorted(listener.events[1:]) == ["the listener was cancelled", "the work was cancelled"]
    assert call.status == 499


async def test_an_answer_to_a_client_that_is_still_there_is_ours() -> None:
    """A listener that we have told because the time is up believes that its client has left."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        await Response(b"nobody reads this")(scope, receive, send)

    call = await get(RequestCancelationMiddleware(app, default_timeout=0.05))
    assert (call.status, call.json()) == (504, {"detail": "Timed out after 0.05 seconds"})


async def test_an_upload_that_a_child_task_reads_is_out_of_time() -> None:
    """It hears of a disconnect, for its own sake; the client that is there hears of the timeout."""
    app = application("middleware", default_timeout=0.05)

    @app.post("/")
    async def upload(request: Request) -> Response:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(request.body)
        return Response(b"all of it")

    async def half() -> AsyncIterator[bytes]:
        yield b"half of it"
        await anyio.sleep_forever()

    async with running(app, method="POST", content=half()) as call:
        await call.response_started()
    assert call.status == 504


async def test_a_handler_for_which_nobody_listens_is_cancelled_at_once() -> None:
    """Not after the time that a listener has."""
    app = application("middleware", cleanup_grace=60)

    @app.get("/")
    async def work() -> None:
        await anyio.sleep_forever()

    call = await hang_up(app)
    assert call.status == 499
    assert call.elapsed < 30


async def test_a_handler_that_reads_its_upload_hears_it_as_ever() -> None:
    app, events = application("middleware"), []

    @app.post("/")
    async def upload(request: Request) -> Response:
        try:
            await request.body()
        except ClientDisconnect:
            events.append("ClientDisconnect")
        return Response(b"its own end")

    call = await get(app, method="POST", content=b"half of it", hang_up=HangUp.before_body())
    assert (events, call.status, str(call.reason)) == (["ClientDisconnect"], 200, "disconnect")


async def test_an_upload_that_its_handler_does_not_catch_is_silent() -> None:
    app = application("middleware around a BaseHTTPMiddleware")

    @app.post("/")
    async def upload(request: Request) -> Response:
        return Response(await request.body())

    call = await get(app, method="POST", content=b"half of it", hang_up=HangUp.before_body())
    assert (call.status, call.exception) == (499, None)


async def test_a_body_that_fastapi_parses_is_not_called_malformed() -> None:
    app = application("middleware")

    @app.post("/")
    async def upload(item: dict[str, int]) -> None: ...

    headers = {"content-type": "application/json"}
    call = await get(app, method="POST", content=b'{"a": 1}', headers=headers, hang_up=HangUp.before_body())
    assert call.status == 499


async def test_a_handle_inside_of_a_stream_does_not_take_its_background() -> None:
    app, ticks = application("middleware"), Ticks()

    async def guarded(cancel: Any) -> AsyncIterator[bytes]:
        async with cancel:
            async for tick in ticks():
                yield tick

    @app.get("/")
    async def stream(cancel: RequestCancelable) -> StreamingResponse:
        return StreamingResponse(guarded(cancel), background=BackgroundTask(ticks.background))

    call = await hang_up(app)
    assert call.exception is None
    assert ticks.events[-1] == "background"


@pytest.mark.parametrize("door", DOORS)
async def test_the_background_of_our_own_stream_runs_after_a_cut(door: str) -> None:
    app, ticks = application(door), Ticks()

    @app.get("/")
    async def stream(cancel: RequestCancelable) -> StreamingResponse:
        ticks.stop = lambda: cancel.cancel_nowait(CancelationReason.TIMEOUT)
        return CancelableStreamingResponse(ticks(), cancel=cancel, background=BackgroundTask(ticks.background))

    # The test's own server cannot be told to close, and gets the error.
    call = await get(app, raise_app_exceptions=False)
    assert (call.status, call.is_complete) == (200, False)
    assert ticks.events == ["cleaned up", "background"]


@pytest.mark.parametrize("why", ["disconnect", "timeout"])
@pytest.mark.parametrize("door", DOORS)
async def test_a_download_is_a_finished_result(door: str, why: str, tmp_path: Any) -> None:
    """Its background deletes a temporary file."""
    app = application(door, default_timeout=0.15 if why == "timeout" else None)
    path = tmp_path / "report"
    deleted: list[bool] = []
    path.write_bytes(b"x" * 300_000)

    @app.get("/")
    async def download() -> FileResponse:
        return FileResponse(path, background=BackgroundTask(deleted.append, True))

    # A busy machine may take its time before the response begins, which must come before the limit.
    slow = Slow(app, 0.16 if why == "timeout" else 0)
    options: dict[str, Any] = {"hang_up": HangUp.after_response(1)} if why == "disconnect" else {}
    call = await get(slow, **options)
    assert (call.status, deleted) == (200, [True])
    assert call.is_complete or why == "disconnect"


class Slow:
    """A connection that takes its time for each chunk."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_slowly(message: Message) -> None:
            await anyio.sleep(self._seconds)
            await send(message)

        await self._app(scope, receive, send_slowly)


async def test_a_response_that_has_no_body_is_a_finished_result() -> None:
    ran: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(status_code=204, background=BackgroundTask(ran.append, True))(scope, receive, send)

    slow = Slow(RequestCancelationMiddleware(app), 0)
    await get(slow, hang_up=HangUp.after_response(0))
    assert ran


@pytest.mark.parametrize("kind", ["pathsend", "zerocopysend"])
async def test_what_the_server_reads_itself_ends_a_response(kind: str) -> None:
    """The disconnect that follows every complete response stops nothing."""
    events: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": f"http.response.{kind}", "path": "/dev/null", "file": 3})
        await anyio.sleep(0.05)
        events.append("background")

    complete = anyio.Event()

    async def receive() -> Message:
        await complete.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == f"http.response.{kind}":
            complete.set()

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "asgi": {"version": "3.0"}}
    await RequestCancelationMiddleware(app)(scope, receive, send)
    assert events == ["background"]


async def test_a_task_that_is_cancelled_once_keeps_its_cleanup() -> None:
    """As Django does it: an ``asyncio`` task for the work, cancelled by the one that listens."""
    if sniffio.current_async_library() != "asyncio":
        pytest.skip("asyncio's own tasks")
    events: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            events.append("cleaned up")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        task = asyncio.create_task(work())
        await receive()
        task.cancel()
        await asyncio.wait([task])
        events.append("finished")

    await hang_up(RequestCancelationMiddleware(app))
    assert events == ["cleaned up", "finished"]
