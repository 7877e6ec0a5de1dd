"""The hooks of a worker of arq or SAQ: they open the operations when it starts, and close them when it stops."""

from __future__ import annotations

import asyncio
from typing import Any

from .reports import operations


async def startup(ctx: dict[Any, Any]) -> None:
    """Open the operations in a task of their own.

    The task that opens them has to close them, and a worker may call its hooks in different tasks.
    """
    opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    ctx["closing"] = asyncio.Event()
    ctx["open"] = asyncio.create_task(keep_open(opened, ctx["closing"]))
    await asyncio.wait([ctx["open"], opened], return_when=asyncio.FIRST_COMPLETED)
    if not opened.done():
        await ctx["open"]  # It has failed.


async def keep_open(opened: asyncio.Future[None], closing: asyncio.Event) -> None:
    async with operations:
        opened.set_result(None)
        await closing.wait()


async def shutdown(ctx: dict[Any, Any]) -> None:
    """Close the operations: the others are told that this worker is gone."""
    ctx["closing"].set()
    await ctx["open"]
