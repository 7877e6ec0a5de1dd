"""Shut a server down: the application is notified at once, and every request ends in time.

    python -m examples.shutdown
    curl -i localhost:8000/report & curl -N localhost:8000/ticks & curl -i -X POST localhost:8000/orders

Then press Ctrl-C at the server. The ticks say goodbye at once, the report has three seconds and is answered 503 with
Retry-After, the e-mail is left for the next start, and the pool is closed when nobody uses it any longer.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import uvicorn
from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import StreamingResponse

from cancelable_deps import (
    Cancelable,
    CancelationError,
    RequestCancelationMiddleware,
    cancelation_lifespan,
    shutdown_token,
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
    yield {"pool": "open"}
    print("the pool is closed")


app = FastAPI(lifespan=cancelation_lifespan(lifespan, grace=3, background_grace=2, retry_after=10))
app.add_middleware(RequestCancelationMiddleware)


@app.get("/report")
async def report() -> str:
    await anyio.sleep(60)
    return "a report that took a minute"


@app.get("/ticks")
async def ticks() -> StreamingResponse:
    async def until_the_shutdown() -> AsyncIterator[str]:
        while not shutdown_token().is_cancelled:
            yield "tick\n"
            with anyio.move_on_after(1):
                await shutdown_token().wait()
        yield "goodbye\n"

    return StreamingResponse(until_the_shutdown(), media_type="text/plain")


async def send_email() -> None:
    try:
        async with Cancelable(token=shutdown_token()):  # a block that stops at once, not after the grace
            await anyio.sleep(60)
    except CancelationError as exc:
        print(f"the e-mail waits for the next start, because of a {exc.reason}")


@app.post("/orders")
async def order(tasks: BackgroundTasks) -> str:
    tasks.add_task(send_email)
    return "ordered"


if __name__ == "__main__":
    uvicorn.run(app)
