"""Streams on real servers: a hang-up, a cut that the client can see, and a log without complaints."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.machine import scaled
from tests.servers import Server, let_it_listen, new_key, request

pytest_plugins = ["tests.servers"]
pytestmark = pytest.mark.one_server("shared_server")

STACKS = ("", "/mounted")
LIMIT = scaled(0.1)


def read_to_the_end(server: Server, target: str, key: str) -> bytes:
    """Everything that comes, until the server closes."""
    with closing(server.connect()) as connection:
        connection.send(request(target, key))
        connection.head()
        lines = []
        while line := connection.line():
            lines.append(line)
            if line == b"0\r\n":
                lines.append(connection.line())
                break
        return b"".join(lines)


def is_known_well(server: Server) -> bool:
    """Whether its connection can be closed from wherever we are; into others we may have to raise, which they log."""
    return server.variant.name.startswith("uvicorn")


def hung_up_in(server: Server, path: str) -> list[str]:
    """What became of a stream whose client leaves after its head, when the first chunk is out."""
    key = new_key()
    connection = server.connect()
    connection.send(request(path, key))
    connection.head()
    let_it_listen(server)
    connection.reset()
    return server.journal(key, "ended")


@pytest.mark.parametrize("stack", STACKS)
def test_a_hang_up_stops_a_stream(server: Server, stack: str) -> None:
    assert hung_up_in(server, f"{stack}/stream") == ["status:200", "cancelled", "cleaned up", "ended"]


@pytest.mark.parametrize("ours", ["true", "false"])
def test_a_stream_hears_of_a_client_that_left_before_it(server: Server, ours: str) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(request(f"/stream-for-nobody?ours={ours}", key))
    assert server.ask("/bare/work").status == 200
    connection.reset()
    assert server.journal(key, "ended")[-1] == "ended"


@pytest.mark.parametrize("stack", STACKS)
def test_a_timeout_cuts_a_stream_visibly_and_quietly(server: Server, stack: str) -> None:
    key = new_key()
    assert read_to_the_end(server, f"{stack}/stream?timeout={LIMIT}", key) == b"5\r\nfirst\r\n"
    assert server.journal(key, "ended") == ["status:200", "cancelled", "cleaned up", "ended"]


@pytest.mark.parametrize("stack", ["/inside", "/outside"])
def test_a_stream_is_stopped_behind_a_base_http_middleware(server: Server, stack: str) -> None:
    assert hung_up_in(server, f"{stack}/stream") == ["status:200", "cancelled", "cleaned up", "ended"]


@pytest.mark.parametrize("stack", ["/inside", "/outside"])
def test_a_timeout_cuts_a_stream_visibly_behind_a_base_http_middleware(server: Server, stack: str) -> None:
    key = new_key()
    assert read_to_the_end(server, f"{stack}/stream?timeout={LIMIT}", key) == b"5\r\nfirst\r\n"
    assert server.journal(key, "ended") == ["status:200", "cancelled", "cleaned up", "ended"]
    # Outside of ours such a middleware ends whatever stream ends, if it is not made to fail, or the connection closed.
    if stack == "/outside" and not is_known_well(server):
        server.expected.add('assert message["type"] == "http.response.body"')


@pytest.mark.parametrize("stack", STACKS)
def test_a_timeout_cuts_a_stream_behind_which_another_request_waits(server: Server, stack: str) -> None:
    key = new_key()
    with closing(server.connect()) as connection:
        connection.send(request(f"{stack}/stream?timeout={LIMIT}", key) + request("/bare/work", new_key()))
        connection.head()
        assert [connection.line(), connection.line(), connection.line()] == [b"5\r\n", b"first\r\n", b""]
    assert server.journal(key, "ended") == ["status:200", "cancelled", "cleaned up", "ended"]


def test_a_stream_that_fails_for_a_task_which_somebody_has_cancelled_does_not_look_whole(server: Server) -> None:
    server.expected.add("the generator of a response ended with CancelledError()")
    assert read_to_the_end(server, "/failing-stream", new_key()) == b"5\r\nfirst\r\n"


@pytest.mark.parametrize("stack", STACKS)
def test_an_event_stream_ends_with_the_reason(server: Server, stack: str) -> None:
    body = read_to_the_end(server, f"{stack}/stream?timeout={LIMIT}&kind=text/event-stream", new_key())
    assert b'event: cancelled\ndata: {"reason": "timeout"' in body
    assert body.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("endpoint", ["stream", "starlette-stream"])
def test_the_timeout_of_the_middleware_cuts_a_stream_visibly_and_quietly(server: Server, endpoint: str) -> None:
    key = new_key()
    assert read_to_the_end(server, f"/timed/{endpoint}", key) == b"5\r\nfirst\r\n"
    assert server.journal(key, "ended") == ["status:200", "cancelled", "cleaned up", "ended"]


def needs_generators() -> None:
    pytest.importorskip("fastapi.sse", reason="generator endpoints came with FastAPI 0.135")


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", ["sse", "jsonl", "raw", "plain-sse", "plain-jsonl", "plain-raw"])
def test_a_hang_up_stops_a_generator_endpoint(server: Server, stack: str, kind: str) -> None:
    needs_generators()
    assert hung_up_in(server, f"{stack}/generated/{kind}") == ["status:200", "cancelled", "cleaned up", "ended"]


@pytest.mark.parametrize("stack", STACKS)
def test_a_timeout_of_an_event_stream_endpoint_is_its_last_event(server: Server, stack: str) -> None:
    needs_generators()
    body = read_to_the_end(server, f"{stack}/generated/timed-sse", new_key())
    assert b'event: cancelled\ndata: {"reason": "timeout"' in body.replace(b'":"', b'": "')
    assert body.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("kind", ["jsonl", "raw"])
def test_a_timeout_cuts_a_generator_endpoint_quietly_under_the_middleware(server: Server, kind: str) -> None:
    needs_generators()
    key = new_key()
    body = read_to_the_end(server, f"/mounted/generated/timed-{kind}", key)
    assert b"first" in body
    assert not body.endswith(b"0\r\n\r\n")
    events = server.journal(key, "ended")
    assert events == ["status:200", "cancelled", "cleaned up", "ended"]


@pytest.mark.parametrize("stack", STACKS)
def test_a_hang_up_past_the_point_is_acted_on_later(server: Server, stack: str) -> None:
    needs_generators()
    key = new_key()
    connection = server.connect()
    connection.send(request(f"{stack}/guarded", key))
    connection.head()
    # Until its first chunk is out, the generator may not have come to what it defers.
    assert [connection.line(), connection.line()] == [b"5\r\n", b"first\r\n"]
    connection.reset()
    events = server.journal(key, "ended")
    assert events[:2] == ["status:200", "past the point"]


@pytest.mark.parametrize("kind", ["jsonl", "raw"])
def test_a_timeout_cuts_a_generator_endpoint_under_the_decorator_alone(server: Server, kind: str) -> None:
    needs_generators()
    body = read_to_the_end(server, f"/generated/timed-{kind}", new_key())
    assert b"first" in body
    assert not body.endswith(b"0\r\n\r\n")
    if not is_known_well(server):
        server.expected.add("RuntimeError: Caught handled exception, but response already started.")


@pytest.mark.parametrize("stack", STACKS)
def test_a_client_that_stops_reading_is_told_apart_from_one_that_left(server: Server, stack: str) -> None:
    if server.variant.name in ("granian", "hypercorn-trio"):
        pytest.skip("send() never waits, as it buffers what the client does not read, or is shielded while it waits")
    key = new_key()
    before = server.log()
    with closing(server.connect()) as connection:
        connection.send(request(f"{stack}/flood", key))
        connection.head()
        assert server.journal(key, "ended") == ["status:200", "cleaned up", "ended"]
    assert "timeout: The client read nothing for 0.5 seconds" in server.log().removeprefix(before)
