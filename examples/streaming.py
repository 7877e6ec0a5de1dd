"""Streams: an LLM proxy that stops with its client but still receives the bill, a feed of ticks, a report with progress.

python -m examples.streaming
curl -N http://127.0.0.1:8000/chat       # press Ctrl-C: the upstream is closed, or, past `finish`, read to its end; the
                                         # server prints which
curl -N http://127.0.0.1:8000/ticks      # after a second: event: cancelled, data: {"reason": "timeout", ...}
curl -N http://127.0.0.1:8000/report     # event: progress, twice, and event: result
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import anyio
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from cancelable_deps import Cancelable, RequestCancelable, cancelable_streaming_response, progress_response

app = FastAPI()
THINKING = 1.0


async def model() -> AsyncGenerator[str]:
    """Simulate the upstream: yield tokens, `finish`, and then the costs."""
    try:
        for number in range(3):
            yield f"token {number}"
            await anyio.sleep(THINKING)
        yield "finish"
        await anyio.sleep(THINKING)
        yield "usage: 3 tokens"
    finally:
        print("upstream closed", flush=True)


async def proxied(cancel: Cancelable) -> AsyncIterator[str]:
    async with aclosing(model()) as frames:
        async for frame in frames:
            if frame == "finish":
                break
            yield f"data: {frame}\n\n"
        # From here the answer is complete, and only the bill is missing. A disconnect must not stop that any more, but a
        # timeout still may.
        with cancel.defer_disconnect():
            yield "data: finish\n\n"
            async for frame in frames:
                print("billed:", frame, flush=True)
                yield f"data: {frame}\n\n"


@app.get("/chat")
async def chat(cancel: RequestCancelable) -> StreamingResponse:
    return cancelable_streaming_response(
        proxied(cancel), cancel, media_type="text/event-stream", timeout=60, gap_timeout=10, send_timeout=30
    )


async def endless() -> AsyncIterator[str]:
    try:
        while True:
            yield "data: tick\n\n"
            await anyio.sleep(0.1)
    finally:
        await anyio.sleep(0.01)  # cleanup may await
        print("ticks closed", flush=True)


@app.get("/ticks")
async def ticks() -> StreamingResponse:
    return cancelable_streaming_response(endless(), media_type="text/event-stream", timeout=1)


async def write_report(cancel: Cancelable) -> dict[str, int]:
    for page in (1, 2):
        await anyio.sleep(0.01)
        await cancel.report_progress(f"page {page} of 2", {"page": page})
    return {"pages": 2}


@app.get("/report")
async def report(cancel: RequestCancelable) -> StreamingResponse:
    return progress_response(write_report, cancel)


if __name__ == "__main__":
    uvicorn.run(app)
