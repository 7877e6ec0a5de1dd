"""Jobs of arq that any web worker lists, follows and stops. It needs a Redis: REDIS_URL, or one on this machine.

uvicorn examples.queues.with_arq:app &
arq examples.queues.with_arq.WorkerSettings &
curl -X POST 'http://127.0.0.1:8000/reports?pages=60' -H 'user: ann'
curl http://127.0.0.1:8000/operations/ -H 'user: ann'
curl -X POST http://127.0.0.1:8000/operations/ID/cancel -H 'user: ann'
curl http://127.0.0.1:8000/reports/ID -H 'user: ann'
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from arq import create_pool, func
from arq.connections import RedisSettings
from arq.jobs import Job, JobStatus
from fastapi import Depends, FastAPI, HTTPException

from cancelable_deps.operations import operations_router

from . import hooks
from .reports import REDIS, operations, user, write_report

# The worker: `arq examples.queues.with_arq.WorkerSettings`.


async def report(ctx: dict[str, Any], user: str, pages: int) -> dict[str, int]:
    """Write a report. If it is stopped, its error is the result of the job, which arq does not try again."""
    async with operations.track(id=ctx["job_id"], name="report", owner=user) as cancel:
        return await write_report(cancel, ctx["job_id"], pages)


class WorkerSettings:
    redis_settings = RedisSettings.from_dsn(REDIS)
    functions = (func(report, timeout=600),)
    on_startup = hooks.startup
    on_shutdown = hooks.shutdown
    allow_abort_jobs = True  # `Job.abort` works as well


# The application: `uvicorn examples.queues.with_arq:app`.


@asynccontextmanager
async def connected(app: FastAPI) -> AsyncIterator[None]:
    app.state.queue = queue = await create_pool(WorkerSettings.redis_settings)
    try:
        yield
    finally:
        await queue.aclose()


app = FastAPI(lifespan=operations.lifespan(connected))
app.include_router(operations_router(operations, owner=user), prefix="/operations")


@app.post("/reports", status_code=202)
async def order(user: Annotated[str, Depends(user)], pages: int) -> dict[str, str]:
    """Order a report; its id is that of its operation as well."""
    job = await app.state.queue.enqueue_job("report", user, pages)
    return {"id": job.job_id}


@app.get("/reports/{id}")
async def outcome(id: str) -> dict[str, str]:
    """Say what the queue knows of a report."""
    job = Job(id, app.state.queue)
    if (status := await job.status()) is JobStatus.not_found:
        raise HTTPException(404)
    info = await job.result_info()
    return {"status": status.value, "result": "" if info is None else repr(info.result)}
