"""The application behind the real servers: the same endpoints under every door, and a journal of what became of each request.

A path is `<stack>/<door>/<endpoint>`. The header `x-id` names the request in the journal, `x-before` says how the handler works
before it touches the request: a number of seconds, `gate` (until the test opens the request's gate) or `forever`.
The journal and the gates are served under no door.
"""

import asyncio
import hashlib
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Annotated, Any, TypeVar

import anyio
import anyio.from_thread
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelationError,
    CancellationEvent,
    RequestCancelable,
    RequestCancelationMiddleware,
    cancelable_streaming_response,
    cancelable_with_timeout,
    current_cancelable,
    with_cancelation,
)
from tests.machine import scaled
from tests.runners import Runner, Work, run_in_group, run_plainly
from tests.server_policies import policies_app
from tests.server_workers import add_worker_endpoints

DOWNLOAD = [hashlib.sha512(bytes([number])).digest() * 1024 for number in range(128)]
DOWNLOAD_DIGEST = hashlib.sha256(b"".join(DOWNLOAD)).hexdigest()
SHORT = scaled(0.4)
JOURNAL_CEILING = scaled(15)

RunnerDependency = Callable[..., Awaitable[Runner]]
Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Response]])

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")


class Journal:
    """What happened to each request, in order; a reader can wait until an event has happened often enough."""

    def __init__(self) -> None:
        self.events: defaultdict[str, list[str]] = defaultdict(list)
        self._changed = anyio.Event()

    def add(self, key: str, event: str) -> None:
        self.events[key].append(event)
        self._changed.set()
        self._changed = anyio.Event()

    async def wait(self, key: str, event: str, count: int) -> list[str]:
        with anyio.move_on_after(JOURNAL_CEILING):
            while self.events[key].count(event) < count:
                await self._changed.wait()
        return self.events[key]


journal = Journal()
gates: defaultdict[str, anyio.Event] = defaultdict(anyio.Event)


