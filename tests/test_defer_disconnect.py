"""Past the point of cancelling: a disconnect is recorded and acted on later."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from cancelable_deps import (
    Cancelable,
    RequestCancelable,
    RequestCancelationMiddleware,
    cancelable_streaming_response,
    current_cancelable,
    wait_for_disconnect,
    with_cancelation,
)
from tests.calls import get, hang_up, running
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio

DOORS = ("decorator", "middleware", "handle")


def app_for(door: str, work: Any, timeout: float | None = None) -> FastAPI:
    """``work(cancel, request)`` under a door."""
    app = FastAPI()
    if door == "handle":

        @app.get("/")
        async def handle(request: Request, cancel: RequestCancelable) -> None:
            async with cancel:
                await work(cancel, request)

        return app

    async def plain(request: Request) -> None:
        await work(current_cancelable(), request)

    app.get("/")(with_cancelation(timeout=timeout)(plain) if door == "decorator" else plain)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)
    return app


class Work:
    def __init__(self) -> None:
        self.started = anyio.Event()
        self.events: list[Any] = []

    async def __call__(self, cancel: Cancelable, request: Request) -> None:
        await request.body()
        with cancel.defer_disconnect():
            async with cancel.defer_disconnect():
                self.started.set()
                while not cancel.client_has_left:  # noqa: ASYNC110
                    await anyio.sleep(0.001)
            await anyio.sleep(0.01)
            self.events.append((cancel.is_cancelled, await request.is_disconnected()))
        self.events.append(cancel.is_cancelled)
        await anyio.sleep_forever()


@pytest.mark.parametrize("disconnect", ["repeats", "once"])
@pytest.mark.parametrize("door", DOORS)
async def test_a_disconnect_acts_at_the_end_of_the_guard(door: str, disconnect: str) -> None:
    work = Work()
    async with nothing_left(), running(app_for(door, work), disconnect=disconnect) as call:
        await work.started.wait()
        await call.hang_up()
    assert work.events == [(False, False), True]
    assert call.status == 499


@pytest.mark.parametrize("door", ["decorator", "middleware"])
async def test_a_timeout_acts_inside_the_guard(door: str) -> None:
    async def work(cancel: Cancelable, request: Request) -> None:
        with cancel.defer_disconnect():
            await anyio.sleep_forever()

    async with nothing_left():
        assert (await get(app_for(door, work, timeout=0.05))).status == 504


async def test_a_block_inside_defers_for_its_request_and_one_without_a_request_does_nothing() -> None:
    done: list[bool] = []

    async def work(cancel: Cancelable, request: Request) -> None:
        async with Cancelable() as inner:
            with inner.defer_disconnect():
                while not inner.client_has_left:  # noqa: ASYNC110
                    await anyio.sleep(0.001)
                done.append(cancel.is_cancelled)

    app = app_for("decorator", work)
    await hang_up(app)
    assert done == [False]
    async with Cancelable() as lone:
        with lone.defer_disconnect():
            assert not lone.client_has_left


def upstream(cancel: Cancelable | None, started: anyio.Event, events: list[str]) -> AsyncIterator[str]:
    async def tokens() -> AsyncIterator[str]:
        block = cancel or current_cancelable()
        assert block is not None
        yield "token"
        with block.defer_disconnect():
            started.set()
            while not block.client_has_left:  # noqa: ASYNC110
                await anyio.sleep(0.001)
            yield "finish"
            events.append("usage")
        try:
            await anyio.sleep_forever()
        finally:
            events.append("stopped")

    return tokens()


@pytest.mark.parametrize(("send_raises", "spec_version"), [(False, "2.3"), (True, "2.4")])
@pytest.mark.parametrize("door", ["response", "decorator", "decorator under middleware"])
async def test_a_stream_is_finished_inside_the_guard(door: str, send_raises: bool, spec_version: str) -> None:
    app = FastAPI()
    started = anyio.Event()
    events: list[str] = []
    if door == "response":

        @app.get("/")
        async def respond(cancel: RequestCancelable) -> StreamingResponse:
            return cancelable_streaming_response(upstream(cancel, started, events), cancel)

    else:
        pytest.importorskip("fastapi.sse", reason="generator endpoints came with FastAPI 0.135")

        @app.get("/", response_class=StreamingResponse)
        @with_cancelation
        async def generate() -> AsyncIterator[str]:
            async for token in upstream(None, started, events):
                yield token

        if "middleware" in door:
            app.add_middleware(RequestCancelationMiddleware)
    # From a `send()` that raises Starlette makes an error of its own.
    options: dict[str, Any] = {
        "spec_version": spec_version,
        "send_raises": send_raises,
        "raise_app_exceptions": not send_raises,
    }
    async with nothing_left(), running(app, **options) as call:
        await started.wait()
        await call.listened_to()
        await call.hang_up()
    assert events[:1] == ["usage"]


async def test_starlettes_own_listener_is_told_at_the_end_of_the_guard() -> None:
    app = FastAPI()
    started = anyio.Event()
    events: list[str] = []

    @app.get("/")
    async def plain() -> StreamingResponse:
        return StreamingResponse(upstream(current_cancelable(), started, events))

    app.add_middleware(RequestCancelationMiddleware)
    async with nothing_left(), running(app) as call:
        await started.wait()
        await call.listened_to()
        await call.hang_up()
    assert events == ["usage", "stopped"]


async def test_a_guard_that_is_left_in_a_thread_wakes_who_listens() -> None:
    app = FastAPI()
    started = anyio.Event()
    messages: list[Any] = []

    def work(cancel: Cancelable) -> None:
        with cancel.defer_disconnect():
            anyio.from_thread.run_sync(started.set)
            while not cancel.client_has_left:
                anyio.from_thread.run(anyio.sleep, 0.001)

    @app.get("/")
    async def both(request: Request, cancel: RequestCancelable) -> None:
        await request.body()

        async def listen() -> None:
            await wait_for_disconnect(request)
            messages.append(await request.receive())

        async with anyio.create_task_group() as tg:
            tg.start_soon(listen)
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(work, cancel)

    async with nothing_left(), running(app) as call:
        await started.wait()
        await call.listened_to()
        await call.hang_up()
    assert (messages, call.status) == ([{"type": "http.disconnect"}], 200)
