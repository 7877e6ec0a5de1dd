"""The parts that the three examples have in common: the operations, the user, and the work of a job."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import anyio
from fastapi import Header

from cancelable_deps import Cancelable
from cancelable_deps.operations import Operations, RedisBackend

REDIS = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
FOLDER = Path(os.environ.get("REPORTS", tempfile.gettempdir()))

# The application and the workers of the queue open the same. A cancel that comes while its job still waits in the queue
# is remembered for an hour.
operations = Operations(RedisBackend(REDIS, prefix="reports", lease=6), memory=3600)


async def user(user: Annotated[str, Header()]) -> str:
    """Return the user; a real application takes it from a session."""
    return user


async def write_report(cancel: Cancelable, id: str, pages: int) -> dict[str, int]:
    """Write a page a second. Of a report that is not finished, no file is left."""
    draft = anyio.Path(FOLDER, f"{id}.draft")
    try:
        async with await draft.open("w") as file:
            for page in range(1, pages + 1):
                await file.write(f"page {page}\n")
                await cancel.report_progress("page written", {"done": page, "total": pages})
                await anyio.sleep(1)
        await draft.rename(FOLDER / f"{id}.txt")
    finally:
        await draft.unlink(missing_ok=True)
    return {"pages": pages}
