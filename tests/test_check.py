"""The start-up check: each finding in an application that shows it, gone where it is put right; and what it is about.

With real servers: `tests/test_check_servers.py`; with other people's packages: `tests/compat/test_check.py`.
"""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import fastapi.routing
import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from starlette.routing import Host, Mount, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelable_deps import (
    CancelableRoute,
    CancellationEvent,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    TimeoutPolicy,
    cancelable_streaming_response,
    cancelable_with_timeout,
    cancelation_lifespan,
    configure,
    create_request_task_group,
    current_cancelable,
    no_timeout,
    timeout_policy,
    with_cancelation,
)
from cancelable_deps.checks import Finding, check_stack, check_store
from cancelable_deps.checks import start as start_of_checks
from cancelable_deps.checks.findings import LEVELS
from cancelable_deps.hosts.fastapi import EVENT_STREAM, HAS_GENERATORS
from cancelable_deps.kernel.loops import known
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.operations import MemoryBackend, Operations, RedisBackend, latest_only
from cancelable_deps.testing import Call
from tests.calls import get, hang_up, running
from tests.redis_server import redis_server
from tests.test_examples import EXAMPLES
from tests.test_wsgi import View

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from starlette.middleware.wsgi import WSGIMiddleware

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[1]
# Since 0.137 FastAPI keeps an included router as it is, with its mounts; older versions copy routes out of it.
KEEPS_ROUTERS = hasattr(fastapi.routing, "_IncludedRouter")
generators_only = pytest.mark.skipif(not HAS_GENERATORS, reason="FastAPI accepts generators as endpoints since 0.135")


