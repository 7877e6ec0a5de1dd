"""The alternatives: decorators written by hand, and other libraries if they are installed.

The decorators follow vLLM's and two gists that are widely copied, faults included. All libraries together need Python
3.13: `uv sync --group rivals`.
"""

import asyncio
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any

import anyio
from fastapi import Depends, HTTPException, Request
from starlette.types import ASGIApp

from benchmarks._asgi import Work
from benchmarks._handlers import Handler, app_with, entering_handler, event_handler, plain_handler, request_handler
from benchmarks._variants import DEPENDENCY, SEND_MIDDLEWARE, YIELD_DEPENDENCY, Variant


def rivals() -> list[Variant]:
    """Return the decorators by hand and the doors of the installed libraries; print a line for each that is missing."""
    return [
        *BY_HAND,
        *_those_of("fastapi-disconnect", "fastapi_disconnect", _fastapi_disconnect),
        *_those_of("aiofence", "aiofence.contrib.fastapi", _aiofence),
        *_those_of("hother-cancelable", "hother.cancelable.integrations.fastapi", _hother),
    ]


async def _left(request: Request) -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _racing_a_listener(handler: Handler) -> Handler:
    """Decorate as vLLM's `with_cancellation`: one task for the handler and one that listens; cancel the slower one."""

    @functools.wraps(handler)
    async def racing(*args: Any, **kwargs: Any) -> object:
        answering = asyncio.create_task(handler(*args, **kwargs))
        listening = asyncio.create_task(_left(kwargs["request"]))
        done, slower = await asyncio.wait([answering, listening], return_when=asyncio.FIRST_COMPLETED)
        for task in slower:
            task.cancel()
        return answering.result() if answering in done else None

    return racing


def _in_a_task_group(handler: Handler) -> Handler:
    """Decorate as a gist does with anyio: handler and listener run in one task group, which the first to end cancels."""

    @functools.wraps(handler)
    async def grouped(*args: Any, **kwargs: Any) -> object:
        answers: list[object] = []
        async with anyio.create_task_group() as group:

            async def listen() -> None:
                await _left(kwargs["request"])
                group.cancel_scope.cancel()

            group.start_soon(listen)
            answers.append(await handler(*args, **kwargs))
            group.cancel_scope.cancel()
        return answers[0] if answers else None

    return grouped


_POLL = 0.01
"""The seconds between two polls in most copies of the gist; some copies have 0.1."""


async def _polled(request: Request) -> None:
    """Wait until a poll has shown that the client has left."""
    while not await request.is_disconnected():  # noqa: ASYNC110 - polling is what it is about
        await asyncio.sleep(_POLL)


def _racing_a_poller(handler: Handler) -> Handler:
    """Decorate as the gist `cancel_on_disconnect`: one task polls; cancel the slower of it and the handler, and await it."""

    @functools.wraps(handler)
    async def racing(*args: Any, **kwargs: Any) -> object:
        answering = asyncio.create_task(handler(*args, **kwargs))
        polling = asyncio.create_task(_polled(kwargs["request"]))
        done, slower = await asyncio.wait([answering, polling], return_when=asyncio.FIRST_COMPLETED)
        for task in slower:
            task.cancel()
        await asyncio.gather(*slower, return_exceptions=True)
        if answering not in done:
            raise HTTPException(503)
        return answering.result()

    return racing


def _by_hand(name: str, decorator: Callable[[Handler], Handler], polls: bool = False) -> Variant:
    def build(work: Work) -> ASGIApp:
        return app_with(decorator(request_handler(work)))

    return Variant(f"by hand: {name}", build, "rival", "decorator", hears=True, polls=polls)


BY_HAND = [
    _by_hand("two tasks (vLLM)", _racing_a_listener),
    _by_hand("task group over two (gist)", _in_a_task_group),
    _by_hand("polling every 10 ms (gist)", _racing_a_poller, polls=True),
]


def _those_of(name: str, module: str, doors: Any) -> list[Variant]:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        print(f"{name}: not installed, skipped ({error})")
        return []
    variants: list[Variant] = doors(found)
    return variants


def _fastapi_disconnect(library: ModuleType) -> list[Variant]:
    def decorator(work: Work) -> ASGIApp:
        return app_with(library.cancel_on_disconnect(plain_handler(work)))

    def middleware(work: Work) -> ASGIApp:
        app = app_with(plain_handler(work))
        app.add_middleware(library.CancelOnDisconnectMiddleware)
        return app

    def event(work: Work) -> ASGIApp:
        return app_with(event_handler(work, Annotated[Any, Depends(library.disconnected_event)]))

    return [
        Variant("fastapi-disconnect: decorator", decorator, "rival", "decorator", hears=True),
        Variant("fastapi-disconnect: middleware", middleware, "rival", "middleware", SEND_MIDDLEWARE, hears=True),
        Variant("fastapi-disconnect: event", event, "rival", "event", YIELD_DEPENDENCY, hears=True),
    ]


def _aiofence(library: ModuleType) -> list[Variant]:
    current = importlib.import_module("aiofence").get_current_fencing
    disconnect_middleware = importlib.import_module("aiofence.contrib.starlette").DisconnectMiddleware

    def middleware(work: Work) -> ASGIApp:
        app = app_with(plain_handler(work))
        app.add_middleware(disconnect_middleware)
        return app

    def fence(work: Work) -> ASGIApp:
        async def handler() -> dict[str, bool]:
            with current().move_on_cancel():
                await work()
            return {"ok": True}

        app = app_with(handler)
        app.add_middleware(disconnect_middleware)
        return app

    def event(work: Work) -> ASGIApp:
        app = app_with(event_handler(work, Annotated[Any, Depends(library.disconnect_event)]))
        app.add_middleware(disconnect_middleware)
        return app

    return [
        # Not compared with a door of ours, because by itself it stops nothing.
        Variant("aiofence: middleware, nothing fenced", middleware, "rival", None, SEND_MIDDLEWARE),
        Variant("aiofence: middleware + fence", fence, "rival", "handle", SEND_MIDDLEWARE, hears=True),
        Variant("aiofence: middleware + event", event, "rival", "event", DEPENDENCY, hears=True),
    ]


def _hother(library: ModuleType) -> list[Variant]:
    def decorator(work: Work) -> ASGIApp:
        answer = request_handler(work)
        # Unchanged, FastAPI takes its `args` and `kwargs` for query parameters and answers 422.
        return app_with(functools.update_wrapper(library.with_cancelation(timeout=30)(answer), answer))

    def handler_of(work: Work) -> Handler:
        return entering_handler(work, Annotated[Any, Depends(library.cancelable_dependency)])

    def dependency(work: Work) -> ASGIApp:
        return app_with(handler_of(work))

    def middleware(work: Work) -> ASGIApp:
        app = app_with(plain_handler(work))
        app.add_middleware(library.RequestCancelationMiddleware)
        return app

    def both(work: Work) -> ASGIApp:
        app = app_with(handler_of(work))
        app.add_middleware(library.RequestCancelationMiddleware)
        return app

    return [
        Variant("hother-cancelable: decorator(30)", decorator, "rival", "decorator"),
        Variant("hother-cancelable: dependency", dependency, "rival", "handle", DEPENDENCY),
        Variant("hother-cancelable: middleware", middleware, "rival", "middleware", SEND_MIDDLEWARE),
        Variant("hother-cancelable: middleware + dependency", both, "rival", None, DEPENDENCY, hears=True),
    ]
