"""The tools of `examples/recipes` behind real servers, by the SDK's own client, and by one that hangs up."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

# The short run collects this file as well, and does not have it.
pytest.importorskip("mcp")

from mcp import Client

from tests.machine import scaled
from tests.servers import (
    HYPERCORN,
    UVICORN,
    Connection,
    Response,
    Server,
    Variant,
    new_key,
    request,
    started,
    without_complaints,
)

APP = "tests.compat.mcp_tools_app:app"
CEILING = scaled(20)
CALL = 7
"""The id of a call, which its client chooses."""
MANY = 1000
"""Pages that take longer than any test."""
LEGACY, MODERN = "2025-11-25", "2026-07-28"
SERVERS = {"uvicorn": f"{UVICORN}0", "hypercorn-trio": f"{HYPERCORN} -k trio --graceful-timeout 50"}
HTTP_MODES = ["stateful", "stateless", "stateful-json", "stateless-json"]
CASES = [
    *(pytest.param(("uvicorn", mode), id=f"uvicorn-{mode}") for mode in HTTP_MODES),
    *(pytest.param(("hypercorn-trio", mode), id=f"hypercorn-trio-{mode}") for mode in HTTP_MODES[:2]),
]
META = {
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientCapabilities": {},
    "io.modelcontextprotocol/clientInfo": {"name": "by hand", "version": "1"},
}


class Tools:
    """A server of tools, and what can be seen of it."""

    def __init__(self, server: Server, mode: str) -> None:
        self.server = server
        self.mode = mode
        self.is_stateful = mode.startswith("stateful")
        self.url = f"http://127.0.0.1:{server.port}/mcp/"

    def running(self) -> list[Any]:
        calls: list[Any] = self.server.ask("/tool-calls").json()
        return calls

    def until(self, condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + CEILING
        while not (found := condition()):
            assert time.monotonic() < end, f"{self.running()}; {self.server.log()[-1500:]}"
            time.sleep(0.01)
        return found

    def started(self) -> str:
        """The id of the call that runs, as soon as one does."""
        (call,) = self.until(self.running)
        assert (call["kind"], call["name"]) == ("tracked", "report")
        return str(call["id"])

    def said(self, title: str, last: str) -> list[str]:
        """What the plain tool has said until ``last``."""
        lines: list[str] = []

        def has_said_it() -> bool:
            log = self.server.log().splitlines()
            lines[:] = [each.removeprefix(f"{title}: ") for each in log if each.startswith(f"{title}: ")]
            return last in lines

        self.until(has_said_it)
        return lines

    def released(self, title: str) -> str:
        """Why a call was stopped, as soon as its cleanup is over."""
        line: str = self.until(lambda: [each for each in self.server.log().splitlines() if each.startswith(title)])[0]
        self.until(lambda: not self.running())
        return line.removeprefix(f"{title}: released, ")


@pytest.fixture(scope="module", params=CASES)
def tools(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tools]:
    name, mode = request.param
    variant = Variant(name, SERVERS[name], app=APP, ready="/tool-calls")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HTTP_MODE", mode)
        with started(variant, tmp_path_factory.mktemp("tools")) as server, without_complaints(server):
            yield Tools(server, mode)


class ByHand:
    """A client that sends each message when the test likes, and can hang up."""

    def __init__(self, tools: Tools, version: str) -> None:
        self._tools = tools
        self._version = version
        self._session: dict[str, str] = {}
        if version == LEGACY and tools.is_stateful:
            about = {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": {"name": "by hand", "version": "1"}}
            response = self.post("initialize", about, id=0)
            self._session = {"mcp-session-id": response.headers["mcp-session-id"]}
            self.post("notifications/initialized", {})

    def post(self, method: str, params: dict[str, Any], **body: Any) -> Response:
        with closing(self.open(method, params, **body)) as connection:
            return connection.response()

    def call(self, title: str, pages: int = MANY) -> Connection:
        return self.call_tool("report", title=title, pages=pages)

    def call_tool(self, name: str, **arguments: Any) -> Connection:
        return self.open("tools/call", {"name": name, "arguments": arguments}, id=CALL)

    def open(self, method: str, params: dict[str, Any], **body: Any) -> Connection:
        headers = {"mcp-protocol-version": self._version, **self._session}
        if self._version == MODERN:
            headers["mcp-method"] = method
            params = {**params, "_meta": META}
            if "name" in params:
                headers["mcp-name"] = params["name"]
        message = json.dumps({"jsonrpc": "2.0", "method": method, "params": params, **body}).encode()
        connection = self._tools.server.connect()
        headers |= {"accept": "application/json, text/event-stream", "content-type": "application/json"}
        connection.send(request("/mcp/", "", message, host=f"127.0.0.1:{self._tools.server.port}", **headers))
        return connection


def message_of(response: Response) -> Any:
    """The JSON-RPC message of a response, be it JSON or an event stream."""
    events = re.findall(rb"^data: (.+?)\r?$", response.body, re.MULTILINE)
    return json.loads(events[-1] if events else response.body)


def text_of(response: Response) -> str:
    result = message_of(response)["result"]
    assert result["isError"] is True
    return str(result["content"][0]["text"])


@pytest.mark.parametrize("version", [LEGACY, MODERN])
def test_a_call_is_answered(tools: Tools, version: str) -> None:
    title = new_key()
    with closing(ByHand(tools, version).call(title, 1)) as connection:
        result = message_of(connection.response())["result"]
    assert (result["content"][0]["text"], result["isError"]) == (f"{title}: 1 pages", False)
    assert tools.released(title) == "without a reason"


@pytest.mark.parametrize("version", [LEGACY, MODERN])
def test_a_client_that_hangs_up_stops_its_call(tools: Tools, version: str) -> None:
    title = new_key()
    connection = ByHand(tools, version).call(title)
    tools.started()
    connection.reset()
    assert tools.released(title) == "disconnect"


@pytest.mark.parametrize("version", [LEGACY, MODERN])
def test_a_call_is_stopped_by_its_id(tools: Tools, version: str) -> None:
    title = new_key()
    with closing(ByHand(tools, version).call(title)) as connection:
        id = tools.started()
        assert tools.server.ask(f"/tool-calls/{id}/cancel", "", b"").json()["outcome"] == "cancelled"
        assert text_of(connection.response()) == "Error executing tool report: stopped: stopped by an operator"
    assert tools.released(title) == "manual"


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_a_client_of_the_sdk_that_is_cancelled_stops_its_call(tools: Tools, mode: str) -> None:
    title = new_key()

    async def call_and_give_up() -> str | None:
        async with Client(tools.url, mode=mode) as client:  # type: ignore[arg-type]
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.call_tool, "report", {"title": title, "pages": MANY})
                await anyio.to_thread.run_sync(tools.started)
                tasks.cancel_scope.cancel()
            if mode == "legacy" and not tools.is_stateful:
                # A limit of the SDK: its client sends a notification, which stops nothing there, and stays connected.
                await client.list_tools()
                assert tools.running()
                return None
            return await anyio.to_thread.run_sync(tools.released, title)

    why = anyio.run(call_and_give_up)
    if why is None:
        assert tools.released(title) == "disconnect"
    else:
        # Without a reason: the notification cancels the scope that the SDK has around the tool, which is not ours.
        assert why == ("without a reason" if mode == "legacy" else "disconnect")


def test_a_notification_stops_a_call_of_a_session(tools: Tools) -> None:
    if not tools.is_stateful:
        pytest.skip("it has no sessions")
    title = new_key()
    client = ByHand(tools, LEGACY)
    with closing(client.call(title)) as connection:
        tools.started()
        assert client.post("notifications/cancelled", {"requestId": CALL}).status == 202
        assert message_of(connection.response())["error"]["message"] == "Request cancelled"
    assert tools.released(title) == "without a reason"


@pytest.mark.parametrize("version", [LEGACY, MODERN])
def test_a_notification_stops_nothing_without_a_session(tools: Tools, version: str) -> None:
    """A limit of the SDK: it acknowledges the notification, and knows no other request than the one that it came by."""
    if version == LEGACY and tools.is_stateful:
        pytest.skip("it has a session")
    title = new_key()
    client = ByHand(tools, version)
    connection = client.call(title)
    id = tools.started()
    assert client.post("notifications/cancelled", {"requestId": CALL}).status == 202
    assert [call["id"] for call in tools.running()] == [id]
    connection.reset()
    assert tools.released(title) == "disconnect"


@pytest.mark.parametrize("version", [LEGACY, MODERN])
def test_a_plain_tool_is_stopped_by_a_hang_up_but_in_a_session(tools: Tools, version: str) -> None:
    """What the SDK does without `tool_call`, and why that is there."""
    title = new_key()
    connection = ByHand(tools, version).call_tool("plain", title=title)
    tools.said(title, "started")
    connection.reset()
    if version == LEGACY and tools.is_stateful:
        # The server has noticed the hang-up when it has answered what came after it.
        for _ in range(2):
            assert tools.running() == []
        assert tools.said(title, "started") == ["started"]
    else:
        # The SDK's scope raises its cancellation again in the cleanup; with JSON there is no scope of the SDK.
        politely = version == MODERN and tools.mode.endswith("json")
        cleanup = ["cleaned up"] if politely else []
        assert tools.said(title, "ended") == ["started", "cancelled", *cleanup, "ended"]


def test_a_notification_interrupts_the_cleanup_of_a_plain_tool(tools: Tools) -> None:
    if not tools.is_stateful:
        pytest.skip("it has no sessions")
    title = new_key()
    client = ByHand(tools, LEGACY)
    with closing(client.call_tool("plain", title=title)) as connection:
        tools.said(title, "started")
        assert client.post("notifications/cancelled", {"requestId": CALL}).status == 202
        assert message_of(connection.response())["error"]["message"] == "Request cancelled"
    assert tools.said(title, "ended") == ["started", "cancelled", "ended"]


@pytest.mark.parametrize("why", ["timeout", "signal"])
@pytest.mark.parametrize("version", [LEGACY, MODERN])
@pytest.mark.parametrize("name", SERVERS)
def test_what_the_server_stops(
    name: str, version: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRACE", "0.1")
    if why == "timeout":
        monkeypatch.setenv("TIMEOUT", str(scaled(0.5)))
    title = new_key()
    with started(Variant(name, SERVERS[name], app=APP, ready="/tool-calls"), tmp_path) as server:
        tools = Tools(server, "stateful")
        with closing(ByHand(tools, version).call(title)) as connection:
            tools.started()
            if why == "timeout":
                text = f"Error executing tool report: stopped: Timed out after {scaled(0.5):g} seconds"
                assert text_of(connection.response()) == text
                assert tools.released(title) == "timeout"
            else:
                # hypercorn on trio is killed by a SIGTERM.
                os.kill(server.pid, signal.SIGINT)
                server.wait()
                assert f"{title}: released, signal" in server.log()
