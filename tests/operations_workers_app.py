"""An application with operations on Redis, for several uvicorn workers."""

from __future__ import annotations

import os

import anyio
from fastapi import FastAPI

from cancelable_deps import RequestCancelationMiddleware
from cancelable_deps.operations import Operations, RedisBackend, RequestOperation, RequestOperations

operations = Operations(RedisBackend(os.environ["REDIS_URL_OF_TEST"], lease=3))
app = FastAPI(lifespan=operations.lifespan())
app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")


@app.get("/wait")
async def wait(operation: RequestOperation) -> None:
    await anyio.sleep_forever()


@app.get("/ids")
async def ids(operations: RequestOperations) -> list[str]:
    return [each.id for each in (await operations.list(route="/wait", limit=1000)).items]


@app.get("/worker")
async def worker(operations: RequestOperations) -> list[str]:
    return [str(os.getpid()), *(each.name for each in await operations.workers())]


@app.post("/stop/{id}")
async def stop(id: str, operations: RequestOperations) -> list[str]:
    return [str(os.getpid()), (await operations.cancel(id, wait=10)).outcome]
