"""Jobs of SAQ that any web worker lists, follows and stops. It needs a Redis: REDIS_URL, or one on this machine.

uvicorn examples.queues.with_saq:app &
saq examples.queues.with_saq.settings &
curl -X POST 'http://127.0.0.1:8000/reports?pages=60' -H 'user: ann'
curl http://127.0.0.1:8000/operations/ -H 'user: ann'
curl -X POST http://127.0.0.1:8000/operations/ID/cancel -H 'user: ann'
curl http://127.0.0.1:8000/reports/ID -H 'user: ann'
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException
from saq import Queue

from cancelable_deps import CancelationError
from cancelable_deps.operations import operations_router

from . import hooks
from .reports import REDIS, operations, user, write_report

queue = Queue.from_url(REDIS)

# The worker: `saq examples.queues.with_saq.settings`.


async def report(ctx: dict[str, Any], *, user: str, pages: int) -> dict[str, int]:
    """Write a report. If it is stopped, SAQ has it as aborted, and does not try it again."""
    job = ctx["job"]
    try:
        async with operations.track(id=job.key, name="report", owner=user) as cancel:
            return await write_report(cancel, job.key, pages)
    except CancelationError as stopped:
        # As `Job.abort` does it. The error itself would be a failure like any other.
        ctx["worker"].job_task_contexts[job]["aborted"] = stopped.detail
        raise asyncio.CancelledError from stopped


settings = {
    "queue": queue,
    "functions": [report],
    "startup": hooks.startup,
    "shutdown": hooks.shutdown,
    "cancellation_hard_deadline_s": 5,  # for the cleanup of jobs when the worker stops
}

# The application: `uvicorn examples.queues.with_saq:app`.


@asynccontextmanager
async def connected(app: FastAPI) -> AsyncIterator[None]:
    await queue.connect()
    try:
        yield
    finally:
        await queue.disconnect()


app = FastAPI(lifespan=operations.lifespan(connected))
app.include_router(operations_router(operations, owner=user), prefix="/operations")


@app.post("/reports", status_code=202)
async def order(user: Annotated[str, Depends(user)], pages: int) -> dict[str, str]:
    """Order a report; its id is that of its operation as well."""
    # SAQ's own timeout is ten seconds.
    job = await queue.enqueue("report", user=user, pages=pages, timeout=600, retries=3)
    assert job is not None
    return {"id": job.key}


@app.get("/reports/{id}")
async def outcome(id: str) -> dict[str, Any]:
    """Say what the queue knows of a report."""
    job = await queue.job(id)
    if job is None:
        raise HTTPException(404)
    return {"status": job.status.value, "result": job.result or job.error}
