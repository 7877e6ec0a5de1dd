"""Receive a large upload, and stop when it breaks off or takes too long.

    python -m examples.upload
    head -c 50000000 /dev/urandom | curl -i -X POST -T - http://127.0.0.1:8000/files
    head -c 50000000 /dev/urandom | curl -i -X POST -T - --limit-rate 100k -m 2 http://127.0.0.1:8000/files

The body reaches the handler whole: what is read while listening for the hang-up is passed on, and no more than 64 KiB
of it wait in memory.
"""

import hashlib

import anyio
import uvicorn
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect

from cancelable_deps import with_cancelation

app = FastAPI()


@app.post("/files")
@with_cancelation(timeout=60)
async def take(request: Request) -> dict[str, int | str]:
    digest, size = hashlib.sha256(), 0
    try:
        async with anyio.TemporaryFile() as file:
            async for chunk in request.stream():
                size += await file.write(chunk)
                digest.update(chunk)
    except (anyio.get_cancelled_exc_class(), ClientDisconnect):
        # `request.stream()` raises the second if the client leaves while the handler reads. Both are answered with 499.
        print(f"broken off after {size} bytes; the file is gone", flush=True)
        raise
    return {"bytes": size, "sha256": digest.hexdigest()}


if __name__ == "__main__":
    uvicorn.run(app)