@pytest.fixture(autouse=True)
def known_anyio(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this is also run as on an anyio that we do not know, which is a finding."""
    monkeypatch.setattr("cancelable_deps.checks.outside.hooks_are_known", lambda is_trio: True)


def codes(app: ASGIApp, **known: Any) -> list[str]:
    return [finding.code for finding in check_stack(app, **known)]


def one(app: ASGIApp, code: str, **known: Any) -> Finding:
    [finding] = [finding for finding in check_stack(app, **known) if finding.code == code]
    return finding


# What the applications here are made of


class Outer:
    """A middleware that keeps its application where nobody looks for it."""

    def __init__(self, app: ASGIApp) -> None:
        self.inner = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.inner(scope, receive, send)


class Findable:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


BASE = Middleware(BaseHTTPMiddleware, dispatch=pass_on)
OURS = Middleware(RequestCancelationMiddleware)


class Work:
    """A handler that works until it is stopped, and then cleans up."""

    def __init__(self) -> None:
        self.events: list[str] = []

    async def __call__(self) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await self.clean_up()

    async def clean_up(self) -> None:
        try:
            await anyio.sleep(0.02)
            self.events.append("clean")
        except BaseException:
            self.events.append("interrupted")
            raise


def application(*middleware: Middleware, route: Callable[..., Any] | None = None, **options: Any) -> FastAPI:
    """An application with these middlewares, the first one outside, and a handler at `/`."""
    app = FastAPI()
    app.user_middleware[:] = middleware
    if route is not None:
        router = APIRouter(**({"route_class": options.pop("route_class")} if "route_class" in options else {}))
        router.add_api_route("/", route, methods=["GET", "POST"], **options)
        app.include_router(router)
    return app


# A BaseHTTPMiddleware that ours does not find


def hidden(between: type[Outer | Findable], work: Work) -> FastAPI:
    return application(OURS, Middleware(between), BASE, route=work.__call__)


@pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")
async def test_a_hidden_base_http_middleware() -> None:
    work = Work()
    finding = one(hidden(Outer, work), "base-http-middleware")
    assert (finding.level, finding.where) == ("warning", "middleware pass_on")
    assert "behind Outer" in finding.message
    assert (await hang_up(hidden(Outer, work))).status == 499
    assert work.events == ["interrupted"]
    gc.collect()  # Starlette's streams, which it has left open.


async def test_one_that_ours_finds() -> None:
    work = Work()
    assert codes(hidden(Findable, work)) == []
    assert (await hang_up(hidden(Findable, work))).status == 499
    assert work.events == ["clean"]


async def test_one_that_ours_finds_in_every_place_of_an_application() -> None:
    async def work(request: Request) -> Response:
        return Response()

    inner = Starlette(routes=[Route("/", work)], middleware=[BASE])
    routes = [
        Mount("/a", inner),
        Mount("/b", routes=[Route("/", work)], middleware=[BASE]),
        Mount("/c", Router([Route("/", work, middleware=[BASE])], middleware=[BASE])),
        Mount("/d", GZipMiddleware(inner)),
        Host("example.org", inner),
    ]
    assert codes(Starlette(routes=routes, middleware=[OURS])) == []
    hidden = [Mount("/a", Outer(inner)), Mount("/b", Findable(Outer(inner)))]
    assert codes(Starlette(routes=hidden, middleware=[OURS])) == ["base-http-middleware"]


def by_path(app: ASGIApp) -> ASGIApp:
    applications = {"/": app}

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        await applications["/"](scope, receive, send)

    return dispatch


async def test_a_function_that_hides_one() -> None:
    async def work() -> None: ...

    inner = application(BASE, route=work)
    assert codes(RequestCancelationMiddleware(by_path(inner))) == ["base-http-middleware"]
    # A door inside of it does what the middleware cannot do.
    inner = application(BASE, route=with_cancelation(work))
    assert codes(RequestCancelationMiddleware(by_path(inner))) == []


async def test_a_started_application_is_looked_at_as_it_is() -> None:
    app = hidden(Outer, Work())
    assert (await get(app, "/nowhere")).status == 404
    assert app.middleware_stack is not None
    assert codes(app) == ["base-http-middleware"]
    app = hidden(Findable, Work())
    await get(app, "/nowhere")
    assert codes(app) == []
    # What a function makes is known when it has been made.
    for made in (Outer, Findable):
        app = application(OURS, Middleware(lambda app, made=made: made(app)), BASE, route=Work().__call__)
        assert codes(app) == []
        await get(app, "/nowhere")
        assert codes(app) == (["base-http-middleware"] if made is Outer else [])


# Middleware that passes a receive() of its own on


class RepeatsDisconnect:
    """Reads the body, and passes it on with a disconnect behind it, as many do that log bodies."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = await receive()
        messages = [body]

        async def replay() -> Message:
            return messages.pop() if messages else {"type": "http.disconnect"}

        await self.app(scope, replay, send)


class RepeatsBody(RepeatsDisconnect):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await receive() if scope["type"] == "http" else {}

        async def receive_again() -> Message:
            return body

        await self.app(scope, receive_again if body else receive, send)


class Repeats(RepeatsDisconnect):
    """The same, done right."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages = [await receive()] if scope["type"] == "http" else []

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)


async def set_body(request: Request, body: bytes) -> None:
    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    request._receive = receive


async def logs_bodies(request: Request, call_next: RequestResponseEndpoint) -> Response:
    await set_body(request, await request.body())
    return await call_next(request)


async def short_work(request: Request) -> str:
    await request.body()
    await (anyio.sleep_forever() if "endless" in request.query_params else anyio.sleep(0.1))
    return "done"


@pytest.mark.parametrize("door", ["middleware", "decorator", "route"])
async def test_a_false_disconnect(door: str) -> None:
    app = behind(Middleware(RepeatsDisconnect), door)
    finding = one(app, "false-disconnect")
    assert (finding.level, finding.where) == ("warning", "middleware RepeatsDisconnect")
    assert (await get(app, method="POST", content=b"body")).status == 499


def behind(middleware: Middleware, door: str) -> FastAPI:
    route = with_cancelation(short_work) if door == "decorator" else short_work
    options = {"route_class": CancelableRoute} if door == "route" else {}
    return application(middleware, *([OURS] if door == "middleware" else []), route=route, **options)


@pytest.mark.parametrize(
    "middleware", [Middleware(RepeatsBody), Middleware(BaseHTTPMiddleware, dispatch=logs_bodies)], ids=["own", "base"]
)
async def test_a_hidden_disconnect(middleware: Middleware) -> None:
    app = behind(middleware, "decorator")
    name = "logs_bodies" if middleware.kwargs else "RepeatsBody"
    assert one(app, "hidden-disconnect").where == f"middleware {name}"
    async with running(app, method="POST", content=b"body") as call:
        await call.running()
        await call.hang_up()
    assert call.status == 200


@pytest.mark.parametrize("middleware", [RepeatsDisconnect, RepeatsBody])
async def test_neither_if_ours_stands_outside(middleware: type[RepeatsDisconnect]) -> None:
    app = application(OURS, Middleware(middleware), route=short_work)
    assert codes(app) == []
    assert (await get(app, method="POST", content=b"body")).status == 200
    assert (await left(app)).status == 499


async def left(app: ASGIApp) -> Call:
    """A request whose client leaves when its body has been read."""
    async with running(app, "/?endless=1", method="POST", content=b"body") as call:
        await call.running()
        await call.listened_to()
        await call.hang_up()
    return call


async def test_neither_if_the_server_is_asked_in_the_end_or_there_is_no_door() -> None:
    assert codes(behind(Middleware(Repeats), "decorator")) == []
    assert (await left(behind(Middleware(Repeats), "decorator"))).status == 499
    assert codes(application(Middleware(RepeatsDisconnect), route=short_work)) == []


async def test_middleware_that_passes_messages_through() -> None:
    class Counts(Findable):
        count = 0

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def has_received(message: Message) -> None:
                if message["type"] == "http.request":
                    self.count = len(message["body"])

            async def on_receive(message: Message) -> Message:
                return message

            async def receive_and_count() -> Message:
                message = await receive()
                await has_received(message)
                return await on_receive(message)

            await self.app(scope, receive_and_count, send)

    assert codes(application(Middleware(Counts), Middleware(GZipMiddleware), route=with_cancelation(short_work))) == []


# Streams


def endless(work: Work) -> Callable[[], AsyncIterator[dict[str, int]]]:
    async def numbers() -> AsyncIterator[dict[str, int]]:
        try:
            yield {"number": 1}
            await anyio.sleep_forever()
        finally:
            await work.clean_up()

    return numbers


@generators_only
async def test_a_stream_that_looks_complete() -> None:
    def made(*middleware: Middleware, **options: Any) -> FastAPI:
        stopped = with_cancelation(timeout=0.05)(endless(Work()))
        return application(*middleware, route=stopped, **options)

    assert one(made(BASE), "stream-looks-complete").where == "/"
    assert (await get(made(BASE), raise_app_exceptions=False)).is_complete
    for right in (made(OURS, BASE), made(), made(BASE, route_class=CancelableRoute)):
        assert "stream-looks-complete" not in codes(right)
        assert not (await get(right, raise_app_exceptions=False)).is_complete


async def test_a_stream_whose_cut_is_logged() -> None:
    async def handler(cancel: RequestCancelable) -> StreamingResponse:
        return cancelable_streaming_response(["a", "b"], cancel, timeout=1)

    async def of_another() -> StreamingResponse:
        return StreamingResponse(["a", "b"])

    assert one(application(BASE, route=handler), "stream-cut-is-logged").level == "info"
    assert codes(application(BASE, OURS, route=of_another)) == ["stream-cut-is-logged"]
    assert codes(application(BASE, route=of_another, route_class=CancelableRoute)) == ["stream-cut-is-logged"]
    assert codes(application(OURS, BASE, route=handler)) == []
    assert codes(application(BASE, route=of_another)) == []


@generators_only
async def test_an_event_stream_without_its_grace() -> None:
    def made(work: Work, door: Callable[[Any], Any], **options: Any) -> FastAPI:
        return application(OURS, route=door(endless(work)), response_class=EVENT_STREAM, **options)

    async def clean(app: FastAPI) -> None:
        async with running(app) as call:
            await call.response_started()
            await call.listened_to()
            await call.hang_up()

    work = Work()
    assert one(made(work, lambda endpoint: endpoint), "event-stream-grace").level == "info"
    await clean(made(work, lambda endpoint: endpoint))
    assert work.events == ["interrupted"]
    assert codes(made(work, with_cancelation)) == []
    await clean(made(work, with_cancelation))
    assert codes(made(work, lambda endpoint: endpoint, route_class=CancelableRoute)) == []
    assert work.events == ["interrupted", "clean"]


async def test_a_stream_that_outlives_its_timeout() -> None:
    made: list[AsyncGenerator[str]] = []

    async def lines() -> AsyncGenerator[str]:
        while True:
            yield "line"
            await anyio.sleep(0.01)

    async def stream() -> StreamingResponse:
        made.append(lines())
        return StreamingResponse(made[0])

    async def ours(cancel: RequestCancelable) -> StreamingResponse:
        return cancelable_streaming_response(lines(), cancel, timeout=0.05)

    app = application(route=with_cancelation(timeout=0.05)(stream))
    finding = one(app, "stream-outlives-timeout")
    assert (finding.level, finding.where) == ("warning", "/")
    async with running(app) as call:
        await call.response_started()
        await anyio.sleep(0.1)
        assert not call.has_ended
        await call.hang_up()
    await made[0].aclose()  # Starlette does not.
    # Not even the default of ours does, because the timeout of the decorator replaces it.
    assert "stream-outlives-timeout" in codes(application(OURS, route=with_cancelation(timeout=3)(stream)))
    assert codes(application(route=with_cancelation(timeout=0.05)(ours))) == []
    assert codes(application(route=with_cancelation(stream))) == []
    assert codes(application(route=with_cancelation(policy=TimeoutPolicy(3, advisory=True))(stream))) == []


# Threads


def helper() -> int:
    return deeper.look()


class Deeper:
    def look(self) -> int:
        cancel = current_cancelable()
        return 0 if cancel is None else 1

    def sleep(self) -> int:
        time.sleep(0.1)
        return 1


deeper = Deeper()


def silent_helper() -> int:
    return deeper.sleep()


async def test_a_def_handler_that_never_checks() -> None:
    def silent() -> int:
        return silent_helper()

    def asks() -> int:
        return helper()

    def is_given(asking: Deeper) -> int:
        return asking.look()

    def has_handle(cancel: RequestCancelable) -> int:
        return 1

    async def unblocked() -> int:
        return 1

    limited = with_cancelation(timeout=0.01)
    app = application(route=limited(silent))
    finding = one(app, "def-never-checks")
    assert (finding.level, finding.where) == ("warning", "/")
    assert (await get(app)).json() == 1, "the timeout does nothing"
    for right in (asks, has_handle, unblocked):
        assert codes(application(route=limited(right))) == []
    assert codes(application(route=with_cancelation(timeout=1, abandon_thread=True)(silent))) == []
    assert codes(application(route=with_cancelation(silent))) == []
    assert codes(Starlette(routes=[Route("/", limited(is_given))])) == []


async def test_def_handlers_under_a_default_timeout() -> None:
    def silent() -> int:
        return silent_helper()

    limited = Middleware(RequestCancelationMiddleware, default_timeout=30)
    finding = one(application(limited, route=silent), "def-without-check")
    assert (finding.level, finding.where) == ("info", "/")
    assert codes(application(limited, route=helper)) == []
    assert codes(application(OURS, route=silent)) == []
    excluded = Middleware(RequestCancelationMiddleware, default_timeout=30, exclude="/")
    assert codes(application(excluded, route=silent)) == []
    assert codes(application(limited, route=silent, dependencies=[Depends(no_timeout)])) == []
    assert codes(application(route=silent, route_class=CancelableRoute.with_timeout(3))) == ["def-without-check"]
    # Nobody changes those of a package, such as one for metrics.
    assert codes(application(limited, route=httpx.codes.is_error)) == []


async def test_the_routes_of_a_finding_are_counted() -> None:
    app = application(Middleware(RequestCancelationMiddleware, default_timeout=30))
    for number in range(6):
        app.get(f"/{number}")(silent_helper)
    assert one(app, "def-without-check").where == "/0, /1, /2 and 3 more"


# Handlers


async def polls(request: Request) -> str:
    for _ in range(10):
        if await request.is_disconnected():
            return "seen"
        await anyio.sleep(0.01)
    return "in vain"


async def test_polling_in_vain() -> None:
    async def answer(app: FastAPI) -> Any:
        async with running(app) as call:
            await call.running()
            await call.hang_up()
        return call.json()

    app = application(BASE, route=polls)
    finding = one(app, "polling-in-vain")
    assert (finding.level, finding.where) == ("warning", "/")
    assert "pass_on" in finding.message
    assert await answer(app) == "in vain"
    assert codes(application(route=polls)) == []
    assert await answer(application(route=polls)) == "seen"
    for right in (with_cancelation(polls), asks_an_event):
        assert codes(application(BASE, route=right)) == []
        assert (await hang_up(application(BASE, route=right))).status in (200, 499)


async def asks_an_event(request: Request, event: CancellationEvent) -> bool:
    await event.wait()
    return await request.is_disconnected()


async def test_a_plain_task_group() -> None:
    def made(work: Work, **groups: Any) -> FastAPI:
        async def plain() -> None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.sleep_forever)
                await work()

        async def ours(get_task_group: RequestTaskGroup) -> None:
            async with get_task_group() as tasks:
                tasks.start_soon(anyio.sleep_forever)
                await work()

        return application(OURS, route=ours if groups else plain)

    work = Work()
    assert one(made(work), "task-group").level == "info"
    await hang_up(made(work))
    assert work.events == ["interrupted"]
    assert codes(made(work, ours=True)) == []
    await hang_up(made(work, ours=True))
    assert work.events == ["interrupted", "clean"]


async def test_websockets_of_the_route_class() -> None:
    def made(door: Callable[[Any], Any], *middleware: Middleware) -> FastAPI:
        async def talk(websocket: WebSocket) -> None: ...

        async def answer() -> None: ...

        app = application(*middleware)
        router = APIRouter(prefix="/chat", route_class=CancelableRoute)
        if not KEEPS_ROUTERS:
            app.router.route_class = CancelableRoute
            router = app.router
        router.add_api_route("/rooms", answer)
        router.add_api_websocket_route("/talk", door(talk))
        if KEEPS_ROUTERS:
            app.include_router(router, prefix="/v1")
        return app

    finding = one(made(lambda endpoint: endpoint), "websocket-not-covered")
    assert (finding.level, finding.where) == ("warning", "/v1/chat/talk" if KEEPS_ROUTERS else "/talk")
    assert codes(made(with_cancelation)) == []
    assert codes(made(lambda endpoint: endpoint, OURS)) == []

    async def talk(websocket: WebSocket) -> None: ...

    app, another = made(with_cancelation), APIRouter()
    another.add_api_websocket_route("/of-another-router", talk)
    if KEEPS_ROUTERS:
        app.include_router(another)
    assert codes(app) == []


# WSGI


async def test_a_mounted_wsgi_application() -> None:
    app = application(OURS)
    app.mount("/old", WSGIMiddleware(View()))
    finding = one(app, "wsgi-mount")
    assert (finding.level, finding.where) == ("info", "mount /old")
    excluded = application(Middleware(RequestCancelationMiddleware, exclude="/old*"))
    excluded.mount("/old", WSGIMiddleware(View()))
    assert codes(excluded) == []
    bare = application()
    bare.mount("/old", WSGIMiddleware(View()))
    assert codes(bare) == []


async def test_a_wsgi_application_that_ours_does_not_find() -> None:
    app = application(OURS)
    app.mount("/old", Outer(WSGIMiddleware(View())))
    finding = one(app, "wsgi-interrupted")
    assert (finding.level, finding.where) == ("warning", "mount /old")
    app = application(OURS)
    app.mount("/old", Findable(WSGIMiddleware(View())))
    assert codes(app) == ["wsgi-mount"]


# The outside


async def test_a_server_that_is_told_to_wait_for_too_short() -> None:
    app = FastAPI(lifespan=cancelation_lifespan(grace=3, background_grace=1))
    app.add_middleware(RequestCancelationMiddleware, cleanup_grace=7)
    app.get("/")(polls)
    finding = one(app, "server-grace", server_grace=10)
    assert (finding.level, finding.where) == ("warning", "the server")
    assert "needs 11 s: grace 3, background_grace 1 and cleanup_grace 7" in finding.message
    for enough in (11, float("inf"), None):
        assert codes(app, server_grace=enough) == []
    assert codes(application(OURS), server_grace=1) == []


async def test_the_lifespan_is_found_in_others() -> None:
    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[None]:
        async with cancelation(app):
            yield

    cancelation = cancelation_lifespan()
    including = APIRouter(lifespan=cancelation_lifespan())
    including.get("/")(polls)
    app = FastAPI()
    app.include_router(including)
    for each in (FastAPI(lifespan=own), FastAPI(lifespan=Operations().lifespan(cancelation)), app):
        each.add_middleware(RequestCancelationMiddleware)
        assert "server-grace" in codes(each, server_grace=3)


async def test_several_workers_with_operations_in_memory() -> None:
    operations, shared = Operations(), Operations(RedisBackend("redis://127.0.0.1:1"))
    for opened in (operations, shared):

        @asynccontextmanager
        async def own(app: FastAPI) -> AsyncIterator[None]:
            async with opened:  # noqa: B023
                yield

        expected = ["memory-with-workers"] if opened is operations else []
        with_middleware = application(Middleware(RequestCancelationMiddleware, operations=opened), route=polls)
        for app in (FastAPI(lifespan=opened.lifespan()), FastAPI(lifespan=own), with_middleware):
            assert codes(app, workers=2) == expected
            assert codes(app, workers=1) == codes(app) == []
    assert one(FastAPI(lifespan=operations.lifespan()), "memory-with-workers", workers=4).message.startswith(
        "4 workers"
    )


async def streams() -> StreamingResponse:
    return StreamingResponse(["a"])


async def test_a_timeout_that_proxies_do_not_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DYNO", raising=False)

    def made(seconds: float, **options: Any) -> FastAPI:
        return application(Middleware(RequestCancelationMiddleware, default_timeout=seconds), route=polls, **options)

    finding = one(made(90), "proxy-timeout")
    assert (finding.level, finding.where) == ("info", "/")
    assert "nginx 60 s" in finding.message
    assert "Cloudflare" not in finding.message
    assert "Cloudflare 100 s" in one(made(120), "proxy-timeout").message
    assert codes(made(60)) == []
    shorter = Depends(cancelable_with_timeout(5))
    assert codes(made(90, dependencies=[shorter])) == []
    assert codes(application(route=with_cancelation(timeout=90)(polls))) == ["proxy-timeout"]
    assert codes(application(route=polls, route_class=CancelableRoute.with_timeout(90))) == ["proxy-timeout"]
    policies = Middleware(RequestCancelationMiddleware, policies={"long": TimeoutPolicy(90)})
    assert codes(application(policies, route=polls, dependencies=[Depends(timeout_policy("long"))])) == [
        "proxy-timeout"
    ]
    assert codes(application(policies, route=with_cancelation(policy="long")(polls))) == ["proxy-timeout"]
    long = Middleware(RequestCancelationMiddleware, default_timeout=90)
    assert codes(application(long, route=streams)) == []
    monkeypatch.setenv("DYNO", "web.1")
    assert "Heroku 30 s" in one(made(60), "proxy-timeout").message


async def groups_by_hand(request: Request) -> None:
    async with create_request_task_group(request):
        pass


def of_everybody() -> str:
    return "everybody"


async def test_a_lifespan_that_ends_nothing() -> None:
    app = FastAPI(lifespan=cancelation_lifespan())
    app.get("/")(polls)
    assert one(app, "nothing-covered").level == "info"
    app.get("/covered")(with_cancelation(polls))
    assert codes(app) == []
    stoppable = FastAPI(lifespan=cancelation_lifespan())
    stoppable.get("/", dependencies=[Depends(latest_only(of_everybody))])(polls)
    assert codes(stoppable) == []
    by_hand = FastAPI(lifespan=cancelation_lifespan())
    by_hand.get("/")(groups_by_hand)
    assert codes(by_hand) == []
    inner = FastAPI(lifespan=cancelation_lifespan())
    inner.get("/")(polls)
    around = RequestCancelationMiddleware(inner)
    assert codes(inner) == codes(around) == [], "it knows that ours stands around it"


async def test_background_tasks_that_nobody_knows_of() -> None:
    async def order(background: BackgroundTasks) -> None: ...

    def made(*middleware: Middleware, lifespan: Any = None) -> FastAPI:
        app = FastAPI(lifespan=lifespan)
        app.user_middleware[:] = middleware
        app.post("/orders")(with_cancelation(order))
        return app

    assert one(made(lifespan=cancelation_lifespan()), "background-not-covered").where == "/orders"
    assert codes(made(OURS, lifespan=cancelation_lifespan())) == []
    assert codes(made()) == []


async def test_a_lifespan_that_nobody_runs() -> None:
    inner, outer, app = FastAPI(lifespan=cancelation_lifespan()), FastAPI(), application(OURS)
    outer.mount("/inner", inner)
    outer.mount("/again", outer)
    app.mount("/outer", Findable(outer))
    assert one(app, "lifespan-in-mount").where == "mount /outer/inner"


async def test_an_anyio_that_we_do_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cancelable_deps.checks.outside.hooks_are_known", known.hooks_are_known)
    expected = [] if known.hooks_are_known(current_loop().is_trio) else ["unknown-anyio"]
    assert codes(application()) == expected
    monkeypatch.setattr("cancelable_deps.checks.outside.hooks_are_known", lambda is_trio: False)
    finding = one(application(), "unknown-anyio")
    assert (finding.level, finding.where) == ("info", "trio" if current_loop().is_trio else "anyio")


@pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")
@pytest.mark.parametrize("policy", ["allkeys-lru", "noeviction"])
async def test_a_redis_that_evicts(policy: str) -> None:
    with redis_server("--save", "", "--maxmemory", "100mb", "--maxmemory-policy", policy) as server:
        backend = RedisBackend(server.url)
        found = await check_store(backend)
        async with Operations(backend):
            assert await check_store(backend) == found
    if policy == "noeviction":
        assert found == []
    else:
        assert [(finding.level, finding.code) for finding in found] == [("warning", "evicting-redis")]
        assert "allkeys-lru" in found[0].message
    assert [finding.code for finding in await check_store(backend)] == ["store-unreachable"]
    assert await check_store(MemoryBackend()) == []
    gc.collect()  # coredis has left streams open, as it found no server.


# At the start


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_of_checks, "_logged", set())


async def started(app: FastAPI) -> None:
    await get(app, "/nowhere", lifespan=True)


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, vars(record)["code"]) for record in caplog.records if "code" in vars(record)]


def to_start(lifespan: Any) -> FastAPI:
    app = FastAPI(lifespan=lifespan)
    app.user_middleware[:] = [OURS, Middleware(Outer), BASE]
    app.mount("/old", WSGIMiddleware(View()))
    app.get("/")(polls)
    return app


async def test_each_finding_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    operations = Operations()
    await started(to_start(operations.lifespan(cancelation_lifespan())))
    assert lines(caplog) == [(logging.WARNING, "base-http-middleware"), (logging.WARNING, "wsgi-interrupted")]
    text = caplog.text
    assert "base-http-middleware (middleware pass_on): It is a BaseHTTPMiddleware" in text
    await started(to_start(operations.lifespan(cancelation_lifespan())))
    assert len(lines(caplog)) == 2


async def test_an_application_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[ASGIApp] = []

    def check(app: ASGIApp) -> list[Finding]:
        checked.append(app)
        return []

    monkeypatch.setattr(start_of_checks, "check_stack", check)
    app = FastAPI(lifespan=Operations().lifespan(cancelation_lifespan()))
    await started(app)
    await started(app)
    assert checked == [app]


@pytest.mark.parametrize("lifespan", [cancelation_lifespan(check=False), Operations().lifespan(check=False), None])
async def test_it_can_be_switched_off(lifespan: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    await started(to_start(lifespan))
    assert lines(caplog) == []


async def test_a_check_that_fails_does_not_stop_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(app: object) -> None:
        raise RuntimeError("a bug")

    caplog.set_level(logging.INFO, "cancelable_deps")
    monkeypatch.setattr(start_of_checks, "check_stack", fail)
    await started(to_start(cancelation_lifespan()))
    assert "the start-up check has failed: RuntimeError('a bug')" in caplog.text


async def test_a_plain_application_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    app = FastAPI(lifespan=cancelation_lifespan())
    app.add_middleware(RequestCancelationMiddleware, default_timeout=30)
    app.add_middleware(GZipMiddleware)
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    app.get("/")(polls)
    app.websocket("/ws")(polls)
    await started(app)
    assert caplog.records == []


# No false alarm


@pytest.mark.parametrize("name", EXAMPLES)
async def test_the_examples_are_all_right(name: str) -> None:
    module = __import__(f"examples.{name}", fromlist=["app"])
    assert check_stack(getattr(module, "app", FastAPI())) == []


class Proxy:
    """As that of a web framework for an object of the current request."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("working outside of request context")

    def __call__(self) -> None: ...


proxy: Any = Proxy()


async def test_objects_that_raise_are_no_trouble() -> None:
    def silent() -> int:
        return int(proxy.value + proxy())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        proxy()
        yield

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(RequestCancelationMiddleware, exclude=lambda scope: proxy.value, default_timeout=3)
    app.get("/")(silent)
    app.mount("/proxy", proxy)
    assert codes(app) == ["def-without-check"]


async def test_an_application_that_leads_to_itself() -> None:
    app, router = FastAPI(), Router()
    router.mount("/again", router)
    app.mount("/", router)
    app.add_middleware(RequestCancelationMiddleware)
    assert codes(app) == []


async def test_what_cannot_be_checked() -> None:
    calls: list[tuple[Any, dict[str, Any], type[Exception]]] = [
        (3, {}, TypeError),
        (FastAPI(), {"workers": "2"}, TypeError),
        (FastAPI(), {"server_grace": "long"}, TypeError),
        (FastAPI(), {"workers": 0}, ValueError),
        (FastAPI(), {"server_grace": -1}, ValueError),
    ]
    for app, arguments, error in calls:
        with pytest.raises(error):
            check_stack(app, **arguments)
    with pytest.raises(TypeError, match=r"operations\.backend"):
        await check_store(Operations())
    assert codes(Findable(Findable(Outer(FastAPI())))) == []


def test_the_grace_of_a_cleanup_is_the_one_that_is_configured() -> None:
    app = FastAPI(lifespan=cancelation_lifespan(grace=3, background_grace=1))
    app.add_middleware(RequestCancelationMiddleware)
    app.get("/")(polls)
    assert codes(app, server_grace=9) == []
    configure(cleanup_grace=6)
    try:
        assert codes(app, server_grace=9) == ["server-grace"]
    finally:
        configure(cleanup_grace=5)


def test_the_page_describes_every_finding() -> None:
    faults, _, notes = (ROOT / "docs/check.md").read_text().partition("## Warnings")[2].partition("## Notes")
    for text, level in ((faults, "warning"), (notes, "info")):
        described = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
        assert described == sorted(code for code in LEVELS if LEVELS[code] == level)


def test_a_finding_is_a_value() -> None:
    finding = Finding("info", "code", "/", "Text.")
    assert finding == Finding("info", "code", "/", "Text.")
    assert str(finding) == "info: code (/): Text."
    with pytest.raises(AttributeError):
        finding.code = "other"  # type: ignore[misc]
