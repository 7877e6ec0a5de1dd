"""The application of `benchmarks.soak`: it counts the pieces of work that begin and end, and their complete cleanups."""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.middleware import Middleware

from cancelable_deps import (
    CancelableRoute,
    CancelableStreamingResponse,
    CancellationEvent,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    with_cancelation,
)

counts: Counter[str] = Counter()


@asynccontextmanager
async def counted(name: str) -> AsyncIterator[None]:
    """Count a piece of work, and its cleanup if it is stopped, whose awaits must not be interrupted."""
    counts[f"{name} begun"] += 1
    try:
        yield
    except BaseException:
        counts[f"{name} cleanup begun"] += 1
        await anyio.sleep(0.001)
        counts[f"{name} cleanup ended"] += 1
        raise
    finally:
        counts[f"{name} ended"] += 1


async def life(name: str, seconds: float) -> None:
    async with counted(name):
        await anyio.sleep(seconds)


async def chunks(name: str, key: str, seconds: float) -> AsyncIterator[str]:
    async with counted(f"{name} stream"):
        for number in range(5):
            yield f"{key}/{number};"
            await anyio.sleep(seconds / 5)


Decorator = Callable[[Any], Any]


def as_it_is(handler: Any) -> Any:
    return handler


def add(router: APIRouter, name: str, decorate: Decorator = as_it_is) -> None:
    """Return the endpoints of a door around the handler."""

    @router.post("/work")
    @decorate
    async def work(request: Request, key: str, seconds: float) -> Response:
        await life(name, seconds)
        return Response(key)

    @router.post("/upload")
    @decorate
    async def upload(request: Request, key: str, seconds: float) -> Response:
        size = len(await request.body())
        await life(name, seconds)
        return Response(f"{key} {size}")

    @router.post("/stream")
    @decorate
    async def stream(request: Request, key: str, seconds: float) -> Response:
        return CancelableStreamingResponse(chunks(name, key, seconds), media_type="text/plain")


def add_handles(app: FastAPI) -> None:
    """Return the endpoints whose handler uses a handle."""

    @app.post("/handle/work")
    async def in_block(cancel: RequestCancelable, key: str, seconds: float) -> Response:
        async with cancel:
            await life("handle", seconds)
        return Response(key)

    @app.post("/group/work")
    async def in_group(get_task_group: RequestTaskGroup, key: str, seconds: float) -> Response:
        async with get_task_group() as tasks:
            tasks.start_soon(life, "group", seconds)
        return Response(key)

    @app.post("/event/work")
    async def until_told(event: CancellationEvent, key: str, seconds: float) -> Response:
        with anyio.move_on_after(seconds):
            await event.wait()
        return Response(key)


def build() -> Callable[..., Awaitable[None]]:
    app = FastAPI(openapi_url=None)
    route = APIRouter(prefix="/route", route_class=CancelableRoute)
    decorated = APIRouter(prefix="/decorator")
    timed = APIRouter(prefix="/timed")
    add(route, "route")
    add(decorated, "decorator", with_cancelation)
    add(timed, "timed", with_cancelation(timeout=0.02))
    for router in (route, decorated, timed):
        app.include_router(router)
    add_handles(app)
    covered = FastAPI(openapi_url=None, middleware=[Middleware(RequestCancelationMiddleware)])
    add(covered.router, "middleware")
    app.mount("/middleware", covered)

    @app.get("/counts")
    async def read() -> dict[str, Any]:
        return {"counts": counts, "tasks": len(anyio.get_running_tasks())}

    return app


app = build()
