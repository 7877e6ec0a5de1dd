"""The application whose operations the page shows, for a real server: ``uvicorn tests.operations_page_app:app``."""

from __future__ import annotations

import anyio
from fastapi import FastAPI, Request

from cancelable_deps import RequestCancelationMiddleware
from cancelable_deps.operations import Operations, RequestOperation, RequestOperations, operations_router

HOSTILE_PATH = """/wait<img src=x onerror="document.title='evil'">"""


def everybody_is_an_operator() -> None: ...


operations = Operations(background_grace=0)
app = FastAPI(lifespan=operations.lifespan())
app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")
app.include_router(
    operations_router(operations, operator=everybody_is_an_operator, page=True), prefix="/admin/operations"
)
mounted = FastAPI()
mounted.include_router(operations_router(operations, operator=everybody_is_an_operator, page=True))
app.mount("/mounted", mounted)


@app.get(HOSTILE_PATH)
@app.get("/wait/{number}")
async def wait(request: Request, operation: RequestOperation) -> None:
    """Wait until it is stopped, as an operation with the owner, labels and progress that its client wants."""
    labels = dict(request.query_params)
    message, done, total = labels.pop("progress", None), labels.pop("done", None), labels.pop("total", None)
    operation.claim(labels.pop("name"))
    operation.label(**labels)
    if done is not None and total is not None:
        operation.progress(message, {"done": int(done), "total": int(total)})
    elif message is not None:
        operation.progress(message)
    await anyio.sleep_forever()


@app.get("/until/{id}")
async def until_it_runs(id: str, known: RequestOperations) -> bool:
    """Wait until an operation is known."""
    while await known.get(id) is None:  # noqa: ASYNC110 - nothing tells of what is not known
        await anyio.sleep(0.01)
    return True
