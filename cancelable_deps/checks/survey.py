"""What an application consists of: its handlers, and the middleware around each of them."""

from __future__ import annotations

import dis
import inspect
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, cast

from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute

from ..doors.base_http import InnerDoor, under_ours
from ..doors.middleware import RequestCancelationMiddleware, is_excluded, limits_of_middleware
from ..doors.wsgi import Bridge, is_wsgi_bridge
from ..hosts.fastapi import routes_below
from .handler import Handler
from .reading import is_a, variables_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_NESTED = 50


@dataclass(frozen=True)
class Layer:
    """A middleware, or another application that leads to the next one."""

    kind: Any
    """Its class; for a function the function."""

    dispatch: Any = None
    """The function of a ``BaseHTTPMiddleware`` that was not derived from."""

    ours: RequestCancelationMiddleware | None = None
    hides: bool = False
    """Whether nobody who follows the attributes ``app`` finds what stands inside of it."""

    prefix: str = ""
    """The path of the mount that it belongs to."""

    @property
    def name(self) -> str:
        """The name that its author has given it."""
        named = self.kind if self.dispatch is None else self.dispatch
        return getattr(named, "__qualname__", type(named).__qualname__).rpartition("<locals>.")[2]

    @property
    def is_base_http(self) -> bool:
        """Whether it runs the rest of the application in a task group of its own."""
        return inspect.isclass(self.kind) and issubclass(self.kind, BaseHTTPMiddleware)


@dataclass(frozen=True)
class Place:
    """A place where requests end: a handler, or an application that we cannot look into."""

    kind: str
    """``"http"``, ``"websocket"``, ``"wsgi"`` or ``"asgi"``."""

    path: str
    layers: tuple[Layer, ...]
    """What stands around it, the outermost first."""

    handler: Handler | None = None
    is_under_ours: bool = False
    """Whether a middleware of ours stands around the whole application, outside of all layers."""

    @cached_property
    def covering(self) -> int | None:
        """The index of the outermost middleware of ours that covers it; -1 if that stands outside of all layers."""
        if self.is_under_ours:
            return -1
        return next((index for index, layer in enumerate(self.layers) if _covers(layer, self)), None)

    @property
    def is_covered(self) -> bool:
        """Whether any door covers it."""
        return self.covering is not None or (self.handler is not None and self.handler.has_door)

    @property
    def ours(self) -> RequestCancelationMiddleware | None:
        """The outermost middleware of ours that covers it, if it is one that we can look at."""
        return None if self.covering is None or self.covering < 0 else self.layers[self.covering].ours

    @property
    def timeout(self) -> float | None:
        """The seconds after which a request is stopped; ``None`` if it never is, or that is not known."""
        limits = None if self.ours is None else limits_of_middleware(self.ours)
        policies = {} if limits is None else limits.policies or {}
        has_own, seconds = (False, None) if self.handler is None else self.handler.own_timeout(policies)
        return seconds if has_own or limits is None else limits.timeout

    @property
    def outside_ours(self) -> tuple[Layer, ...]:
        """The layers that no middleware of ours stands around."""
        return self.layers if self.covering is None else self.layers[: max(0, self.covering)]

    @property
    def inside_ours(self) -> tuple[Layer, ...]:
        """The layers that a middleware of ours stands around."""
        return () if self.covering is None else self.layers[self.covering + 1 :]

    @property
    def hidden_from_ours(self) -> tuple[Layer, ...]:
        """The layers inside of ours that it does not find."""
        inside = self.inside_ours
        first = next((index for index, layer in enumerate(inside) if layer.hides), len(inside))
        return inside[first + 1 :]

    @property
    def is_hidden_from_ours(self) -> bool:
        """Whether ours does not find what stands here."""
        return any(layer.hides for layer in self.inside_ours)


def _covers(layer: Layer, place: Place) -> bool:
    if layer.ours is None:
        return False
    kind = "websocket" if place.kind == "websocket" else "http"
    scope = {"type": kind, "path": place.path, "root_path": layer.prefix, "method": "GET", "headers": []}
    try:
        return not is_excluded(layer.ours, scope)
    except Exception:
        return True  # A function of the application has failed for a scope that is no real one.


def places_in(app: Any) -> list[Place]:
    """Return the places of an application, and of those that are mounted in it, but not those of FastAPI's own routes."""
    is_under_ours = is_a(app, Starlette) and app in under_ours
    places = [replace(place, is_under_ours=is_under_ours) for place in _places(app, "", (), frozenset())]
    return [place for place in places if place.handler is None or place.handler.is_of_application]


def mounted_applications(
    app: Starlette, path: str = "", around: frozenset[int] = frozenset()
) -> Iterator[tuple[str, Starlette]]:
    """Yield the applications that are mounted in another one, with their paths."""
    for below in routes_below(app.router):
        inner = application_in(below.route.app) if is_a(below.route, (Mount, Host)) else None
        if inner is not None and id(inner) not in around:
            yield path + below.path, inner
            yield from mounted_applications(inner, path + below.path, around | {id(inner)})


