from __future__ import annotations

import hashlib
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from cancelable_deps import (
    CancelableRoute,
    RequestCancelationMiddleware,
)
from cancelable_deps.request.http_reader import READ_AHEAD_BYTES
from tests.asgi import Call, get, running
from tests.calls import CEILING
from tests.doors import endpoint

pytestmark = pytest.mark.anyio

DOORS = ["decorator", "cancelable", "task_group", "event", "middleware", "route"]


def application(door: str, work: Any) -> FastAPI:
    """An app whose one endpoint is ``work(request)`` under the named door."""
    app = FastAPI()
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    router = app.router
    if door == "route":
        router.route_class = CancelableRoute
    router.post("/")(endpoint(door, work, Request))
    return app


@pytest.mark.parametrize("door", DOORS)
async def test_body_that_was_read_ahead_is_replayed_unchanged(door: str) -> None:
    pieces = [bytes([index]) * 1000 for index in range(100)]

    async def work(request: Request) -> str:
        await call.listened_to()
        return hashlib.sha256(await request.body()).hexdigest()

    call = Call(application(door, work), method="POST", body=pieces)
    with anyio.fail_after(CEILING):
        await call.run()
    assert call.json == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert call.most_readers == 1


@pytest.mark.parametrize("door", DOORS)
async def test_pieces_keep_their_order_and_borders(door: str) -> None:
    async def work(request: Request) -> list[int]:
        lengths = []
        async for chunk in request.stream():
            await call.listened_to()
            lengths.append(len(chunk))
        return lengths

    call = Call(application(door, work), method="POST", body=[b"a" * 10, b"b" * 20, b"c" * 30])
    with anyio.fail_after(CEILING):
        await call.run()
    assert call.json == [10, 20, 30, 0]
    assert call.most_readers == 1


@pytest.mark.parametrize("door", DOORS)
async def test_read_ahead_is_bounded(door: str) -> None:
    released = anyio.Event()

    async def work(request: Request) -> int:
        await released.wait()
        return len(await request.body())

    piece = b"x" * 16 * 1024
    async with running(application(door, work), method="POST", body=[piece] * 64) as call:
        await call.listened_to()
        assert call.received == READ_AHEAD_BYTES // len(piece)
        assert call.readers == 0
        released.set()
    assert call.json == 64 * len(piece)


async def test_a_flood_of_tiny_pieces_is_bounded() -> None:
    released = anyio.Event()

    async def work(request: Request) -> int:
        await released.wait()
        return len(await request.body())

    async with running(application("decorator", work), method="POST", body=[b"x"] * 5000) as call:
        await call.listened_to()
        assert call.received < 300
        released.set()
    assert call.json == 5000


@pytest.mark.parametrize("door", ["decorator", "cancelable", "task_group", "middleware", "route"])
@pytest.mark.parametrize("once", [False, True])
async def test_client_that_leaves_in_the_middle_of_its_upload_gets_499(door: str, once: bool) -> None:
    reading = anyio.Event()

    async def work(request: Request) -> None:
        async for _ in request.stream():
            reading.set()

    async with running(application(door, work), method="POST", body=[b"x"], once=once) as call:
        call._incoming[0]["more_body"] = True
        await reading.wait()
        await anyio.wait_all_tasks_blocked()
        call.hang_up()
    assert call.error is None
    assert call.status == 499


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("once", [False, True])
async def test_is_disconnected_still_tells(door: str, once: bool) -> None:
    seen = anyio.Event()

    async def work(request: Request) -> bool:
        told_again = False
        with anyio.CancelScope(shield=True):
            seen.set()
            while not await request.is_disconnected():  # noqa: ASYNC110 - how people ask it
                await anyio.sleep(0.001)
            told_again = await request.is_disconnected()
        return told_again

    async with running(application(door, work), method="POST", body=b"{}", once=once) as call:
        await seen.wait()
        await anyio.lowlevel.checkpoint()
        call.hang_up()
    assert call.error is None
    assert call.status in {200, 499}


@pytest.mark.parametrize("door", ["decorator", "cancelable", "middleware", "route"])
@pytest.mark.parametrize("asks", [False, True])
async def test_100_continue_is_left_to_the_application(door: str, asks: bool) -> None:
    released = anyio.Event()

    async def work(request: Request) -> Any:
        await released.wait()
        return (await request.body()).decode() if asks else PlainTextResponse("too large", 413)

    expect = {"expect": "100-continue"}
    async with running(application(door, work), method="POST", body=b"body", headers=expect) as call:
        await anyio.sleep(0.03)
        await anyio.wait_all_tasks_blocked()
        assert call.received == call.readers == 0
        released.set()
    assert (call.status, call.received > 0) == ((200, True) if asks else (413, False))


@pytest.mark.parametrize("door", ["decorator", "middleware", "route"])
async def test_what_receive_raises_reaches_whoever_reads(door: str) -> None:
    async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
        async def limited() -> Message:
            message = await receive()
            if message["body"] == b"second":
                raise ValueError("too long")
            return message

        await inner(scope, limited, send)

    async def work(request: Request) -> str:
        await call.listened_to()
        chunks = []
        try:
            async for chunk in request.stream():
                chunks.append(chunk.decode())  # noqa: PERF401 - what was read before the error counts
        except ValueError as exc:
            chunks.append(str(exc))
        return ",".join(chunks)

    inner = application(door, work)
    call = Call(refusing, method="POST", body=[b"first", b"second"])
    with anyio.fail_after(CEILING):
        await call.run()
    assert call.json == "first,too long"


async def test_receive_that_repeats_itself_does_not_hang_the_loop() -> None:
    """As in hand-made test clients: ``async def receive(): return {"type": "http.request"}``."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    async def work(request: Request) -> str:
        await anyio.sleep(0.03)
        return "done"

    call = Call(application("decorator", work), method="POST")
    with anyio.fail_after(CEILING):
        await call.app(call.scope, receive, send)
    assert sent[0]["status"] == 200


async def test_reading_in_two_tasks_loses_nothing() -> None:
    async def work(request: Request) -> list[int]:
        sizes: list[int] = []

        async def read() -> None:
            sizes.append(len((await request.receive()).get("body", b"")))

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(read)
        return sorted(sizes)

    call = Call(application("decorator", work), method="POST", body=[b"a", b"bb", b"ccc"])
    with anyio.fail_after(CEILING):
        await call.run()
    assert call.json == [1, 2, 3]
    assert call.most_readers == 1


@pytest.mark.parametrize("door", DOORS)
async def test_fast_request_is_not_listened_to(door: str) -> None:
    async def work(request: Request) -> str:
        return "done"

    call = await get(application(door, work), method="POST")
    assert call.status == 200
    assert call.most_readers == 0


@pytest.mark.parametrize("first", ["handler", "response"])
async def test_what_sends_the_response_may_have_the_receive_of_the_handler(first: str) -> None:
    class Echo(Response):
        def __init__(self, receive: Receive, read: list[Message]) -> None:
            super().__init__()
            self.receive, self.read = receive, read

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            while not self.read or self.read[-1].get("more_body"):
                self.read.append(await self.receive())
            await PlainTextResponse(b"".join(message["body"] for message in self.read))(scope, receive, send)

    async def work(request: Request) -> Response:
        receive = request.receive
        return Echo(receive, [await receive()] if first == "handler" else [])

    call = await get(application("decorator", work), method="POST", body=[b"ab", b"cd"])
    assert (call.error, call.body) == (None, b"abcd")
