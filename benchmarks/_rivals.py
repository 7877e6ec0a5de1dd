"""The doors of other libraries, where they are installed: `uv sync --group rivals` on Python 3.13."""

import functools
import importlib
from types import ModuleType
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from starlette.types import ASGIApp

from benchmarks._asgi import Work, forever
from benchmarks._variants import DEPENDENCY, SEND_MIDDLEWARE, YIELD_DEPENDENCY, Variant, app_with, plain_handler


def rivals() -> list[Variant]:
    """Every door of every rival that can be imported; a line on the terminal for each that cannot."""
    return [
        *_those_of("fastapi-disconnect", "fastapi_disconnect", _fastapi_disconnect),
        *_those_of("aiofence", "aiofence.contrib.fastapi", _aiofence),
        *_those_of("hother-cancelable", "hother.cancelable.integrations.fastapi", _hother),
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
        return _event_app(work, library.disconnected_event)

    return [
        Variant("fastapi-disconnect: decorator", decorator, "rival", "decorator", hears=True),
        Variant("fastapi-disconnect: middleware", middleware, "rival", "middleware", SEND_MIDDLEWARE, hears=True),
        Variant("fastapi-disconnect: event", event, "rival", "event", YIELD_DEPENDENCY, hears=True),
    ]


def _event_app(work: Work, dependency: Any) -> FastAPI:
    async def handler(gone: Annotated[Any, Depends(dependency)]) -> dict[str, bool]:
        if work is forever:
            await gone.wait()
        else:
            await work()
        return {"ok": True}

    return app_with(handler)


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
        app = _event_app(work, library.disconnect_event)
        app.add_middleware(disconnect_middleware)
        return app

    return [
        # Compared with none of ours: by itself it stops nothing.
        Variant("aiofence: middleware, nothing fenced", middleware, "rival", None, SEND_MIDDLEWARE),
        Variant("aiofence: middleware + fence", fence, "rival", "handle", SEND_MIDDLEWARE, hears=True),
        Variant("aiofence: middleware + event", event, "rival", "event", DEPENDENCY, hears=True),
    ]


def _hother(library: ModuleType) -> list[Variant]:
    def decorator(work: Work) -> ASGIApp:
        async def answer(request: Request) -> dict[str, bool]:
            await work()
            return {"ok": True}

        # As it comes, FastAPI takes its `args` and `kwargs` for query parameters and answers 422.
        return app_with(functools.update_wrapper(library.with_cancelation(timeout=30)(answer), answer))

    def handler_of(work: Work) -> Any:
        async def handler(cancel: Annotated[Any, Depends(library.cancelable_dependency)]) -> dict[str, bool]:
            async with cancel:
                await work()
            return {"ok": True}

        return handler

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
