"""Everyone in the stack sees the answer, on either side of our middleware."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import anyio
import fastapi.routing
import pytest
from fastapi import APIRouter, FastAPI, Request
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import Response
from starlette.routing import BaseRoute, Host, Mount, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelable_deps import RequestCancelationMiddleware, TimeoutPolicy, begin_shutdown, cancelation_lifespan
from cancelable_deps.doors.base_http import InnerDoor
from tests.calls import get, hang_up, running
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio

request_id: ContextVar[str] = ContextVar("request_id", default="none")


class Observer:
    """A middleware that counts, adds a header and sets a variable, as those for metrics and correlation do."""

    def __init__(self, app: ASGIApp, seen: list[Any], waits: bool = False) -> None:
        self.app = app
        self.seen = seen
        self.waits = waits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id.set("7")
        if self.waits:
            await anyio.sleep(0.001)

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.seen.append(message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", b"7")]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        except BaseException as exc:
            self.seen.append(type(exc).__name__)
            raise


def application(seen: list[Any], place: str, **options: Any) -> FastAPI:
    app = FastAPI(lifespan=cancelation_lifespan(grace=0))
    if "BaseHTTPMiddleware" in place:

        @app.middleware("http")
        async def pass_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
            return await call_next(request)

    observer = Middleware(Observer, seen=seen, waits="waits" in place)
    ours = Middleware(RequestCancelationMiddleware, **options)
    app.user_middleware[:0] = [observer, ours] if place == "outside" else [ours, observer]

    app.state.has_begun = anyio.Event()

    @app.get("/")
    async def work() -> None:
        app.state.has_begun.set()
        await anyio.sleep_forever()

    return app


PLACES = ["outside", "inside", "inside, waits", "inside, around a BaseHTTPMiddleware"]


@pytest.mark.parametrize("why", ["disconnect", "timeout", "shutdown"])
@pytest.mark.parametrize("place", PLACES)
async def test_a_middleware_sees_the_same_wherever_it_stands(place: str, why: str) -> None:
    seen: list[Any] = []
    app = application(seen, place, default_timeout=0.05 if why == "timeout" else None)
    async with nothing_left(), running(app, lifespan=True) as call:
        await call.listened_to()
        if why != "timeout":
            await app.state.has_begun.wait()
        if why == "disconnect":
            await call.hang_up()
        elif why == "shutdown":
            begin_shutdown()
    status = {"disconnect": 499, "timeout": 504, "shutdown": 503}[why]
    assert (call.status, seen) == (status, [status])
    assert (b"x-request-id", b"7") in call.sent[0]["headers"]
    assert call.is_complete or why == "disconnect"


@pytest.mark.parametrize("place", ["inside", "inside, waits", "inside, around a BaseHTTPMiddleware"])
async def test_the_log_line_has_the_context_of_the_handler(place: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ids: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        ids.append(request_id.get())
        return True

    logger = logging.getLogger("cancelable_deps")
    logger.addFilter(note)
    try:
        await hang_up(application([], place))
    finally:
        logger.removeFilter(note)
    assert ids == ["7"]


async def test_the_writer_of_a_policy_answers_there_too() -> None:
    seen: list[Any] = []
    policy = TimeoutPolicy(0.05, status_code=503, response=lambda request, error: Response(b"later", 503))
    call = await get(application(seen, "inside", default_policy=policy))
    assert (call.status, call.body, seen) == (503, b"later", [503])


async def test_in_an_application_that_is_mounted() -> None:
    seen: list[Any] = []

    async def work(request: Request) -> Response:
        await anyio.sleep_forever()
        return Response()

    inner = Starlette(routes=[Route("/", work)], middleware=[Middleware(Observer, seen=seen)])
    outer = Starlette(routes=[Mount("/inner", inner)], middleware=[Middleware(RequestCancelationMiddleware)])
    call = await hang_up(outer, "/inner/")
    assert (call.status, seen) == (499, [499])


@pytest.mark.parametrize("path", ["/work", "/again/work", "/again/again/work", "/inner/again/work"])
async def test_in_a_router_that_is_mounted_in_itself(path: str) -> None:
    seen: list[Any] = []

    async def work(request: Request) -> Response:
        await anyio.sleep_forever()
        return Response()

    router = Router([Route("/work", work)], middleware=[Middleware(Observer, seen=seen)])
    inner = Starlette(routes=[Mount("/", router)])
    inner.middleware_stack = inner.build_middleware_stack()
    router.routes += [Mount("/inner", inner), Mount("/again", router)]
    app = Starlette(routes=[Mount("/", router)], middleware=[Middleware(RequestCancelationMiddleware)])
    call = await hang_up(app, path)
    assert (call.status, set(seen)) == (499, {499})


async def test_work_outside_of_a_handler_that_has_returned_is_stopped_too() -> None:
    """A middleware that holds the response back is not what the handler's result is to be spared for."""
    waiting = anyio.Event()

    class Buffer:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def keep(message: Message) -> None: ...

            await self.app(scope, receive, keep)
            waiting.set()
            await anyio.sleep_forever()

    async def work(request: Request) -> Response:
        return Response()

    ours = Middleware(RequestCancelationMiddleware, cleanup_grace=0.05)
    app = Starlette(routes=[Route("/", work)], middleware=[ours, Middleware(Buffer)])
    async with nothing_left(), running(app) as call:
        await waiting.wait()
        await call.listened_to()
        await call.hang_up()
    assert call.status == 499


