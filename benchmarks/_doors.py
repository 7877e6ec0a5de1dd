"""Our own doors, as a user writes them."""

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, FastAPI
from starlette.types import ASGIApp

from benchmarks._asgi import Work, forever
from benchmarks._variants import BARE, DEPENDENCY, SEND_MIDDLEWARE, Handler, Variant, app_with, plain_handler
from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancellationEvent,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    cancelable_with_timeout,
    with_cancelation,
)

Build = Callable[[Work], ASGIApp]


def _decorator(work: Work) -> ASGIApp:
    return app_with(with_cancelation(plain_handler(work)))


def _decorator_timeout(work: Work) -> ASGIApp:
    return app_with(with_cancelation(timeout=30)(plain_handler(work)))


def _route_class(work: Work) -> ASGIApp:
    app = FastAPI()
    # Not a router that is included: FastAPI takes a seventh longer to find a route there, with any route class.
    app.router.route_class = CancelableRoute
    app.get("/")(plain_handler(work))
    return app


def _middleware(timeout: float | None, handler: Callable[[Work], Handler]) -> Build:
    def build(work: Work) -> ASGIApp:
        app = app_with(handler(work))
        app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)
        return app

    return build


def _decorated_handler(work: Work) -> Handler:
    return with_cancelation(plain_handler(work))


def _cancelable_handler(work: Work) -> Handler:
    async def handler(cancel: RequestCancelable) -> dict[str, bool]:
        async with cancel:
            await work()
        return {"ok": True}

    return handler


def _cancelable(work: Work) -> ASGIApp:
    return app_with(_cancelable_handler(work))


def _cancelable_timeout(work: Work) -> ASGIApp:
    async def handler(cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(30))]) -> dict[str, bool]:
        async with cancel:
            await work()
        return {"ok": True}

    return app_with(handler)


def _task_group(work: Work) -> ASGIApp:
    async def handler(get_task_group: RequestTaskGroup) -> dict[str, bool]:
        async with get_task_group():
            await work()
        return {"ok": True}

    return app_with(handler)


def _event(work: Work) -> ASGIApp:
    async def handler(gone: CancellationEvent) -> dict[str, bool]:
        if work is forever:
            await gone.wait()
        else:
            await work()
        return {"ok": True}

    return app_with(handler)


def _ours(name: str, build: Build, door: str | None, target: float | None = None, floor: str = BARE) -> Variant:
    return Variant(name, build, "ours", door, floor, target, hears=True)


OURS = [
    _ours("decorator", _decorator, "decorator", 1.30),
    _ours("decorator(timeout=30)", _decorator_timeout, "decorator", 1.30),
    _ours("route class", _route_class, "decorator", 1.30),
    _ours("middleware", _middleware(None, plain_handler), "middleware", 1.30, SEND_MIDDLEWARE),
    _ours("middleware(default_timeout=30)", _middleware(30, plain_handler), "middleware", 1.30, SEND_MIDDLEWARE),
    _ours("RequestCancelable", _cancelable, "handle", 1.55, DEPENDENCY),
    _ours("cancelable_with_timeout(30)", _cancelable_timeout, "handle", 1.55, DEPENDENCY),
    _ours("RequestTaskGroup", _task_group, "task group", 1.55, DEPENDENCY),
    _ours("CancellationEvent", _event, "event", 1.85, DEPENDENCY),
    _ours("middleware + decorator", _middleware(None, _decorated_handler), None, floor=SEND_MIDDLEWARE),
    _ours("middleware + RequestCancelable", _middleware(None, _cancelable_handler), None, floor=SEND_MIDDLEWARE),
]
