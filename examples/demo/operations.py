"""What runs and how it is stopped from elsewhere, a report in the background, and a search of which the latest wins."""

from __future__ import annotations

import os
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Header, Query, Response

from cancelable_deps import Cancelable, current_cancelable, with_cancelation
from cancelable_deps.operations import Operations, RequestOperations, latest_only, operations_router

from .ledger import LISTED
from .materials import TheMaterials, ThisRun
from .work import Table, find_words, largest_sales

PACE = float(os.environ.get("DEMO_PACE", "0.05"))
"""Seconds between two slices of the report, so that there is time to watch it."""


async def everybody() -> None:
    """Let everybody who can reach the demonstration see and stop everything; your own dependency asks who it is."""


async def user_of(user: Annotated[str, Header(min_length=1, max_length=64)]) -> str:
    """Return the user; the page makes one for each tab, a real application takes it from a session."""
    return user


Typed = Annotated[str, Query(min_length=1, max_length=40)]

searches = APIRouter()


@searches.get("/search", dependencies=[Depends(latest_only(user_of))])
@with_cancelation
async def search(run: ThisRun, materials: TheMaterials, text: Typed) -> dict[str, int]:
    run.begin("words", materials.corpus.words, current_cancelable())
    return await find_words(materials.corpus, text.lower(), run.advance)


@searches.get("/plain/search")
async def plain_search(run: ThisRun, materials: TheMaterials, text: Typed) -> dict[str, int]:
    run.begin("words", materials.corpus.words, None)
    return await find_words(materials.corpus, text.lower(), run.advance)


@searches.post("/reports", status_code=202)
async def start_report(operations: RequestOperations, materials: TheMaterials) -> Response:
    return (await operations.start(write_report, materials.table)).accepted()


async def write_report(cancel: Cancelable, table: Table) -> dict[str, list[int]]:
    """Write a report that outlives the request which has started it."""
    rows = 0

    def advance(amount: int) -> None:
        nonlocal rows
        rows += amount

    async def tell() -> None:
        await cancel.report_progress("rows read", {"done": rows, "total": table.rows})
        await anyio.sleep(PACE)

    return await largest_sales(table, advance, tell)


def operations_routes(operations: Operations) -> APIRouter:
    """Return the routes of the table and of the operators' page, of the report and of the searches."""
    routes = APIRouter()
    routes.include_router(operations_router(operations, operator=everybody, page=True), prefix=LISTED)
    routes.include_router(searches)
    return routes
