"""Choose your own stopping point, and keep what is done so far.

    python -m examples.partial_result
    curl -m 1 -X POST http://127.0.0.1:8000/imports/7
    curl -X POST http://127.0.0.1:8000/imports/7
    curl -X POST http://127.0.0.1:8000/imports/8

Each request goes on where the last one stopped: the first hung up, and the others may take two seconds. The handler asks,
and stops between two pages: it has half a second for that before it would be stopped anywhere.
"""

from typing import Annotated

import anyio
import uvicorn
from fastapi import Depends, FastAPI

from cancelable_deps import (
    CancelableRoute,
    RequestCancellationEvent,
    cancellation_event,
)

app = FastAPI()
app.router.route_class = CancelableRoute.with_timeout(2)
Stop = Annotated[RequestCancellationEvent, Depends(cancellation_event(soft=0.5))]
PAGES = 30
imported: dict[int, int] = {}


@app.post("/imports/{number}")
async def import_pages(number: int, stop: Stop) -> dict[str, int | str]:
    start = imported.get(number, 0)
    with stop.guard():
        for page in range(start, PAGES):
            if stop.is_set():
                return {"from": start, "imported": page, "stopped": str(stop.reason)}
            await import_page()
            imported[number] = page + 1
    return {"from": start, "imported": PAGES}


async def import_page() -> None:
    await anyio.sleep(0.1)


if __name__ == "__main__":
    uvicorn.run(app)
