"""Endpoints behind the real servers that work in a thread or in a process, under every door.

A path is `/workers/<door>/<endpoint>`; the query parameter `told` names a file by which test and worker tell each other.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import anyio.from_thread
from fastapi import APIRouter, Depends, FastAPI, Header

from cancelable_deps import (
    CancelableRoute,
    CancelationError,
    CancellationEvent,
    RequestCancelable,
    RequestCancelationMiddleware,
    current_cancelable,
    with_cancelation,
)
from tests import jobs
from tests.machine import scaled

CEILING = scaled(15)
LIMIT = scaled(0.2)

Note = Callable[[str], None]


def add_worker_endpoints(root: FastAPI, add: Callable[[str, str], None]) -> None:
    async def note_of(x_id: Annotated[str, Header()] = "") -> Note:
        return lambda event: anyio.from_thread.run_sync(add, x_id, event)

    noting: Note = Depends(note_of)
    for door, limit in (("deco", None), ("timed-deco", LIMIT)):
        _add(root, door, noting, with_cancelation(timeout=limit))
    for door, limit in (("route", None), ("timed-route", LIMIT)):
        _add(root, door, noting, _as_it_is, route_class=CancelableRoute.with_timeout(limit))
    for door, limit in (("mw", None), ("timed-mw", LIMIT)):
        app = FastAPI(openapi_url=None)
        app.add_middleware(RequestCancelationMiddleware, default_timeout=limit)
        _add(app, "", noting, _as_it_is)
        root.mount(f"/workers/{door}", app)
    _add_handles(root, noting)


def _as_it_is(endpoint: Any) -> Any:
    return endpoint


def _add(app: FastAPI, door: str, noting: Note, decorate: Callable[[Any], Any], **options: Any) -> None:
    router = APIRouter(**options)

    @router.get("/thread")
    @decorate
    def thread(note: Note = noting) -> None:
        cancel = current_cancelable()
        assert cancel is not None
        work(note, cancel.check)

    @router.get("/process")
    @decorate
    async def process(told: str) -> None:
        cancel = current_cancelable()
        assert cancel is not None
        await cancel.run_in_process(jobs.spin, told)

    app.include_router(router, prefix=f"/workers/{door}" if door else "")


def _add_handles(root: FastAPI, noting: Note) -> None:
    router = APIRouter(prefix="/workers")

    @router.get("/dep/thread")
    def handle(cancel: RequestCancelable, note: Note = noting) -> None:
        with cancel:
            work(note, cancel.check)

    @router.get("/dep/process")
    async def process(cancel: RequestCancelable, told: str) -> None:
        async with cancel:
            await cancel.run_in_process(jobs.spin, told)

    @router.get("/dep/process-id")
    async def process_id(cancel: RequestCancelable) -> int:
        async with cancel:
            return await cancel.run_in_process(jobs.process_id)

    @router.get("/event/thread")
    def event(event: CancellationEvent, note: Note = noting) -> None:
        work(note, event.is_set)
        note(f"stopped:{event.reason}")

    @router.get("/abandoned")
    @with_cancelation(timeout=LIMIT, abandon_thread=True)
    def abandoned(told: str, note: Note = noting) -> None:
        work(note, Path(told).exists)

    root.include_router(router)


def work(note: Note, ask: Callable[[], object]) -> None:
    """Ask again and again, until that raises or is true."""
    note("started")
    deadline = time.monotonic() + CEILING
    try:
        while not ask():
            assert time.monotonic() < deadline, "the thread was never told to stop"
            time.sleep(0.001)
    except CancelationError as exc:
        note(f"stopped:{exc.reason}")
        raise
    note("finished")
