"""For which request FastAPI calls a decorated function that has no parameter for one.

A parameter of ours would be in the way of every decorator between the route and ours: in its cache keys, its hints, its
schemas. So no signature shows one. Where nothing is between, FastAPI is made to give the request as a keyword all the
same, which costs least. Otherwise it is told beside the arguments, in a context variable that is set while the route's
handler runs.
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

# Of FastAPI's description of a function: the name of the parameter that takes the request or WebSocket. Not public; if
# it is gone one day, the context variable serves for all.
_PARAMETER_OF_FASTAPI: Final = "http_connection_param_name"

# They make what a route runs for each request, of what is known when the app is built: where other libraries that follow
# a request (tracers, error reporters) stand as well. Nothing closer to FastAPI's public surface is given the endpoint
# and the very Request that its dependencies get, for routes of every class.
_MAKERS: Final = ("get_request_handler", "get_websocket_app")

# Far more than any stack of decorators has; a callable object may lead to a whole application.
_MOST_CALLABLES: Final = 500


class Target:
    """Stands for one decorated function, to be told its request."""

    function: Any = None
    has_own = False
    """Whether it has a parameter for the request."""

    is_on_route = False


# Weakly: the context is copied for every task that is started meanwhile, and one that goes on must not keep the request.
# With the targets: a decorated function that the handler calls itself was not called for the request.
_calling: ContextVar[tuple[ref[HTTPConnection], frozenset[Target]] | None] = ContextVar(
    "cancelable_deps_calling", default=None
)


def request_for(target: Target) -> HTTPConnection | None:
    """The request that FastAPI calls the target's function for."""
    calling = _calling.get()
    return None if calling is None or target not in calling[1] else calling[0]()


@functools.cache
def is_told() -> bool:
    """Make FastAPI tell for which request it calls a target; whether it does."""
    for name in _MAKERS:
        maker = getattr(fastapi.routing, name, None)
        if maker is not None:
            setattr(fastapi.routing, name, _telling(maker))
    told = all(_is_asked(route) for route in (APIRoute, APIWebSocketRoute))
    if not told:
        logger.warning(
            "this version of FastAPI does not tell @with_cancelation for which request it calls a function: functions "
            "without a parameter for the request get one, `%s`, which decorators above ours see",
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
    """Those that what FastAPI calls leads to, but for one that it is: that is given the request as a keyword."""
    for target in _targets_in(dependant.call):
        target.is_on_route = True
        called = getattr(dependant.call, "__func__", dependant.call)
        if called is target.function and hasattr(dependant, _PARAMETER_OF_FASTAPI):
            setattr(dependant, _PARAMETER_OF_FASTAPI, KEYWORD)
        else:
            yield target


def _targets_in(call: Any) -> Iterator[Target]:
    """Those of all functions that ``call`` wraps, by whatever means."""
    to_look_at, seen = [call], {id(call)}
    while to_look_at and len(seen) < _MOST_CALLABLES:
        for inner in _held_by(to_look_at.pop()):
            # Not isinstance(), which asks the object: some proxies for what there is only during a request raise then.
            if issubclass(type(inner), Target):
                if not inner.has_own:
                    yield inner
            elif callable(inner) and id(inner) not in seen:
                seen.add(id(inner))
                to_look_at.append(inner)


def _held_by(function: Any) -> list[Any]:
    """What may be the function that a decorator has wrapped; not all of them leave a ``__wrapped__``."""
    held: list[Any] = []
    # The same proxies.
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
    """Whether it takes whatever it is given, or says that it takes what another one takes.

    What an endpoint of its own calls it calls itself: that was not called for the request.
    """
    code = getattr(function, "__code__", None)
    takes_all = code is None or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return bool(takes_all) or hasattr(function, "__signature__") or hasattr(function, "__wrapped__")


def _kept(function: Any) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        # Some are not assigned yet.
        with suppress(ValueError):
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from _attributes(function)


def _attributes(owner: Any) -> Iterator[Any]:
    yield from getattr(owner, "__dict__", {}).values()
