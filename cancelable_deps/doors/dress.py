"""What makes a wrapper the function that it wraps, for whoever looks at it: decorators, FastAPI, pickle, type hints."""

from __future__ import annotations

import functools
import inspect
import sys
from types import FunctionType
from typing import Any, Final

if sys.version_info >= (3, 14):
    from annotationlib import Format


def signature_of(function: Any) -> inspect.Signature:
    """The signature, with annotations as they are written."""
    if sys.version_info >= (3, 14):
        # Those that cannot be evaluated yet, or never, stay what they are: names.
        return inspect.signature(function, annotation_format=Format.FORWARDREF)
    return inspect.signature(function)


def what_runs(endpoint: Any) -> Any:
    function = innermost(endpoint)
    return function if inspect.isroutine(function) else type(function).__call__


def innermost(function: Any) -> Any:
    """What is left when all partials and wrappers are taken off."""
    while isinstance(function, functools.partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    return function


def dressed(wrapper: Any, endpoint: Any, unguarded: Any, *, is_generator: bool = False) -> Any:
    """``wrapper`` as a function that is ``endpoint`` in all that can be asked of it.

    :param wrapper: finds what it needs in its closure, for its module will be that of the endpoint.
    :param unguarded: gives what ``endpoint`` gives, in the way in which ``wrapper`` gives it.
    :param is_generator: whether that is an async iterator, and not an awaitable.
    """
    result = _in_its_module(wrapper, endpoint)
    signature = signature_of(endpoint)
    _look_like(result, endpoint, signature)
    is_kind = inspect.isasyncgenfunction if is_generator else inspect.iscoroutinefunction
    end = inspect.unwrap(endpoint)
    if not (inspect.isroutine(end) and is_kind(end)):
        # FastAPI takes a decorated function for what is at the end of its `__wrapped__`. A `def` would be called in a
        # thread; a partial or a callable object has no hints.
        result.__wrapped__ = _twin(endpoint, signature, unguarded, is_generator)
    return result


def _in_its_module(function: Any, endpoint: Any) -> Any:
    # FastAPI before 0.124, and others, evaluate annotations among the globals of what they are given.
    namespace = getattr(what_runs(endpoint), "__globals__", function.__globals__)
    return FunctionType(function.__code__, namespace, function.__name__, None, function.__closure__)


def _look_like(function: Any, endpoint: Any, signature: inspect.Signature) -> None:
    functools.update_wrapper(function, endpoint)
    # Without effect, for the parameters of a wrapper are `*args, **kwargs`.
    function.__defaults__ = getattr(endpoint, "__defaults__", None)
    function.__kwdefaults__ = getattr(endpoint, "__kwdefaults__", None)
    if not inspect.isroutine(endpoint):
        # As FastAPI names a partial or a callable object, which has no name of its own.
        function.__name__ = getattr(endpoint, "__name__", type(endpoint).__name__)
        function.__qualname__ = getattr(endpoint, "__qualname__", function.__name__)
        function.__annotations__ = _annotations(signature)


def _annotations(signature: inspect.Signature) -> dict[str, Any]:
    written = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    written["return"] = signature.return_annotation
    return {name: annotation for name, annotation in written.items() if annotation is not inspect.Signature.empty}


def _twin(endpoint: Any, signature: inspect.Signature, unguarded: Any, is_generator: bool) -> Any:
    """An ``async def`` with the parameters of ``endpoint`` that does what ``unguarded`` does.

    Made of source, for nothing else has a signature of its own: one that is attached keeps its annotations as strings,
    and those who look at the code see others.
    """
    parameters = signature.parameters.values()
    namespace: dict[str, Any] = {}
    exec(_source(list(parameters), is_generator), namespace)  # noqa: S102
    code = namespace["bind"](unguarded)
    twin: Any = _in_its_module(code, endpoint)
    _look_like(twin, endpoint, signature)
    del twin.__wrapped__
    empty, keyword_only = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
    given = [parameter for parameter in parameters if parameter.default is not empty]
    twin.__defaults__ = tuple(p.default for p in given if p.kind is not keyword_only) or None
    twin.__kwdefaults__ = {p.name: p.default for p in given if p.kind is keyword_only} or None
    original = getattr(what_runs(endpoint), "__code__", twin.__code__)
    # Error messages of FastAPI name the lines of the endpoint.
    twin.__code__ = twin.__code__.replace(co_filename=original.co_filename, co_firstlineno=original.co_firstlineno)
    return twin


def _source(parameters: list[inspect.Parameter], is_generator: bool) -> str:
    names = {parameter.name for parameter in parameters}
    run, item = (_unused(name, names) for name in ("run", "item"))
    call = f"{run}({', '.join(map(_argument, parameters))})"
    body = f"async for {item} in {call}: yield {item}" if is_generator else f"return await {call}"
    head = f"async def twin({_parameter_list(parameters)}):"
    return f"def bind({run}):\n  {head}\n    {body}\n  return twin"


def _unused(name: str, names: set[str]) -> str:
    while name in names:
        name += "_"
    return name


_STARS: Final[dict[Any, str]] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def _argument(parameter: inspect.Parameter) -> str:
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
        return f"{parameter.name}={parameter.name}"
    return _STARS.get(parameter.kind, "") + parameter.name


def _parameter_list(parameters: list[inspect.Parameter]) -> str:
    # Of a signature, with the defaults to be replaced by the real ones.
    bare = [
        parameter.replace(
            annotation=parameter.empty, default=parameter.empty if parameter.default is parameter.empty else None
        )
        for parameter in parameters
    ]
    return str(inspect.Signature(bare))[1:-1]
