"""Other decorators on the same handler, above ours and below it: those that people use, each the real one."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.dependencies import models
from fastapi.responses import JSONResponse

from cancelable_deps import current_cancelable, with_cancelation
from tests.calls import get, hang_up

Decorator = Callable[[Any], Any]

# Those that keep results work with asyncio alone.
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.compat,
    pytest.mark.skipif(
        not hasattr(models, "_unwrapped_call"),
        reason="this FastAPI calls some decorated functions in a thread, whatever they are",
    ),
]


def package(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@contextmanager
def fastapi_cache2(app: FastAPI) -> Iterator[Decorator]:
    backend = package("fastapi_cache.backends.inmemory").InMemoryBackend()
    caches = package("fastapi_cache").FastAPICache
    caches.init(backend, prefix="tests")
    try:
        yield package("fastapi_cache.decorator").cache(expire=60)
    finally:
        backend._store.clear()
        caches.reset()


@contextmanager
def cashews(app: FastAPI) -> Iterator[Decorator]:
    cache = package("cashews").Cache()
    cache.setup("mem://", check_interval=0)
    yield cache(ttl="1m", key="v:{n}")


@contextmanager
def aiocache(app: FastAPI) -> Iterator[Decorator]:
    yield package("aiocache").cached(ttl=None)


@contextmanager
def async_lru(app: FastAPI) -> Iterator[Decorator]:
    yield package("async_lru").alru_cache(maxsize=8)


@contextmanager
def slowapi(app: FastAPI) -> Iterator[Decorator]:
    limiter = package("slowapi").Limiter(key_func=package("slowapi.util").get_remote_address)
    app.state.limiter = limiter
    yield limiter.limit("2/minute")


@contextmanager
def dishka(app: FastAPI) -> Iterator[Decorator]:
    container = package("dishka").make_async_container()
    integration = package("dishka.integrations.fastapi")
    integration.setup_dishka(container, app)
    yield integration.inject


@contextmanager
def validate_call(app: FastAPI) -> Iterator[Decorator]:
    import pydantic

    yield pydantic.validate_call


@contextmanager
def beartype(app: FastAPI) -> Iterator[Decorator]:
    yield package("beartype").beartype


@contextmanager
def plain_wraps(app: FastAPI) -> Iterator[Decorator]:
    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    yield decorate


@contextmanager
def async_wraps(app: FastAPI) -> Iterator[Decorator]:
    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await function(*args, **kwargs)

        return wrapper

    yield decorate


@contextmanager
def signature_alone(app: FastAPI) -> Iterator[Decorator]:
    """A wrapper that leaves nothing of what it wraps but a signature."""

    def decorate(function: Any) -> Any:
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await function(*args, **kwargs)

        wrapper.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
        wrapper.__name__ = function.__name__
        return wrapper

    yield decorate


@contextmanager
def callable_object(app: FastAPI) -> Iterator[Decorator]:
    class Wrapper:
        def __init__(self, function: Any) -> None:
            self.function = function
            self.__signature__ = inspect.signature(function, eval_str=True)
            self.__name__ = function.__name__

        async def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return await self.function(*args, **kwargs)

    yield Wrapper


CACHES = [fastapi_cache2, cashews, aiocache, async_lru]
CHECKERS = [validate_call, beartype]
WRAPPERS = [plain_wraps, async_wraps, signature_alone, callable_object]
OTHERS = [*CACHES, dishka, *CHECKERS, *WRAPPERS]

both_orders = pytest.mark.parametrize("order", ["above", "below"])


def stacked(theirs: Decorator, order: str, function: Any, *, ours: Decorator = with_cancelation) -> Any:
    return theirs(ours(function)) if order == "above" else ours(theirs(function))


def as_it_is(function: Any) -> Any:
    return function


@both_orders
@pytest.mark.parametrize("library", OTHERS, ids=lambda library: library.__name__)
@on_asyncio
async def test_answers_and_schema_are_those_without_ours(library: Any, order: str) -> None:
    answers, schemas = [], []
    for ours in (as_it_is, with_cancelation):
        app = FastAPI()
        with library(app) as theirs:

            async def endpoint(n: int, flag: bool = False) -> dict[str, int]:
                """Says it."""
                return {"n": n}

            app.get("/{n}", name="endpoint")(stacked(theirs, order, endpoint, ours=ours))
            calls = [await get(app, path) for path in ("/3", "/3?flag=true", "/x")]
        answers.append([(call.status, call.json()) for call in calls])
        schemas.append(app.openapi())
    assert answers[0] == answers[1]
    assert schemas[0] == schemas[1]


@both_orders
@pytest.mark.parametrize("library", OTHERS, ids=lambda library: library.__name__)
@on_asyncio
async def test_a_client_that_leaves_stops_the_handler(library: Any, order: str) -> None:
    stopped: list[object] = []
    app = FastAPI()

    async def endpoint(n: int) -> dict[str, int]:
        block = current_cancelable()
        assert block is not None
        try:
            await anyio.sleep_forever()
        finally:
            stopped.append(str(block.reason))
        return {}

    with library(app) as theirs:
        app.get("/{n}")(stacked(theirs, order, endpoint))
        call = await hang_up(app, "/3")
    assert (call.status, stopped, call.most_readers) == (499, ["disconnect"], 1)


@both_orders
@pytest.mark.parametrize("library", CACHES, ids=lambda library: library.__name__)
@on_asyncio
async def test_a_cache_is_hit(library: Any, order: str) -> None:
    made: list[int] = []
    app = FastAPI()

    async def endpoint(n: int) -> dict[str, int]:
        made.append(n)
        return {"n": n}

    with library(app) as theirs:
        app.get("/{n}")(stacked(theirs, order, endpoint))
        calls = [await get(app, path) for path in ("/3", "/3", "/4", "/4")]
    assert [call.json() for call in calls] == [{"n": 3}, {"n": 3}, {"n": 4}, {"n": 4}]
    assert made == [3, 4]


@both_orders
async def test_a_limiter_that_needs_the_request_has_it(order: str) -> None:
    app = FastAPI()
    errors = package("slowapi.errors")

    @app.exception_handler(errors.RateLimitExceeded)
    async def limited(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse("too many", 429)

    async def endpoint(request: Request, n: int) -> int:
        return n

    async def waiting(request: Request) -> None:
        await anyio.sleep_forever()

    with slowapi(app) as theirs:
        app.get("/waiting")(stacked(theirs, order, waiting))
        app.get("/{n}")(stacked(theirs, order, endpoint))
        assert [(await get(app, "/3")).status for _ in range(3)] == [200, 200, 429]
        assert (await hang_up(app, "/waiting")).status == 499


@both_orders
@on_asyncio
async def test_a_container_gives_what_the_handler_wants(order: str) -> None:
    di, integration = package("dishka"), package("dishka.integrations.fastapi")
    provider = di.Provider(scope=di.Scope.REQUEST)
    provider.provide(lambda: 41, provides=int)
    app = FastAPI()
    integration.setup_dishka(di.make_async_container(provider), app)

    async def endpoint(n: int, value: Any) -> int:
        return n + int(value)

    endpoint.__annotations__["value"] = integration.FromDishka[int]
    app.get("/{n}")(stacked(integration.inject, order, endpoint))
    assert (await get(app, "/1")).json() == 42


@both_orders
async def test_a_wired_container_gives_what_the_handler_wants(order: str) -> None:
    wiring = package("dependency_injector.wiring")
    container: Any = package("dependency_injector.containers").DeclarativeContainer
    providers = package("dependency_injector.providers")
    app = FastAPI()

    class Box(container):  # type: ignore[misc]
        value = providers.Factory(lambda: 41)

    async def endpoint(value: int = Depends(wiring.Provide[Box.value])) -> int:
        return value + 1

    def plain(value: int = Depends(wiring.Provide[Box.value])) -> int:
        return value + 2

    async def waiting(value: int = Depends(wiring.Provide[Box.value])) -> None:
        await anyio.sleep_forever()

    for path, function in {"/async": endpoint, "/plain": plain, "/waiting": waiting}.items():
        app.get(path)(stacked(wiring.inject, order, function))
    box = Box()
    box.wire(modules=[__name__])
    try:
        assert [(await get(app, path)).json() for path in ("/async", "/plain")] == [42, 43]
        assert (await hang_up(app, "/waiting")).status == 499
    finally:
        box.unwire()


@on_asyncio
async def test_the_endpoints_of_a_class_based_view() -> None:
    cbv = package("fastapi_utils.cbv").cbv
    app, router = FastAPI(), APIRouter()

    class View:
        base: int = Depends(lambda: 7)

        @router.get("/n/{n}")
        @with_cancelation
        async def n(self, n: int) -> int:
            return self.base + n

        @router.get("/forever")
        @with_cancelation(timeout=30)
        async def forever(self) -> None:
            await anyio.sleep_forever()

        @router.get("/plain/{n}")
        @with_cancelation
        def plain(self, n: int) -> int:
            return self.base * n

    cbv(router)(View)
    app.include_router(router)
    assert [(await get(app, path)).json() for path in ("/n/3", "/plain/3")] == [10, 21]
    assert (await hang_up(app, "/forever")).status == 499


@both_orders
@pytest.mark.parametrize("library", CHECKERS, ids=lambda library: library.__name__)
async def test_a_checker_of_types_refuses_what_it_would_refuse(library: Any, order: str) -> None:
    app = FastAPI()

    async def endpoint(n: int) -> int:
        return n

    def plain(n: int) -> int:
        return n

    with library(app) as theirs:
        for function in (endpoint, plain):
            checked = stacked(theirs, order, function)
            assert await checked(3) == 3
            with pytest.raises(Exception, match=r"(?s)int.*'x'|'x'.*int"):
                await checked("x")


@pytest.mark.parametrize("library", [*WRAPPERS, validate_call], ids=lambda library: library.__name__)
@on_asyncio
async def test_a_plain_def_below_another_decorator(library: Any) -> None:
    app = FastAPI()

    def endpoint(n: int, name: str = "a") -> str:
        return f"{name}{n}"

    with library(app) as theirs:
        app.get("/{n}")(theirs(with_cancelation(endpoint)))
        assert (await get(app, "/3")).json() == "a3"
        assert app.openapi() == described(endpoint)


def described(endpoint: Any) -> dict[str, Any]:
    app = FastAPI()
    app.get("/{n}")(endpoint)
    return app.openapi()


@pytest.mark.parametrize("library", [plain_wraps], ids=lambda library: library.__name__)
async def test_a_generator_below_another_decorator(library: Any) -> None:
    pytest.importorskip("fastapi.sse")
    app = FastAPI()

    async def items(n: int) -> AsyncIterator[int]:
        for item in range(n):
            yield item

    def plain(n: int) -> Iterator[int]:
        yield from range(n)

    with library(app) as theirs:
        for path, function in {"async": items, "plain": plain}.items():
            app.get(f"/{path}/{{n}}")(theirs(with_cancelation(function)))
            assert (await get(app, f"/{path}/2")).body == b"0\n1\n"
