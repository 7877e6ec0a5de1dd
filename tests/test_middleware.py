from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import anyio
import pytest
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.gzip import GZipMiddleware
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelable_deps import (
    Cancelable,
    CancelationReason,
    RequestCancelationMiddleware,
    current_cancelable,
    with_cancelation,
)
from cancelable_deps.testing import CancelableClient, advance
from tests.calls import get, hang_up, movable_clock, running

pytestmark = pytest.mark.anyio

Next = Callable[[Request], Awaitable[Response]]


class Metrics:
    """A middleware at the level of ASGI that notes every status."""

    def __init__(self, app: ASGIApp, statuses: list[int]) -> None:
        self.app = app
        self.statuses = statuses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses.append(message["status"])
            await send(message)

        await self.app(scope, receive, note)


def waiting_app(**options: Any) -> FastAPI:
    app = FastAPI()

    @app.get("/")
    async def wait() -> None:
        await anyio.sleep_forever()

    app.add_middleware(RequestCancelationMiddleware, **options)
    return app


async def test_client_that_leaves_stops_the_handler() -> None:
    call = await hang_up(waiting_app())
    assert (call.status, call.json()) == (499, {"detail": "Client closed the request"})


@pytest.mark.parametrize("timeout", [0.02, timedelta(milliseconds=20), 0])
async def test_default_timeout(timeout: Any) -> None:
    call = await get(waiting_app(default_timeout=timeout))
    assert call.status == 504
    assert call.json()["detail"].startswith("Timed out after")


async def test_outer_middleware_sees_the_status() -> None:
    statuses: list[int] = []
    slow, quick = waiting_app(), waiting_app(default_timeout=0.05)
    for app in (slow, quick):
        app.add_middleware(Metrics, statuses=statuses)
    await hang_up(slow)
    await get(quick)
    assert statuses == [499, 504]


async def test_one_line_is_logged_and_nothing_louder(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await hang_up(waiting_app())
    ours = [record for record in caplog.records if record.name == "cancelable_deps"]
    assert len(ours) == 1
    assert re.fullmatch(r"GET / cancelled after \d+\.\d+ s: disconnect", ours[0].getMessage())
    assert (ours[0].__dict__["reason"], ours[0].__dict__["route"]) == ("disconnect", "/")
    assert max(record.levelno for record in caplog.records) == logging.INFO


async def test_plain_starlette_application() -> None:
    async def wait(request: Request) -> Response:
        await anyio.sleep_forever()
        raise AssertionError

    app = RequestCancelationMiddleware(Starlette(routes=[Route("/", wait)]))
    call = await hang_up(app)
    assert call.json() == {"detail": "Client closed the request"}


async def test_bare_application_may_raise_our_errors() -> None:
    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        async with Cancelable.with_timeout(0.01):
            await anyio.sleep_forever()

    call = await get(RequestCancelationMiddleware(bare))
    assert call.status == 504


@pytest.mark.parametrize(
    ("exclude", "path", "is_covered"),
    [
        ("/health", "/health", False),
        ("/health", "/health/deep", True),
        (["/a", "/static/*"], "/static/x/y.css", False),
        ([re.compile("/v[12]/wait")], "/v2/wait", False),
        ([re.compile("/v[12]/wait")], "/v3/wait", True),
        ([lambda scope: scope["method"] == "GET"], "/anything", False),
    ],
)
async def test_excluded_paths_are_left_alone(exclude: Any, path: str, is_covered: bool) -> None:
    app = FastAPI()

    @app.get(path)
    async def endpoint() -> bool:
        return current_cancelable() is not None

    app.add_middleware(RequestCancelationMiddleware, exclude=exclude)
    assert (await get(app, path)).json() is is_covered


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"default_timeout": -1}, ValueError, "default_timeout must be zero or more"),
        ({"default_timeout": float("nan")}, ValueError, "nan"),
        ({"default_timeout": "30"}, TypeError, "takes seconds"),
        ({"cleanup_grace": -1}, ValueError, "cleanup_grace"),
        ({"exclude": ["health"]}, ValueError, "begin with '/'"),
        ({"exclude": [42]}, TypeError, "exclude takes"),
    ],
)
def test_bad_configuration_fails_when_the_app_is_built(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RequestCancelationMiddleware(FastAPI(), **options)


@movable_clock
@pytest.mark.parametrize("timeout", [10, None])
async def test_the_route_wins_over_the_default(timeout: float | None) -> None:
    app = FastAPI()

    @app.get("/")
    @with_cancelation(timeout=timeout)
    async def endpoint() -> str:
        await advance(3)
        return "finished"

    app.add_middleware(RequestCancelationMiddleware, default_timeout=2)
    assert (await get(app)).json() == "finished"


async def test_bare_decorator_keeps_the_default() -> None:
    app = FastAPI()

    @app.get("/")
    @with_cancelation
    async def endpoint() -> None:
        await anyio.sleep_forever()

    app.add_middleware(RequestCancelationMiddleware, default_timeout=0.03)
    assert (await get(app)).status == 504


@movable_clock
@pytest.mark.parametrize("where", ["inside", "outside", "both", "twice inside", "inside of what we wrap"])
@pytest.mark.parametrize("ending", ["hang up", "time out", "finish"])
async def test_base_http_middleware_anywhere(where: str, ending: str) -> None:
    cleaned = anyio.Event()
    app = FastAPI()

    @app.post("/")
    async def endpoint(request: Request) -> int:
        try:
            await anyio.sleep(0.03 if ending == "finish" else 100)
        finally:
            await anyio.sleep(0.02)
            cleaned.set()
        return len(await request.body())

    async def passing(request: Request, call_next: Next) -> Response:
        return await call_next(request)

    if where != "outside":
        app.middleware("http")(passing)
    if where == "twice inside":
        app.middleware("http")(passing)
    timeout = 5 if ending == "time out" else None
    served: ASGIApp = app
    if where == "inside of what we wrap":
        served = RequestCancelationMiddleware(app, default_timeout=timeout)
    else:
        app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)
    if where in {"outside", "both"}:
        app.middleware("http")(passing)
    async with running(served, method="POST", content=b"12345") as call:
        await call.running()
        if ending == "hang up":
            await call.hang_up()
        if ending == "time out":
            await advance(5)
    assert call.status == {"hang up": 499, "time out": 504, "finish": 200}[ending]
    assert cleaned.is_set()


