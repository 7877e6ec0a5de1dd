"""Checks of the arguments of users, when the app is built: limits, statuses, callbacks, and classes in `Depends`."""

from __future__ import annotations

import inspect
import math
from datetime import timedelta
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, TypeVar, cast
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

F = TypeVar("F", bound="Callable[..., Any]")


def seconds(value: Any, what: str) -> float:
    """Return ``value`` as a number of seconds; raise an error that names ``what`` if it is not one."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} takes seconds (int, float) or a timedelta, not {value!r}")
    if math.isnan(value) or value < 0:
        raise ValueError(f"{what} must be zero or more seconds, not {value!r}")
    return float(value)


def checked_status(code: object, what: object) -> int:
    """Return ``code`` if it is an HTTP error status; raise an error that names ``what`` if it is not."""
    if isinstance(code, bool) or not isinstance(code, int):
        raise TypeError(f"the status for {what} must be a number such as 503, not {code!r}")
    if not 400 <= code <= 599:
        raise ValueError(f"the status for {what} must be an error status (400 to 599), not {code}")
    if code == 408:
        raise ValueError(f"408 for {what} makes clients send the request again (RFC 9110); use 503 or 504")
    return code


class _Refusal:
    """An annotation of a parameter for which pydantic raises when FastAPI builds the app."""

    def __init__(self, advice: str) -> None:
        self._advice = advice

    def __repr__(self) -> str:
        return "not a dependency"

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> NoReturn:
        raise TypeError(self._advice)


def _refused(signature: inspect.Signature, advice: str) -> inspect.Signature:
    annotation = Annotated[Any, _Refusal(advice)]
    parameters = [parameter.replace(annotation=annotation) for parameter in signature.parameters.values()]
    return signature.replace(parameters=parameters)


def not_a_dependency(advice: str) -> Callable[[F], F]:
    """Make ``Depends(function)`` raise ``TypeError(advice)`` when the app is built."""

    def mark(function: F) -> F:
        function.__signature__ = _refused(inspect.signature(function), advice)  # type: ignore[attr-defined]
        return function

    return mark


def takes(function: object, count: int) -> bool:
    """Return whether ``function`` can be called with ``count`` arguments, as far as Python can tell."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        pass  # Some functions that are written in C have no signature.
    return True


def runs_only_when_awaited(function: object) -> bool:
    """Return whether ``function`` is ``async`` or a generator, also in a ``partial`` or as ``__call__``.

    Calling such a function runs none of its code.
    """
    while isinstance(function, partial):
        function = function.func
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
    method = None if inspect.isroutine(function) else getattr(type(function), "__call__", None)  # noqa: B004
    return any(is_one(each) for is_one in kinds for each in (function, method))


class NotADependency:
    """A ``__signature__`` for a class that makes ``Depends(class)`` raise, but not ``Depends`` of a subclass."""

    def __init__(self, advice: str) -> None:
        self._advice = advice

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner = owner

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is not None or owner is not self._owner:
            raise AttributeError("__signature__")
        constructor = inspect.signature(owner.__init__)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
        without_self = list(constructor.parameters.values())[1:]
        return _refused(constructor.replace(parameters=without_self), self._advice)


_COUNTS: Final[WeakKeyDictionary[Any, set[int]]] = WeakKeyDictionary()
"""The numbers of arguments that functions were found to take: to look takes longer than to start them."""


def checked_work(work: Any, count: int) -> Callable[..., Awaitable[Any]]:
    """Return work that can be started.

    :raises TypeError: if it cannot.
    """
    what: Any = work
    # Not `isfunction`, which also believes a proxy that cannot be referred to weakly.
    is_function = type(work) is FunctionType
    if is_function and count in _COUNTS.get(work, ()):
        return cast("Callable[..., Awaitable[Any]]", work)
    while isinstance(what, partial):
        what = what.func
    if not callable(what) or inspect.isgeneratorfunction(what) or inspect.isasyncgenfunction(what):
        raise TypeError(f"work must be an async function that takes the Cancelable, not {work!r}")
    is_plain = inspect.isbuiltin(what) or (inspect.isfunction(what) and not inspect.iscoroutinefunction(what))
    if is_plain and what.__name__ != "<lambda>" and not hasattr(what, "__wrapped__"):
        raise TypeError(
            f"work must be an async function that takes the Cancelable, and {what.__name__}() is not async. Run a "
            "blocking function inside of one: `await cancel.run_in_thread(function)`, or `cancel.run_in_process(function)`"
        )
    try:
        inspect.signature(work).bind(*[None] * (count + 1))
    except TypeError as exc:
        raise TypeError(f"work is called with the Cancelable and the {count} arguments given here: {exc}") from None
    except ValueError:
        pass  # Some functions that are written in C have no signature.
    if is_function:
        _COUNTS.setdefault(work, set()).add(count)
    return cast("Callable[..., Awaitable[Any]]", work)


def name_of_work(work: Any) -> str:
    function = getattr(work, "func", work)
    return str(getattr(function, "__name__", type(function).__name__))
