"""The application behind the servers that are shut down; its log is its journal."""

import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from fastapi import BackgroundTasks, FastAPI, WebSocket
from fastapi.responses import StreamingResponse

from cancelable_deps import (
    RequestCancelationMiddleware,
    begin_shutdown,
    cancelable_streaming_response,
    cancelation_lifespan,
    shutdown_token,
    with_cancelation,
)

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
log = logging.getLogger("journal")

if "SIGTERM_AS_SIGINT" in os.environ:
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    log.info("process %d is up", os.getpid())
    yield
    log.info("lifespan ended")


app = FastAPI(
    lifespan=cancelation_lifespan(
        lifespan,
        grace=float(os.environ.get("GRACE", "1")),
        background_grace=0.5,
        retry_after=7,
        refuse_new="REFUSE_NEW" in os.environ,
    )
)
covered = FastAPI()
covered.add_middleware(RequestCancelationMiddleware)
app.mount("/mw", covered)


@app.get("/")
async def answers() -> str:
    return "bare"


@app.post("/shutdown")
async def shutdown() -> bool:
    return begin_shutdown("by order")


@covered.get("/")
async def quick() -> str:
    return "quick"


@covered.get("/told")
async def told() -> str:
    """Ends as soon as it is told of the shutdown."""
    log.info("told started")
    reason = await shutdown_token().wait()
    return f"{reason}: {shutdown_token().message}"


@covered.get("/endless")
async def endless() -> None:
    await work("endless")


@app.get("/decorated")
@with_cancelation
async def decorated() -> None:
    await work("decorated")


@covered.get("/background")
async def background(tasks: BackgroundTasks) -> str:
    tasks.add_task(work, "background")
    return "done"


@app.get("/events")
async def events() -> StreamingResponse:
    return cancelable_streaming_response(endless_events(), media_type="text/event-stream")


async def endless_events() -> AsyncIterator[str]:
    yield "data: first\n\n"
    await work("events")


@app.websocket("/socket")
@with_cancelation
async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await work("socket")


async def work(name: str) -> None:
    log.info("%s started", name)
    try:
        await anyio.sleep_forever()
    finally:
        log.info("%s cancelled", name)
