"""Stop a request, and follow a report, from any of several workers. They share a Redis: REDIS_URL, or one on this machine.

python -m examples.several_workers
uvicorn examples.several_workers:app --workers 2  # instead of the line before; or examples/compose.yaml
curl http://127.0.0.1:8000/report -H 'user: ann' -H 'operation-id: mine' & sleep 1
curl -X POST http://127.0.0.1:8000/operations/mine/cancel -H 'user: ann'
curl -i -X POST http://127.0.0.1:8000/reports -H 'user: ann'
curl -N http://127.0.0.1:8000/operations/ID/events -H 'user: ann'
"""

import os
from typing import Annotated

import anyio
import uvicorn
from fastapi import Depends, FastAPI, Header, Response

from cancelable_deps import Cancelable, RequestCancelationMiddleware, cancelation_lifespan
from cancelable_deps.operations import Operations, RedisBackend, RequestOperation, RequestOperations, operations_router


async def user(user: Annotated[str, Header()]) -> str:
    """Return the user; a real application takes it from a session."""
    return user


redis = RedisBackend(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379"), prefix="example")
operations = Operations(redis, background_grace=15)
app = FastAPI(lifespan=operations.lifespan(cancelation_lifespan(grace=5, background_grace=5)))
app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id", exclude="/health")
app.include_router(operations_router(operations, owner=user), prefix="/operations")


@app.get("/report")
async def report(operation: RequestOperation, user: Annotated[str, Depends(user)]) -> dict[str, int]:
    """Work for a minute in one of the workers."""
    operation.claim(user)
    await anyio.sleep(60)
    return {"pages": 60, "worker": os.getpid()}


@app.post("/reports", status_code=202)
async def start(operations: RequestOperations, user: Annotated[str, Depends(user)]) -> Response:
    """Start a report that goes on after this response; every worker knows how far it is."""
    return (await operations.start(write_report, owner=user)).accepted()


async def write_report(cancel: Cancelable) -> dict[str, int]:
    for page in range(60):
        await cancel.report_progress("page written", {"done": page, "total": 60})
        await anyio.sleep(1)
    return {"pages": 60, "worker": os.getpid()}


@app.get("/health")
async def health() -> dict[str, int]:
    """Say that this worker lives. Redis is not asked: without it, the worker still answers."""
    return {"worker": os.getpid()}


if __name__ == "__main__":
    uvicorn.run(app)