class Metrics:
    """The outermost layer, as an access log or a metrics exporter would be: it journals the status that it sees go by."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        key = dict(scope["headers"]).get(b"x-id", b"").decode()

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                journal.add(key, f"status:{message['status']}")
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            journal.add(key, "ended")


def key_of(request: Request) -> str:
    return request.headers.get("x-id", "")


async def before(request: Request) -> None:
    how = request.headers.get("x-before", "0")
    if how == "gate":
        await gates[key_of(request)].wait()
    elif how == "forever":
        await anyio.sleep_forever()
    elif float(how):
        await anyio.sleep(float(how))


def reason_of(request: Request) -> str:
    cancelable = current_cancelable()
    reason = getattr(request.state, "reason", None) or (cancelable.reason if cancelable else None)
    return reason.name if reason else "unknown"


async def recorded(request: Request, work: Work) -> Response:
    key = key_of(request)
    journal.add(key, "started")
    try:
        await before(request)
        response = await work()
    except anyio.get_cancelled_exc_class():
        journal.add(key, f"cancelled:{reason_of(request)}")
        raise
    except ClientDisconnect:
        journal.add(key, f"told:{reason_of(request)}")
        raise
    journal.add(key, "finished")
    return response


async def run_in_block(cancel: RequestCancelable) -> Runner:
    async def run(work: Work) -> Response:
        async with cancel:
            response = await work()
        return response

    return run


async def run_in_timed_block(cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(SHORT))]) -> Runner:
    return await run_in_block(cancel)


async def run_in_block_by_hand() -> Runner:
    return await run_in_block(Cancelable.with_timeout(SHORT))


async def run_until_told(request: Request, event: CancellationEvent) -> Runner:
    async def run(work: Work) -> Response:
        response: Response = JSONResponse({"partial": True})
        async with anyio.create_task_group() as tg:

            async def stop() -> None:
                await event.wait()
                request.state.reason = event.reason
                tg.cancel_scope.cancel()

            tg.start_soon(stop)
            response = await work()
            tg.cancel_scope.cancel()
        return response

    return run


class Item(BaseModel):
    numbers: list[int]


def digest(data: bytes) -> Response:
    return JSONResponse({"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})


async def digest_of_stream(request: Request) -> Response:
    digest, size = hashlib.sha256(), 0
    async for chunk in request.stream():
        digest.update(chunk)
        size += len(chunk)
    return JSONResponse({"sha256": digest.hexdigest(), "size": size})


async def pieces(request: Request) -> AsyncIterator[bytes]:
    """The download; with `x-after: gate` it goes on after the first piece when the test says so."""
    yield DOWNLOAD[0]
    if request.headers.get("x-after") == "gate":
        await gates[f"{key_of(request)}-after"].wait()
    for piece in DOWNLOAD[1:]:
        yield piece


async def afterwards(key: str) -> None:
    journal.add(key, "background")
    try:
        await gates[key].wait()
    except anyio.get_cancelled_exc_class():
        journal.add(key, "background_cancelled")
        raise
    journal.add(key, "background_done")


def as_it_is(handler: Handler) -> Handler:
    return handler


def add_endpoints(
    router: APIRouter | FastAPI, runner: RunnerDependency, decorate: Callable[[Handler], Handler] = as_it_is
) -> None:
    add_reading_endpoints(router, runner, decorate)
    add_answering_endpoints(router, runner, decorate)


def add_reading_endpoints(
    router: APIRouter | FastAPI, runner: RunnerDependency, decorate: Callable[[Any], Any]
) -> None:
    """Endpoints that take a body, in each of the ways in which a handler can read one, or refuse it."""
    chosen = Depends(runner)

    @router.post("/json")
    @decorate
    async def json(request: Request, item: Item, run: Runner = chosen) -> Response:
        async def work() -> Response:
            return JSONResponse({"total": sum(item.numbers)})

        return await run(lambda: recorded(request, work))

    @router.post("/raw")
    @decorate
    async def raw(request: Request, run: Runner = chosen) -> Response:
        async def work() -> Response:
            return digest(await request.body())

        return await run(lambda: recorded(request, work))

    @router.post("/upload")
    @decorate
    async def upload(request: Request, run: Runner = chosen) -> Response:
        return await run(lambda: recorded(request, lambda: digest_of_stream(request)))

    @router.post("/refuse")
    @decorate
    async def refuse(request: Request, run: Runner = chosen) -> Response:
        async def work() -> Response:
            return JSONResponse({"detail": "too large"}, 413)

        return await run(lambda: recorded(request, work))


def add_answering_endpoints(
    router: APIRouter | FastAPI, runner: RunnerDependency, decorate: Callable[[Any], Any]
) -> None:
    """Endpoints that only answer: at once or after work, in one piece or as a stream, with or without a background task."""
    chosen = Depends(runner)

    @router.get("/work")
    @decorate
    async def work(request: Request, run: Runner = chosen) -> Response:
        async def work() -> Response:
            return JSONResponse({"ok": True})

        return await run(lambda: recorded(request, work))

    @router.get("/poll")
    @decorate
    async def poll(request: Request, run: Runner = chosen) -> Response:
        async def work() -> Response:
            return JSONResponse({"left": [await request.is_disconnected() for _ in range(3)]})

        return await run(lambda: recorded(request, work))

    @router.get("/download")
    @decorate
    async def download(request: Request, run: Runner = chosen) -> Response:
        async def work() -> Response:
            return StreamingResponse(pieces(request), headers={"x-sha256": DOWNLOAD_DIGEST})

        return await run(lambda: recorded(request, work))

    @router.get("/background")
    @decorate
    async def background(request: Request, run: Runner = chosen) -> Response:
        async def work() -> Response:
            return JSONResponse({"ok": True}, background=BackgroundTask(afterwards, key_of(request)))

        return await run(lambda: recorded(request, work))


def door(name: str, runner: RunnerDependency, decorate: Callable[[Any], Any] = as_it_is, **router: Any) -> APIRouter:
    doorway = APIRouter(prefix=f"/{name}", **router)
    add_endpoints(doorway, runner, decorate)
    return doorway


def doors() -> list[APIRouter]:
    return [
        door("bare", run_plainly),
        door("route", run_plainly, route_class=CancelableRoute),
        door("deco", run_plainly, with_cancelation),
        door("dep", run_in_block),
        door("tg", run_in_group),
        door("event", run_until_told),
        door("timed-deco", run_plainly, with_cancelation(timeout=SHORT)),
        door("timed-dep", run_in_timed_block),
        door("timed-route", run_in_block_by_hand, route_class=CancelableRoute),
    ]


def stack(*middleware: Middleware) -> FastAPI:
    """An application with all doors; the middleware door is a mounted application of its own."""
    app = FastAPI(middleware=list(middleware), openapi_url=None)
    for router in doors():
        app.include_router(router)
    covered = FastAPI(middleware=[Middleware(RequestCancelationMiddleware)], openapi_url=None)
    add_endpoints(covered, run_plainly)
    app.mount("/mw", covered)
    return app


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def build() -> FastAPI:
    based = Middleware(BaseHTTPMiddleware, dispatch=pass_on)
    covering = Middleware(RequestCancelationMiddleware)
    root = stack()
    root.mount("/mounted", stack(covering))
    root.mount("/timed", stack(Middleware(RequestCancelationMiddleware, default_timeout=SHORT)))
    root.mount("/outside", stack(based))
    root.mount("/inside", stack(covering, based))
    root.mount("/web", stack(Middleware(CORSMiddleware, allow_origins=["*"]), Middleware(GZipMiddleware)))
    return root


root = build()
add_worker_endpoints(root, journal.add)
root.mount("/policies", policies_app(journal.add))


async def endless(key: str) -> AsyncIterator[bytes]:
    try:
        yield b"first"
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        journal.add(key, "cancelled")
        raise
    finally:
        await anyio.sleep(0.01)
        journal.add(key, "cleaned up")


async def cancelled_at_the_gate(key: str, cancel: Cancelable) -> AsyncIterator[bytes]:
    """A stream that the application stops when the test says so."""
    try:
        yield b"first"
        await gates[key].wait()
        cancel.cancel_nowait()
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        journal.add(key, f"cancelled:{cancel.reason.name if cancel.reason else None}")
        raise


async def of_a_cancelled_task() -> AsyncIterator[bytes]:
    """One that fails as if it had awaited a task that somebody has cancelled."""
    yield b"first"
    await anyio.sleep(0.01)
    raise asyncio.CancelledError


async def flood(key: str) -> AsyncIterator[bytes]:
    """More than any buffer between us and a client that does not read."""
    try:
        for _ in range(48):
            yield bytes(1024 * 1024)
        journal.add(key, "all sent")
    finally:
        journal.add(key, "cleaned up")


def add_streams(app: FastAPI) -> None:
    @app.get("/flood")
    async def flooding(request: Request) -> StreamingResponse:
        return cancelable_streaming_response(flood(key_of(request)), send_timeout=0.5)

    @app.get("/stream")
    async def stream(request: Request, kind: str = "application/octet-stream", timeout: float | None = None) -> Any:
        return cancelable_streaming_response(endless(key_of(request)), media_type=kind, timeout=timeout)

    @app.get("/stream-until-gate")
    async def stream_until_gate(request: Request, cancel: RequestCancelable) -> StreamingResponse:
        return cancelable_streaming_response(cancelled_at_the_gate(key_of(request), cancel), cancel)

    @app.get("/failing-stream")
    async def failing_stream() -> StreamingResponse:
        return cancelable_streaming_response(of_a_cancelled_task())

    @app.get("/stream-for-nobody")
    async def stream_for_nobody(request: Request, event: CancellationEvent, ours: bool) -> StreamingResponse:
        await event.wait()
        body = endless(key_of(request))
        return cancelable_streaming_response(body) if ours else StreamingResponse(body)

    @app.get("/starlette-stream")
    async def starlette_stream(request: Request) -> StreamingResponse:
        return StreamingResponse(endless(key_of(request)))


def add_generators(app: FastAPI) -> None:
    """FastAPI's own generator endpoints, decorated; older ones of it have none."""
    try:
        from fastapi.sse import EventSourceResponse
    except ImportError:
        return

    def add(kind: str, timeout: float | None, **options: Any) -> None:
        @app.get(f"/generated/{kind}", **options)
        @with_cancelation(timeout=timeout)
        async def generate(request: Request) -> AsyncIterator[str]:
            async for chunk in endless(key_of(request)):
                yield chunk.decode()

    def add_plain(kind: str, **options: Any) -> None:
        @app.get(f"/generated/plain-{kind}", **options)
        @with_cancelation
        def generate(request: Request) -> Iterator[str]:
            cancel = current_cancelable()
            assert cancel is not None
            try:
                yield "first"
                while True:
                    cancel.check()
                    time.sleep(0.001)
            except CancelationError:
                anyio.from_thread.run_sync(journal.add, key_of(request), "cancelled")
                raise
            finally:
                anyio.from_thread.run_sync(journal.add, key_of(request), "cleaned up")

    for name, timeout in (("", None), ("timed-", SHORT)):
        add(f"{name}sse", timeout, response_class=EventSourceResponse)
        add(f"{name}jsonl", timeout)
        add(f"{name}raw", timeout, response_class=StreamingResponse)
    add_plain("sse", response_class=EventSourceResponse)
    add_plain("jsonl")
    add_plain("raw", response_class=StreamingResponse)

    @app.get("/guarded", response_class=StreamingResponse)
    @with_cancelation
    async def guarded(request: Request) -> AsyncIterator[str]:
        cancel = current_cancelable()
        assert cancel is not None
        with cancel.defer_disconnect():
            yield "first"
            while not cancel.client_has_left:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            journal.add(key_of(request), "past the point")
            yield "second"
        async for chunk in endless(key_of(request)):
            yield chunk.decode()


def streaming_apps() -> list[Any]:
    stacks = {route.path: route.app for route in root.routes if isinstance(route, Mount)}
    return [root, *(stacks[path] for path in ("/mounted", "/timed", "/inside", "/outside"))]


for streaming in streaming_apps():
    assert isinstance(streaming, FastAPI)
    add_streams(streaming)
    add_generators(streaming)


@root.get("/journal/{key}")
async def read_journal(key: str, event: str, count: int = 1) -> list[str]:
    return await journal.wait(key, event, count)


@root.post("/gates/{key}")
async def open_gate(key: str) -> None:
    gates[key].set()


@root.get("/listen")
async def listen(request: Request) -> None:
    """Say in the journal when the server itself reports that the client has left."""
    journal.add(key_of(request), "started")
    while (await request.receive())["type"] != "http.disconnect":
        pass
    journal.add(key_of(request), "heard")


app = Metrics(root)
