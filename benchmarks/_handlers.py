"""The handlers that are measured, as a user writes them. Each awaits its work and returns a small JSON object."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request

from benchmarks._asgi import Work, forever

Handler = Callable[..., Coroutine[Any, Any, object]]


def app_with(handler: Handler) -> FastAPI:
    app = FastAPI()
    app.get("/")(handler)
    return app


def plain_handler(work: Work) -> Handler:
    async def handler() -> dict[str, bool]:
        await work()
        return {"ok": True}

    return handler


def request_handler(work: Work) -> Handler:
    async def handler(request: Request) -> dict[str, bool] | None:
        await work()
        return {"ok": True}

    return handler


def value_handler(work: Work, dependency: Any) -> Handler:
    """Return a handler that takes the value of a dependency and does not use it."""

    async def handler(given: Any) -> dict[str, bool]:
        await work()
        return {"ok": True}

    return _given(handler, dependency)


def entering_handler(work: Work, dependency: Any) -> Handler:
    """Return a handler that works inside the context manager that a dependency returns."""

    async def handler(given: Any) -> dict[str, bool]:
        async with given:
            await work()
        return {"ok": True}

    return _given(handler, dependency)


def calling_handler(work: Work, dependency: Any) -> Handler:
    """Return a handler that works inside the context manager that a dependency's function makes."""

    async def handler(given: Any) -> dict[str, bool]:
        async with given():
            await work()
        return {"ok": True}

    return _given(handler, dependency)


def event_handler(work: Work, dependency: Any) -> Handler:
    """Return a handler that waits for the event of a dependency, where the other handlers wait for ever."""

    async def handler(given: Any) -> dict[str, bool]:
        if work is forever:
            await given.wait()
        else:
            await work()
        return {"ok": True}

    return _given(handler, dependency)


def _given(handler: Handler, dependency: Any) -> Handler:
    """Return the handler with the dependency (an `Annotated[..., Depends(...)]`) as its parameter's annotation."""
    handler.__annotations__["given"] = dependency
    return handler
