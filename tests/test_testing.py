# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: SIM117 - the client is one thing, a call another
from __future__ import annotations

import asyncio
import io
import json
import math
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Annotated, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx
import pytest
import trio.testing
from anyio._backends._asyncio import _task_states
from fastapi import BackgroundTasks, Cookie, Depends, FastAPI, File, Form, Request, Response, UploadFile, WebSocket
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from cancelable_deps import (
    Cancelable,
    CancelationReason,
    CancellationEvent,
    RequestCancelable,
    RequestCancelationMiddleware,
    cancelable_with_timeout,
    with_cancelation,
)
from cancelable_deps.testing import (
    CancelableClient,
    HangUp,
    SocketClosed,
    advance,
    assert_cancelled,
    no_tasks_left,
)
from cancelable_deps.testing import client as testing_client

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])
START = {"type": "http.response.start", "status": 200, "headers": []}
LAST = {"type": "http.response.body", "body": b"all"}


@pytest.fixture(params=["repeats", "once"])
def disconnect(request: pytest.FixtureRequest) -> Any:
    return request.param


def application() -> FastAPI:
    app = FastAPI()

    @app.get("/never")
    @with_cancelation
    async def never() -> None:
        await anyio.sleep_forever()

    @app.get("/deaf")
    async def deaf() -> str:
        await anyio.sleep(0.01)
        return "never asked"

    @app.api_route("/echo", methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    async def echo(request: Request) -> dict[str, Any]:
        return {
            "method": request.method,
            "query": str(request.query_params),
            "body": (await request.body()).decode(),
            "header": request.headers.get("x-own"),
        }

    @app.post("/form")
    async def form(name: Annotated[str, Form()], file: Annotated[UploadFile, File()]) -> list[str]:
        return [name, (await file.read()).decode()]

    @app.get("/cookie")
    async def cookie(response: Response, seen: Annotated[str | None, Cookie()] = None) -> str | None:
        response.set_cookie("seen", "yes")
        return seen

    @app.get("/fails")
    async def fails() -> None:
        raise KeyError("own")

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            for index in range(10):
                yield str(index).encode()
                await anyio.lowlevel.checkpoint()

        return StreamingResponse(body())

    return app


async def test_requests_read_as_with_httpx() -> None:
    async with CancelableClient(application(), headers={"x-own": "mine"}) as client:
        response = await client.post("/echo", params={"a": "1 2"}, content="body")
        assert response.status_code == 200
        assert response.json() == {"method": "POST", "query": "a=1+2", "body": "body", "header": "mine"}
        assert str(response.request.url).startswith("http://testserver/echo?a=1")
        assert (await client.get("/echo")).json()["method"] == "GET"
        assert json.loads((await client.put("/echo", json={"x": 1})).json()["body"]) == {"x": 1}
        assert (await client.patch("/echo")).json()["method"] == "PATCH"
        assert (await client.delete("/echo")).json()["method"] == "DELETE"
        assert (await client.options("/echo")).json()["method"] == "OPTIONS"
        assert (await client.head("/echo")).status_code == 405
        form = await client.post("/form", data={"name": "me"}, files={"file": b"content"})
        assert form.json() == ["me", "content"]


async def test_what_httpx_does_for_its_users() -> None:
    app = FastAPI()

    @app.get("/files/{name}")
    async def file(name: str, request: Request) -> list[str | None]:
        return [name, request.headers.get("authorization"), request.cookies.get("seen")]

    @app.get("/moved")
    async def moved() -> Response:
        response = RedirectResponse("/files/here")
        response.set_cookie("seen", "yes")
        return response

    async with CancelableClient(app) as client:
        assert (await client.get("/moved")).status_code == 307
        client.cookies.clear()
        response = await client.get("/moved", follow_redirects=True, auth=("me", "secret"))
        assert response.json() == ["here", "Basic bWU6c2VjcmV0", "yes"]
        assert [earlier.status_code for earlier in response.history] == [307]
        assert response.elapsed.total_seconds() < 10
        # Decoded once, as by a server.
        assert (await client.get("/files/100%2541")).json()[0] == "100%41"


async def test_bodies_that_httpx_leaves_to_its_other_client() -> None:
    async with CancelableClient(application()) as client:
        for content in ([b"one", b"two"], io.BytesIO(b"onetwo")):
            assert (await client.post("/echo", content=content)).json()["body"] == "onetwo"


async def test_a_response_is_what_a_server_lets_through() -> None:
    app = FastAPI()
    app.head("/")(lambda: Response(b"what a GET is answered"))
    app.get("/stream")(lambda: StreamingResponse(iter([b"a", b"b"])))
    async with CancelableClient(app) as client:
        response = await client.head("/")
        assert (response.content, response.headers["content-length"]) == (b"", "22")
        assert dict((await client.get("/stream")).headers) == {}


async def test_a_body_is_decoded_for_those_who_ask() -> None:
    app = FastAPI()
    app.get("/")(lambda: Response(b"no gzip", headers={"content-encoding": "gzip"}))
    async with CancelableClient(app) as client:
        async with client.start("GET", "/") as call:
            pass
        assert call.body == b"no gzip"
        with pytest.raises(httpx.DecodingError):
            await call.response()


@pytest.mark.parametrize("messages", [[START], [START, {**LAST, "more_body": True}]])
async def test_a_cut_response_is_no_whole_one(messages: list[dict[str, Any]]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    async with CancelableClient(app, lifespan=False) as client:
        with pytest.raises(
            httpx.RemoteProtocolError, match="the response is incomplete: <GET /: the application returned"
        ):
            await client.get("/")
        async with client.start("GET", "/") as call:
            response = await call.response()
        assert (response.status_code, call.is_complete) == (200, False)


@pytest.mark.parametrize("beside", [False, True])
async def test_cookies_are_kept(beside: bool) -> None:
    async with CancelableClient(application()) as client:
        if beside:
            async with client.start("GET", "/cookie", hang_up=HangUp.after_response(1)):
                pass
            assert "seen" not in client.cookies
            async with client.start("GET", "/cookie") as call:
                pass
            assert call.json() is None
        else:
            assert (await client.get("/cookie")).json() is None
        assert (await client.get("/cookie")).json() == "yes"
        assert client.cookies["seen"] == "yes"


async def test_hanging_up(disconnect: Any) -> None:
    async with CancelableClient(application(), disconnect=disconnect) as client:
        async with client.start("GET", "/never") as call:
            await call.listened_to()
            assert (call.outcome, call.status, call.reason, call.has_ended) == ("running", None, None, False)
            await call.hang_up()
        assert (call.outcome, call.status, call.reason) == ("returned", 499, CancelationReason.DISCONNECT)
        assert call.elapsed > 0
        assert call.left_behind == []
        assert_cancelled(call)
        assert_cancelled(call, reason=CancelationReason.DISCONNECT)
        assert_cancelled(call, reason="disconnect")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        assert (await call.response()).status_code == 499


async def test_a_handler_that_does_not_ask_is_not_cancelled() -> None:
    async with CancelableClient(application()) as client:
        async with client.start("GET", "/deaf") as call:
            await call.running()
            await call.hang_up()
        assert (call.outcome, call.status, call.reason) == ("returned", 200, None)
        with pytest.raises(AssertionError, match=r"not cancelled: the application returned after .*status 200"):
            assert_cancelled(call)


async def test_the_wrong_reason_is_named() -> None:
    async with CancelableClient(application()) as client:
        async with client.start("GET", "/never", hang_up=HangUp.before_body()) as call:
            pass
        with pytest.raises(AssertionError, match="cancelled for disconnect, not for timeout"):
            assert_cancelled(call, CancelationReason.TIMEOUT)


async def test_a_long_stream_is_told_in_short() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"chunk"

    app = FastAPI()
    app.get("/")(lambda: StreamingResponse(chunks()))
    async with CancelableClient(app) as client, client.start("GET", "/") as call:
        pass
    assert call.describe().endswith("it sent http.response.start, http.response.body x 1001 (status 200)")


async def test_a_call_that_still_runs_is_not_cancelled() -> None:
    async with CancelableClient(application()) as client, client.start("GET", "/never") as call:
        await call.running()
        with pytest.raises(AssertionError, match="the application still runs"):
            assert_cancelled(call)
        await call.hang_up()


class Reader:
    """An application that notes what ``receive()`` says."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        more = True
        while more:
            message = await receive()
            self.seen.append(message.get("body", "left"))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        self.seen.append((await receive())["type"] if self.leaves_early else None)
        await send({"type": "http.response.body", "body": b"last"})
        self.seen.append((await receive())["type"])

    leaves_early = False


async def test_hanging_up_before_the_body() -> None:
    app = Reader()
    async with CancelableClient(app) as client, client.start("POST", "/", content=b"abc", hang_up=HangUp.before_body()):
        pass
    assert app.seen == ["left", None, "http.disconnect"]


async def test_hanging_up_after_some_bytes_of_the_request() -> None:
    app = Reader()
    async with CancelableClient(app) as client:
        async with client.start("POST", "/", content=[b"abc", b"def", b"ghi"], hang_up=HangUp.after_request(4)):
            pass
    assert app.seen[:3] == [b"abc", b"d", "left"]


async def test_a_body_that_is_broken_off_in_its_last_piece() -> None:
    app = Reader()
    async with CancelableClient(app) as client:
        async with client.start("POST", "/", content=b"abc", hang_up=HangUp.after_request(2)):
            pass
    assert app.seen[:2] == [b"ab", "left"]


@pytest.mark.parametrize("count", [0, 1, 5])
async def test_hanging_up_after_some_bytes_of_the_response(count: int) -> None:
    app = Reader()
    app.leaves_early = True
    async with CancelableClient(app) as client:
        async with client.start("POST", "/", hang_up=HangUp.after_response(count)) as call:
            pass
    assert app.seen == [b"", "http.disconnect", "http.disconnect"]
    assert call.body == b"firstlast"


async def test_hanging_up_in_the_tick_of_the_last_byte() -> None:
    finished: list[str] = []
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> str:
        await anyio.sleep(0.03)
        tasks.add_task(background)
        return "done"

    async def background() -> None:
        await anyio.sleep(0.01)
        finished.append("background")

    async with CancelableClient(app) as client:
        async with client.start("GET", "/", hang_up=HangUp.at_end()) as call:
            pass
        assert (call.status, call.reason, finished) == (200, None, ["background"])


async def test_who_listens_is_told_before_the_last_byte_is_sent() -> None:
    told: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            told.append(call.is_complete)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            await anyio.wait_all_tasks_blocked()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"all"})

    async with CancelableClient(app) as client:
        async with client.start("GET", "/", hang_up=HangUp.at_end()) as call:
            pass
        assert (told, call.is_complete) == ([False], True)
        async with client.start("GET", "/") as call:
            pass
        assert told == [False, True]


async def test_a_disconnect_is_repeated_or_not(disconnect: Any) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        with anyio.move_on_after(0.05):
            while len(seen) < 3:
                seen.append((await receive())["type"])

    async with CancelableClient(app, disconnect=disconnect) as client:
        async with client.start("GET", "/", hang_up=HangUp.before_body()):
            pass
    assert seen == ["http.disconnect"] * (3 if disconnect == "repeats" else 1)


async def test_pieces_of_the_body_arrive_slowly() -> None:
    gate = anyio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        await gate.wait()
        yield b"two"

    app = Reader()
    async with CancelableClient(app) as client:
        async with client.start("POST", "/", content=pieces()) as call:
            await call.listened_to()
            assert app.seen == [b"one"]
            gate.set()
        assert b"".join(piece for piece in app.seen if isinstance(piece, bytes)) == b"onetwo"


async def test_a_body_that_nobody_wants_to_the_end_is_closed() -> None:
    closed: list[str] = []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"more"
        finally:
            closed.append("closed")

    app = Reader()
    async with CancelableClient(app) as client:
        async with client.start("POST", "/", content=pieces(), hang_up=HangUp.after_request(10)):
            pass
        assert (b"".join(app.seen[:-3]), app.seen[-3], closed) == (b"moremoremo", "left", ["closed"])
    async with CancelableClient(application()) as client:
        await client.request("GET", "/deaf", content=pieces())
    assert closed == ["closed", "closed"]


async def test_a_body_that_fails_breaks_its_own_connection_and_no_other() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        raise KeyError("no more")

    app = Reader()
    async with no_tasks_left(), CancelableClient(app) as client:
        with pytest.raises(KeyError, match="no more"):
            await client.post("/", content=pieces())
        with pytest.raises(KeyError, match="no more"):
            async with client.start("POST", "/", content=pieces()):
                pass
        assert app.seen[:3] == [b"one", "left", None]
        assert (await client.post("/", content=b"whole")).status_code == 200


@pytest.mark.parametrize("reads", [0, 1, 2])
async def test_a_body_that_nobody_reads_to_its_end_is_not_left_behind(reads: int) -> None:
    closed: list[str] = []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            yield b"one"
            yield b"two"
            await anyio.sleep_forever()
        finally:
            closed.append("closed")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        for _ in range(reads):
            await receive()
        await anyio.wait_all_tasks_blocked()
        await Response()(scope, receive, send)

    async with CancelableClient(app) as client:
        async with client.start("POST", "/", content=pieces()) as call:
            pass
        assert (call.status, call.left_behind, closed) == (200, [], ["closed"])


async def test_a_body_by_hand() -> None:
    app = Reader()
    async with CancelableClient(app) as client:
        async with client.start("POST", "/", body_by_hand=True) as call:
            await call.send_body(b"one")
            await call.listened_to()
            assert app.seen == [b"one"]
            await call.send_body(b"two", more=False)
        assert app.seen[:2] == [b"one", b"two"]


async def test_chunks_and_a_client_that_stops_reading() -> None:
    async with CancelableClient(application()) as client:
        async with client.start("GET", "/stream") as call:
            call.stop_reading(after=3)
            await call.response_started()
            await call.running()
            assert (call.body, call.is_complete) == (b"012", False)
            call.resume_reading()
            assert [chunk async for chunk in call.chunks()] == [str(index).encode() for index in range(10)]
        assert (await call.response()).text == "0123456789"


async def test_a_client_that_reads_nothing_of_the_body_has_the_headers() -> None:
    async with CancelableClient(application()) as client, client.start("GET", "/stream") as call:
        call.stop_reading()
        await call.response_started()
        await call.running()
        assert (call.status, call.body) == (200, b"")
        call.resume_reading()


async def test_chunks_may_be_left_before_the_end() -> None:
    async with CancelableClient(application()) as client, client.start("GET", "/stream") as call:
        async for chunk in call.chunks():
            assert chunk == b"0"
            break


async def test_sending_after_the_hang_up_raises_if_asked_to() -> None:
    raised: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        await receive()
        await receive()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        except OSError:
            raised.append(True)

    async with CancelableClient(app, send_raises=True, spec_version="2.4") as client:
        async with client.start("GET", "/", hang_up=HangUp.after_request(0)) as call:
            pass
    assert raised == [True]
    assert call.scope["asgi"]["spec_version"] == "2.4"


async def test_hanging_up_in_the_middle_of_a_step() -> None:
    app = FastAPI()

    @app.get("/")
    @with_cancelation
    async def endpoint(wait: bool) -> str:
        call.hang_up_nowait()
        if wait:
            await anyio.sleep_forever()
        return "done"

    @app.websocket("/")
    async def busy(websocket: WebSocket, cancel: RequestCancelable) -> None:
        async with cancel:
            await websocket.accept()
            socket.drop_nowait()
            await anyio.sleep_forever()

    async with CancelableClient(app) as client:
        for wait, status in {True: 499, False: 200}.items():
            async with client.start("GET", "/", params={"wait": wait}) as call:
                pass
            assert call.status == status
        async with client.websocket("/") as socket:
            await socket.ended()
        assert_cancelled(socket, CancelationReason.DISCONNECT)


async def test_the_response_is_at_hand() -> None:
    async with CancelableClient(application()) as client, client.start("GET", "/echo") as call:
        assert (call.status, dict(call.headers), call.body) == (None, {}, b"")
        await call.ended()
        assert (call.status, call.headers["Content-Type"], call.json()["method"]) == (200, "application/json", "GET")


@pytest.mark.parametrize("count", [1, 2])
async def test_who_reads_at_one_time(count: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def read() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(read)

    async with CancelableClient(app, lifespan=False) as client, client.start("GET", "/") as call:
        await call.listened_to()
        await call.hang_up()
    assert call.most_readers == count


ACCEPT = {"type": "websocket.accept"}
CLOSE = {"type": "websocket.close", "code": 1000}
REFUSE = {"type": "websocket.http.response.start", "status": 403, "headers": []}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([LAST], "http.response.start"),
        ([START, START], "http.response.body"),
        ([START, LAST, LAST], "nothing more"),
        ([CLOSE, ACCEPT], "nothing more"),
        ([ACCEPT, ACCEPT], "websocket.send, websocket.close"),
        ([REFUSE, CLOSE], "websocket.http.response.body"),
        ([{"type": "websocket.send", "text": ""}], "websocket.accept, websocket.close, websocket.http.response.start"),
    ],
)
async def test_what_no_server_takes_is_refused(messages: list[dict[str, Any]], expected: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    async with CancelableClient(app, lifespan=False) as client:
        call = client.start("GET", "/") if messages[0]["type"].startswith("http") else client.websocket("/")
        with pytest.raises(RuntimeError, match=f"and a server expects {expected}$"):
            async with call as running:
                await running.ended()


async def test_what_the_application_raises_is_raised() -> None:
    async with CancelableClient(application()) as client:
        with pytest.raises(KeyError, match="own"):
            await client.get("/fails")
    async with CancelableClient(application(), raise_app_exceptions=False) as client:
        async with client.start("GET", "/fails") as call:
            pass
        assert (call.outcome, call.status) == ("raised", 500)
        assert isinstance(call.exception, KeyError)


async def test_what_the_test_raises_ends_the_application() -> None:
    async with CancelableClient(application()) as client:
        with pytest.raises(LookupError):  # noqa: PT012
            async with client.start("GET", "/never") as call:
                await call.running()
                raise LookupError
        await call.ended()
        assert call.outcome == "cancelled"


@on_asyncio
@pytest.mark.parametrize("kind", ["http", "websocket", "lifespan"])
async def test_an_application_runs_in_a_task_as_on_a_server(kind: str) -> None:
    chosen: ContextVar[str] = ContextVar("chosen", default="nothing")
    seen: list[tuple[Any, str]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        if scope["type"] == kind:
            seen.append((_task_states.get(task), chosen.get()))
        if scope["type"] == "http":
            await Response()(scope, receive, send)

    chosen.set("by the test")
    async with CancelableClient(app) as client:
        if kind == "http":
            await client.get("/")
        elif kind == "websocket":
            async with client.websocket("/"):
                pass
    assert seen == [(None, "by the test")]


@on_asyncio
async def test_an_application_that_goes_on_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing_client, "_NEXT_CANCELLATION", 0.01)
    cancelled: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for number in range(3):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            cancelled.append(number)

    async with CancelableClient(app, lifespan=False, ceiling=0.05) as client:
        with suppress(LookupError):
            async with client.start("GET", "/"):
                raise LookupError
    assert cancelled == [0, 1, 2]


async def test_an_application_that_hangs_fails_the_test_with_a_message() -> None:
    async with CancelableClient(application(), ceiling=0.05) as client:
        with pytest.raises(AssertionError, match=r"not ended within 0.05 seconds: <GET /never: the application still"):
            async with client.start("GET", "/never"):
                pass


async def test_an_application_that_never_stands_still() -> None:
    app = FastAPI()

    @app.get("/")
    @with_cancelation
    async def endpoint() -> None:
        while True:
            await anyio.lowlevel.checkpoint()

    async with CancelableClient(app) as client:
        async with client.start("GET", "/") as call:
            await call.running()
            await call.listened_to()
            await call.hang_up()
        assert_cancelled(call, reason=CancelationReason.DISCONNECT)


async def test_the_reason_of_a_handle() -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(0.02))]) -> None:
        async with cancel:
            await anyio.sleep_forever()

    async with CancelableClient(app) as client:
        async with client.start("GET", "/") as call:
            pass
        assert_cancelled(call, CancelationReason.TIMEOUT)
        assert call.status == 504


async def test_the_reason_of_an_event() -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(event: CancellationEvent) -> str:
        return str(await event.wait())

    async with CancelableClient(app) as client:
        async with client.start("GET", "/") as call:
            await call.listened_to()
            await call.hang_up()
        assert (call.reason, (await call.response()).json()) == (CancelationReason.DISCONNECT, "disconnect")


@on_asyncio
async def test_tasks_left_behind_are_named() -> None:
    app = FastAPI()
    kept: list[asyncio.Task[None]] = []

    @app.get("/")
    async def endpoint() -> None:
        kept.append(asyncio.create_task(anyio.sleep_forever(), name="forgotten"))

    async with CancelableClient(app) as client:
        async with client.start("GET", "/") as call:
            pass
        assert [left.name for left in call.left_behind] == ["forgotten"]
        assert "_asyncio.py" in call.left_behind[0].line or "tasks" in call.left_behind[0].line
    with pytest.raises(AssertionError, match="tasks are left behind: other at "):
        async with no_tasks_left():
            kept.append(asyncio.create_task(anyio.sleep_forever(), name="other"))
    for task in kept:
        task.cancel()
    await asyncio.wait(kept)


async def test_a_process_that_waits_for_the_next_job_is_not_left_behind() -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(cancel: RequestCancelable) -> int:
        async with cancel:
            return await cancel.run_in_process(abs, -3)

    async with no_tasks_left(), CancelableClient(app) as client:
        async with client.start("GET", "/") as call:
            pass
        assert (call.json(), call.left_behind) == (3, [])


async def test_the_lifespan_is_run() -> None:
    journal: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        journal.append("started")
        yield {"pool": "open"}
        journal.append("stopped")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def endpoint(request: Request) -> str:
        return str(request.state.pool)

    async with CancelableClient(app) as client:
        assert journal == ["started"]
        assert (await client.get("/")).json() == "open"
    assert journal == ["started", "stopped"]


async def test_the_lifespan_is_left_alone_if_so_wished() -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        raise LookupError("no database")
        yield

    app = FastAPI(lifespan=lifespan)
    app.get("/")(lambda: "answered")
    async with CancelableClient(app, lifespan=False) as client:
        assert (await client.get("/")).json() == "answered"


@pytest.mark.parametrize("phase", ["startup", "shutdown"])
async def test_a_lifespan_that_fails(phase: str) -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if phase == "startup":
            raise LookupError("no database")
        yield
        raise LookupError("no database")

    with pytest.raises(LookupError, match="no database"):
        async with CancelableClient(FastAPI(lifespan=lifespan)):
            assert phase == "shutdown"


async def test_a_lifespan_that_breaks_in_the_middle() -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            yield

    async def consume() -> None:
        await broken.wait()
        raise LookupError("no queue")

    broken = anyio.Event()
    with pytest.raises(ExceptionGroup) as raised:  # noqa: PT012
        async with CancelableClient(FastAPI(lifespan=lifespan)):
            broken.set()
            await anyio.wait_all_tasks_blocked()
    assert raised.group_contains(LookupError, match="no queue")


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_the_lifespan_ends_though_the_test_does_not(how: str) -> None:
    journal: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.sleep(0.001)
        journal.append("closed")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def endpoint() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            journal.append("endpoint")

    with anyio.CancelScope() as scope, suppress(LookupError):
        async with CancelableClient(app) as client, client.start("GET", "/") as call:
            await call.running()
            if how == "fails":
                raise LookupError
            scope.cancel()
            await anyio.sleep_forever()
    assert journal == ["endpoint", "closed"]


async def test_many_calls_at_once() -> None:
    async with CancelableClient(application()) as client:

        async def leave() -> None:
            async with client.start("GET", "/never", hang_up=HangUp.before_body()) as call:
                pass
            assert_cancelled(call)

        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(leave)


def slow_application() -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, default_timeout=30)

    @app.get("/middleware")
    async def middleware() -> None:
        await anyio.sleep_forever()

    @app.get("/decorator")
    @with_cancelation(timeout=3600)
    async def decorator() -> None:
        await anyio.sleep_forever()

    @app.get("/handle")
    async def handle(cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(45))]) -> str:
        try:
            async with cancel:
                await anyio.sleep_forever()
        finally:
            await anyio.sleep(1)
        return ""

    @app.get("/sleeps")
    @with_cancelation(timeout=None)
    async def sleeps() -> str:
        await anyio.sleep(86_400)
        return "a day later"

    return app


async def hours() -> None:
    async with CancelableClient(slow_application()) as client:
        for path, limit in {"/middleware": 30, "/decorator": 3600, "/handle": 45}.items():
            async with client.start("GET", path) as call:
                await call.running()
                await advance(limit - 1)
                assert not call.has_ended
                await advance(3)
                await call.ended()
            assert_cancelled(call, CancelationReason.TIMEOUT)
            assert (call.status, limit <= call.elapsed < limit + 3) == (504, True)
        async with client.start("GET", "/sleeps") as call:
            await call.running()
            await advance(86_401)
        assert (await call.response()).json() == "a day later"


@pytest.mark.parametrize("anyio_backend", ["asyncio", ("trio", {"clock": trio.testing.MockClock()})])
async def test_time_passes_from_one_deadline_to_the_next() -> None:
    journal: list[float] = []

    async def tick() -> None:
        while True:
            await anyio.sleep(10)
            journal.append(anyio.current_time() - began)

    async with anyio.create_task_group() as tasks:
        began = anyio.current_time()
        tasks.start_soon(tick)
        await advance(35)
        assert [round(moment, 1) for moment in journal] == [10, 20, 30]
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("anyio_backend", ["asyncio", ("trio", {"clock": trio.testing.MockClock()})])
async def test_every_deadline_is_kept() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        for _ in range(1500):
            await anyio.sleep(0.01)
            ticks += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await anyio.wait_all_tasks_blocked()
        await advance(15)
        assert ticks == 1500


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"debug": True})])
async def test_time_that_passes_is_no_slow_callback(caplog: pytest.LogCaptureFixture) -> None:
    # A busy machine may well take longer than the usual 0.1, to come here as well.
    asyncio.get_running_loop().slow_callback_duration = 5
    caplog.clear()
    await advance(30)
    await anyio.lowlevel.checkpoint()
    assert caplog.messages == []


@pytest.mark.parametrize("anyio_backend", [("trio", {"clock": trio.testing.MockClock()})])
async def test_a_clock_that_stands_still() -> None:
    async with CancelableClient(application(), ceiling=1) as client:
        async with client.start("GET", "/never") as call:
            await call.listened_to()
            await call.hang_up()
        assert_cancelled(call)
        async with client.start("GET", "/never", hang_up=HangUp.before_body()) as call:
            pass
        assert_cancelled(call)
        with pytest.raises(AssertionError, match="not ended within 1 seconds"):
            async with client.start("GET", "/never"):
                pass


@on_asyncio
async def test_hours_in_no_time_on_asyncio() -> None:
    await hours()


@pytest.mark.parametrize("anyio_backend", [("trio", {"clock": trio.testing.MockClock()})])
async def test_hours_in_no_time_on_trio() -> None:
    await hours()


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_real_clock_of_trio_cannot_be_moved() -> None:
    with pytest.raises(RuntimeError, match="MockClock"):
        await advance(1)


def test_the_clock_of_uvloop_cannot_be_moved() -> None:
    with pytest.raises(RuntimeError, match="asyncio's own event loop"):
        anyio.run(advance, 1, backend="asyncio", backend_options={"use_uvloop": True})


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf])
async def test_what_is_no_time_to_pass_is_refused(seconds: float) -> None:
    before = anyio.current_time()
    with pytest.raises(ValueError, match="advance must be"):
        await advance(seconds)
    assert before <= anyio.current_time() < before + 1


def sockets() -> FastAPI:
    app = FastAPI()

    @app.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        assert websocket.headers["sec-websocket-protocol"] == "chat, token"
        await websocket.accept(subprotocol="chat")
        async for text in websocket.iter_text():
            await websocket.send_text(text.upper())

    @app.websocket("/bytes")
    async def in_bytes(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_bytes(await websocket.receive_bytes())
        await websocket.send_json({"got": await websocket.receive_json()})
        await websocket.close(4000, "enough")

    @app.websocket("/busy")
    async def busy(websocket: WebSocket, cancel: RequestCancelable) -> None:
        await websocket.accept()
        async with cancel:
            await anyio.sleep_forever()

    @app.websocket("/refused")
    async def refused(websocket: WebSocket) -> None:
        await websocket.close(4403, "no")

    @app.websocket("/denied")
    async def denied(websocket: WebSocket) -> None:
        await websocket.send_denial_response(JSONResponse("who are you?", 401))

    @app.websocket("/late")
    @with_cancelation(timeout=0.02)
    async def late(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep_forever()

    return app


async def test_a_websocket() -> None:
    async with CancelableClient(sockets()) as client:
        async with client.websocket("/echo", subprotocols=["chat", "token"]) as socket:
            await socket.send_text("hello")
            assert await socket.receive_text() == "HELLO"
            assert socket.subprotocol == "chat"
            await socket.close(1001)
        assert (socket.outcome, socket.close_code) == ("returned", None)
        async with client.websocket("/bytes") as socket:
            await socket.send_bytes(b"raw")
            assert await socket.receive_bytes() == b"raw"
            await socket.send_json([1])
            assert await socket.receive_json() == {"got": [1]}
            with pytest.raises(SocketClosed, match="closed with 4000: enough"):
                await socket.receive_text()
        assert (socket.close_code, socket.close_reason) == (4000, "enough")


async def test_a_websocket_that_drops(disconnect: Any) -> None:
    async with CancelableClient(sockets(), disconnect=disconnect) as client:
        async with client.websocket("/busy") as socket:
            await socket.accepted()
            await socket.listened_to()
            await socket.drop()
        assert_cancelled(socket, CancelationReason.DISCONNECT)


async def test_a_websocket_that_is_stopped_or_refused() -> None:
    async with CancelableClient(sockets()) as client:
        async with client.websocket("/late") as socket:
            with pytest.raises(SocketClosed, match="4504: Timed out after"):
                await socket.receive_text()
        assert_cancelled(socket, CancelationReason.TIMEOUT)
        async with client.websocket("/refused") as socket:
            with pytest.raises(SocketClosed) as closed:
                await socket.accepted()
            assert (closed.value.code, closed.value.reason) == (4403, "no")
        async with client.websocket("/denied") as socket:
            with pytest.raises(SocketClosed, match="refused the handshake with status 401"):
                await socket.receive_text()
            assert socket.refusal is not None
            assert socket.refusal.json() == "who are you?"


async def test_a_message_of_the_other_kind_is_told() -> None:
    async with CancelableClient(sockets()) as client, client.websocket("/bytes") as socket:
        await socket.send_bytes(b"raw")
        with pytest.raises(AssertionError, match=r"has not sent text, but .*b'raw'"):
            await socket.receive_text()
        await socket.send_json([1])


def test_wrong_use_says_how_to_do_it_right() -> None:
    with pytest.raises(TypeError, match="takes an ASGI application"):
        CancelableClient("app")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match='"repeats" or "once"'):
        CancelableClient(FastAPI(), disconnect="never")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_a_client_works_in_its_block() -> None:
    client = CancelableClient(application())
    with pytest.raises(RuntimeError, match="the client is not open"):
        await client.get("/echo")
    async with client:
        with pytest.raises(RuntimeError, match="open already"):
            await client.__aenter__()
        assert (await client.get("/echo")).status_code == 200
    with pytest.raises(RuntimeError, match="the client is not open"):
        async with client.websocket("/echo"):
            pass
    async with client:
        assert (await client.get("/echo")).status_code == 200


@on_asyncio
async def test_a_client_works_in_its_event_loop() -> None:
    async with CancelableClient(application()) as client:
        with pytest.raises(RuntimeError, match=r"opened in another event loop.*loop_scope"):
            await anyio.to_thread.run_sync(lambda: anyio.run(client.get, "/echo"))


def imported_by(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_it_is_imported_by_those_who_test_only() -> None:
    assert not {"httpx", "pytest", "cancelable_deps.testing"} & imported_by("import cancelable_deps")
    assert not {"pytest"} & imported_by("import cancelable_deps.testing")
