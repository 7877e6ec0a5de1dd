"""`CancelableWebSocket`: it stops with the request, after silence, and after a total time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from cancelable_deps import (
    Cancelable,
    CancelableWebSocket,
    CancelationReason,
    CancelationToken,
    DisconnectCancelation,
    RequestCancelable,
    TimeoutCancelation,
    current_cancelable,
)
from cancelable_deps.testing import advance
from tests.calls import checked_socket as checked
from tests.calls import closed, connected, movable_clock, say

pytestmark = pytest.mark.anyio

Work = Callable[[CancelableWebSocket], Awaitable[None]]


def application(work: Work, **options: Any) -> FastAPI:
    app = FastAPI()

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, cancel: RequestCancelable) -> None:
        async with CancelableWebSocket(websocket, cancel, **options) as socket:
            await work(socket)

    return app


async def test_everything_goes_through() -> None:
    got: list[Any] = []

    async def work(socket: CancelableWebSocket) -> None:
        await socket.accept("chat", [(b"x-a", b"b")])
        got.append(await socket.receive_text())
        got.append(await socket.receive_bytes())
        got.append(await socket.receive_json())
        got.append((await socket.receive())["text"])
        await socket.send_text("text")
        await socket.send_bytes(b"bytes")
        await socket.send_json({"a": 1})
        await socket.send({"type": "websocket.send", "text": "raw"})
        await socket.close(4000, "bye")
        got.append(socket.websocket.url.path)

    async with checked(application(work, idle_timeout=5, timeout=5)) as client:
        await say(client, "text", b"bytes", '{"a": 1}', "raw")
    assert got == ["text", b"bytes", {"a": 1}, "raw", "/"]
    accept, *sent, close = client.sent
    assert (accept["subprotocol"], accept["headers"]) == ("chat", [(b"x-a", b"b")])
    assert [message.get("text") or message.get("bytes") for message in sent] == ["text", b"bytes", '{"a":1}', "raw"]
    assert (close["code"], close["reason"]) == (4000, "bye")


@pytest.mark.parametrize("how", ["iter_text", "iter_bytes", "iter_json"])
async def test_iterating_ends_with_the_client(how: str) -> None:
    got: list[Any] = []

    async def work(socket: CancelableWebSocket) -> None:
        await socket.accept()
        async for item in getattr(socket, how)():
            got.append(item)
            if len(got) == 2:
                client.drop_nowait()
        await anyio.sleep(0.001)
        got.append("end")

    async with checked(application(work, idle_timeout=5)) as client:
        await say(client, *([b"1", b"2"] if how == "iter_bytes" else ["1", "2"]))
    expected: dict[str, list[Any]] = {"iter_text": ["1", "2"], "iter_bytes": [b"1", b"2"], "iter_json": [1, 2]}
    assert got == [*expected[how], "end"]


async def test_silence_closes() -> None:
    got: list[str] = []

    async def work(socket: CancelableWebSocket) -> None:
        await socket.accept()
        try:
            async for text in socket.iter_text():
                got.append(text)  # noqa: PERF401 - the texts before the silence
        except TimeoutCancelation as exc:
            await anyio.sleep(0.001)
            got.append(str(exc.detail))
            raise

    async with checked(application(work, idle_timeout=0.05)) as client:
        await say(client, "one", "two")
    assert got == ["one", "two", "No message for 0.05 seconds"]
    assert closed(client) == (4504, "No message for 0.05 seconds")


@movable_clock
async def test_the_handlers_own_time_is_no_silence() -> None:
    async def work(socket: CancelableWebSocket) -> None:
        await socket.accept()
        for _ in range(3):
            text = await socket.receive_text()
            await advance(15)
            await socket.send_text(text)
        await socket.close()

    async with checked(application(work, idle_timeout=10)) as client:
        await say(client, "one", "two", "three")
    assert [await client.receive_text() for _ in range(3)] == ["one", "two", "three"]
    assert closed(client) == (1000, "")


async def test_silence_in_another_task_stops_the_block() -> None:
    stopped: list[CancelationReason | None] = []

    async def work(socket: CancelableWebSocket) -> None:
        await socket.accept()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(socket.receive_text)
                await anyio.sleep_forever()
        finally:
            stopped.append(socket.cancelable.reason)

    async with checked(application(work, idle_timeout=0.05)) as client:
        pass
    assert stopped == [CancelationReason.TIMEOUT]
    assert closed(client) == (4504, "No message for 0.05 seconds")


async def test_total_timeout() -> None:
    async def work(socket: CancelableWebSocket) -> None:
        await socket.accept()
        assert 0 < socket.cancelable.remaining() <= 0.1
        while True:
            await socket.send_text(await socket.receive_text())

    async with checked(application(work, timeout=0.1, idle_timeout=5)) as client:
        await client.send_text("one")
        assert await client.receive_text() == "one"
    assert closed(client) == (4504, "Timed out after 0.1 seconds")


@pytest.mark.parametrize("refusal_response", [True, False])
async def test_timeout_before_accept(refusal_response: bool) -> None:
    async def work(socket: CancelableWebSocket) -> None:
        raise AssertionError

    async with checked(application(work, timeout=0), refusal_response=refusal_response) as client:
        pass
    if refusal_response:
        assert client.refusal is not None
        assert client.refusal.status_code == 504
    else:
        assert closed(client) == (4504, "Timed out after 0 seconds")


@pytest.mark.parametrize("doing", ["busy", "sending"])
async def test_drop_stops_it(doing: str) -> None:
    seen: list[Any] = []

    async def work(socket: CancelableWebSocket) -> None:
        await socket.accept()
        client.drop_nowait()
        try:
            while doing == "sending":
                await socket.send_text("more")
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.001)
            seen.append("cleaned")

    async with checked(application(work)) as client:
        pass
    assert (seen, client.close_code) == (["cleaned"], None)


async def test_it_can_be_cancelled_by_what_it_was_given() -> None:
    app = FastAPI()
    stop = CancelationToken()

    @app.websocket("/{entered}")
    async def endpoint(websocket: WebSocket, entered: bool, cancel: RequestCancelable) -> None:
        async def work() -> None:
            async with CancelableWebSocket(websocket, cancel) as socket:
                await socket.accept()
                cancel.cancel_nowait(CancelationReason.SIGNAL, "later")
                await anyio.sleep_forever()

        if entered:
            async with cancel:
                await work()
        else:
            await work()

    @app.websocket("/token")
    async def token(websocket: WebSocket) -> None:
        async with CancelableWebSocket(websocket, Cancelable(token=stop)) as socket:
            await socket.accept()
            stop.cancel_nowait(CancelationReason.SIGNAL, "later")
            await anyio.sleep_forever()

    app.router.routes.reverse()
    for path in ("/true", "/false", "/token"):
        async with checked(app, path) as client:
            pass
        assert closed(client) == (1012, "later"), path


async def test_without_a_handle_and_without_fastapi() -> None:
    async def endpoint(websocket: WebSocket) -> None:
        async with CancelableWebSocket(websocket, idle_timeout=0.05) as socket:
            await socket.accept()
            assert current_cancelable() is socket.cancelable
            await socket.receive_text()
            await socket.receive_text()

    async with checked(Starlette(routes=[WebSocketRoute("/", endpoint)])) as client:
        await client.send_text("one")
    assert closed(client) == (4504, "No message for 0.05 seconds")


async def test_a_caught_error_has_closed() -> None:
    """Else nobody would: it is the handler's word that it is done."""
    caught: list[Any] = []
    app = FastAPI()

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, cancel: RequestCancelable) -> None:
        try:
            async with CancelableWebSocket(websocket, cancel, idle_timeout=0) as socket:
                await socket.accept()
                await socket.receive_text()
        except TimeoutCancelation as exc:
            caught.append(exc.reason)

    async with checked(app) as client:
        pass
    assert caught == [CancelationReason.TIMEOUT]
    assert closed(client) == (4504, "No message for 0 seconds")


