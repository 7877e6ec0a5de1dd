"""Cover a whole application, and leave its handlers unchanged.

    python -m examples.middleware
    curl -m 1 http://127.0.0.1:8000/report
    curl -i http://127.0.0.1:8000/report
    curl -i http://127.0.0.1:8000/health

The first request ends when curl hangs up, the second after two seconds with a 504. The health check is excluded.
"""

import anyio
import uvicorn
from fastapi import BackgroundTasks, FastAPI

from cancelable_deps import RequestCancelationMiddleware

app = FastAPI()
app.add_middleware(RequestCancelationMiddleware, default_timeout=2, exclude=["/health"])


@app.get("/report")
async def report() -> dict[str, int]:
    await anyio.sleep(10)
    return {"rows": 1_000_000}


@app.get("/health")
async def health() -> str:
    return "alive"


@app.post("/orders")
async def order(background: BackgroundTasks) -> str:
    """Take an order: its background task runs after the response, also if the client has left by then."""
    background.add_task(print, "the invoice is on its way", flush=True)
    return "ordered"


if __name__ == "__main__":
    uvicorn.run(app)
