"""Answer 504, or a status of your own, when a handler takes too long.

python -m examples.timeout
curl -i http://127.0.0.1:8000/decorated
curl -i http://127.0.0.1:8000/dependency
curl -i http://127.0.0.1:8000/own-status
"""

from typing import Annotated

import anyio
import uvicorn
from fastapi import Depends, FastAPI

from cancelable_deps import Cancelable, CancelationReason, cancelable_with_timeout, with_cancelation

app = FastAPI()


@app.get("/decorated")
@with_cancelation(timeout=0.5)
async def decorated() -> dict[str, str]:
    """Limit the whole handler to half a second."""
    return await slow_answer()


@app.get("/dependency")
async def dependency(cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(0.5))]) -> dict[str, str]:
    """Limit the block to half a second; the code outside it has no limit."""
    async with cancel:
        return await slow_answer()


@app.get("/own-status")
@with_cancelation(timeout=0.5, status_codes={CancelationReason.TIMEOUT: 503})
async def own_status() -> dict[str, str]:
    return await slow_answer()


async def slow_answer() -> dict[str, str]:
    await anyio.sleep(10)
    return {"answer": "here, after all"}


if __name__ == "__main__":
    uvicorn.run(app)
