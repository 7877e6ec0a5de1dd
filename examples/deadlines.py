"""A client says how long it waits, and the service behind is told how much of that is left. Both services are this one.

Run: python -m examples.deadlines
Try: curl -i -H 'Prefer: wait=5' localhost:8000/offers
     curl -i -H 'Prefer: wait=2' localhost:8000/offers    # 504 after two seconds
     curl -i -H 'Prefer: wait=0' localhost:8000/offers    # refused at once
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import httpx
import uvicorn
from fastapi import FastAPI, HTTPException

from cancelable_deps import RequestCancelable, RequestCancelationMiddleware
from cancelable_deps.deadlines import ClientTimeout, forward_deadline, no_deadline

PRICES = os.environ.get("PRICES", "http://localhost:8000")
LOOKING_UP = 3.0

http = httpx.AsyncClient(base_url=PRICES, event_hooks={"request": [forward_deadline(header="x-time-left")]})


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with http:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(
    RequestCancelationMiddleware,
    default_timeout=30,
    client_timeout=ClientTimeout(["prefer", "x-time-left"], maximum=60, minimum=0.05),
)


@app.get("/offers")
async def offers() -> dict[str, object]:
    response = await http.get("/prices")
    if "x-deadline-expired" in response.headers:
        # It ends a little before we do, as it was told of less time. The client may know that the time was its own.
        raise HTTPException(504, "There was no time for the prices", headers={"X-Deadline-Expired": "1"})
    with no_deadline():
        await http.post("/statistics")
    return {"prices": response.json()}


@app.get("/prices")
async def prices(cancel: RequestCancelable) -> dict[str, float]:
    left = cancel.remaining()
    try:
        await anyio.sleep(LOOKING_UP)
    finally:
        print(f"prices had {left:.1f} s")
    return {"tea": 4.5}


@app.post("/statistics")
async def statistics(cancel: RequestCancelable) -> None:
    print(f"statistics had {cancel.remaining():.0f} s")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    uvicorn.run(app)
