"""Generator endpoints that are plain `def`, and covered: their items are made in worker threads."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from functools import partial
from typing import Any, assert_type

import anyio
import anyio.from_thread
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from cancelable_deps import (
    CancelableRoute,
    CancelationError,
    CancelationReason,
    RequestCancelationMiddleware,
    TimeoutCancelation,
    current_cancelable,
    with_cancelation,
)
from cancelable_deps.testing import CancelableClient, assert_cancelled

from .calls import CEILING
from .leftovers import nothing_left

pytestmark = pytest.mark.anyio
sse: Any = pytest.importorskip("fastapi.sse", reason="generator endpoints came with FastAPI 0.135")

KINDS: dict[str, dict[str, Any]] = {
    "sse": {"response_class": sse.EventSourceResponse},
    "jsonl": {},
    "raw": {"response_class": StreamingResponse},
}
BODIES = {"sse": b'data: "one"\n\ndata: "two"\n\n', "jsonl": b'"one"\n"two"\n', "raw": b"onetwo"}


class Item(BaseModel):
    name: str


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_its_items_are_made_in_threads(kind: str, outer: bool) -> None:
    app = FastAPI()
    threads: set[int] = set()

    @app.get("/", **KINDS[kind])
    @with_cancelation
    def items() -> Iterator[str]:
        for item in ("one", "two"):
            threads.add(threading.get_ident())
            yield item

    if outer:
        app.add_middleware(RequestCancelationMiddleware)
    async with nothing_left(), CancelableClient(app) as client:
        response = await client.get("/")
    assert (response.content, response.status_code) == (BODIES[kind], 200)
    assert threads
    assert threading.get_ident() not in threads


async def test_fastapi_documents_and_checks_its_items_as_without() -> None:
    def items(limit: int = 2) -> Iterator[Item]:
        for number in range(limit):
            yield Item(name=str(number))

    def app_of(endpoint: Callable[..., Any]) -> FastAPI:
        app = FastAPI()
        app.get("/")(endpoint)
        return app

    plain, covered = app_of(items), app_of(with_cancelation(timeout=30)(items))
    assert covered.openapi() == plain.openapi()
    async with CancelableClient(covered) as client:
        assert (await client.get("/", params={"limit": 1})).content == b'{"name":"0"}\n'
        assert (await client.get("/", params={"limit": "x"})).status_code == 422


@pytest.mark.parametrize("door", ["decorator", "decorator under middleware", "route"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_hang_up_stops_it_between_two_items_and_closes_it_in_a_thread(kind: str, door: str) -> None:
    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute) if door == "route" else APIRouter()
    events: list[str] = []
    loops_thread = threading.get_ident()

    def items() -> Iterator[str]:
        try:
            while True:
                yield "one"
        except GeneratorExit:
            events.append("closed in the loop" if threading.get_ident() == loops_thread else "closed")
            raise

    router.get("/", **KINDS[kind])(items if door == "route" else with_cancelation(items))
    app.include_router(router)
    if "middleware" in door:
        app.add_middleware(RequestCancelationMiddleware)
    async with nothing_left(), CancelableClient(app) as client:
        async with client.start("GET", "/") as call:
            async for _ in call.chunks():
                break
            await call.hang_up()
        assert_cancelled(call, reason=CancelationReason.DISCONNECT)
    assert events == ["closed"]


@pytest.mark.parametrize("kind", KINDS)
async def test_it_is_stopped_where_it_asks(kind: str) -> None:
    app = FastAPI()
    caught: list[CancelationError] = []

    @app.get("/", **KINDS[kind])
    @with_cancelation(timeout=0.05)
    def items() -> Iterator[str]:
        yield "one"
        cancel = current_cancelable()
        assert cancel is not None
        try:
            while True:
                cancel.check()
                threading.Event().wait(0.001)
        except TimeoutCancelation as exc:
            caught.append(exc)
            raise

    async with nothing_left(), CancelableClient(app, raise_app_exceptions=False) as client:
        async with client.start("GET", "/") as call:
            await call.ended()
        assert call.reason is CancelationReason.TIMEOUT
        assert (b"cancelled" in call.body) == (kind == "sse")
        assert call.is_complete == (kind == "sse")
    assert len(caught) == 1


async def test_one_that_does_not_ask_is_waited_for() -> None:
    app = FastAPI()
    go_on = threading.Event()
    events: list[str] = []

    @app.get("/")
    @with_cancelation
    def items() -> Iterator[str]:
        try:
            yield "one"
            anyio.from_thread.run_sync(inside.set)
            go_on.wait(CEILING)
            events.append("went on")
            yield "two"
            events.append("never")
        finally:
            events.append("closed")

    inside = anyio.Event()
    async with nothing_left(), CancelableClient(app) as client, client.start("GET", "/") as call:
        await inside.wait()
        await call.listened_to()
        await call.hang_up()
        await call.running()
        assert not call.has_ended
        go_on.set()
    assert events == ["went on", "closed"]
    assert b"two" not in call.body


async def test_an_error_of_its_own_arrives_as_itself() -> None:
    app = FastAPI()

    @app.get("/")
    @with_cancelation
    def items() -> Iterator[str]:
        yield "one"
        raise KeyError("mine")

    async with nothing_left(), CancelableClient(app, raise_app_exceptions=False) as client:
        async with client.start("GET", "/") as call:
            await call.ended()
        assert isinstance(call.exception, KeyError)


async def test_without_a_request_it_is_an_async_generator_with_the_timeout_alone() -> None:
    @with_cancelation(timeout=0.05)
    def items(count: int) -> Generator[int]:
        cancel = current_cancelable()
        assert cancel is not None
        yield from range(count)
        while True:
            cancel.check()

    assert_type(items(1), AsyncIterator[int])
    received = []
    async with nothing_left():
        generator = items(2)
        received += [await anext(generator), await anext(generator)]
        with pytest.raises(TimeoutCancelation):
            await anext(generator)
    assert received == [0, 1]


@pytest.mark.parametrize("wrap", [partial, lambda function: function], ids=["partial", "function"])
async def test_one_that_is_never_asked_for_an_item_is_closed(wrap: Callable[[Any], Any]) -> None:
    def items() -> Iterator[int]:
        yield 1

    async with nothing_left():
        unused: Any = with_cancelation(wrap(items))()
        await unused.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(unused)


def test_a_generator_cannot_be_abandoned() -> None:
    def plain() -> Iterator[int]:
        yield 1

    async def asynchronous() -> AsyncIterator[int]:
        yield 1

    for endpoint in (plain, asynchronous):
        with pytest.raises(TypeError, match="abandon_thread is for `def` handlers that return"):
            with_cancelation(abandon_thread=True)(endpoint)
