"""A decorated function is the function, for whoever looks at it."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import sys
import typing
from collections.abc import AsyncIterator, Iterator
from dis import get_instructions
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from fastapi import Body, Depends, FastAPI, Query
from pydantic import BaseModel

from cancelable_deps import with_cancelation
from tests.calls import get

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForTypes

pytestmark = pytest.mark.anyio


# They are equal only to themselves.
QUERY, BODY = Query(), Body(embed=True)


class Item(BaseModel):
    name: str


def seven() -> int:
    return 7


async def plain(n: int) -> int:
    """Says it."""
    return n


async def with_defaults(n: int, q: str = "x", *, flag: Annotated[bool, QUERY] = False) -> dict[str, Any]:
    return {"n": n, "q": q, "flag": flag}


async def with_a_body(n: int, item: Annotated[Item, BODY], seven: int = Depends(seven)) -> Item:
    return item


async def positional_only(n: int, /, q: int = 3) -> int:
    return n + q


async def takes_all(n: int, *args: int, **kwargs: str) -> tuple[object, ...]:
    return n, args, kwargs


async def names_for_types_alone(n: int, other: OnlyForTypes | None = None) -> OnlyForTypes | None:
    return other


def in_a_thread(n: int, q: str = "x", *, flag: Annotated[bool, QUERY] = False) -> dict[str, Any]:
    """Says it as well."""
    return {"n": n, "q": q, "flag": flag}


def in_a_thread_with_awkward_names(
    run: int, item: int, run_: int = 3, /, *self: int, run__: int = 4, **cls: int
) -> Any:
    return run, item, run_, self, run__, cls


def in_a_thread_for_types_alone(n: int, other: OnlyForTypes | None = None) -> OnlyForTypes | None:
    return other


async def items(n: int, q: str = "x") -> AsyncIterator[str]:
    for _ in range(n):
        yield q


def items_in_threads(n: int, *, q: str = "x") -> Iterator[str]:
    for _ in range(n):
        yield q


class Views:
    async def method(self, n: int, q: str = "x") -> str:
        return q * n

    def method_in_a_thread(self, n: int, q: str = "x") -> str:
        return q * n


VIEWS = Views()

FUNCTIONS = [
    plain,
    with_defaults,
    with_a_body,
    positional_only,
    takes_all,
    names_for_types_alone,
    in_a_thread,
    in_a_thread_with_awkward_names,
    in_a_thread_for_types_alone,
    *((items, items_in_threads) if find_spec("fastapi.sse") else ()),
    Views.method,
    Views.method_in_a_thread,
    VIEWS.method,
    VIEWS.method_in_a_thread,
]

every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)


def outcome(ask: Any, function: Any) -> Any:
    try:
        return ask(function)
    except NameError as error:
        return str(error)


QUESTIONS = {
    "hints": typing.get_type_hints,
    "hints with their metadata": functools.partial(typing.get_type_hints, include_extras=True),
    "signature": inspect.signature,
    "evaluated signature": functools.partial(inspect.signature, eval_str=True),
    "annotations": lambda function: function.__annotations__,
    "evaluated annotations": functools.partial(inspect.get_annotations, eval_str=True),
    "defaults": lambda function: (function.__defaults__, function.__kwdefaults__),
    "names": lambda function: (function.__name__, function.__qualname__, function.__module__, function.__doc__),
    "parameters of its type": lambda function: getattr(function, "__type_params__", ()),
    "globals": lambda function: function.__globals__ is globals(),
    "source": inspect.getsource,
}


@every_function
@pytest.mark.parametrize("question", QUESTIONS)
def test_what_is_asked_of_it_is_answered_as_by_the_function(function: Any, question: str) -> None:
    ask = QUESTIONS[question]
    decorated = with_cancelation(function)
    assert outcome(ask, decorated) == outcome(ask, function)
    if question not in ("globals", "defaults"):
        # And of what a decorator above makes of it, which has these of its own.
        wrapper: Any = functools.wraps(decorated)(lambda *args, **kwargs: decorated(*args, **kwargs))
        assert outcome(ask, wrapper) == outcome(ask, function)


@every_function
def test_its_kind_is_told_truly(function: Any) -> None:
    decorated = with_cancelation(function)
    innermost = inspect.unwrap(decorated)
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        assert inspect.isasyncgenfunction(innermost)
        assert not inspect.iscoroutinefunction(decorated)
    else:
        assert inspect.iscoroutinefunction(innermost)
        assert inspect.iscoroutinefunction(decorated)
    assert not inspect.isgeneratorfunction(innermost)


@every_function
def test_it_looks_for_nothing_in_its_module(function: Any) -> None:
    # Which is that of the endpoint, where all names may mean anything.
    code = with_cancelation(function).__code__
    assert [step.argval for step in get_instructions(code) if step.opname == "LOAD_GLOBAL"] == []


def described(endpoint: Any) -> Any:
    app = FastAPI()
    try:
        app.post("/{n}", name="endpoint")(endpoint)
        return app.openapi()
    except Exception as error:
        return type(error)


@every_function
def test_its_entry_in_the_schema_is_that_of_the_function(function: Any) -> None:
    assert described(with_cancelation(function)) == described(function)
    assert described(with_cancelation(with_cancelation(function))) == described(function)


def test_one_whose_annotations_name_what_is_local() -> None:
    class Local(BaseModel):
        n: int

    async def endpoint(n: int, local: Local) -> Local:
        return local

    def in_a_thread(n: int, local: Local) -> Local:
        return local

    for function in (endpoint, in_a_thread):
        assert described(with_cancelation(function)) == described(function)
        for ask in (typing.get_type_hints, inspect.signature):
            assert outcome(ask, with_cancelation(function)) == outcome(ask, function)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="its syntax is not known")
@pytest.mark.parametrize("kind", ["async def", "def"])
def test_one_with_parameters_of_its_type(kind: str) -> None:
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(f"{kind} endpoint[T: int](n: int, value: T | None = None) -> T | None: ...", namespace)  # noqa: S102
    function, decorated = namespace["endpoint"], with_cancelation(namespace["endpoint"])
    assert decorated.__type_params__ == function.__type_params__
    # The first Pythons 3.12 do not know the parameters in them.
    assert outcome(typing.get_type_hints, decorated) == outcome(typing.get_type_hints, function)
    assert described(decorated) == described(function)


@with_cancelation
async def decorated_here(n: int) -> int:
    return n


@with_cancelation(timeout=5)
def decorated_here_in_a_thread(n: int) -> int:
    return n


def test_it_is_pickled_and_copied_by_its_name() -> None:
    for function in (decorated_here, decorated_here_in_a_thread):
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.copy(function) is copy.deepcopy(function) is function


async def test_the_function_itself_stays_as_it_was_and_can_be_decorated_again() -> None:
    before = dict(vars(in_a_thread)), in_a_thread.__defaults__, in_a_thread.__annotations__.copy()
    first, second = with_cancelation(in_a_thread), with_cancelation(timeout=3)(in_a_thread)
    assert (dict(vars(in_a_thread)), in_a_thread.__defaults__, in_a_thread.__annotations__) == before
    assert in_a_thread(3) == await first(3) == await second(3) == {"n": 3, "q": "x", "flag": False}
    assert first is not second


async def test_a_plain_def_below_runs_without_the_decorator_by_its_wrapped() -> None:
    decorated: Any = with_cancelation(in_a_thread_with_awkward_names)
    expected = (1, 2, 5, (6,), 7, {"x": 8})
    assert await decorated(1, 2, 5, 6, run__=7, x=8) == expected
    assert await decorated.__wrapped__(1, 2, 5, 6, run__=7, x=8) == expected
    assert await decorated.__wrapped__(1, 2) == (1, 2, 3, (), 4, {})


@pytest.mark.skipif(find_spec("fastapi.sse") is None, reason="no endpoints that are generators")
async def test_a_generator_runs_without_the_decorator_by_its_wrapped() -> None:
    generator: Any = with_cancelation(items_in_threads)
    assert [item async for item in generator.__wrapped__(2, q="y")] == ["y", "y"]


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_method_of_the_class_stays_one(kind: Any, is_async: bool) -> None:
    async def endpoint(*own: Any, n: int) -> str:
        return f"{len(own)} {n}"

    def in_a_thread(*own: Any, n: int) -> str:
        return f"{len(own)} {n}"

    function: Any = endpoint if is_async else in_a_thread
    decorated = with_cancelation(kind(function))
    assert type(decorated) is kind
    owner: Any = type("Owner", (), {"method": decorated})
    expected = f"{int(kind is classmethod)} 3"
    assert await owner.method(n=3) == await owner().method(n=3) == expected


async def test_a_partial_and_a_callable_object_get_what_they_lack() -> None:
    class Endpoint:
        async def __call__(self, n: int, q: str = "x") -> str:
            return q * n

    endpoints: list[tuple[Any, list[str]]] = [
        (functools.partial(with_defaults, q="y"), ["n", "q", "flag"]),
        (functools.partial(in_a_thread, q="y"), ["n", "q", "flag"]),
        (Endpoint(), ["n", "q"]),
    ]
    for endpoint, parameters in endpoints:
        decorated: Any = with_cancelation(endpoint)
        assert inspect.signature(decorated) == inspect.signature(endpoint)
        assert list(typing.get_type_hints(decorated)) == [*parameters, "return"]
        assert inspect.iscoroutinefunction(inspect.unwrap(decorated))
        app = FastAPI()
        app.get("/{n}")(decorated)
        assert (await get(app, "/2")).status == 200
        assert await decorated(2) == await decorated.__wrapped__(2)
