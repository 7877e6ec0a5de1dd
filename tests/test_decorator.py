from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio
import pytest
from fastapi import APIRouter, Body, Depends, FastAPI, Header, HTTPException, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cancelable_deps import (
    Cancelable,
    CancelationReason,
    RequestCancelable,
    TimeoutCancelation,
    current_cancelable,
    with_cancelation,
)
from tests.calls import get, hang_up, running

pytestmark = pytest.mark.anyio


class Item(BaseModel):
    name: str
    price: float = 1.0


async def bare(item_id: int) -> int:
    """Doubles it."""
    return item_id * 2


async def with_request(request: Request, item_id: int) -> str:
    return f"{request.method} {item_id}"


async def with_body(item: Item, q: Annotated[list[str], Query()] = [], x_token: str = Header("none")) -> str:  # noqa: B006
    return f"{item.name} {item.price} {q} {x_token}"


async def with_dependency(cancel: RequestCancelable, limit: Annotated[int, Depends(lambda: 3)]) -> int:
    async with cancel:
        return limit


async def with_keywords(item: Annotated[Item, Body(embed=True)], *, flag: bool = False) -> str:
    return f"{item.name} {flag}"


class Views:
    factor = 5

    @with_cancelation
    async def decorated(self, item_id: int) -> int:
        return item_id * self.factor

    async def plain(self, request: Request, item_id: int) -> int:
        return item_id * self.factor

    async def __call__(self, item_id: int) -> int:
        return item_id + self.factor


async def two(factor: int, item_id: int, item: Item) -> str:
    return f"{factor * item_id} {item.name}"


# FastAPI before 0.123 cannot resolve the annotations of a partial, with or without us.
two.__annotations__ = {"factor": int, "item_id": int, "item": Item, "return": str}


def schema_of(endpoint: Any) -> dict[str, Any]:
    app = FastAPI()
    app.post("/{item_id}", name="endpoint")(endpoint)
    return app.openapi()


@pytest.mark.parametrize(
    ("endpoint", "options", "expected"),
    [
        (bare, {}, 8),
        (with_request, {}, "POST 4"),
        (
            with_body,
            {"json": {"name": "a"}, "params": {"q": [1, 2]}, "headers": {"x-token": "t"}},
            "a 1.0 ['1', '2'] t",
        ),
        (with_dependency, {}, 3),
        (with_keywords, {"json": {"item": {"name": "a"}}, "params": {"flag": True}}, "a True"),
        (Views().plain, {}, 20),
        (Views(), {}, 9),
        (functools.partial(two, 2), {"json": {"name": "a"}}, "8 a"),
    ],
)
async def test_endpoint_works_and_its_openapi_entry_stays(endpoint: Any, options: Any, expected: Any) -> None:
    app = FastAPI()
    app.post("/{item_id}")(with_cancelation(endpoint))
    call = await get(app, "/4", "POST", **options)
    assert (call.status, call.json()) == (200, expected)
    assert schema_of(with_cancelation(endpoint)) == schema_of(endpoint)


async def test_decorated_method_of_an_instance() -> None:
    app = FastAPI()
    app.post("/{item_id}")(Views().decorated)
    assert (await get(app, "/4", "POST")).json() == 20


async def test_callable_object_with_a_body() -> None:
    # Not in the list above: FastAPI before 0.123 cannot resolve its annotations, without us.
    class Endpoint:
        async def __call__(self, item: Item) -> str:
            return item.name

    app = FastAPI()
    app.post("/")(with_cancelation(Endpoint()))
    assert (await get(app, method="POST", json={"name": "a"})).json() == "a"


def test_name_docstring_annotations_and_own_parameters_stay() -> None:
    decorated = with_cancelation(bare)
    assert (decorated.__name__, decorated.__doc__, decorated.__module__) == ("bare", "Doubles it.", __name__)
    for endpoint in (bare, with_request, with_body, Views().plain):
        assert inspect.signature(with_cancelation(endpoint)) == inspect.signature(endpoint)
    assert inspect.iscoroutinefunction(decorated)


async def test_missing_and_wrong_parameters_are_still_refused() -> None:
    app = FastAPI()
    app.post("/{item_id}")(with_cancelation(bare))
    call = await get(app, "/x", "POST")
    assert call.status == 422
    assert [error["loc"] for error in call.json()["detail"]] == [["path", "item_id"]]


async def test_client_that_leaves_stops_the_handler() -> None:
    cleaned = anyio.Event()
    app = FastAPI()

    @app.get("/")
    @with_cancelation
    async def endpoint() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.02)
            cleaned.set()

    call = await hang_up(app)
    assert (call.status, call.json()) == (499, {"detail": "Client closed the request"})
    assert cleaned.is_set()
    assert call.most_readers == 1


