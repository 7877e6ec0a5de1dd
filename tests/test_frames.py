"""A handler that has returned has finished, whatever the framework still does with its result."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Request
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelable_deps import (
    CancelableRoute,
    CancelationReason,
    RequestCancelationMiddleware,
    configure,
    current_cancelable,
    with_cancelation,
)
from cancelable_deps.hosts import frames
from cancelable_deps.kernel.loops.current import current_loop
from tests.calls import get
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio

LIMIT = 0.05
DOORS = ["middleware", "route", "middleware around a BaseHTTPMiddleware", "middleware around two", "both"]


class Result(BaseModel):
    placed: bool


def application(door: str) -> FastAPI:
    app = FastAPI()
    if door in {"route", "both"}:
        app.router.route_class = CancelableRoute
    for _ in range({"middleware around a BaseHTTPMiddleware": 1, "middleware around two": 2}.get(door, 0)):

        @app.middleware("http")
        async def pass_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            return await call_next(request)

    if door != "route":
        app.add_middleware(RequestCancelationMiddleware)
    return app


def outlive_the_limit() -> None:
    """As the last step of a handler: the time is up when the loop looks again."""
    block = current_cancelable()
    assert block is not None
    token = block.token

    def strike() -> None:
        token.cancel_nowait(CancelationReason.TIMEOUT)

    try:
        current_loop().call_from_thread(strike)
    except RuntimeError:
        anyio.from_thread.run_sync(strike)


@pytest.mark.parametrize(
    "kind", ["async", "def", "def, validated", "def, decorated, validated", "its own response", "a file"]
)
@pytest.mark.parametrize("door", DOORS)
async def test_the_result_of_a_handler_that_is_late_is_the_response(door: str, kind: str, tmp_path: Any) -> None:
    app = application(door)
    billed: list[bool] = []
    path = tmp_path / "result"
    path.write_bytes(b'{"placed":true}')

    async def order(background: BackgroundTasks) -> dict[str, bool]:
        await anyio.lowlevel.checkpoint()
        outlive_the_limit()
        background.add_task(billed.append, True)
        return {"placed": True}

    def order_in_thread(background: BackgroundTasks) -> dict[str, bool]:
        outlive_the_limit()
        background.add_task(billed.append, True)
        return {"placed": True}

    async def respond() -> Response:
        outlive_the_limit()
        return JSONResponse({"placed": True}, background=BackgroundTask(billed.append, True))

    async def send_file() -> FileResponse:
        outlive_the_limit()
        return FileResponse(path, background=BackgroundTask(billed.append, True))

    endpoints: dict[str, Any] = {
        "async": order,
        "def": order_in_thread,
        "def, validated": order_in_thread,
        "def, decorated, validated": with_cancelation(order_in_thread),
        "its own response": respond,
        "a file": send_file,
    }
    app.get("/", response_model=Result if "validated" in kind else None)(endpoints[kind])
    async with nothing_left():
        call = await get(app)
    assert (call.status, call.body, billed) == (200, b'{"placed":true}', [True])
    assert call.is_complete


async def strike_in_thread() -> None:
    await anyio.to_thread.run_sync(outlive_the_limit)


async def strike_in_thread_of_block() -> None:
    block = current_cancelable()
    assert block is not None
    await block.run_in_thread(outlive_the_limit)


async def strike_in_threadpool() -> None:
    await run_in_threadpool(outlive_the_limit)


@pytest.mark.parametrize("strikes", [strike_in_thread, strike_in_thread_of_block, strike_in_threadpool])
@pytest.mark.parametrize("door", DOORS)
async def test_a_handler_that_goes_on_after_its_thread_is_stopped_at_once(
    door: str, strikes: Callable[[], Awaitable[None]]
) -> None:
    app = application(door)
    events: list[str] = []

    @app.get("/")
    async def order() -> None:
        await strikes()
        try:
            await anyio.sleep_forever()
        finally:
            events.append("stopped")

    configure(cleanup_grace=3600)
    try:
        assert ((await get(app)).status, events) == (504, ["stopped"])
    finally:
        configure(cleanup_grace=5)


@pytest.mark.parametrize("door", DOORS)
async def test_a_dependency_that_ends_before_the_response_may_commit(door: str) -> None:
    app = application(door)
    events: list[str] = []

    async def session() -> AsyncIterator[str]:
        yield "session"
        await anyio.sleep(0.01)
        events.append("committed")

    @app.get("/")
    async def order(session: str = Depends(session, scope="function")) -> str:
        outlive_the_limit()
        return session

    call = await get(app)
    assert (call.status, events) == (200, ["committed"])


async def test_middleware_that_waits_while_it_sends() -> None:
    app = application("middleware")

    class Storing:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def store(message: Message) -> None:
                await anyio.sleep(0.01)
                await send(message)

            await self.app(scope, receive, store)

    @app.get("/")
    async def order() -> dict[str, bool]:
        outlive_the_limit()
        return {"placed": True}

    app.user_middleware.append(Middleware(Storing))
    call = await get(app)
    assert (call.status, call.body) == (200, b'{"placed":true}')


async def test_in_an_application_of_starlettes() -> None:
    async def order(request: Request) -> Response:
        outlive_the_limit()
        return FileResponse(__file__)

    app = RequestCancelationMiddleware(Starlette(routes=[Route("/", order)]))
    assert (await get(app)).status == 200


async def test_a_handler_that_works_on_is_stopped() -> None:
    app = application("middleware")

    @app.get("/")
    async def order() -> None:
        outlive_the_limit()
        await anyio.sleep_forever()

    assert (await get(app)).status == 504


async def test_a_stream_that_a_late_handler_returns_is_stopped() -> None:
    app = application("middleware")

    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b"chunk"
            await anyio.sleep(0.001)

    @app.get("/")
    async def stream() -> StreamingResponse:
        outlive_the_limit()
        return StreamingResponse(chunks())

    call = await get(app)
    # Which of them is first, the head of the response or the end of the time, trio leaves to chance.
    assert (call.status, call.is_complete) in {(200, False), (504, True)}


class NeverSent(Response):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep_forever()


async def test_a_response_that_is_never_sent_is_stopped_after_a_grace() -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, default_timeout=LIMIT, cleanup_grace=LIMIT)

    @app.get("/")
    async def order() -> Response:
        return NeverSent()

    assert (await get(app)).status == 504


async def test_a_thread_that_asks_is_told() -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, default_timeout=LIMIT)
    events: list[str] = []

    @app.get("/")
    def order() -> str:
        while True:
            try:
                anyio.from_thread.check_cancelled()
            except BaseException:
                events.append("told")
                raise
            time.sleep(0.005)

    assert ((await get(app)).status, events) == (504, ["told"])


def test_what_is_known_of_the_frameworks_is_there() -> None:
    """Or a handler that has returned would be taken for one that works."""
    assert {code.co_filename.rsplit("/", 2)[-2] for code in frames._SENDERS if code} == {"starlette", "fastapi"}
    assert frames._FASTAPIS_HANDLER is not None
    assert frames._FASTAPIS_CALL is not None
    assert frames._STARLETTES_POOL is not None
    assert all("response" in code.co_varnames for code in frames._SENDERS if code)
    assert {"raw_response", "errors"} <= {*frames._FASTAPIS_HANDLER.co_varnames, *frames._FASTAPIS_HANDLER.co_cellvars}
