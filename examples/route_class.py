"""Cover all routes of one router, by FastAPI's `route_class`.

python -m examples.route_class
curl -m 1 http://127.0.0.1:8000/reports/5
"""

import anyio
import uvicorn
from fastapi import APIRouter, FastAPI

from cancelable_deps import CancelableRoute

reports = APIRouter(prefix="/reports", route_class=CancelableRoute)


@reports.get("/{number}")
async def report(number: int) -> dict[str, int]:
    try:
        await anyio.sleep(10)
    except anyio.get_cancelled_exc_class():
        print(f"report {number} was stopped", flush=True)
        raise
    return {"number": number}


app = FastAPI()
app.include_router(reports)


if __name__ == "__main__":
    uvicorn.run(app)
