"""HTTP/2 on real servers: what stops one request leaves the others of its connection alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing

import httpx
import pytest

from tests import servers
from tests.machine import scaled
from tests.servers import (
    DOORS,
    PATIENCE,
    UVICORN,
    Http2Connection,
    Server,
    Variant,
    new_key,
    without_complaints,
)

pytest_plugins = ["tests.servers"]
pytestmark = pytest.mark.one_server("server")

UVICORN_HTTP2 = f"{UVICORN} --http zttp --http2"
VARIANTS = [
    Variant("uvicorn-asyncio", f"{UVICORN_HTTP2} --loop asyncio"),
    Variant("uvicorn-uvloop", f"{UVICORN_HTTP2} --loop uvloop"),
    # The others speak HTTP/2 as they are.
    *(variant for variant in servers.VARIANTS if not variant.name.startswith("uvicorn")),
]
CANCELLING = tuple(door for door in DOORS if door != "event")
STACKS = ("", "/mounted", "/inside")
LIMIT = scaled(0.2)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def server(request: pytest.FixtureRequest, start_once: Callable[[Variant], Server]) -> Iterator[Server]:
    if request.param.name.startswith("uvicorn"):
        pytest.importorskip("uvicorn.protocols.http.zttp_h2_impl", reason="HTTP/2 came with uvicorn 0.54 and zttp")
    with without_complaints(start_once(request.param)) as running:
        yield running


async def answer(client: httpx.AsyncClient, target: str, key: str, **headers: str) -> str:
    """The status and the body of a response over HTTP/2, or how it failed."""
    try:
        response = await client.get(target, headers={"x-id": key} | {f"x-{name}": headers[name] for name in headers})
    except httpx.RemoteProtocolError as exc:
        return str(exc)
    assert response.http_version == "HTTP/2"
    return f"{response.status_code} {response.text}"


def cut_beside(server: Server, target: str, gate: str = "") -> tuple[str, str]:
    """A stream that is cut, and a request beside it on the same connection that ends later, as httpx has them."""
    cut, other = gate or new_key(), new_key()

    async def ask() -> tuple[str, str]:
        async with httpx.AsyncClient(
            http1=False, http2=True, base_url=f"http://127.0.0.1:{server.port}", timeout=PATIENCE, trust_env=False
        ) as client:
            beside = asyncio.create_task(answer(client, "/mw/work", other, before="gate"))
            await asyncio.to_thread(server.journal, other, "started")
            if gate:
                await asyncio.to_thread(server.open_gate, gate)
            outcome = await answer(client, target, cut)
            await asyncio.to_thread(server.journal, cut, "ended")
            await asyncio.to_thread(server.open_gate, other)
            return outcome, await beside

    return asyncio.run(ask())


@pytest.mark.parametrize("stack", STACKS)
def test_a_stream_that_times_out_is_reset_alone(server: Server, stack: str) -> None:
    cut, other = cut_beside(server, f"{stack}/stream?timeout={LIMIT}")
    assert "StreamReset" in cut
    assert other == '200 {"ok":true}'


@pytest.mark.parametrize("stack", STACKS)
def test_a_stream_that_the_application_cancels_is_reset_alone(server: Server, stack: str) -> None:
    key = new_key()
    cut, other = cut_beside(server, f"{stack}/stream-until-gate", key)
    assert "StreamReset" in cut
    assert other == '200 {"ok":true}'
    assert server.journal(key, "ended") == ["status:200", "cancelled:MANUAL", "ended"]


@pytest.mark.parametrize("endpoint", ["stream", "starlette-stream"])
def test_the_timeout_of_the_middleware_resets_a_stream_alone(server: Server, endpoint: str) -> None:
    cut, other = cut_beside(server, f"/timed/{endpoint}")
    assert "StreamReset" in cut
    assert other == '200 {"ok":true}'


@pytest.mark.parametrize("kind", ["jsonl", "raw"])
def test_the_timeout_of_a_generator_endpoint_resets_it_alone(server: Server, kind: str) -> None:
    pytest.importorskip("fastapi.sse", reason="generator endpoints came with FastAPI 0.135")
    cut, other = cut_beside(server, f"/mounted/generated/timed-{kind}")
    assert "StreamReset" in cut
    assert other == '200 {"ok":true}'


def is_told_at_once(server: Server) -> bool:
    """Whether its stream can be reset from wherever we are; into others we may have to raise, which they log."""
    return server.variant.name != "granian"


def test_a_stream_is_reset_alone_behind_a_base_http_middleware(server: Server) -> None:
    if not is_told_at_once(server):
        server.expected.add('assert message["type"] == "http.response.body"')
    cut, other = cut_beside(server, f"/outside/stream?timeout={LIMIT}")
    assert "StreamReset" in cut
    assert other == '200 {"ok":true}'


@pytest.mark.parametrize("kind", ["jsonl", "raw"])
def test_a_generator_endpoint_is_reset_alone_under_the_decorator_alone(server: Server, kind: str) -> None:
    pytest.importorskip("fastapi.sse", reason="generator endpoints came with FastAPI 0.135")
    if not is_told_at_once(server):
        server.expected.add("RuntimeError: Caught handled exception, but response already started.")
    cut, other = cut_beside(server, f"/generated/timed-{kind}")
    assert "StreamReset" in cut
    assert other == '200 {"ok":true}'


def test_what_was_sent_before_the_cut_arrives(server: Server) -> None:
    with closing(Http2Connection(server.port)) as connection:
        assert connection.response(connection.send(f"/stream?timeout={LIMIT}", new_key())) == (200, b"first", "cut")


def test_an_event_stream_ends_with_the_reason(server: Server) -> None:
    with closing(Http2Connection(server.port)) as connection:
        status, body, end = connection.response(connection.send(f"/stream?timeout={LIMIT}&kind=text/event-stream"))
    assert (status, end) == (200, "whole")
    assert b'event: cancelled\ndata: {"reason": "timeout"' in body


def test_a_timeout_before_the_response_is_answered(server: Server) -> None:
    with closing(Http2Connection(server.port)) as connection:
        status, _, end = connection.response(connection.send("/timed-deco/work", new_key(), x_before="forever"))
    assert (status, end) == (504, "whole")


@pytest.mark.parametrize("door", CANCELLING)
def test_a_request_that_its_client_resets_is_stopped_alone(server: Server, door: str) -> None:
    gone, other = new_key(), new_key()
    with closing(Http2Connection(server.port)) as connection:
        reset = connection.send(f"/{door}/work", gone, x_before="forever")
        stays = connection.send(f"/{door}/work", other, x_before="gate")
        server.journal(gone, "started")
        server.journal(other, "started")
        connection.reset(reset)
        assert server.journal(gone, "ended") == ["started", "cancelled:DISCONNECT", "status:499", "ended"]
        server.open_gate(other)
        assert connection.response(stays) == (200, b'{"ok":true}', "whole")


@pytest.mark.parametrize("stack", STACKS)
def test_a_stream_that_its_client_resets_is_stopped_alone(server: Server, stack: str) -> None:
    gone, other = new_key(), new_key()
    with closing(Http2Connection(server.port)) as connection:
        reset = connection.send(f"{stack}/stream", gone)
        stays = connection.send(f"{stack}/stream?timeout={scaled(5)}&kind=text/event-stream", other)
        assert connection.body_begins(reset) == connection.body_begins(stays) == b"first"
        connection.reset(reset)
        assert server.journal(gone, "ended") == ["status:200", "cancelled", "cleaned up", "ended"]
        assert server.journal(other, "status:200") == ["status:200"]
        assert connection.response(connection.send("/mw/work", new_key())) == (200, b'{"ok":true}', "whole")


def test_every_second_of_60_requests_of_one_connection_is_reset(server: Server) -> None:
    gone, other = new_key(), new_key()
    with closing(Http2Connection(server.port)) as connection:
        doors = [CANCELLING[number % len(CANCELLING)] for number in range(30)]
        resets = [connection.send(f"/{door}/work", gone, x_before="forever") for door in doors]
        stay = [connection.send(f"/{door}/work", other, x_before="gate") for door in doors]
        server.journal(gone, "started", 30)
        server.journal(other, "started", 30)
        connection.reset(*resets)
        assert server.journal(gone, "ended", 30).count("cancelled:DISCONNECT") == 30
        server.open_gate(other)
        assert {connection.response(number) for number in stay} == {(200, b'{"ok":true}', "whole")}
