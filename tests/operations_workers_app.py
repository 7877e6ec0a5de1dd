"""An application with operations on Redis, for several workers of a server.

What its handlers do they write to the folder ``FOLDER_OF_TEST``, where a file ``release-NAME`` lets those of that name end.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anyio
from fastapi import Depends, FastAPI, HTTPException

from cancelable_deps import RequestCancelationMiddleware
from cancelable_deps.operations import (
    Operations,
    RedisBackend,
    RequestOperation,
    RequestOperations,
    at_most,
    latest_only,
)

LEASE = float(os.environ.get("LEASE_OF_TEST", "3"))
FOLDER = Path(os.environ["FOLDER_OF_TEST"])

operations = Operations(RedisBackend(os.environ["REDIS_URL_OF_TEST"], lease=LEASE, prefix=os.environ["PREFIX_OF_TEST"]))
app = FastAPI(lifespan=operations.lifespan())
app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")


async def user(user: str) -> str:
    return user


def write(line: str) -> None:
    with (FOLDER / "journal").open("a") as file:
        file.write(line + "\n")


async def until_released(name: str) -> None:
    while not (FOLDER / f"release-{name}").exists():  # noqa: ASYNC110 - another process makes it
        await anyio.sleep(0.05)


@app.get("/wait")
async def wait(operation: RequestOperation) -> None:
    await anyio.sleep_forever()


@app.get("/search", dependencies=[Depends(latest_only(user))])
async def search(user: str, text: str, operation: RequestOperation) -> str:
    operation.label(text=text)
    await until_released("search")
    return text


@app.get("/turn", dependencies=[Depends(at_most(1, user, queue=20, queue_timeout=300))])
async def turn(user: str, text: str) -> str:
    write(f"{text} begins")
    await until_released(text)
    return text


@app.get("/document", dependencies=[Depends(latest_only(user, wait_for_previous=300))])
async def document(user: str, text: str) -> str:
    write(f"{text} begins")
    try:
        await until_released(text)
    finally:
        # A cleanup that the next one has to wait for.
        with anyio.CancelScope(shield=True):
            await until_released(f"cleanup-{text}")
            write(f"{text} ends")
    return text


@app.get("/running")
async def running(route: str, operations: RequestOperations) -> list[dict[str, Any]]:
    found = await operations.list(route=route, limit=1000, timeout=10)
    if found.unreachable:
        raise HTTPException(503, f"unreachable: {found.unreachable}")
    return [
        {"id": each.id, "worker": each.worker, "key": each.key, "state": each.state, "text": each.labels.get("text")}
        for each in found.items
    ]


@app.get("/worker")
async def worker(operations: RequestOperations) -> list[str]:
    return [operations.worker.local.worker, *(each.name for each in await operations.workers())]


@app.post("/stop/{id}")
async def stop(id: str, operations: RequestOperations) -> list[str]:
    return [operations.worker.local.worker, (await operations.cancel(id, wait=10)).outcome]