async def test_gzip_and_cors_inside_and_outside() -> None:
    app = FastAPI()

    @app.get("/wait")
    async def wait() -> None:
        await anyio.sleep_forever()

    @app.get("/text")
    async def text() -> Response:
        await anyio.sleep(0.02)
        return PlainTextResponse("x" * 2000)

    app.add_middleware(GZipMiddleware)
    app.add_middleware(RequestCancelationMiddleware)
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    headers = {"origin": "http://example.org", "accept-encoding": "gzip"}
    call = await hang_up(app, "/wait", headers=headers)
    assert (call.status, call.headers["access-control-allow-origin"]) == (499, "*")
    call = await get(app, "/text", headers=headers)
    assert (call.status, call.headers["content-encoding"]) == (200, "gzip")


async def test_mounted_application_shares_the_request() -> None:
    app = FastAPI()
    app.mount("/sub", waiting_app(default_timeout=None))
    app.add_middleware(RequestCancelationMiddleware, default_timeout=5)
    call = await hang_up(app, "/sub/")
    assert (call.status, call.most_readers) == (499, 1)


async def test_default_of_a_mounted_application_replaces_the_outer_one() -> None:
    app = FastAPI()
    app.mount("/sub", waiting_app(default_timeout=0.02))
    app.add_middleware(RequestCancelationMiddleware, default_timeout=100)
    call = await get(app, "/sub/")
    assert call.json() == {"detail": "Timed out after 0.02 seconds"}


async def test_cancel_through_current_cancelable_stops_the_request() -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint() -> None:
        cancel = current_cancelable()
        assert cancel is not None
        await cancel.cancel(CancelationReason.MANUAL, "replaced by a newer request")

    app.add_middleware(RequestCancelationMiddleware)
    call = await get(app)
    assert (call.status, call.json()) == (499, {"detail": "replaced by a newer request"})


@movable_clock
async def test_cut_stream_is_not_completed() -> None:
    app = FastAPI()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"first"
        await anyio.sleep_forever()

    @app.get("/")
    async def endpoint() -> Response:
        return StreamingResponse(chunks())

    app.add_middleware(RequestCancelationMiddleware, default_timeout=5)
    async with running(app) as call:
        await call.response_started()
        await advance(5)
    assert (call.status, call.body, call.is_complete) == (200, b"first", False)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_stream_is_stopped_when_its_client_leaves(spec_version: str) -> None:
    ended = anyio.Event()
    app = FastAPI()

    async def chunks() -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await anyio.sleep_forever()
        finally:
            ended.set()

    @app.get("/")
    async def endpoint() -> Response:
        return StreamingResponse(chunks())

    app.add_middleware(RequestCancelationMiddleware)
    await hang_up(app, spec_version=spec_version)
    assert ended.is_set()


async def test_errors_of_the_application_pass() -> None:
    app = FastAPI()

    @app.get("/404")
    async def missing() -> None:
        raise HTTPException(404)

    @app.get("/bug")
    async def bug() -> None:
        raise ValueError("a bug")

    app.add_middleware(RequestCancelationMiddleware)
    assert (await get(app, "/404")).status == 404
    call = await get(app, "/bug", raise_app_exceptions=False)
    assert call.status == 500
    assert isinstance(call.exception, ValueError)


async def test_lifespan_and_websocket_pass() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async with CancelableClient(RequestCancelationMiddleware(app)) as client, client.websocket("/"):
        pass
    assert seen == ["lifespan", "websocket"]
