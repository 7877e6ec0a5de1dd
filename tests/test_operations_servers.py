"""Operations on real servers: stopped by id from a second connection, and at the shutdown."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.servers import PATIENCE, VARIANTS, Server, Variant, request, started
from tests.socket_client import SocketClient

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.platform == "win32", reason="the servers and signals of Unix"),
]

SERVED = [dataclasses.replace(variant, app="tests.operations_server_app:app") for variant in VARIANTS]


@pytest.fixture(params=SERVED, ids=lambda variant: variant.name)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    variant: Variant = request.param
    with started(variant, tmp_path) as server:
        yield server


def stopped(server: Server, id: str) -> str:
    """Stop an operation, and return the outcome; wait until it is known."""
    until = time.monotonic() + PATIENCE
    while True:
        outcome: str = server.ask(f"/stop/{id}", "", b"").json()
        if outcome != "unknown" or time.monotonic() > until:
            return outcome


def test_a_request_a_stream_and_a_websocket_are_stopped_from_a_second_connection(server: Server) -> None:
    with closing(server.connect()) as work:
        work.send(request("/work", "", None, operation_id="work"))
        assert stopped(server, "work") == "cancelled"
        answer = work.response()
        assert (answer.status, answer.json()) == (499, {"detail": "stopped"})
        assert answer.headers["operation-id"] == "work"
    with closing(server.connect()) as stream:
        stream.send(request("/stream", "", None, operation_id="stream"))
        head = stream.head()
        assert head.status == 200
        assert stopped(server, "stream") == "cancelled"
        with pytest.raises((AssertionError, ValueError, ConnectionError)):  # It ends without its last chunk.
            stream.finish(head)
    with closing(SocketClient(server.port, "/socket", operation_id="socket")) as socket:
        assert socket.accepted()
        assert stopped(server, "socket") == "cancelled"
        assert socket.closed() == (4499, "stopped")


def test_background_work_is_stopped_at_the_shutdown(server: Server) -> None:
    started_work = server.ask("/reports", "", b"")
    assert started_work.status == 202
    assert started_work.json()["state"] == "running"
    # hypercorn on trio does not look for SIGTERM.
    os.kill(server.pid, signal.SIGINT if server.variant.name == "hypercorn-trio" else signal.SIGTERM)
    server.wait()
    assert "report: signal" in server.log()
