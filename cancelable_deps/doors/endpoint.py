"""The kinds of endpoints: whether one is ``async`` or a generator, and where it finds the request it is called for."""

from __future__ import annotations

import functools
import inspect
import typing
from typing import Any, cast

from starlette.requests import HTTPConnection, Request
from starlette.websockets import WebSocket

from ..hosts.fastapi import HAS_GENERATORS
from ..hosts.route_handlers import KEYWORD, TARGET_ATTRIBUTE, Target, is_told, request_for
from .dress import innermost, signature_of, what_runs


class RequestFinder(Target):
    """A callable that returns the request that an endpoint is called for: from its arguments, or from FastAPI."""

    def __init__(self, endpoint: Any) -> None:
        signature = signature_of(endpoint)
        namespace = getattr(what_runs(endpoint), "__globals__", {})
        self.annotations = {
            name: _resolve(parameter.annotation, namespace) for name, parameter in signature.parameters.items()
        }
        names = list(signature.parameters)
        self.own = next((name for name in names if _is_a(self.annotations[name], HTTPConnection)), None)
        if self.own is None:
            self.own = _starlettes_own(signature)
        self.index = None if self.own is None else names.index(self.own)

    def be_given_the_request(self, guarded: Any) -> None:
        """Register ``guarded``, the decorated function, so that FastAPI passes it the request."""
        self.function = guarded
        self.has_own = self.own is not None
        setattr(guarded, TARGET_ATTRIBUTE, self)
        if not self.has_own and not is_told():
            guarded.__signature__ = _with_request(signature_of(guarded))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HTTPConnection | None:
        if self.own is None:
            found = kwargs.pop(KEYWORD, None)
            if found is None:
                found = request_for(self)
            if found is None and args:
                found = _first_of(args)
        elif self.own in kwargs:
            found = kwargs[self.own]
        else:
            found = args[self.index] if self.index is not None and len(args) > self.index else None
        return found if isinstance(found, (Request, WebSocket)) else None


def _with_request(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    ours = inspect.Parameter(KEYWORD, inspect.Parameter.KEYWORD_ONLY, annotation=HTTPConnection, default=None)
    at = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(at, ours)
    return signature.replace(parameters=parameters)


def _first_of(args: tuple[Any, ...]) -> Any:
    """Return a request among the first two arguments: Starlette passes it alone, whatever the parameter's name is."""
    return next((given for given in args[:2] if isinstance(given, HTTPConnection)), None)


def _starlettes_own(signature: inspect.Signature) -> str | None:
    """Return the name of the request's parameter in ``endpoint(request)`` or ``on_receive(self, websocket, data)``.

    Starlette allows it to have no annotation. FastAPI, which does not call methods with ``self``, would take it for a
    query parameter.
    """
    names = [name for name in signature.parameters if name != "self"]
    is_method = len(names) < len(signature.parameters)
    if names[:1] not in (["request"], ["websocket"]) or (len(names) > 1 and not is_method):
        return None
    return names[0] if signature.parameters[names[0]].annotation is inspect.Parameter.empty else None


def refuse_what_cannot_be_covered(endpoint: Any) -> None:
    """Raise a ``TypeError`` that says how to do it right, if ``endpoint`` is not an endpoint."""
    if inspect.isclass(endpoint) or not callable(endpoint):
        raise TypeError(
            f"@with_cancelation takes an endpoint (a function), not {endpoint!r}. Put it below the route decorator, "
            "directly above the function, and pass its options by name: @with_cancelation(timeout=30)."
        )
    function = what_runs(endpoint)
    if {"scope", "receive", "send"} <= set(inspect.signature(function).parameters):
        raise TypeError(
            f"{name_of(endpoint)} is an ASGI application, and @with_cancelation takes an endpoint. Wrap an application in "
            "RequestCancelationMiddleware."
        )
    if yields(endpoint):
        if not HAS_GENERATORS:
            raise TypeError(f"{name_of(endpoint)}() is a generator, which FastAPI accepts as an endpoint since 0.135")
        return
    if not is_async(endpoint) and any(_is_a(kind, WebSocket) for kind in RequestFinder(endpoint).annotations.values()):
        raise TypeError(
            f"{name_of(endpoint)}() is a plain `def`, and a WebSocket endpoint must be awaitable: make it `async def`."
        )


def yields(endpoint: Any) -> bool:
    """Return whether ``endpoint`` is a generator function, or wraps one."""
    function = what_runs(endpoint)
    return inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function)


def is_async(endpoint: Any) -> bool:
    """Return whether FastAPI awaits ``endpoint``: whether it is ``async def``, or wraps such a function."""
    if inspect.iscoroutinefunction(what_runs(endpoint)):
        return True
    while isinstance(endpoint, functools.partial):
        endpoint = endpoint.func
    return inspect.iscoroutinefunction(endpoint)


def name_of(endpoint: Any) -> str:
    """Return the name of an endpoint, for the text of an error."""
    return getattr(innermost(endpoint), "__qualname__", repr(endpoint))


def _resolve(annotation: Any, namespace: dict[str, Any]) -> Any:
    if isinstance(annotation, str):
        try:
            return eval(annotation, namespace)
        except Exception:
            return annotation
    return annotation


def _is_a(annotation: Any, kind: type) -> bool:
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return inspect.isclass(annotation) and issubclass(cast("type", annotation), kind)
