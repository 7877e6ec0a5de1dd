"""The application of `benchmarks.soak --workers`: operations over Redis, and what each of its workers still holds."""

import gc
import os
from contextlib import suppress
from typing import Annotated, Any

import anyio
import psutil
from fastapi import Depends, FastAPI, HTTPException, Query
from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cancelable_deps import Cancelable, RequestCancelationMiddleware, with_cancelation
from cancelable_deps.kernel.detached import all_detached
from cancelable_deps.operations import (
    Operations,
    OperationsUnavailable,
    RedisBackend,
    RequestOperation,
    at_most,
    latest_only,
)

MEMORY = 5.0
"""Seconds for which ids and entries are remembered: short, so that a minute shows whether they are forgotten."""

operations = Operations(
    RedisBackend(os.environ["REDIS_URL"], lease=3), memory=MEMORY, result_ttl=MEMORY, background_grace=1
)
app = FastAPI(lifespan=operations.lifespan(), openapi_url=None)
served = 0
app.add_middleware(
    RequestCancelationMiddleware, operations=operations, operation_id="operation-id", default_timeout=0.05
)


async def user(user: Annotated[str, Query()]) -> str:
    return user


class Counter:
    """A middleware that counts the requests of this worker."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        global served
        served += 1
        await self.app(scope, receive, send)


app.add_middleware(Counter)


@app.post("/work")
async def work(key: str, seconds: float) -> Response:
    await anyio.sleep(seconds)
    return Response(key)


@app.post("/timed")
@with_cancelation(timeout=0.01)
async def timed(key: str, seconds: float) -> Response:
    await anyio.sleep(seconds)
    return Response(key)


@app.post("/owned")
async def owned(operation: RequestOperation, key: str, seconds: float) -> Response:
    operation.claim(key)
    operation.label(stage="soak")
    await anyio.sleep(seconds)
    return Response(key)


@app.post("/error")
async def error(key: str, seconds: float) -> Response:
    await anyio.sleep(seconds)
    raise HTTPException(418, key)


@app.post("/latest", dependencies=[Depends(latest_only(user))])
async def latest(key: str, seconds: float) -> Response:
    await anyio.sleep(seconds)
    return Response(key)


@app.post("/few", dependencies=[Depends(at_most(2, user, queue=2, queue_timeout=0.03))])
async def few(key: str, seconds: float) -> Response:
    await anyio.sleep(seconds)
    return Response(key)


@app.post("/jobs")
async def jobs(key: str, seconds: float) -> Response:
    await operations.start(job, seconds, id=f"job-{key}", owner="soak")
    return Response(key)


@app.post("/detached")
@with_cancelation
async def detached(key: str, seconds: float) -> Response:
    Cancelable().detach(job, seconds)
    return Response(key)


async def job(cancel: Cancelable, seconds: float) -> None:
    for step in range(3):
        await cancel.report_progress(str(step))
        await anyio.sleep(seconds)


@app.post("/cancel")
async def cancel(key: str, id: str) -> Response:
    with suppress(OperationsUnavailable):
        await operations.cancel(id, wait=0.02)
    return Response(key)


@app.get("/held")
async def held() -> dict[str, Any]:
    """Return the sizes of all that this worker keeps, and its process id."""
    gc.collect()
    process, local, exchange = psutil.Process(), operations.worker.local, operations.worker.exchange
    loop = local.loop
    return {
        "pid": process.pid,
        "served": served,
        "objects": len(gc.get_objects()),
        "sizes": {
            "tasks": len(anyio.get_running_tasks()),
            "young requests": len(loop.in_flight.young),
            "old requests": len(loop.in_flight.requests),
            "detached": len(all_detached(loop).running),
            "ids": len(local._by_id),
            "named": len(local._arrived),
            "blocks": len(local._blocks),
            "early cancels": len(local.early),
            "ended": len(local.ended),
            "questions": len(exchange._questions),
            "seen entries": len(exchange._seen),
            "lasting entries": len(exchange._lasting),
            "turns": len(operations.worker.turns),
            "doubtful records": len(operations.worker.background.doubtful),
            "jobs": len(operations.worker.background._jobs),
            "places": len(operations.worker.exchange.backend._places),  # type: ignore[attr-defined]
        },
        "descriptors": process.num_fds(),
        "memory": process.memory_info().rss,
    }
