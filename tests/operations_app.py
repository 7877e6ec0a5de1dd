"""An application with operations, their routers and work that lasts, for the tests of the routers and of the page."""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.responses import Response

from cancelable_deps import Cancelable, RequestCancelationMiddleware
from cancelable_deps.operations import Operations, RequestOperation, operations_router
from cancelable_deps.testing import CancelableClient
from tests.machine import scaled

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

ALICE, BOB, ADMIN = {"x-user": "alice"}, {"x-user": "bob"}, {"x-admin": "yes"}
LONGEST = scaled(20)


def current_user(x_user: str | None = Header(default=None)) -> str | None:
    return x_user


def require_admin(x_admin: str | None = Header(default=None)) -> None:
    if x_admin != "yes":
        raise HTTPException(401, "Who are you?")


async def wait_until_stopped(cancel: Cancelable) -> None:
    await anyio.sleep_forever()


async def report_and_wait(cancel: Cancelable, done: object, total: int, may_begin: anyio.Event | None = None) -> None:
    if may_begin is not None:
        await may_begin.wait()
    await cancel.report_progress("pages", {"done": done, "total": total})
    await anyio.sleep_forever()


async def return_it(cancel: Cancelable, value: Any) -> Any:
    return value


async def raise_it(cancel: Cancelable, error: Exception) -> None:
    raise error


async def clean_up_until(cancel: Cancelable, may_end: anyio.Event) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        await may_end.wait()


def application(operations: Operations) -> FastAPI:
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")
    app.include_router(operations_router(operations, owner=current_user), prefix="/operations")
    app.include_router(operations_router(operations, operator=require_admin, page=True), prefix="/admin/operations")

    @app.get("/wait/{number}")
    async def wait(number: int, operation: RequestOperation, request: Request) -> None:
        user = request.headers.get("x-user")
        if user is not None:
            operation.claim(user)
        await anyio.sleep_forever()

    @app.post("/start", status_code=202)
    async def start(x_user: str = Header()) -> Response:
        return (await operations.start(wait_until_stopped, owner=x_user)).accepted()

    return app


class Place:
    """An application that is open, with a client of it."""

    def __init__(self, operations: Operations, app: FastAPI, client: CancelableClient) -> None:
        self.operations = operations
        self.app = app
        self.client = client

    async def get(self, path: str, headers: Mapping[str, str] = ALICE, /, **more: str) -> Any:
        return await self.client.get(path, headers={**headers, **more})

    async def post(self, path: str, headers: Mapping[str, str] = ALICE, /, **options: Any) -> Any:
        return await self.client.post(path, headers=headers, **options)

    async def until(self, id: str, *states: str) -> None:
        """Wait until an operation is in one of these states."""
        async with aclosing(self.operations.events(id)) as events:
            async for event in events:
                if event.operation.state in states:
                    return


@asynccontextmanager
async def opened(**options: Any) -> AsyncGenerator[Place]:
    operations = Operations(background_grace=0, **options)
    app = application(operations)
    async with CancelableClient(app, ceiling=LONGEST) as client:
        yield Place(operations, app, client)