def application_in(app: Any) -> Starlette | None:
    """Return the outermost application of Starlette or FastAPI, inside all middleware that ``app`` begins with."""
    for _ in range(_MOST_NESTED):
        if is_a(app, Starlette):
            return cast("Starlette", app)
        app = next(iter(_inside(app)[0]), None)
    return None


def _places(app: Any, path: str, layers: tuple[Layer, ...], around: frozenset[int]) -> Iterator[Place]:
    """Yield the places of any ASGI application; ``around`` are the ids of those that it stands in."""
    if id(app) in around:
        return
    around |= {id(app)}
    if is_a(app, InnerDoor):
        yield from _places(app.app, path, layers, around)
    elif is_a(app, Bridge) or is_wsgi_bridge(app):
        yield Place("wsgi", path, layers)
    elif is_a(app, Starlette):
        yield from _places(app.router, path, layers + _layers_of(app, path), around)
    elif is_a(app, Router):
        layers += tuple(_chain(app.middleware_stack, path))
        yield from _places_of(app, path, layers, around)
    else:
        inner, hides = _inside(app)
        layer = replace(_layer(app, path), hides=hides)
        for each in inner:
            yield from _places(each, path, (*layers, layer), around)
        if not inner:
            yield Place("asgi", path, layers)


def _places_of(router: Router, path: str, layers: tuple[Layer, ...], around: frozenset[int]) -> Iterator[Place]:
    for below in routes_below(router):
        route, full = below.route, path + below.path
        if is_a(route, (Mount, Host)):
            yield from _places(route.app, full, layers, around)
        elif is_a(route, (Route, WebSocketRoute)):
            kind = "http" if is_a(route, Route) else "websocket"
            yield Place(kind, full, (*layers, *_chain(route.app, path)), Handler(below))


def _layers_of(app: Starlette, path: str) -> tuple[Layer, ...]:
    if app.middleware_stack is not None:
        own = (ServerErrorMiddleware, ExceptionMiddleware)
        return tuple(layer for layer in _chain(app.middleware_stack, path) if layer.kind not in own)
    return tuple(_layer_to_be(middleware, path) for middleware in app.user_middleware)


def _chain(app: Any, path: str) -> Iterator[Layer]:
    """Yield the middleware from ``app`` to the router or endpoint that it leads to."""
    for _ in range(_MOST_NESTED):
        if inspect.isclass(app) or is_a(app, (Starlette, Router, MethodType)) or is_wsgi_bridge(app):
            return
        inner, hides = _inside(app)
        if not inner:
            return
        if not isinstance(app, InnerDoor):
            yield replace(_layer(app, path), hides=hides)
        app = inner[0]


def _layer(app: Any, path: str) -> Layer:
    kind = app if is_a(app, FunctionType) else type(app)
    dispatch = app.dispatch_func if kind is BaseHTTPMiddleware else None
    ours = app if is_a(app, RequestCancelationMiddleware) else None
    return Layer(kind, dispatch, ours, prefix=path)


def _layer_to_be(middleware: Any, path: str) -> Layer:
    """Return a middleware that the application builds when it starts."""
    kind, args, kwargs = middleware
    ours = None
    if inspect.isclass(kind) and issubclass(kind, RequestCancelationMiddleware):
        with suppress(Exception):  # wrong options, which the start reports
            ours = kind(_nothing, *args, **kwargs)
    dispatch = kwargs.get("dispatch") if kind is BaseHTTPMiddleware else None
    return Layer(kind, dispatch, ours, hides=inspect.isclass(kind) and not _keeps_app(kind), prefix=path)


async def _nothing(scope: Any, receive: Any, send: Any) -> None: ...


def _keeps_app(kind: type) -> bool:
    """Return whether a class of middleware keeps its application in the attribute ``app``, as far as can be seen."""
    initializers = [vars(each)["__init__"] for each in kind.__mro__ if is_a(vars(each).get("__init__"), FunctionType)]
    stores = {
        instruction.argval
        for initializer in initializers
        for instruction in dis.get_instructions(initializer)
        if instruction.opname == "STORE_ATTR"
    }
    return not stores or "app" in stores or hasattr(kind, "app")


def _inside(app: Any) -> tuple[list[Any], bool]:
    """Return the applications that an application leads to, and whether one has to search for them."""
    if is_a(app, MethodType) and is_a(app.__self__, Router):
        return [], False
    with suppress(Exception):  # a proxy that raises
        following = getattr(app, "app", None)
        if callable(following):
            return [following], False
        return [value for value in _held(app) if _is_application(value)], True
    return [], False


def _held(app: Any) -> Iterator[Any]:
    values = list(getattr(app, "__dict__", {}).values())
    for value in [*values, *variables_of(app)]:
        if is_a(value, dict):
            yield from value.values()
        elif is_a(value, (list, tuple)):
            yield from value
        else:
            yield value


def _is_application(value: Any) -> bool:
    if is_a(value, (Starlette, Router, BaseHTTPMiddleware, RequestCancelationMiddleware)):
        return True
    if inspect.isclass(value) or not callable(value):
        return False
    called = value if inspect.isroutine(value) else type(value).__call__
    code = getattr(called, "__code__", None)
    return code is not None and {"receive", "send"} <= set(code.co_varnames[: code.co_argcount])
