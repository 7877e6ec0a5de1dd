"""What is told of a server by the object behind its ``receive()``. The real ones are in `test_servers_*.py`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import anyio
import pytest
import trio
from starlette.types import Message, Receive, Scope

from cancelable_deps import CancelableStreamingResponse, CancelationError, RequestCancelationMiddleware
from cancelable_deps.hosts import servers
from cancelable_deps.hosts.servers import can_refuse_socket_with, server_of

pytestmark = pytest.mark.anyio

HTTP1: Scope = {"type": "http", "http_version": "1.1"}
HTTP2: Scope = {"type": "http", "http_version": "2"}
DISCONNECT = {"type": "http.disconnect"}


class Transport:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def close(self) -> None:
        self.calls.append("close")

    def abort(self) -> None:
        self.calls.append("abort")


class Cycle:
    """What uvicorn has of one request: over HTTP/1, and of a kind that it may have one day."""

    def __init__(self) -> None:
        self.transport = Transport()
        self.disconnected = False

    async def receive(self) -> Message:
        await anyio.sleep_forever()
        return DISCONNECT


class StreamCycle(Cycle):
    """What it has over HTTP/2."""

    resets = 0

    def abort_stream(self) -> None:
        self.resets += 1


async def test_a_connection_of_its_own_is_closed() -> None:
    cycle = Cycle()
    cycle.transport.close = lambda: setattr(cycle, "disconnected", True)  # type: ignore[method-assign]
    assert await server_of(cycle.receive, HTTP1).abort(drop=False)
    assert cycle.transport.calls == []


async def test_a_connection_is_aborted_if_it_does_not_close() -> None:
    cycle = Cycle()
    assert await server_of(cycle.receive, HTTP1).abort(drop=True)
    assert cycle.transport.calls == ["abort"]
    assert cycle.disconnected


async def test_a_stream_is_reset_alone() -> None:
    cycle = StreamCycle()
    assert await server_of(cycle.receive, HTTP2).abort(drop=False)
    assert (cycle.resets, cycle.transport.calls, cycle.disconnected) == (1, [], True)


async def test_a_stream_that_its_client_has_reset_is_not_reset_again() -> None:
    cycle = StreamCycle()
    cycle.disconnected = True
    assert await server_of(cycle.receive, HTTP2).abort(drop=False)
    assert cycle.resets == 0


@pytest.mark.parametrize("module", ["uvicorn.protocols.http.zttp_h3_impl", "elsewhere"])
async def test_a_connection_that_may_be_shared_is_left_alone(module: str) -> None:
    unknown: Any = type("Cycle", (Cycle,), {"__module__": module})()
    assert not await server_of(unknown.receive, HTTP2).abort(drop=True)
    assert unknown.transport.calls == []


async def test_what_only_looks_like_a_server_is_left_alone() -> None:
    class Half(Cycle):
        transport = None  # type: ignore[assignment]

        def __init__(self) -> None:
            self.disconnected = False

    assert not await server_of(Half().receive, HTTP1).abort(drop=False)


async def ticks() -> AsyncIterator[bytes]:
    yield b"tick"
    await anyio.sleep_forever()


async def cut_stream(receive: Receive, scope: Scope) -> None:
    """A stream on this server that is cut by a timeout, which counts from its start."""

    async def send(message: Message) -> None: ...

    async def app(scope: Scope, receive: Receive, send: Any) -> None:
        await CancelableStreamingResponse(ticks(), gap_timeout=0.01)(scope, receive, send)

    whole = {"method": "GET", "path": "/", "headers": [], "asgi": {"spec_version": "2.3"}, **scope}
    with suppress(CancelationError):
        await RequestCancelationMiddleware(app)(whole, receive, send)


async def test_an_unknown_server_is_named_once_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_unknown", set())
    caplog.set_level(logging.DEBUG, "cancelable_deps")
    for _ in range(2):
        await cut_stream(Cycle().receive, HTTP2)
    told = [record for record in caplog.records if record.levelno == logging.DEBUG]
    assert [record.getMessage().partition(" is not a server")[0] for record in told] == ["tests.test_server.Cycle"]


async def test_a_known_server_is_not_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cancelable_deps")
    cycle = StreamCycle()
    await cut_stream(cycle.receive, HTTP2)
    assert cycle.resets == 1
    assert not [record for record in caplog.records if record.levelno == logging.DEBUG]


async def test_a_function_for_receive_is_no_server() -> None:
    async def receive() -> Message:
        return DISCONNECT

    server = server_of(receive, HTTP1)
    server.say_again(DISCONNECT)
    assert not await server.abort(drop=False)
    assert not server.aborts_unfinished_responses


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("kind", [asyncio.Queue, type("Queue", (asyncio.Queue,), {})])
async def test_a_queue_says_it_again(anyio_backend: str, kind: Any) -> None:
    queue = kind()
    server = server_of(queue.get, HTTP1)
    server.say_again(DISCONNECT)
    assert await queue.get() == DISCONNECT
    assert server.aborts_unfinished_responses


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_channel_says_it_again(anyio_backend: str) -> None:
    sender, channel = trio.open_memory_channel[Message](5)
    server = server_of(channel.receive, HTTP1)
    server.say_again(DISCONNECT)
    assert await channel.receive() == DISCONNECT
    assert server.aborts_unfinished_responses
    sender.close()


async def test_only_a_refusal_by_an_enum_needs_a_known_status() -> None:
    class Enums(Cycle):
        async def process_request(self) -> None: ...

    assert can_refuse_socket_with(Cycle().receive, 499)
    assert can_refuse_socket_with(Enums().receive, 503)
    assert not can_refuse_socket_with(Enums().receive, 499)
