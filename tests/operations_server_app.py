"""An application with operations, for real servers: work, a stream and a WebSocket that wait, and their stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
from fastapi import Depends, FastAPI, Header, WebSocket
from fastapi.responses import StreamingResponse

from cancelable_deps import Cancelable, RequestCancelationMiddleware, cancelation_lifespan
from cancelable_deps.operations import Operations, latest_only

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


searches: Counter[str] = Counter()
"""How many have come, have begun to work, run, and have ended."""

last = anyio.Event()


async def user(user: Annotated[str, Header()]) -> str:
    searches["come"] += 1
    return user


@app.get("/search", dependencies=[Depends(latest_only(user))])
async def search(text: str, seconds: float) -> str:
    """Search for so many seconds; for ever with a negative number, until `/last` is asked for."""
    searches["begun"] += 1
    searches["run"] += 1
    try:
        await (anyio.sleep(seconds) if seconds >= 0 else last.wait())
    finally:
        searches["run"] -= 1
        searches["ended"] += 1
    return text


@app.get("/searches")
async def counts() -> dict[str, int]:
    """Return the counts, and how many operations are listed, and turns kept."""
    listed = await operations.list(route="/search", limit=0)
    return {**searches, "listed": listed.total, "turns": len(operations.worker.turns)}


@app.post("/last")
async def let_the_last_end() -> None:
    last.set()


@app.get("/bare/work")
async def health() -> bool:
    return True


@app.post("/stop/{id}")
async def stop(id: str) -> str:
    return (await operations.cancel(id, message="stopped")).outcome