async def test_an_application_is_given_its_gateways_once() -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)
    app.add_middleware(RequestCancelationMiddleware)
    stack: Any = app.build_middleware_stack()
    gateways = 0
    while hasattr(stack, "app") and not hasattr(stack, "routes"):
        gateways += isinstance(stack, InnerDoor)
        stack = stack.app
    assert gateways == 1


PLACES_OF_HANDLERS = ["host", "route", "router", "mount"]
if hasattr(fastapi.routing, "_IncludedRouter"):  # Before 0.137 FastAPI had no mounts in included routers.
    PLACES_OF_HANDLERS.append("mount of an included router")


@pytest.mark.parametrize("place", PLACES_OF_HANDLERS)
@pytest.mark.parametrize("kind", ["BaseHTTPMiddleware", "another"])
async def test_whatever_leads_to_a_handler(place: str, kind: str) -> None:
    seen: list[Any] = []
    cleaned: list[bool] = []

    async def note(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        seen.append(response.status_code)
        return response

    async def work(request: Request) -> Response:
        try:
            await anyio.sleep_forever()
            return Response()
        finally:
            await anyio.sleep(0.01)
            cleaned.append(True)

    observer = Middleware(BaseHTTPMiddleware, dispatch=note)
    if kind == "another":
        observer = Middleware(Observer, seen=seen)
    inner = Starlette(routes=[Route("/", work)], middleware=[observer])
    included = APIRouter()
    included.mount("/x", inner)
    app = FastAPI()
    routes: dict[str, list[BaseRoute]] = {
        "host": [Host("{name:path}", Starlette(routes=[Mount("/x", inner)]))],
        "route": [Route("/x/", work, middleware=[observer])],
        "router": [Mount("/x", Router([Route("/", work)], middleware=[observer]))],
        "mount": [Mount("/x", routes=[Route("/", work)], middleware=[observer])],
        "mount of an included router": [],
    }
    app.router.routes += routes[place]
    app.include_router(included)
    app.add_middleware(RequestCancelationMiddleware)
    async with nothing_left(), running(app, "/x/") as call:
        await call.listened_to()
        await call.hang_up()
    assert (call.status, seen, cleaned) == (499, [499], [True])


async def test_an_exception_group_of_the_application_stays_one() -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, default_timeout=30)

    @app.exception_handler(ExceptionGroup)
    async def answer(request: Request, error: Exception) -> Response:
        return Response(b"a group", 418)

    @app.get("/")
    async def work() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)

    async def fail() -> None:
        raise ValueError

    assert (await get(app)).status == 418
