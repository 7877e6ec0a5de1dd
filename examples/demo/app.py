"""The application of the demonstration: each piece of work under a different door, and once without any."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import anyio.to_process
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import HTMLResponse, StreamingResponse

from cancelable_deps import (
    Cancelable,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    cancelable_with_timeout,
    cancelation_lifespan,
    current_cancelable,
    with_cancelation,
)

from .catalog import FEED_EVENTS, LIMIT, works
from .crunch import longest_collatz
from .ledger import LISTED, Ledger, LedgerMiddleware, Run
from .materials import Materials, TheMaterials, ThisRun
from .operations import operations_routes
from .work import SLICE_ROWS, count_words, largest_sales, sales_feed, take_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from anyio.abc import TaskGroup
    from starlette.types import ASGIApp

    from cancelable_deps.operations import Operations

    from .work import OpenTaskGroup


TwoSeconds = Annotated[Cancelable, Depends(cancelable_with_timeout(LIMIT))]

covered, limited, plain, feeds = APIRouter(), APIRouter(prefix="/limited"), APIRouter(prefix="/plain"), APIRouter()


@covered.get("/report")
@with_cancelation
async def report(run: ThisRun, materials: TheMaterials) -> dict[str, Any]:
    return await make_report(run, materials)


@limited.get("/report")
@with_cancelation(timeout=LIMIT)
async def limited_report(run: ThisRun, materials: TheMaterials) -> dict[str, Any]:
    return await make_report(run, materials)


@plain.get("/report")
async def plain_report(run: ThisRun, materials: TheMaterials) -> dict[str, Any]:
    return await make_report(run, materials)


@covered.get("/words")
async def words(run: ThisRun, materials: TheMaterials, get_task_group: RequestTaskGroup) -> dict[str, Any]:
    return await make_count(run, materials, get_task_group)


@limited.get("/words")
async def limited_words(
    run: ThisRun, materials: TheMaterials, cancel: TwoSeconds, get_task_group: RequestTaskGroup
) -> dict[str, Any]:
    async with cancel:
        run.follow(cancel)
        return await make_count(run, materials, get_task_group)


@plain.get("/words")
async def plain_words(run: ThisRun, materials: TheMaterials) -> dict[str, Any]:
    return await make_count(run, materials, anyio.create_task_group)


@covered.post("/upload")
async def upload(run: ThisRun, request: Request, cancel: RequestCancelable) -> dict[str, Any]:
    async with cancel:
        return await take_upload(run, request)


@limited.post("/upload")
async def limited_upload(run: ThisRun, request: Request, cancel: TwoSeconds) -> dict[str, Any]:
    async with cancel:
        return await take_upload(run, request)


@plain.post("/upload")
async def plain_upload(run: ThisRun, request: Request) -> dict[str, Any]:
    return await take_upload(run, request)


@covered.get("/collatz")
async def collatz(run: ThisRun, materials: TheMaterials, cancel: RequestCancelable) -> dict[str, Any]:
    async with cancel:
        return await make_search(run, materials, cancel.run_in_process)


@limited.get("/collatz")
async def limited_collatz(run: ThisRun, materials: TheMaterials, cancel: TwoSeconds) -> dict[str, Any]:
    async with cancel:
        return await make_search(run, materials, cancel.run_in_process)


@plain.get("/collatz")
async def plain_collatz(run: ThisRun, materials: TheMaterials) -> dict[str, Any]:
    return await make_search(run, materials, anyio.to_process.run_sync)


@feeds.get("/feed")
@plain.get("/feed")
async def feed(
    run: ThisRun, materials: TheMaterials, events: Annotated[int, Query(ge=1, le=1000)] = FEED_EVENTS
) -> StreamingResponse:
    run.begin("rows", min(materials.table.rows, events * SLICE_ROWS), current_cancelable())
    return StreamingResponse(sales_events(run, materials, events), media_type="text/event-stream")


async def sales_events(run: Run, materials: Materials, events: int) -> AsyncIterator[str]:
    async for event in sales_feed(materials.table, run.advance, events, pace=0.2):
        yield f"data: {json.dumps(event)}\n\n"


async def make_report(run: Run, materials: Materials) -> dict[str, Any]:
    run.begin("rows", materials.table.rows, current_cancelable())
    return await largest_sales(materials.table, run.advance)


async def make_count(run: Run, materials: Materials, open_task_group: OpenTaskGroup) -> dict[str, Any]:
    @asynccontextmanager
    async def followed_task_group() -> AsyncIterator[TaskGroup]:
        async with open_task_group() as task_group:
            run.begin("words", materials.corpus.words, current_cancelable())
            yield task_group

    return await count_words(materials.corpus, run.advance, followed_task_group)


async def make_search(
    run: Run, materials: Materials, run_in_process: Callable[..., Awaitable[dict[str, int]]]
) -> dict[str, int]:
    run.begin("numbers", materials.numbers, current_cancelable())
    with run.board(materials.folder) as board:
        return await run_in_process(longest_collatz, materials.numbers, board)


async def take_upload(run: Run, request: Request) -> dict[str, Any]:
    run.begin("bytes", int(request.headers.get("content-length", 0)) or None, current_cancelable())
    return await take_in(request.stream(), run.advance)


def create_app(materials: Materials, ledger: Ledger, operations: Operations) -> ASGIApp:
    """Return the application of the demonstration; its page shows `ledger` and `operations` live."""
    # The lifespan ends streams of events with the server, as `ledger` does with the work.
    lifespan = cancelation_lifespan(ledger.shared, grace=0, background_grace=0)
    app = FastAPI(title="cancelable_deps, the demonstration", lifespan=operations.lifespan(lifespan))
    app.include_router(page_router(materials, ledger))
    app.include_router(operations_routes(operations))
    for router in (covered, limited, plain):
        app.include_router(router)
    app.mount("/limited", feeds_app(materials, default_timeout=LIMIT))
    app.mount("", feeds_app(materials, default_timeout=None))
    app.state.materials = materials
    return LedgerMiddleware(app, ledger)


def feeds_app(materials: Materials, default_timeout: float | None) -> FastAPI:
    app = FastAPI()
    app.include_router(feeds)
    app.add_middleware(RequestCancelationMiddleware, default_timeout=default_timeout)
    app.state.materials = materials
    return app


def page_router(materials: Materials, ledger: Ledger) -> APIRouter:
    router = APIRouter()
    page, script = (
        Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.html", "operations.js")
    )
    page = page.replace("/*OPERATIONS*/", script)
    shown = works(materials.table.rows, materials.corpus.words, materials.numbers)
    setup = {"limit": LIMIT, "operations": LISTED, "word": materials.corpus.example}

    @router.get("/")
    async def show(request: Request) -> HTMLResponse:
        address = str(request.base_url).rstrip("/")
        text = json.dumps(setup | {"works": [work.for_page(address) for work in shown]})
        return HTMLResponse(page.replace("/*SETUP*/", text.replace("<", "\\u003c")))

    @router.get("/events")
    async def events() -> StreamingResponse:
        return StreamingResponse(ledger.changes(), media_type="text/event-stream")

    return router
