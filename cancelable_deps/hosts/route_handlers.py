"""The request that FastAPI calls a decorated function for, if the function has no parameter for the request.

An additional parameter would disturb every decorator between the route and ours: its cache keys, type hints and schemas.
So no signature shows one. If no decorator stands between, FastAPI is made to pass the request as a keyword all the same,
which costs least. Otherwise the request is passed beside the arguments, in a context variable that is set while the
route's handler runs.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import fastapi.routing
from fastapi.routing import APIRoute, APIWebSocketRoute

from ..kernel.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.requests import HTTPConnection

KEYWORD: Final = "cancelable_deps_request"
TARGET_ATTRIBUTE: Final = "__cancelable_deps_target__"

# The attribute of FastAPI's `Dependant` with the name of the parameter that takes the request or WebSocket. Not public;
# if it is gone one day, the context variable serves for all.
_PARAMETER_OF_FASTAPI: Final = "http_connection_param_name"

# These functions make the handler that a route runs for each request, when the app is built. Other libraries that follow
# a request (tracers, error reporters) wrap them as well. Nothing closer to FastAPI's public surface gets both the endpoint
# and the same Request object that its dependencies get, for routes of every class.
_MAKERS: Final = ("get_request_handler", "get_websocket_app")

# Far more than any stack of decorators has. A limit is needed because a callable object may lead to a whole application.
_MOST_CALLABLES: Final = 500


class Target:
    """A decorated function that needs its request."""

    function: Any = None
    has_own = False
    """Whether the function has a parameter for the request."""

    is_on_route = False
    """Whether FastAPI has made a route that leads to the function."""


# A weak reference, because the context is copied for every task that is started meanwhile, and a task that outlives the
# request must not keep it alive. With the targets, because a decorated function that the handler calls itself was not
# called for the request.
_calling: ContextVar[tuple[ref[HTTPConnection], frozenset[Target]] | None] = ContextVar(
    "cancelable_deps_calling", default=None
)


def request_for(target: Target) -> HTTPConnection | None:
    """Return the request that FastAPI is calling the target's function for."""
    calling = _calling.get()
    return None if calling is None or target not in calling[1] else calling[0]()


@functools.cache
def is_told() -> bool:
    """Make FastAPI pass each target its request; return whether that works with this version."""
    for name in _MAKERS:
        maker = getattr(fastapi.routing, name, None)
        if maker is not None:
            setattr(fastapi.routing, name, _telling(maker))
    told = all(_is_asked(route) for route in (APIRoute, APIWebSocketRoute))
    if not told:
        logger.warning(
            "@with_cancelation cannot find the request of a function without a parameter for it in this version of "
            "FastAPI: such functions get an additional parameter, `%s`, which decorators above @with_cancelation see",
            KEYWORD,
        )
    return told


def _is_asked(route: Callable[..., object]) -> bool:
    async def endpoint() -> None: ...

    target = Target()
    setattr(endpoint, TARGET_ATTRIBUTE, target)
    route("/", endpoint)
    return target.is_on_route


def _telling(make: Any) -> Any:
    @functools.wraps(make)
    def make_and_tell(*args: Any, **kwargs: Any) -> Any:
        dependant = kwargs["dependant"] if "dependant" in kwargs else args[0]
        to_tell = frozenset(target for called in _all(dependant) for target in _targets_to_tell(called))
        handle = make(*args, **kwargs)
        return _called_for(handle, to_tell) if to_tell else handle

    return make_and_tell


def _called_for(handle: Any, targets: frozenset[Target]) -> Any:
    @functools.wraps(handle)
    async def handle_and_tell(connection: HTTPConnection) -> Any:
        before = _calling.set((ref(connection), targets))
        try:
            return await handle(connection)
        finally:
            _calling.reset(before)

    return handle_and_tell


def _all(dependant: Any) -> Iterator[Any]:
    yield dependant
    for dependency in dependant.dependencies:
        yield from _all(dependency)


def _targets_to_tell(dependant: Any) -> Iterator[Target]:
    """Yield the targets below the function that FastAPI calls.

    If that function is itself a target, it is given the request as a keyword and is not among them.
    """
    for target in _targets_in(dependant.call):
        target.is_on_route = True
        called = getattr(dependant.call, "__func__", dependant.call)
        if called is target.function and hasattr(dependant, _PARAMETER_OF_FASTAPI):
            setattr(dependant, _PARAMETER_OF_FASTAPI, KEYWORD)
        else:
            yield target


def _targets_in(call: Any) -> Iterator[Target]:
    """Yield the targets of all functions that ``call`` wraps, by whatever means."""
    for inner in _all_in(call):
        if _is_target(inner) and not inner.has_own:
            yield inner


def callables_in(call: Any) -> Iterator[Any]:
    """Yield ``call``, and all callables that it wraps, by whatever means; some twice."""
    yield call
    for inner in _all_in(call):
        if callable(inner) and not _is_target(inner):
            yield inner


def _all_in(call: Any) -> Iterator[Any]:
    to_look_at, seen = [call], {id(call)}
    while to_look_at and len(seen) < _MOST_CALLABLES:
        for inner in _held_by(to_look_at.pop()):
            yield inner
            if callable(inner) and not _is_target(inner) and id(inner) not in seen:
                seen.add(id(inner))
                to_look_at.append(inner)


def _is_target(held: Any) -> bool:
    # Not isinstance(), which asks the object: a proxy for an object of the current request may raise then.
    return issubclass(type(held), Target)


def _held_by(function: Any) -> list[Any]:
    """Return the objects among which the function is that a decorator has wrapped; not every one sets ``__wrapped__``."""
    held: list[Any] = []
    # For the proxies that raise.
    with suppress(Exception):
        held.append(getattr(function, "__wrapped__", None))
        held.append(getattr(function, TARGET_ATTRIBUTE, None))
        if isinstance(function, functools.partial):
            held.append(function.func)
            held += function.args if _passes_on(function.func) else ()
        elif inspect.ismethod(function):
            held.append(function.__func__)
            held += _attributes(function.__self__) if _passes_on(function.__func__) else ()
        elif inspect.isfunction(function):
            held += _kept(function) if _passes_on(function) else ()
        elif not isinstance(function, type):
            called = type(function).__call__
            held.append(called)
            held += _attributes(function) if _passes_on(called) else ()
    return held


def _passes_on(function: Any) -> bool:
    """Return whether ``function`` accepts any arguments, or declares the signature of another function: a wrapper.

    Any other function is an endpoint. The functions that it calls were not called for the request by FastAPI.
    """
    code = getattr(function, "__code__", None)
    takes_all = code is None or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return bool(takes_all) or hasattr(function, "__signature__") or hasattr(function, "__wrapped__")


def _kept(function: Any) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        # A cell may not be assigned yet.
        with suppress(ValueError):
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from _attributes(function)


def _attributes(owner: Any) -> Iterator[Any]:
    yield from getattr(owner, "__dict__", {}).values()
