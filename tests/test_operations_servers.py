"""Operations on real servers: stopped by id from a second connection, by newer ones, and at the shutdown."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.servers import PATIENCE, VARIANTS, Connection, Server, Variant, request, started
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


BURST, CONNECTIONS = 200, 8


def send_search(connection: Connection, number: int, seconds: float) -> None:
    connection.send(request(f"/search?text={number}&seconds={seconds}", "", None, user="ann"))


def type_quickly(server: Server, numbers: Iterator[int], lock: threading.Lock) -> dict[int, tuple[int, Any]]:
    """Send a search for each number as soon as the one before is answered; return the answers."""
    answers: dict[int, tuple[int, Any]] = {}
    with closing(server.connect()) as connection:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return answers
            send_search(connection, number, seconds_of(number))
            answer = connection.response()
            answers[number] = answer.status, answer.json()


def seconds_of(number: int) -> float:
    """Every tenth search ends by itself at once, the others not before the test."""
    return 0 if number % 10 == 0 else 10 * PATIENCE


def counted(server: Server, are_there: Callable[[Counter[str]], bool]) -> Counter[str]:
    """Return the counts of searches, once they are those that a test waits for."""
    until = time.monotonic() + PATIENCE
    while True:
        counts = Counter(server.ask("/searches").json())
        if are_there(counts):
            return counts
        assert time.monotonic() < until, f"waited in vain, with {counts}"


def test_of_a_burst_of_searches_the_newest_answers_and_no_work_is_left(server: Server) -> None:
    newest = BURST - 1
    numbers, lock = iter(range(newest)), threading.Lock()
    with ThreadPoolExecutor(CONNECTIONS) as pool, closing(server.connect()) as connection:
        typing = [pool.submit(type_quickly, server, numbers, lock) for _ in range(CONNECTIONS)]
        # Which of those that are on their way together comes last, the server decides. It may be one that ends by itself.
        counted(server, lambda counts: counts["come"] == newest and counts["run"] <= 1)
        send_search(connection, newest, -1)
        answers = {number: answer for each in typing for number, answer in each.result(PATIENCE).items()}
        counts = counted(server, lambda counts: counts["come"] == BURST and counts["run"] <= 1)
        assert (counts["run"], counts["listed"], counts["begun"] - counts["ended"]) == (1, 1, 1)
        server.ask("/last", "", b"")
        answer = connection.response()
        assert (answer.status, answer.json()) == (200, str(newest))
    superseded = (499, {"detail": "superseded by a newer request"})
    for number in range(newest):
        assert answers[number] in ([superseded] if seconds_of(number) else [superseded, (200, str(number))])
    counts = counted(server, lambda counts: counts["run"] == counts["listed"] == counts["turns"] == 0)
    assert counts["begun"] == counts["ended"]
