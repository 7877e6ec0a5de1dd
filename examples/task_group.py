"""Ask several services at once; a hang-up, or the first refusal, cancels all of these calls.

python -m examples.task_group
curl -m 1 http://127.0.0.1:8000/offers
curl -i 'http://127.0.0.1:8000/offers?article=sold-out'
"""

import anyio
import uvicorn
from fastapi import FastAPI, HTTPException

from cancelable_deps import RequestTaskGroup

app = FastAPI()
SHOPS = {"near": 0.2, "far": 10.0}


@app.get("/offers")
async def offers(get_task_group: RequestTaskGroup, article: str = "lamp") -> dict[str, int]:
    prices: dict[str, int] = {}
    async with get_task_group() as task_group:
        for shop in SHOPS:
            task_group.start_soon(ask, shop, article, prices)
    return prices


async def ask(shop: str, article: str, prices: dict[str, int]) -> None:
    """Reserve in one task: its `HTTPException` is the response, 409, and not an exception group with a 500."""
    try:
        await anyio.sleep(SHOPS[shop])
        if article == "sold-out":
            raise HTTPException(409, f"{shop} has sold out")
        prices[shop] = 100
    except anyio.get_cancelled_exc_class():
        print(f"{shop} was not waited for", flush=True)
        raise


if __name__ == "__main__":
    uvicorn.run(app)