async def test_timeout_and_status_codes() -> None:
    app = FastAPI()

    @app.get("/default")
    @with_cancelation(timeout=0.02)
    async def default() -> None:
        await anyio.sleep_forever()

    @app.get("/changed")
    @with_cancelation(timeout=0.02, status_codes={CancelationReason.TIMEOUT: 503})
    async def changed() -> None:
        await anyio.sleep_forever()

    assert (await get(app, "/default")).status == 504
    assert (await get(app, "/changed")).status == 503


async def test_cancelable_opened_by_hand_is_translated_as_well() -> None:
    app = FastAPI()

    @app.get("/")
    @with_cancelation(status_codes={CancelationReason.TIMEOUT: 503})
    async def endpoint() -> None:
        async with Cancelable.with_timeout(0.02):
            await anyio.sleep_forever()

    assert (await get(app)).status == 503


async def test_on_cancel_is_told_and_awaited() -> None:
    told: list[Any] = []
    app = FastAPI()

    async def stop_engine(cancel: Cancelable) -> None:
        await anyio.sleep(0.01)
        told.append(cancel.reason)

    @app.get("/async")
    @with_cancelation(on_cancel=stop_engine)
    async def awaited() -> None:
        await anyio.sleep_forever()

    @app.get("/plain")
    @with_cancelation(on_cancel=lambda cancel: told.append(cancel), timeout=0.01)
    async def plain() -> None:
        told.append(current_cancelable())
        await anyio.sleep_forever()

    await hang_up(app, "/async")
    assert told == [CancelationReason.DISCONNECT]
    told.clear()
    await get(app, "/plain")
    assert told[0] is told[1]


async def test_on_cancel_is_not_told_of_a_request_that_ended() -> None:
    told: list[Any] = []
    app = FastAPI()

    @app.get("/")
    @with_cancelation(on_cancel=told.append)
    async def endpoint() -> None:
        await anyio.sleep(0.02)

    await get(app)
    assert told == []


async def test_http_exception_from_a_task_group_arrives_as_itself() -> None:
    app = FastAPI()

    async def conflict() -> None:
        raise HTTPException(409, "taken")

    @app.get("/")
    @with_cancelation
    async def endpoint() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(conflict)
            await anyio.sleep_forever()

    call = await get(app)
    assert (call.status, call.json()) == (409, {"detail": "taken"})


async def test_group_of_several_bugs_stays_a_group() -> None:
    app = FastAPI()

    async def bug(number: int) -> None:
        raise ValueError(number)

    @app.get("/")
    @with_cancelation
    async def endpoint() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bug, 1)
            tasks.start_soon(bug, 2)

    with pytest.raises(ExceptionGroup):
        await get(app)


async def test_called_without_a_request_the_timeout_counts() -> None:
    @with_cancelation(timeout=0.02)
    async def endpoint(wait: bool) -> str:
        if wait:
            await anyio.sleep_forever()
        return "done"

    assert await endpoint(False) == "done"
    with pytest.raises(TimeoutCancelation):
        await endpoint(wait=True)


@pytest.mark.parametrize("annotated", [False, True])
async def test_plain_starlette_endpoint(annotated: bool) -> None:

    async def with_annotation(request: Request) -> Response:
        await anyio.sleep_forever()
        return PlainTextResponse("late")

    async def without(request):  # type: ignore[no-untyped-def]
        return await with_annotation(request)

    app = Starlette(routes=[Route("/", with_cancelation(with_annotation if annotated else without))])
    assert (await hang_up(app)).status == 499


async def test_twice_and_nested_is_one_request() -> None:
    app = FastAPI()

    @app.get("/")
    @with_cancelation(timeout=5)
    @with_cancelation(timeout=10)
    async def endpoint() -> None:
        await anyio.sleep_forever()

    call = await hang_up(app)
    assert (call.status, call.most_readers) == (499, 1)


@pytest.mark.parametrize("seconds", [0, 0.03])
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("with_handle", [False, True])
async def test_streaming_response_of_the_handler_is_whole(seconds: float, spec_version: str, with_handle: bool) -> None:
    app = FastAPI()

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            await anyio.sleep(0.005)
            yield b"x" * 10

    @app.get("/plain")
    @with_cancelation
    async def plain() -> Response:
        await anyio.sleep(seconds)
        return StreamingResponse(chunks())

    @app.get("/handle")
    @with_cancelation
    async def handle(cancel: RequestCancelable) -> Response:
        async with cancel:
            await anyio.sleep(seconds)
        return StreamingResponse(chunks())

    call = await get(app, "/handle" if with_handle else "/plain", spec_version=spec_version)
    assert (call.body, call.is_complete, call.most_readers < 2) == (b"x" * 50, True, True)


