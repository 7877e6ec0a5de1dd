"""See what runs in a browser, and stop it there.

python -m examples.operations_page
# Open http://127.0.0.1:8000/admin/operations/page (admin, secret), and then
curl http://127.0.0.1:8000/report/7
curl -X POST http://127.0.0.1:8000/exports/7
"""

import secrets

import anyio
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from cancelable_deps import Cancelable, RequestCancelationMiddleware, cancelation_lifespan
from cancelable_deps.operations import Operations, RequestOperation, RequestOperations, operations_router

basic = HTTPBasic()


def require_admin(who: HTTPBasicCredentials = Depends(basic)) -> None:
    """Let operators in only. Your own dependency asks your own users."""
    is_known = secrets.compare_digest(who.password.encode(), b"secret")
    if who.username != "admin" or not is_known:
        raise HTTPException(401, "Only for operators", headers={"www-authenticate": "Basic"})


operations = Operations()
app = FastAPI(lifespan=operations.lifespan(cancelation_lifespan()))
app.add_middleware(RequestCancelationMiddleware, operations=operations)
app.include_router(operations_router(operations, operator=require_admin, page=True), prefix="/admin/operations")

STEPS = 60


@app.get("/report/{number}")
async def report(number: int, operation: RequestOperation) -> dict[str, int]:
    """Work for a minute, and say how far it is."""
    operation.label(report=str(number))
    for step in range(STEPS):
        operation.progress("rendering", {"done": step, "total": STEPS})
        await anyio.sleep(1)
    return {"pages": STEPS}


@app.post("/exports/{number}", status_code=202)
async def start_export(number: int, operations: RequestOperations) -> Response:
    """Start work that goes on after this response."""
    return (await operations.start(export, number, labels={"export": str(number)})).accepted()


async def export(cancel: Cancelable, number: int) -> dict[str, int]:
    """Work for a minute, and say how far it is."""
    for step in range(STEPS):
        await cancel.report_progress("exporting", {"done": step, "total": STEPS})
        await anyio.sleep(1)
    return {"number": number, "rows": STEPS}


if __name__ == "__main__":
    uvicorn.run(app)
