"""What the code of a function says of it, without running it."""

from __future__ import annotations

import dis
import inspect
import sys
import types
import typing
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_AWAITS: Final = {"GET_AWAITABLE", "GET_ANEXT", "BEFORE_ASYNC_WITH"}
_MESSAGES: Final = {"http.request", "http.disconnect"}

# Far more than a handler needs. Who needs more is not judged.
_MOST_FUNCTIONS: Final = 300

# Packages that call nothing of ours by themselves.
_OTHERS: Final = sys.stdlib_module_names | {"anyio", "cancelable_deps", "fastapi", "pydantic", "starlette", "trio"}


def is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Return whether a value is of a class, without asking the value: a proxy may raise then."""
    return issubclass(type(value), kind)


def codes_of(function: Any) -> Iterator[CodeType]:
    """Yield the code of a function, and of the functions inside it."""
    to_read = [getattr(function, "__code__", None)]
    while to_read:
        code = to_read.pop()
        if code is not None:
            yield code
            to_read += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def names_in(function: Any) -> set[str]:
    """Return the names of globals and attributes that a function uses."""
    return {name for code in codes_of(function) for name in code.co_names}


def is_installed(function: Any) -> bool:
    """Return whether a function belongs to an installed package, which nobody changes."""
    return any({"site-packages", "dist-packages"} & set(Path(code.co_filename).parts) for code in codes_of(function))


def objects_named(function: Any) -> Iterator[Any]:
    """Yield the objects that a function's names stand for: globals, attributes of modules, variables of its closure."""
    names = names_in(function)
    namespace = getattr(function, "__globals__", {})
    for name in names & namespace.keys():
        value = namespace[name]
        yield value
        if is_a(value, ModuleType):
            yield from (vars(value)[attribute] for attribute in names & vars(value).keys())
    yield from variables_of(function)


def variables_of(function: Any) -> Iterator[Any]:
    """Yield the objects in the closure of a function."""
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # not assigned yet
            yield cell.cell_contents


def uses(function: Any, *wanted: Any) -> bool:
    """Return whether a function's names stand for one of these objects."""
    return any(named is each for named in objects_named(function) for each in wanted)


@lru_cache(maxsize=4096)
def awaits(code: CodeType) -> bool:
    """Return whether code waits for anything."""
    return any(instruction.opname in _AWAITS for instruction in dis.get_instructions(code))


def receives_that_never_wait(functions: Iterable[Any]) -> Iterator[CodeType]:
    """Yield the code of functions that return messages of a request as ``receive()`` does, and wait for nothing."""
    for function in functions:
        for code in [code for outer in codes_of(function) for code in outer.co_consts if isinstance(code, CodeType)]:
            is_like_receive = code.co_flags & inspect.CO_COROUTINE and not code.co_argcount + code.co_kwonlyargcount
            returns_messages = bool(_MESSAGES & set(map(_if_text, code.co_consts))) or "receive" in code.co_name
            if is_like_receive and returns_messages and not awaits(code):
                yield code


def can_tell_disconnect(code: CodeType) -> bool:
    """Return whether the code of a ``receive()`` has a disconnect to return."""
    return "http.disconnect" in map(_if_text, code.co_consts)


def _if_text(constant: object) -> str:
    # Messages are constants, or the values of a dictionary of constants.
    return constant if isinstance(constant, str) else ""


def functions_in(kind: Any) -> Iterator[FunctionType]:
    """Yield the functions of a class, its own and those that it inherits from others than Starlette; or a function."""
    if isinstance(kind, FunctionType):
        yield kind
    elif inspect.isclass(kind):
        inherited = [
            each for each in reversed(kind.__mro__) if not each.__module__.startswith(("starlette.", "builtins"))
        ]
        members = {name: value for each in inherited for name, value in vars(each).items()}
        yield from (value for value in members.values() if is_a(value, FunctionType))
    elif inspect.ismethod(kind):
        yield from functions_in(kind.__func__)
    elif callable(kind):
        yield from functions_in(type(kind))


def with_helpers(functions: Iterable[FunctionType]) -> Iterator[FunctionType]:
    """Yield functions, and those of their own modules that they use."""
    for function in functions:
        yield function
        for named in objects_named(function):
            if is_a(named, FunctionType) and named.__module__ == function.__module__:
                yield named


def may_use(function: Any, wanted: set[str]) -> bool:
    """Return whether a function, or anything that it may call as far as can be seen, uses one of these names.

    ``True`` if that cannot be found out.
    """
    to_read: list[Any] = [function, *_methods_of_parameters(function)]
    seen = set(map(id, to_read))
    while to_read:
        if len(seen) > _MOST_FUNCTIONS:
            return True
        current = to_read.pop()
        names = names_in(current)
        if names & wanted:
            return True
        for named in objects_named(current):
            for inner in _callable_by(named, names):
                if id(inner) not in seen:
                    seen.add(id(inner))
                    to_read.append(inner)
    return False


def _methods_of_parameters(function: Any) -> Iterator[FunctionType]:
    names = names_in(function)
    hints: dict[str, Any] = {}
    with suppress(Exception):
        hints = typing.get_type_hints(function)
    for kind in hints.values():
        yield from _callable_by(kind, names)


def _callable_by(named: Any, names: set[str]) -> Iterator[FunctionType]:
    """Yield the functions that run when a named object, or those of its methods that have such a name, are called."""
    with suppress(Exception):  # a proxy that raises
        named = inspect.unwrap(named) if callable(named) else named
        if isinstance(named, types.MethodType):
            named = named.__func__
        is_function = isinstance(named, FunctionType)
        kind: Any = named if is_function or inspect.isclass(named) else type(named)
        if (getattr(kind, "__module__", None) or "").partition(".")[0] in _OTHERS:
            return
        if is_function:
            yield kind
            return
        for each in kind.__mro__:
            for name, value in vars(each).items():
                if isinstance(value, FunctionType) and (name in names or name in ("__init__", "__call__")):
                    yield value


def classes_returned(function: Any) -> set[type]:
    """Return the classes that the annotation of a function's result names."""
    hints: dict[str, Any] = {}
    with suppress(Exception):
        hints = typing.get_type_hints(function)
    result = hints.get("return")
    parts = (result, *typing.get_args(result))
    return {part for part in parts if isinstance(part, type)}
