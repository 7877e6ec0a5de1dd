"""One of several services in a row, each of which gives the rest of its time to the next: for `test_deadline_chain.py`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
from fastapi import FastAPI, Request
from starlette.responses import Response

from cancelable_deps import RequestCancelable, RequestCancelationMiddleware, current_cancelable
from cancelable_deps.deadlines import ClientTimeout, forward_deadline
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.request.in_flight import in_flight_of

HEADER = "connect-timeout-ms"
MARKER = "x-deadline-expired"
MARGIN = 0.5
NEXT = os.environ.get("NEXT_SERVICE", "")

hook = forward_deadline(header=HEADER, margin=MARGIN)
client = httpx.AsyncClient(event_hooks={"request": [hook]}, timeout=None, trust_env=False)
running = 0
reasons: list[str] = []


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with client:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(RequestCancelationMiddleware, client_timeout=ClientTimeout([HEADER]))


@app.get("/bare/work")
async def ready() -> str:
    return "ready"


@app.get("/work")
async def work(request: Request, cancel: RequestCancelable, wait: bool = False) -> Any:
    """What each service from here on was given, and what it had left."""
    global running
    running += 1
    try:
        own = [int(request.headers[HEADER]) / 1000, cancel.remaining()]
        if NEXT:
            response = await client.get(f"{NEXT}/work", params={"wait": wait})
            if response.status_code != 200:
                marker = response.headers.get(MARKER, "")
                return Response(response.content, response.status_code, headers={MARKER: marker})
            return [own, *response.json()]
        if wait:
            await anyio.sleep_forever()
        return [own]
    finally:
        running -= 1
        around = current_cancelable()
        if around is not None and around.reason is not None:
            reasons.append(str(around.reason))


@app.get("/state")
async def state() -> Any:
    """What runs here, besides this request."""
    in_flight = in_flight_of(current_loop())
    requests = len(in_flight.requests) + len(in_flight.young)
    return {"running": running, "requests": requests - 1, "reasons": reasons}
