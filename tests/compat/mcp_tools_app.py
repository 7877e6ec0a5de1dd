"""The application of `examples/recipes/mcp_tools.py`, with a tool that is no operation and has no shield."""

from __future__ import annotations

import anyio

from examples.recipes.mcp_tools import app, mcp

__all__ = ["app"]


@mcp.tool()
async def plain(title: str) -> str:
    """Work without an end."""
    print(f"{title}: started", flush=True)
    try:
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        print(f"{title}: cancelled", flush=True)
        raise
    finally:
        try:
            await anyio.sleep(0.01)
            print(f"{title}: cleaned up", flush=True)
        finally:
            print(f"{title}: ended", flush=True)
    return title
