"""Answer only the latest search of each user: a request for the next keystroke stops the one before.

python -m examples.latest_wins
for text in c ca can; do curl -s "http://127.0.0.1:8000/search?text=$text" -H 'user: ann' & sleep 0.1; done; wait
"""

from typing import Annotated

import anyio
import uvicorn
from fastapi import Depends, FastAPI, Header

from cancelable_deps.operations import Operations, at_most, latest_only

operations = Operations()
app = FastAPI(lifespan=operations.lifespan())


async def user(user: Annotated[str, Header()]) -> str:
    """Return the user; a real application takes it from a session."""
    return user


@app.get("/search", dependencies=[Depends(latest_only(user))])
async def search(text: str) -> list[str]:
    """Search for a second. A newer search of the same user ends this one with 499."""
    await anyio.sleep(1)
    return [word for word in ("cancel", "candle", "canvas") if word.startswith(text)]


@app.get("/export", dependencies=[Depends(at_most(1, user, queue=2))])
async def export() -> dict[str, str]:
    """Let each user run one export; two others wait for their turn, and one more is refused with 409."""
    await anyio.sleep(1)
    return {"file": "sales.csv"}


if __name__ == "__main__":
    uvicorn.run(app)
