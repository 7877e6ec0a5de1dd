"""Stop a handler's work when its client leaves.

    python -m examples.disconnect
    curl -m 1 http://127.0.0.1:8000/report

curl gives up after a second; the server prints what it cleaned up, and logs why.
"""

import logging

import anyio.lowlevel
import uvicorn
from fastapi import FastAPI

from cancelable_deps import RequestCancelable

app = FastAPI()


@app.get("/report")
async def report(cancel: RequestCancelable) -> dict[str, int]:
    async with cancel:
        return {"rows": await count_rows()}


async def count_rows() -> int:
    """Simulate a slow query; its `finally` has five seconds in which it may await."""
    try:
        await anyio.sleep(10)
        return 1_000_000
    finally:
        await anyio.lowlevel.checkpoint()
        print("the query is over, its connection is back in the pool", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    uvicorn.run(app)
