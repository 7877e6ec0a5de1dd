"""Choose your own stopping point, and keep what is done so far.

    python -m examples.partial_result
    curl -m 1 -X POST http://127.0.0.1:8000/imports/7
    curl -X POST http://127.0.0.1:8000/imports/7

The second request goes on where the first one hung up. Nothing is cancelled here: the handler asks.
"""

import anyio
import uvicorn
from fastapi import FastAPI

from cancelable_deps import CancellationEvent

app = FastAPI()
PAGES = 30
imported: dict[int, int] = {}


@app.post("/imports/{number}")
async def import_pages(number: int, stop: CancellationEvent) -> dict[str, int | str]:
    start = imported.get(number, 0)
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
