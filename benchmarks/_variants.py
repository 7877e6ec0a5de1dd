"""What the doors are measured against: floors, and what people write by hand."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

import anyio
from fastapi import Depends, FastAPI, Request
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks._asgi import Work

Handler = Callable[..., Coroutine[Any, Any, object]]

BARE = "bare FastAPI"
SEND_MIDDLEWARE = "middleware that only wraps send"
DEPENDENCY = "no-op async dependency"
YIELD_DEPENDENCY = "no-op yield dependency"


@dataclass(frozen=True)
class Variant:
    """An application to measure.

    `door` groups ours with the rivals', `floor` is the least that such a door can cost, `target` the most that we
    allow it, `hears` whether a hang-up stops its handler.
    """

    name: str
    build: Callable[[Work], ASGIApp]
    kind: str
    door: str | None = None
    floor: str = BARE
    target: float | None = None
    query: bytes = b""
    hears: bool = False


def app_with(handler: Handler) -> FastAPI:
    app = FastAPI()
    app.get("/")(handler)
    return app


def plain_handler(work: Work) -> Handler:
    async def handler() -> dict[str, bool]:
        await work()
        return {"ok": True}

    return handler


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


def _dependency(work: Work) -> ASGIApp:
    async def handler(value: Annotated[int, Depends(_value)]) -> dict[str, bool]:
        await work()
        return {"ok": True}

    return app_with(handler)


def _yield_dependency(work: Work) -> ASGIApp:
    async def handler(value: Annotated[int, Depends(_yielded)]) -> dict[str, bool]:
        await work()
        return {"ok": True}

    return app_with(handler)


FLOORS = [
    Variant(BARE, _bare, "floor"),
    Variant(SEND_MIDDLEWARE, _send_middleware, "floor"),
    Variant(DEPENDENCY, _dependency, "floor"),
    Variant(YIELD_DEPENDENCY, _yield_dependency, "floor"),
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


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _two_tasks(work: Work) -> ASGIApp:
    """As vLLM's `with_cancellation` does it: the handler races a task that listens, the loser is cancelled."""

    async def answer() -> dict[str, bool]:
        await work()
        return {"ok": True}

    async def handler(request: Request) -> object:
        working = asyncio.create_task(answer())
        listening = asyncio.create_task(_client_left(request))
        done, pending = await asyncio.wait([working, listening], return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return working.result() if working in done else None

    return app_with(handler)


def _task_group_of_two(work: Work) -> ASGIApp:
    """The gist that is handed around: handler and listener in one task group, whoever ends first cancels the other."""

    async def handler(request: Request) -> object:
        answers: list[dict[str, bool]] = []
        async with anyio.create_task_group() as group:

            async def first(run: Work) -> None:
                await run()
                group.cancel_scope.cancel()

            async def answer() -> None:
                await work()
                answers.append({"ok": True})

            group.start_soon(first, functools.partial(_client_left, request))
            await first(answer)
        return answers[0] if answers else None

    return app_with(handler)


REFERENCES = [
    Variant("decorator that does nothing", _idle_decorator, "reference"),
    Variant("one anyio.CancelScope", _one_scope, "reference"),
    Variant("two anyio.CancelScopes", _two_scopes, "reference"),
    Variant("anyio.fail_after(30)", _fail_after, "reference"),
    Variant("empty anyio task group", _empty_task_group, "reference"),
    Variant("no-op BaseHTTPMiddleware", _base_http_middleware, "reference"),
    Variant("by hand: two tasks (vLLM)", _two_tasks, "reference", hears=True),
    Variant("by hand: task group over two (gist)", _task_group_of_two, "reference", hears=True),
]
