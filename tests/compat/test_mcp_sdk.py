"""The MCP SDK behind the middleware, with its own client: no session is ever lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import httpx
import pytest

from tests.compat.served import Served
from tests.servers import new_key

STACKS = ("bare", "based", "mw", "inside", "outside")
CALLS = 200
HEADERS = {"accept": "application/json, text/event-stream", "mcp-protocol-version": "2025-06-18"}
# The SDK's own, also without us: its session tries to answer a call that it ends.
CALL_AT_SHUTDOWN = "shutdown error response for request"
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def call_many_times(transport: Any, mode: str) -> None:
    from mcp import Client

    async def calls() -> None:
        async with Client(transport, mode=mode) as client:  # type: ignore[arg-type]
            for number in range(CALLS):
                result: Any = await client.call_tool("add", {"a": number, "b": 1})
                assert result.content[0].text == str(number + 1)

    anyio.run(calls)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("stack", STACKS)
def test_a_client_keeps_its_session_over_http(served: Served, stack: str, mode: str) -> None:
    call_many_times(f"http://127.0.0.1:{served.port}/{stack}/http/", mode)


@pytest.mark.parametrize("stack", STACKS)
def test_a_client_keeps_its_session_over_sse(served: Served, stack: str) -> None:
    from mcp.client.sse import sse_client

    if stack in ("based", "inside", "outside"):
        # The SDK's own, also without us: it answers once more when its stream has ended, which Starlette does not like.
        served.expected.add("Unexpected message: {'type': 'http.response.start'")
    call_many_times(sse_client(f"http://127.0.0.1:{served.port}/{stack}/sse/sse"), "legacy")


def test_a_stream_that_is_excluded_outlives_the_time_of_a_request(served: Served) -> None:
    from mcp import Client
    from mcp.client.sse import sse_client

    async def calls() -> None:
        url = f"http://127.0.0.1:{served.port}/excluded/sse/sse"
        async with Client(sse_client(url), mode="legacy") as client:
            result: Any = await client.call_tool("late", {})
            assert result.content[0].text == "late"

    anyio.run(calls)


class Session:
    """A client by hand, so that it can leave when it likes."""

    def __init__(self, client: httpx.Client, url: str) -> None:
        self.client = client
        self.url = url
        self.headers = HEADERS
        self.numbers = iter(range(1_000_000))
        with self.ask("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo=INFO) as response:
            response.read()
            self.headers = HEADERS | {"mcp-session-id": response.headers["mcp-session-id"]}
        client.post(url, headers=self.headers, json={"jsonrpc": "2.0", "method": "notifications/initialized"})

    @contextmanager
    def ask(self, method: str, **params: Any) -> Iterator[httpx.Response]:
        body = {"jsonrpc": "2.0", "id": next(self.numbers), "method": method, "params": params}
        with self.client.stream("POST", self.url, headers=self.headers, json=body) as response:
            assert response.status_code == 200, response.read()
            yield response

    def call(self, name: str, **arguments: Any) -> str:
        """The text of the result, read no further than to its line: the last chunk is left for a closed connection."""
        with self.ask("tools/call", name=name, arguments=arguments) as response:
            for line in response.iter_lines():
                if line.startswith("data:") and '"result"' in line:
                    return line
        raise AssertionError("no result")


INFO = {"name": "by hand", "version": "1"}


@pytest.mark.parametrize("stack", STACKS)
def test_a_client_that_leaves_before_the_last_chunk_keeps_its_session(served: Served, stack: str) -> None:
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(limits=limits, timeout=10) as client:
        session = Session(client, f"http://127.0.0.1:{served.port}/{stack}/http/")
        for number in range(CALLS):
            assert f'"text":"{number + 1}"' in session.call("add", a=number, b=1)


@pytest.mark.parametrize("stack", ["bare", "mw", "inside", "outside"])
def test_a_hang_up_in_the_middle_of_a_call_leaves_the_session(served: Served, stack: str) -> None:
    key = new_key()
    with httpx.Client(timeout=10) as client:
        session = Session(client, f"http://127.0.0.1:{served.port}/{stack}/http/")
        with session.ask("tools/call", name="slow", arguments={"key": key}):
            served.wait_for(key, "started")
        assert '"text":"3"' in session.call("add", a=1, b=2)
    served.expected.add(CALL_AT_SHUTDOWN)
    # The protocol: a connection that ends is no cancellation of the call.
    assert served.events(key) == ["started"]


def test_a_timeout_ends_the_response_and_not_the_session(served: Served) -> None:
    key = new_key()
    with httpx.Client(timeout=10) as client:
        session = Session(client, f"http://127.0.0.1:{served.port}/timed-mw/http/")
        with session.ask("tools/call", name="slow", arguments={"key": key}) as response:
            assert "event: cancelled" in response.read().decode()
        served.expected.add(CALL_AT_SHUTDOWN)
        assert '"text":"3"' in session.call("add", a=1, b=2)


@pytest.mark.parametrize("stack", ["mw", "inside"])
def test_a_shutdown_ends_a_call(doomed: Served, stack: str) -> None:
    doomed.expected.add(CALL_AT_SHUTDOWN)
    key = new_key()
    with httpx.Client(timeout=10) as client:
        session = Session(client, f"http://127.0.0.1:{doomed.port}/{stack}/http/")
        with session.ask("tools/call", name="slow", arguments={"key": key}) as response:
            doomed.wait_for(key, "started")
            doomed.begin_to_stop()
            assert "event: cancelled" in response.read().decode()
        doomed.wait()
    assert doomed.events(key) == ["started", "cancelled", "cleaned up"]