async def test_uncaught_disconnect_is_both() -> None:
    caught: list[Any] = []
    app = FastAPI()

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, cancel: RequestCancelable) -> None:
        try:
            async with CancelableWebSocket(websocket, cancel) as socket:
                await socket.accept()
                await socket.receive_text()
        except WebSocketDisconnect as exc:
            caught.append(isinstance(exc, DisconnectCancelation))

    async with connected(app) as client:
        await client.accepted()
        await client.listened_to()
    assert caught == [True]


async def never(*args: Any) -> Any:
    await anyio.sleep_forever()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"timeout": -1}, ValueError),
        ({"idle_timeout": float("nan")}, ValueError),
        ({"idle_timeout": "5"}, TypeError),
        ({"cancel": CancelationToken()}, TypeError),
    ],
)
async def test_wrong_use(options: dict[str, Any], error: type[Exception]) -> None:
    websocket = WebSocket({"type": "websocket"}, never, never)
    with pytest.raises(error):
        CancelableWebSocket(websocket, **options)
    with pytest.raises(TypeError, match="WebSocket of the route"):
        CancelableWebSocket(FastAPI())  # type: ignore[arg-type]
    socket = CancelableWebSocket(websocket)
    with pytest.raises(RuntimeError, match="inside its `async with` block"):
        await socket.accept()
    async with socket:
        pass
    with pytest.raises(RuntimeError, match="can be entered once"):
        async with socket:
            pass


async def test_an_idle_timeout_outside_of_its_block_is_told() -> None:
    app = FastAPI()

    @app.websocket("/")
    async def endpoint(websocket: WebSocket) -> None:
        async with CancelableWebSocket(websocket, idle_timeout=0) as socket:
            await socket.accept()
        with pytest.raises(RuntimeError, match=r"has been left.* inside its `async with` block"):
            await socket.receive_text()

    async with connected(app) as call:
        await call.ended()
