"""The references of the doors' measurements: floors, and single parts of anyio and Starlette."""

import functools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated

import anyio
from anyio.abc import TaskGroup
from fastapi import Depends, Request
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks._asgi import Work
from benchmarks._handlers import app_with, calling_handler, plain_handler, value_handler

BARE = "bare FastAPI"
SEND_MIDDLEWARE = "middleware that only wraps send"
DEPENDENCY = "no-op async dependency"
YIELD_DEPENDENCY = "no-op yield dependency"
GROUP_DEPENDENCY = "dependency, empty anyio task group"


@dataclass(frozen=True)
class Target:
    """The highest costs of a door at either handler: ratios to bare FastAPI, or additions to the ratio of its floor."""

    instructions: float
    time: float
    over_floor: bool = False


@dataclass(frozen=True)
class Variant:
    """An application to measure.

    `door` groups ours with the rivals', `floor` is the least that such a door can cost, `hears` whether a hang-up
    stops its handler, `polls` whether it asks again and again.
    """

    name: str
    build: Callable[[Work], ASGIApp]
    kind: str
    door: str | None = None
    floor: str = BARE
    target: Target | None = None
    query: bytes = b""
    hears: bool = False
    polls: bool = False


def _bare(work: Work) -> ASGIApp:
    return app_with(plain_handler(work))


class _WrapsSend:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def wrapped(message: Message) -> None:
            await send(message)

        await self.app(scope, receive, wrapped)


def _send_middleware(work: Work) -> ASGIApp:
    app = app_with(plain_handler(work))
    app.add_middleware(_WrapsSend)
    return app


async def _value() -> int:
    return 1


async def _yielded() -> AsyncIterator[int]:
    yield 1


async def _group_factory() -> Callable[[], TaskGroup]:
    return anyio.create_task_group


def _dependency(work: Work) -> ASGIApp:
    return app_with(value_handler(work, Annotated[int, Depends(_value)]))


def _yield_dependency(work: Work) -> ASGIApp:
    return app_with(value_handler(work, Annotated[int, Depends(_yielded)]))


def _group_dependency(work: Work) -> ASGIApp:
    return app_with(calling_handler(work, Annotated[Callable[[], TaskGroup], Depends(_group_factory)]))


FLOORS = [
    Variant(BARE, _bare, "floor"),
    Variant(SEND_MIDDLEWARE, _send_middleware, "floor"),
    Variant(DEPENDENCY, _dependency, "floor"),
    Variant(YIELD_DEPENDENCY, _yield_dependency, "floor"),
    Variant(GROUP_DEPENDENCY, _group_dependency, "floor"),
]


def _idle_decorator(work: Work) -> ASGIApp:
    inner = plain_handler(work)

    @functools.wraps(inner)
    async def handler() -> object:
        return await inner()

    return app_with(handler)


def _one_scope(work: Work) -> ASGIApp:
    async def handler() -> dict[str, bool]:
        with anyio.CancelScope():
            await work()
        return {"ok": True}

    return app_with(handler)


def _two_scopes(work: Work) -> ASGIApp:
    async def handler() -> dict[str, bool]:
        with anyio.CancelScope(), anyio.CancelScope():
            await work()
        return {"ok": True}

    return app_with(handler)


def _fail_after(work: Work) -> ASGIApp:
    async def handler() -> dict[str, bool]:
        with anyio.fail_after(30):
            await work()
        return {"ok": True}

    return app_with(handler)


def _empty_task_group(work: Work) -> ASGIApp:
    async def handler() -> dict[str, bool]:
        async with anyio.create_task_group():
            await work()
        return {"ok": True}

    return app_with(handler)


class _PassesOn(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


def _base_http_middleware(work: Work) -> ASGIApp:
    app = app_with(plain_handler(work))
    app.add_middleware(_PassesOn)
    return app


REFERENCES = [
    Variant("decorator that does nothing", _idle_decorator, "reference"),
    Variant("one anyio.CancelScope", _one_scope, "reference"),
    Variant("two anyio.CancelScopes", _two_scopes, "reference"),
    Variant("anyio.fail_after(30)", _fail_after, "reference"),
    Variant("empty anyio task group", _empty_task_group, "reference"),
    Variant("no-op BaseHTTPMiddleware", _base_http_middleware, "reference"),
]
