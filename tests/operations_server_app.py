"""An application with operations, for real servers: work, a stream and a WebSocket that wait, and their stop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse

from cancelable_deps import Cancelable, RequestCancelationMiddleware, cancelation_lifespan
from cancelable_deps.operations import Operations

operations = Operations(background_grace=0.3)
app = FastAPI(lifespan=operations.lifespan(cancelation_lifespan(grace=0.2)))
app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")


@app.get("/work")
async def work() -> None:
    await anyio.sleep_forever()


@app.get("/stream")
async def stream() -> StreamingResponse:
    async def parts() -> AsyncIterator[str]:
        yield "one\n"
        await anyio.sleep_forever()

    return StreamingResponse(parts())


@app.websocket("/socket")
async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await anyio.sleep_forever()


async def report(cancel: Cancelable) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        print(f"report: {cancel.reason}", flush=True)


@app.post("/reports", status_code=202)
async def start() -> Any:
    return (await operations.start(report)).accepted()


@app.get("/bare/work")
async def health() -> bool:
    return True


@app.post("/stop/{id}")
async def stop(id: str) -> str:
    return (await operations.cancel(id, message="stopped")).outcome
