"""Stop a request from elsewhere, by an id that its client has chosen.

python -m examples.cancel_by_id
curl -i -H 'operation-id: my-report' http://127.0.0.1:8000/report &
curl -X POST 'http://127.0.0.1:8000/stop/my-report'
"""

import anyio
import uvicorn
from fastapi import FastAPI

from cancelable_deps import RequestCancelationMiddleware, cancelation_lifespan
from cancelable_deps.operations import Cancelation, Operation, Operations, RequestOperations

operations = Operations()
app = FastAPI(lifespan=operations.lifespan(cancelation_lifespan()))
app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")


@app.get("/report")
async def report() -> dict[str, int]:
    """Work for a minute. The handler knows nothing of operations."""
    await anyio.sleep(60)
    return {"rows": 480_000}


@app.get("/running")
async def running(operations: RequestOperations) -> list[Operation]:
    """List what runs, the oldest first."""
    return (await operations.list(route="/report")).items


@app.post("/stop/{id}")
async def stop(id: str, operations: RequestOperations) -> Cancelation:
    """Stop a request, and say what has become of it: the request is answered with 499 and this message."""
    return await operations.cancel(id, message="stopped by its stop button")


if __name__ == "__main__":
    uvicorn.run(app)
