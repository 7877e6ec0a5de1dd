"""Our own doors, as a user writes them."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks._asgi import Work
from benchmarks._handlers import Handler, app_with, calling_handler, entering_handler, event_handler, plain_handler
from benchmarks._variants import BARE, DEPENDENCY, GROUP_DEPENDENCY, SEND_MIDDLEWARE, Target, Variant
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
from cancelable_deps.operations import Operations

Build = Callable[[Work], ASGIApp]


def _decorator(work: Work) -> ASGIApp:
    return app_with(with_cancelation(plain_handler(work)))


def _decorator_timeout(work: Work) -> ASGIApp:
    return app_with(with_cancelation(timeout=30)(plain_handler(work)))


def _route_class(route_class: type[CancelableRoute]) -> Build:
    def build(work: Work) -> ASGIApp:
        app = FastAPI()
        # Not a router that is included: FastAPI takes a seventh longer to find a route there, with any route class.
        app.router.route_class = route_class
        app.get("/")(plain_handler(work))
        return app

    return build


def _middleware(timeout: float | None, handler: Callable[[Work], Handler]) -> Build:
    def build(work: Work) -> ASGIApp:
        app = app_with(handler(work))
        app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)
        return app

    return build


def _operations(is_named: bool) -> Build:
    def build(work: Work) -> ASGIApp:
        app = app_with(plain_handler(work))
        operations = Operations()
        app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")
        return _Opened(app, operations, is_named)

    return build


class _Opened:
    """An application whose operations are opened by its first request, as the benchmark runs no lifespans."""

    def __init__(self, app: ASGIApp, operations: Operations, is_named: bool) -> None:
        self._app = app
        self._operations = operations
        self._header = [(b"operation-id", b"a-name-of-36-characters-as-uuids-are")] if is_named else []
        # The headers have to be added to each request.
        self.warmed = self if is_named else app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # Not a coroutine of its own, which would be counted.
        if self._header:
            scope["headers"] += self._header
        return self._app(scope, receive, send) if self._operations.is_open else self._first(scope, receive, send)

    async def _first(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._operations.__aenter__()
        await self._app(scope, receive, send)


def _decorated_handler(work: Work) -> Handler:
    return with_cancelation(plain_handler(work))


def _cancelable_handler(work: Work) -> Handler:
    return entering_handler(work, RequestCancelable)


def _cancelable(work: Work) -> ASGIApp:
    return app_with(_cancelable_handler(work))


def _cancelable_timeout(work: Work) -> ASGIApp:
    return app_with(entering_handler(work, Annotated[Cancelable, Depends(cancelable_with_timeout(30))]))


def _task_group(work: Work) -> ASGIApp:
    return app_with(calling_handler(work, RequestTaskGroup))


def _event(work: Work) -> ASGIApp:
    return app_with(event_handler(work, CancellationEvent))


def _ours(name: str, build: Build, door: str | None, target: Target | None = None, floor: str = BARE) -> Variant:
    return Variant(name, build, "ours", door, floor, target, hears=True)


_LIMITED = Target(1.08, 1.16)
_HANDLE = Target(0.08, 0.08, over_floor=True)
_EVENT = Target(0.06, 0.06, over_floor=True)

OURS = [
    _ours("decorator", _decorator, "decorator", Target(1.06, 1.12)),
    _ours("decorator(timeout=30)", _decorator_timeout, "decorator", Target(1.07, 1.14)),
    _ours("route class", _route_class(CancelableRoute), "decorator", Target(1.07, 1.14)),
    _ours("route class.with_timeout(30)", _route_class(CancelableRoute.with_timeout(30)), "decorator", _LIMITED),
    _ours("middleware", _middleware(None, plain_handler), "middleware", Target(1.07, 1.14), SEND_MIDDLEWARE),
    _ours("middleware(operations=...)", _operations(False), None, Target(1.08, 1.14), SEND_MIDDLEWARE),
    _ours("middleware(operations=...), with an id", _operations(True), None, floor=SEND_MIDDLEWARE),
    _ours("middleware(default_timeout=30)", _middleware(30, plain_handler), "middleware", _LIMITED, SEND_MIDDLEWARE),
    _ours("RequestCancelable", _cancelable, "handle", _HANDLE, DEPENDENCY),
    _ours("cancelable_with_timeout(30)", _cancelable_timeout, "handle", _HANDLE, DEPENDENCY),
    _ours("RequestTaskGroup", _task_group, "task group", Target(1.5, 1.5), GROUP_DEPENDENCY),
    _ours("CancellationEvent", _event, "event", _EVENT, DEPENDENCY),
    _ours("middleware + decorator", _middleware(None, _decorated_handler), None, floor=SEND_MIDDLEWARE),
    _ours("middleware + RequestCancelable", _middleware(None, _cancelable_handler), None, floor=SEND_MIDDLEWARE),
]
