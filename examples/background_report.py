"""Answer 202 at once, and go on: work with an id, progress, a result and a stop button.

python -m examples.background_report
curl -i -X POST http://127.0.0.1:8000/start-background-task
curl http://127.0.0.1:8000/tasks/ID
curl -X POST http://127.0.0.1:8000/cancel-task/ID
"""

from typing import Any

import anyio
import uvicorn
from fastapi import FastAPI, Response

from cancelable_deps import Cancelable, cancelation_lifespan
from cancelable_deps.operations import Cancelation, Operation, Operations, OperationUnknown, RequestOperations

operations = Operations(background_grace=5)
app = FastAPI(lifespan=operations.lifespan(cancelation_lifespan()))


async def write_report(cancel: Cancelable, pages: int) -> dict[str, int]:
    """Write a report. It outlives the request that has started it, and takes nothing from it."""
    for page in range(pages):
        await anyio.sleep(1)
        await cancel.report_progress("page written", {"done": page + 1, "total": pages})
    return {"pages": pages}


@app.post("/start-background-task", status_code=202)
async def start(operations: RequestOperations, pages: int = 30) -> Response:
    operation = await operations.start(write_report, pages, timeout=600)
    return operation.accepted(f"/tasks/{operation.id}")


@app.get("/tasks/{id}")
async def look(id: str, operations: RequestOperations) -> Operation:
    """Return how far it is."""
    operation = await operations.get(id)
    if operation is None:
        raise OperationUnknown
    return operation


@app.get("/tasks/{id}/result")
async def result(id: str, operations: RequestOperations) -> Any:
    """Wait for the result, and return it, or answer with the error of the work."""
    return await operations.result(id)


@app.post("/cancel-task/{id}")
async def cancel_task(id: str, operations: RequestOperations) -> Cancelation:
    return await operations.cancel(id, message="no longer needed")


if __name__ == "__main__":
    uvicorn.run(app)
