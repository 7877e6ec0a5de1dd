"""An MCP server in a FastAPI application: a tool call ends with its client, when its time is up, or by its id.

Run: python -m examples.recipes.mcp_tools     # it needs mcp
     HTTP_MODE=stateless python -m examples.recipes.mcp_tools
Try: an MCP client at http://localhost:8000/mcp/ that calls the tool `report` and hangs up or cancels; meanwhile
     curl localhost:8000/tool-calls
     curl -X POST localhost:8000/tool-calls/ID/cancel
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import uvicorn
from fastapi import FastAPI
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError

from cancelable_deps import (
    Cancelable,
    CancelationError,
    CancelationReason,
    CancelationToken,
    RequestCancelationMiddleware,
    cancelation_lifespan,
    current_cancelable,
)
from cancelable_deps.operations import Cancelation, Operation, Operations

HTTP_MODE = os.environ.get("HTTP_MODE", "")
TIMEOUT = float(os.environ.get("TIMEOUT", "60"))
GRACE = float(os.environ.get("GRACE", "5"))

operations = Operations()
mcp = MCPServer("reports")
mcp_app = mcp.streamable_http_app(
    streamable_http_path="/", stateless_http="stateless" in HTTP_MODE, json_response="json" in HTTP_MODE
)


@asynccontextmanager
async def tool_call(name: str, timeout: float) -> AsyncIterator[Cancelable]:
    """Make a tool call an operation, and stop it with the HTTP request that has brought it."""
    # The block of the middleware, also in the task of a session: the SDK calls tools with the context of the request.
    request = current_cancelable()
    try:
        async with operations.track(name=name, timeout=timeout) as cancel:

            def stop(token: CancelationToken) -> None:
                cancel.cancel_nowait(token.reason or CancelationReason.DISCONNECT, token.message)

            if request is not None:
                request.token.on_cancel(stop)
            yield cancel
    except CancelationError as error:
        # The model reads it. Any other exception is to the SDK an error of ours, with a traceback in the log.
        raise ToolError(f"stopped: {error.detail}") from None


@mcp.tool()
async def report(title: str, pages: int, context: Context) -> str:
    """Write a report, a page a second."""
    async with tool_call("report", TIMEOUT) as cancel:
        try:
            for page in range(pages):
                await anyio.sleep(1)
                await context.report_progress(page + 1, pages)
        finally:
            # Without a shield the SDK's own cancellation would be raised again at each `await` of the cleanup.
            with cancel.shield():
                await release(title, cancel)
    return f"{title}: {pages} pages"


async def release(title: str, cancel: Cancelable) -> None:
    await anyio.sleep(0.01)
    print(f"{title}: released, {cancel.reason or 'without a reason'}", flush=True)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with mcp.session_manager.run():
        yield


app = FastAPI(lifespan=operations.lifespan(cancelation_lifespan(lifespan, grace=GRACE)))
app.mount("/mcp", mcp_app)
app.add_middleware(RequestCancelationMiddleware)


@app.get("/tool-calls")
async def tool_calls() -> list[Operation]:
    return (await operations.list(kind="tracked")).items


@app.post("/tool-calls/{id}/cancel")
async def cancel_tool_call(id: str) -> Cancelation:
    return await operations.cancel(id, message="stopped by an operator")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    uvicorn.run(app)
