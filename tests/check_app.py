"""An application whose start-up check is seen in its log, under the servers of `tests/test_check_servers.py`."""

import logging
import os
import signal
import sys

import anyio
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from cancelable_deps import RequestCancelable, RequestCancelationMiddleware, cancelation_lifespan, configure
from cancelable_deps.operations import Operations

logging.basicConfig(level=logging.INFO, stream=sys.stdout)
configure(cleanup_grace=2)
if "SIGTERM_IS_SIGINT" in os.environ:
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))

operations = Operations()
lifespan = cancelation_lifespan(grace=1, background_grace=1)
app = FastAPI(lifespan=operations.lifespan(lifespan) if "OPERATIONS" in os.environ else lifespan)
if "HANDLE" not in os.environ:
    app.add_middleware(RequestCancelationMiddleware)


@app.get("/")
async def answer() -> str:
    return "ready"


@app.get("/stream")
async def stream(cancel: RequestCancelable) -> StreamingResponse:
    async with cancel:
        return StreamingResponse(["a"])


@app.get("/cleanup")
async def clean_up() -> None:
    print("work: begun", flush=True)
    try:
        await anyio.sleep_forever()
    finally:
        try:
            await anyio.sleep(1.5)
            print("cleanup: whole", flush=True)
        except BaseException:
            print("cleanup: interrupted", flush=True)
            raise
