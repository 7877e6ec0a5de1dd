"""python-socketio behind the middleware, with its own client: no session is lost, and each ends once."""

from __future__ import annotations

import json

import pytest

from tests.compat.served import Served

CALLS = 50


@pytest.mark.parametrize("transport", ["websocket", "polling"])
@pytest.mark.parametrize("stack", ["bare", "mw", "excluded"])
def test_calls_and_an_end(served: Served, stack: str, transport: str) -> None:
    import socketio

    # A last poll of its client may come when the session is over, without us as well.
    served.expected.add("engineio.server: 'Session is disconnected'")
    before = served.events(f"{stack}-socket").count("disconnected")
    client = socketio.SimpleClient()
    client.connect(
        f"http://127.0.0.1:{served.port}", socketio_path=f"/{stack}/socket.io", transports=[transport], wait_timeout=10
    )
    for number in range(CALLS):
        assert client.call("double", number, timeout=10) == 2 * number
    if stack == "excluded":
        # Of the event that it waits for here, it hears later than the time of a request allows.
        client.emit("later")
        assert client.receive(timeout=10) == ["late"]
    client.disconnect()
    served.wait_for(f"{stack}-socket", "disconnected", count=before + 1)


def open_session(served: Served, stack: str) -> str:
    """A session of long polling, by hand; the path of its requests."""
    path = f"/{stack}/socket.io/?EIO=4&transport=polling"
    opened = served.ask(path).body
    path += "&sid=" + json.loads(opened[1:])["sid"]
    assert served.ask(path, "", b"40").body == b"OK"
    assert served.ask(path).body.startswith(b"40")
    return path


@pytest.mark.parametrize("stack", ["bare", "mw"])
def test_a_poll_that_is_left_ends_its_session_as_without_us(served: Served, stack: str) -> None:
    path = open_session(served, stack)
    before = served.events(f"{stack}-socket").count("disconnected")
    connection = served.open(f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
    connection.reset()
    # Nobody answers its pings any more.
    served.wait_for(f"{stack}-socket", "disconnected", count=before + 1)
