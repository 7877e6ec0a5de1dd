"""Named timeouts: a default, one for a single route, and one that only counts the requests that exceed it.

Run: python -m examples.policies
Try: curl -i localhost:8000/search
     curl -i 'localhost:8000/report?seconds=3'
     curl -i localhost:8000/stats
"""

import logging

import anyio
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse

from cancelable_deps import (
    CancelationError,
    RequestCancelationMiddleware,
    TimeoutPolicy,
    current_cancelable,
    timeout_policy,
    with_cancelation,
)

REPORT = TimeoutPolicy(2, advisory=True)


def try_a_shorter_one(request: Request, error: CancelationError) -> JSONResponse:
    return JSONResponse({"problem": error.detail, "hint": "ask for less"}, status_code=error.status_code)


app = FastAPI()
app.add_middleware(
    RequestCancelationMiddleware,
    policies={"standard": TimeoutPolicy(10), "search": TimeoutPolicy(1, status_code=503, response=try_a_shorter_one)},
    default_policy="standard",
)


@app.get("/search", dependencies=[Depends(timeout_policy("search"))])
async def search(thorough: bool = False) -> list[str]:
    cancel = current_cancelable()
    if thorough and cancel is not None:
        cancel.extend(60)
    await anyio.sleep(3)
    return ["found"]


@app.get("/report")
@with_cancelation(policy=REPORT)
async def report(seconds: float = 1) -> str:
    await anyio.sleep(seconds)
    return "the report"


@app.get("/stats")
async def stats() -> dict[str, int]:
    return {"reports that took longer than 2 seconds": REPORT.exceeded}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    uvicorn.run(app)
