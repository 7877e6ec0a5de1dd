"""An MCP server of the official SDK, mounted: over streamable HTTP under ``/http/``, over SSE under ``/sse/``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import FastAPI
from mcp.server import MCPServer
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from cancelable_deps import RequestCancelationMiddleware, cancelation_lifespan
from tests.compat.doors import SHORT, watched


def make_server() -> MCPServer[Any]:
    server: MCPServer[Any] = MCPServer("compat", log_level="WARNING")

    @server.tool()
    async def add(a: int, b: int) -> int:
        return a + b

    @server.tool()
    async def late() -> str:
        """Answer later than the time of a request allows."""
        await anyio.sleep(2 * SHORT)
        return "late"

    @server.tool()
    async def slow(key: str) -> str:
        async with watched(key, cleanup=None):
            await anyio.sleep_forever()
        return "done"

    return server


async def pass_on(request: Any, call_next: Any) -> Any:
    return await call_next(request)


def build(*middleware: Middleware) -> FastAPI:
    server = make_server()
    http = server.streamable_http_app(streamable_http_path="/")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with server.session_manager.run():
            yield

    ending = cancelation_lifespan(lifespan, grace=0.1, background_grace=0.1)
    app = FastAPI(lifespan=ending, openapi_url=None, middleware=list(middleware))
    app.mount("/http", http)
    app.mount("/sse", make_server().sse_app())
    return app


OURS = Middleware(RequestCancelationMiddleware)
BASED = Middleware(BaseHTTPMiddleware, dispatch=pass_on)


def apps() -> dict[str, Any]:
    return {
        "bare": build(),
        "based": build(BASED),
        "mw": build(OURS),
        "inside": build(OURS, BASED),
        "outside": build(BASED, OURS),
        "excluded": build(Middleware(RequestCancelationMiddleware, default_timeout=SHORT, exclude="/sse/*")),
        "timed-mw": build(Middleware(RequestCancelationMiddleware, default_timeout=SHORT)),
    }