@pytest.mark.parametrize("disconnect", ["repeats", "once"])
async def test_streaming_response_stops_when_its_client_leaves(disconnect: str) -> None:
    ended, started = anyio.Event(), anyio.Event()
    app = FastAPI()

    async def chunks() -> AsyncIterator[bytes]:
        try:
            yield b"first"
            started.set()
            await anyio.sleep_forever()
        finally:
            ended.set()

    @app.get("/")
    @with_cancelation
    async def endpoint() -> Response:
        await anyio.sleep(0.03)
        return StreamingResponse(chunks())

    async with running(app, disconnect=disconnect) as call:
        await started.wait()
        await call.hang_up()
    assert (ended.is_set(), call.most_readers) == (True, 1)


async def test_yield_dependencies_are_closed_after_the_handler_was_cancelled() -> None:
    order: list[str] = []
    app = FastAPI()

    async def session() -> AsyncIterator[str]:
        try:
            yield "session"
        except StarletteHTTPException as exc:
            order.append(str(exc.status_code))
            raise
        finally:
            await anyio.sleep(0.01)
            order.append("closed")

    @app.get("/")
    @with_cancelation
    async def endpoint(session: str = Depends(session)) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            order.append("handler")

    call = await hang_up(app)
    assert order == ["handler", "499", "closed"]
    assert call.status == 499


def test_what_cannot_be_covered_is_refused() -> None:
    for endpoint, message in [
        (Views, "takes an endpoint"),
        (APIRouter(), "ASGI application"),
        ("/path", "takes an endpoint"),
        (30, r"not 30.*with_cancelation\(timeout=30\)"),
    ]:
        with pytest.raises(TypeError, match=message):
            with_cancelation(endpoint)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timeout": -1}, ValueError, "timeout must be zero or more"),
        ({"timeout": float("nan")}, ValueError, "timeout"),
        ({"timeout": "5"}, TypeError, "takes seconds"),
        ({"timeout": True}, TypeError, "takes seconds"),
        ({"status_codes": {"timeout": 503}}, TypeError, "CancelationReason"),
        ({"status_codes": {CancelationReason.TIMEOUT: 200}}, ValueError, "400 to 599"),
        ({"status_codes": {CancelationReason.TIMEOUT: "503"}}, TypeError, "number"),
        ({"status_codes": {CancelationReason.TIMEOUT: 408}}, ValueError, "503 or 504"),
        ({"on_cancel": 1}, TypeError, "on_cancel"),
        ({"on_cancel": lambda: None}, TypeError, "takes the Cancelable"),
        ({"cleanup_grace": -1}, ValueError, "cleanup_grace"),
    ],
)
def test_wrong_options_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        with_cancelation(**options)


async def test_nothing_of_ours_is_a_query_parameter() -> None:
    app = FastAPI()
    app.get("/{item_id}")(with_cancelation(bare))
    assert (await get(app, "/3?cancelable_deps_request=1&timeout=0")).json() == 6


async def test_decorated_endpoint_that_is_wrapped_again() -> None:
    app = FastAPI()

    def logged(function: Any) -> Any:
        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await function(*args, **kwargs)

        return wrapper

    @app.get("/{item_id}")
    @logged
    @with_cancelation
    @logged
    async def endpoint(item_id: int) -> int:
        return item_id

    assert (await get(app, "/7")).json() == 7


async def test_cleanup_grace_of_the_route() -> None:
    app = FastAPI()
    ends: list[str] = []

    @app.get("/")
    @with_cancelation(timeout=0.02, cleanup_grace=0.05)
    async def endpoint() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            try:
                await anyio.sleep(0.01)
                ends.append("short")
                await anyio.sleep_forever()
            finally:
                ends.append("long")

    assert (await get(app)).status == 504
    assert ends == ["short", "long"]


@asynccontextmanager
async def resource(log: list[str]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await anyio.sleep(0.01)
        log.append("released")


async def test_first_request_does_not_change_the_second() -> None:
    app = FastAPI()
    log: list[str] = []

    @app.get("/")
    @with_cancelation
    async def endpoint(wait: bool) -> str:
        async with resource(log):
            if wait:
                await anyio.sleep_forever()
        return "ok"

    await hang_up(app, "/?wait=true")
    call = await get(app, "/?wait=false")
    assert (call.json(), log) == ("ok", ["released", "released"])
