"""Private parts of FastAPI: its exit stacks, its generator endpoints, the tree of its routes, the spans it makes."""

from __future__ import annotations

from collections import deque
from importlib import import_module
from importlib.util import find_spec
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, Final

from fastapi.exceptions import FastAPIError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from starlette.types import Scope

HAS_GENERATORS: Final = find_spec("fastapi.sse") is not None
"""Whether this FastAPI accepts generators as endpoints, as it does since 0.135."""

_sse: Final[Any] = import_module("fastapi.sse") if HAS_GENERATORS else None

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
        # Since 0.137 FastAPI keeps an included router as it is, and the arguments of `include_router` beside it.
        router = getattr(route, "original_router", route)
        inner = getattr(router, "routes", None) or ()
        yield from functions_called(inner, (*apps, getattr(route, "app", None)))


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
