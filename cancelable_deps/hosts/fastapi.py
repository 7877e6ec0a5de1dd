"""Private parts of FastAPI: its exit stacks, its generator endpoints, the tree of its routes, the spans it makes."""

from __future__ import annotations

from collections import deque
from importlib import import_module
from importlib.util import find_spec
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fastapi.exceptions import FastAPIError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from starlette.types import Scope

HAS_GENERATORS: Final = find_spec("fastapi.sse") is not None
"""Whether this FastAPI accepts generators as endpoints, as it does since 0.135."""

_sse: Final[Any] = import_module("fastapi.sse") if HAS_GENERATORS else None

EVENT_STREAM: Final[Any] = getattr(_sse, "EventSourceResponse", None)
"""The response class of event streams; ``None`` before 0.135."""

HANDLER_STACK_KEY: Final = "fastapi_function_astack"
"""The scope's key for the exit stack around dependencies and handler, which is closed when the handler has returned.

No public API lets a plain dependency know that moment. A ``yield`` dependency would, but costs a request as much as all
the rest of ours.
"""

REQUEST_STACK_KEY: Final = "fastapi_inner_astack"
"""The scope's key for the exit stack around the response and its background tasks; it is closed after errors, too."""


_TELEMETRY_KEY: Final = "fastapi.telemetry"


def span_of_request(scope: Mapping[str, Any]) -> Any:
    """Return the span of OpenTelemetry that FastAPI itself makes of a request, as it does since 0.165; or ``None``.

    It is not the current span in a handler, around which FastAPI has another one, and the API of OpenTelemetry leads from
    none to the one around it. `tests/test_telemetry.py` fails when this changes.
    """
    return getattr(scope.get(_TELEMETRY_KEY), "span", None)


def last_item(scope: Scope, event: str, data: dict[str, str]) -> Any:
    """Return an event for a generator endpoint to yield last, or ``None`` if its response is no event stream.

    A route with an event stream is known by an attribute that is not documented.
    """
    is_event_stream = HAS_GENERATORS and getattr(scope.get("route"), "is_sse_stream", False)
    return _sse.ServerSentEvent(event=event, data=data) if is_event_stream else None


def route_as_included(scope: Scope) -> Any:
    """Return the route of a request, with the path that it has where its router is included; ``None`` without one.

    Since 0.137 FastAPI keeps an included router as it is. The path of its routes then lacks the prefixes of
    ``include_router``; an object beside the route has them.
    """
    route = scope.get("route")
    known = scope.get("fastapi")
    context = known.get("effective_route_context") if isinstance(known, dict) else None
    # It may be that of an application further out.
    return context if context is not None and getattr(context, "original_route", None) is route else route


def tells_that_it_was_swallowed(outcome: BaseException) -> bool:
    """Return whether ``outcome`` is how FastAPI fails when a dependency with ``yield`` has swallowed an error.

    On trio, FastAPI's own nursery may swallow it. For a dependency of ``scope="request"`` FastAPI raises an error that
    says so. For one of ``scope="function"`` it does not notice, and uses a response that was never assigned.
    """
    if type(outcome) is not UnboundLocalError:
        return type(outcome) is FastAPIError
    innermost = deque(walk_tb(outcome.__traceback__), maxlen=1)
    return any(frame.f_globals.get("__name__") == "fastapi.routing" for frame, _ in innermost)


def functions_called(routes: Iterable[Any], apps: tuple[Any, ...] = ()) -> Iterator[tuple[Any, str, tuple[Any, ...]]]:
    """Yield each function that the routes call, the path of its route, and the mounted applications around the route."""
    for route in routes:
        for function in _functions_of(route):
            yield function, getattr(route, "path", ""), apps
        inner = included_routes(route) or getattr(route, "routes", None) or ()
        yield from functions_called(inner, (*apps, getattr(route, "app", None)))


def included_routes(route: Any) -> Sequence[Any]:
    """Return the routes of the router that ``route`` stands for, if ``include_router`` has made it; otherwise none."""
    # Since 0.137 FastAPI keeps an included router as it is, and the arguments of `include_router` beside it.
    return getattr(getattr(route, "original_router", None), "routes", ())


class RouteBelow(NamedTuple):
    """A route, and what the routers that it was included by say of it."""

    route: Any
    path: str
    calls: tuple[Any, ...]
    """The functions that are called for its requests besides the endpoint: all dependencies."""

    response_class: Any
    router: Any
    """What it belongs to. Before 0.137 FastAPI made the routes of an included router anew, as those of the other one."""


def routes_below(
    router: Any, prefix: str = "", calls: tuple[Any, ...] = (), response_class: Any = None
) -> Iterator[RouteBelow]:
    """Yield the routes of a router, and those of the routers that it includes, but not those of its mounts."""
    for route in router.routes:
        if included_routes(route):
            inner, context = route.original_router, route.include_context
            more = [depends.dependency for owner in (inner, context) for depends in owner.dependencies]
            chosen = _chosen(inner.default_response_class, context.default_response_class, response_class)
            yield from routes_below(inner, prefix + context.prefix, (*calls, *more), chosen)
        else:
            path = prefix + getattr(route, "path", "")
            called = [*calls, *_dependencies(getattr(route, "dependant", None))]
            chosen = _chosen(getattr(route, "response_class", None), response_class)
            yield RouteBelow(route, path, tuple(called), chosen, router)


def _chosen(*classes: Any) -> Any:
    """Return the first response class that somebody has chosen; FastAPI wraps its own default into a placeholder."""
    return next((cls for cls in classes if isinstance(cls, type)), None)


def takes_background_tasks(route: Any) -> bool:
    """Return whether FastAPI hands a `BackgroundTasks` to the endpoint of ``route``."""
    return getattr(getattr(route, "dependant", None), "background_tasks_param_name", None) is not None


def _functions_of(route: Any) -> Iterator[Any]:
    yield getattr(route, "endpoint", None)
    yield from _dependencies(getattr(route, "dependant", None))
    for owner in (getattr(route, "original_router", None), getattr(route, "include_context", None)):
        for depends in getattr(owner, "dependencies", ()):
            yield getattr(depends, "dependency", None)


def _dependencies(dependant: Any) -> Iterator[Any]:
    for dependency in getattr(dependant, "dependencies", ()):
        yield dependency.call
        yield from _dependencies(dependency)
