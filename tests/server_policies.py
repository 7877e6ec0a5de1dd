"""Endpoints under timeout policies, for the application behind the real servers."""

from collections.abc import Callable

import anyio
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware import Middleware

from cancelable_deps import (
    CancelationError,
    RequestCancelable,
    RequestCancelationMiddleware,
    TimeoutPolicy,
    no_timeout,
    timeout_policy,
    with_cancelation,
)
from tests.machine import scaled

SHORT = scaled(0.1)
LONGER = 3 * SHORT
ADVISORY = TimeoutPolicy(SHORT, advisory=True)


def busy(request: Request, error: CancelationError) -> Response:
    return JSONResponse({"try": "again later", "why": str(error.reason)}, error.status_code)


def policies_app(note: Callable[[str, str], object]) -> FastAPI:
    policies = {
        "standard": TimeoutPolicy(SHORT),
        "busy": TimeoutPolicy(SHORT, status_code=503, response=busy),
        "advisory": ADVISORY,
    }
    middleware = Middleware(RequestCancelationMiddleware, policies=policies, default_policy="standard")
    app = FastAPI(middleware=[middleware])

    async def work(request: Request, seconds: float = 60) -> str:
        key = request.headers.get("x-id", "")
        note(key, "started")
        try:
            await anyio.sleep(seconds)
        except anyio.get_cancelled_exc_class():
            note(key, "cancelled")
            raise
        return "done"

    async def extended(request: Request, cancel: RequestCancelable) -> str:
        cancel.extend(60)
        return await work(request, LONGER)

    async def disabled(request: Request, cancel: RequestCancelable) -> str:
        cancel.disable_timeout()
        return await work(request, LONGER)

    @with_cancelation(policy="busy")
    async def decorated(request: Request) -> str:
        return await work(request)

    async def exceeded() -> int:
        return ADVISORY.exceeded

    app.get("/default")(work)
    app.get("/chosen", dependencies=[Depends(timeout_policy("busy"))])(work)
    app.get("/none", dependencies=[Depends(no_timeout)])(work)
    app.get("/advisory", dependencies=[Depends(timeout_policy("advisory"))])(work)
    app.get("/decorated")(decorated)
    app.get("/extended")(extended)
    app.get("/disabled")(disabled)
    app.get("/exceeded")(exceeded)
    return app
