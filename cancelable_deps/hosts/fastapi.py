"""What we know of FastAPI that it does not promise: its exit stacks, its generator endpoints, the tree of its routes."""

from __future__ import annotations

from collections import deque
from importlib import import_module
from importlib.util import find_spec
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, Final

from fastapi.exceptions import FastAPIError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from starlette.types import Scope

HAS_GENERATORS: Final = find_spec("fastapi.sse") is not None
"""Whether generators are endpoints, which they are since FastAPI 0.135."""

_sse: Final[Any] = import_module("fastapi.sse") if HAS_GENERATORS else None

HANDLER_STACK_KEY: Final = "fastapi_function_astack"
"""The key of the scope with the exit stack around dependencies and handler, closed when the handler has returned.

Nothing public tells a plain dependency of that moment, and a ``yield`` dependency costs a request as much as all the
rest.
"""

REQUEST_STACK_KEY: Final = "fastapi_inner_astack"
"""The key of the exit stack around the response and its background tasks, for what no error may leave behind."""


def last_item(scope: Scope, event: str, data: dict[str, str]) -> Any:
    """Return an event that a generator endpoint can yield at last, or ``None`` if its response is no event stream.

    A route says so by an attribute that is not documented.
    """
    is_event_stream = HAS_GENERATORS and getattr(scope.get("route"), "is_sse_stream", False)
    return _sse.ServerSentEvent(event=event, data=data) if is_event_stream else None


def tells_that_it_was_swallowed(outcome: BaseException) -> bool:
    """Return whether FastAPI finds out so that a dependency with ``yield``, or on trio its own nursery, has kept an error.

    It says so where one of ``scope="request"`` has. Where one of ``scope="function"`` has it does not notice, and goes on
    to a response that was never assigned.
    """
    if type(outcome) is not UnboundLocalError:
        return type(outcome) is FastAPIError
    innermost = deque(walk_tb(outcome.__traceback__), maxlen=1)
    return any(frame.f_globals.get("__name__") == "fastapi.routing" for frame, _ in innermost)


def functions_called(routes: Iterable[Any], apps: tuple[Any, ...] = ()) -> Iterator[tuple[Any, str, tuple[Any, ...]]]:
    """Yield the functions that routes call, each with the path of its route and the mounted applications around that."""
    for route in routes:
        for function in _functions_of(route):
            yield function, getattr(route, "path", ""), apps
        # Since 0.137 FastAPI keeps an included router as it is, with what `include_router` was given beside it.
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
