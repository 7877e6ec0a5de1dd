"""Make a wrapper look like the function that it wraps: to decorators, FastAPI, pickle and type hints."""

from __future__ import annotations

import functools
import inspect
import sys
from types import FunctionType
from typing import Any, Final

if sys.version_info >= (3, 14):
    from annotationlib import Format


def signature_of(function: Any) -> inspect.Signature:
    """Return the signature of ``function``, with its annotations as they are written."""
    if sys.version_info >= (3, 14):
        # Annotations that cannot be evaluated yet, or never, stay names.
        return inspect.signature(function, annotation_format=Format.FORWARDREF)
    return inspect.signature(function)


def what_runs(endpoint: Any) -> Any:
    """Return the function that runs when ``endpoint`` is called, without partials and wrappers."""
    function = innermost(endpoint)
    return function if inspect.isroutine(function) else type(function).__call__


def innermost(function: Any) -> Any:
    """Return the callable that all partials and wrappers around it lead to."""
    while isinstance(function, functools.partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    return function


def dressed(wrapper: Any, endpoint: Any, unguarded: Any, *, is_generator: bool = False) -> Any:
    """Return ``wrapper`` as a function that has the name, signature, defaults, module and type hints of ``endpoint``.

    :param wrapper: a function that needs no globals of its own module, because it gets those of the endpoint's.
    :param unguarded: a function that gives the result of ``endpoint`` in the form in which ``wrapper`` gives it.
    :param is_generator: whether the result is an asynchronous iterator, and not an awaitable.
    """
    result = _in_its_module(wrapper, endpoint)
    signature = signature_of(endpoint)
    _look_like(result, endpoint, signature)
    is_kind = inspect.isasyncgenfunction if is_generator else inspect.iscoroutinefunction
    end = inspect.unwrap(endpoint)
    if not (inspect.isroutine(end) and is_kind(end)):
        # FastAPI judges a decorated function by the end of its `__wrapped__` chain. If that were a `def`, FastAPI would
        # call the wrapper in a thread; if it were a partial or a callable object, it would find no type hints.
        result.__wrapped__ = _twin(endpoint, signature, unguarded, is_generator)
    return result


def _in_its_module(function: Any, endpoint: Any) -> Any:
    # FastAPI before 0.124, and other libraries, evaluate annotations with the globals of the function that they get.
    namespace = getattr(what_runs(endpoint), "__globals__", function.__globals__)
    return FunctionType(function.__code__, namespace, function.__name__, None, function.__closure__)


def _look_like(function: Any, endpoint: Any, signature: inspect.Signature) -> None:
    functools.update_wrapper(function, endpoint)
    # For those who read them. They have no effect on calls, because the parameters of a wrapper are `*args, **kwargs`.
    function.__defaults__ = getattr(endpoint, "__defaults__", None)
    function.__kwdefaults__ = getattr(endpoint, "__kwdefaults__", None)
    if not inspect.isroutine(endpoint):
        # The name that FastAPI uses for a partial or a callable object, which has no name of its own.
        function.__name__ = getattr(endpoint, "__name__", type(endpoint).__name__)
        function.__qualname__ = getattr(endpoint, "__qualname__", function.__name__)
        function.__annotations__ = _annotations(signature)


def _annotations(signature: inspect.Signature) -> dict[str, Any]:
    written = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    written["return"] = signature.return_annotation
    return {name: annotation for name, annotation in written.items() if annotation is not inspect.Signature.empty}


def _twin(endpoint: Any, signature: inspect.Signature, unguarded: Any, is_generator: bool) -> Any:
    """Return an ``async def`` with the parameters of ``endpoint`` that does what ``unguarded`` does.

    It is compiled from source, because only then has the code itself these parameters. A signature that is attached as
    ``__signature__`` keeps annotations as strings, and a library that reads the code object sees other parameters.
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
    # So that error messages of FastAPI name the file and line of the endpoint.
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
    # A signature prints its parameters as source. The defaults are replaced by the real ones later.
    bare = [
        parameter.replace(
            annotation=parameter.empty, default=parameter.empty if parameter.default is parameter.empty else None
        )
        for parameter in parameters
    ]
    return str(inspect.Signature(bare))[1:-1]
