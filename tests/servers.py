"""Real servers in subprocesses, and raw sockets to talk to them.

PYTEST_DONT_REWRITE: the test modules load this file as a plugin, so that a session has one `server` fixture for all of them.
"""

import http.client
import itertools
import json
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h2.connection
import h2.errors
import h2.events
import psutil
import pytest

from tests.machine import scaled
from tests.ports import free_port

ROOT = Path(__file__).parents[1]
APP = "tests.server_app:app"
DOORS = ("mw", "route", "deco", "dep", "tg", "event")
PATIENCE = scaled(20)
STARTUP = scaled(30)
RECORD = re.compile(r"^(?=\[|[A-Z]+:? )", re.MULTILINE)
COMPLAINT = re.compile(r"WARN|ERROR|CRITICAL|Traceback|Exception|Warning|never retrieved")
# hypercorn's own, on trio: a client closes while the empty end of its complete response is being sent.
SERVERS_FAULT = "trio.BusyResourceError: another task is currently sending"
_numbers = itertools.count()


@dataclass(frozen=True)
class Variant:
    """One way to serve, and where it differs from the others.

    `asks_for_bodies`: `100 Continue` goes out when the application reads, not as soon as the request arrives.
    `answers_half_closed`: a client that has shut down its sending side still gets the response. (To the application all
    of them report it as a disconnect.)
    """

    name: str
    command: str
    asks_for_bodies: bool = True
    answers_half_closed: bool = False
    app: str = APP
    ready: str = "/bare/work"
    """What it answers with 200 when it has started."""

    def arguments(self, port: int) -> list[str]:
        return [sys.executable, "-m", *self.command.format(port=port).split(), self.app]


UVICORN = "uvicorn --port {port} --no-access-log --timeout-graceful-shutdown 5"
HYPERCORN = "hypercorn -b 127.0.0.1:{port} -w 0 --backlog 1024"
VARIANTS = [
    Variant("uvicorn-h11-asyncio", f"{UVICORN} --http h11 --loop asyncio"),
    Variant("uvicorn-httptools-uvloop", f"{UVICORN} --http httptools --loop uvloop"),
    Variant("hypercorn-asyncio", f"{HYPERCORN} -k asyncio", asks_for_bodies=False, answers_half_closed=True),
    Variant("hypercorn-trio", f"{HYPERCORN} -k trio", asks_for_bodies=False, answers_half_closed=True),
    # granian 2.8.0 now and then waits for ever for a worker that has nothing left to do.
    Variant("granian", "granian --interface asgi --workers-kill-timeout 5 --port {port}"),
]


@dataclass
class Response:
    status: int
    headers: http.client.HTTPMessage
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """A client's socket: bytes out, responses in, and every way of leaving."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file: IO[bytes] = self.socket.makefile("rb")

    def send(self, *packets: bytes | memoryview) -> None:
        for packet in packets:
            self.socket.sendall(packet)

    def line(self) -> bytes:
        """The next line; empty if the server closes instead, abruptly or not."""
        with suppress(ConnectionResetError):
            return self._file.readline()
        return b""

    def head(self) -> Response:
        """The next head, be it interim or final; its body is still to be read."""
        line = self.line()
        assert line.startswith(b"HTTP/1.1 "), f"no response, but {line!r}"
        return Response(int(line.split()[1]), http.client.parse_headers(self._file))

    def response(self) -> Response:
        return self.finish(self.head())

    def finish(self, response: Response) -> Response:
        """Read the body that belongs to a head."""
        response.body = b"".join(self._body(response.headers))
        return response

    def _body(self, headers: http.client.HTTPMessage) -> Iterator[bytes]:
        if headers.get("transfer-encoding") != "chunked":
            yield self._exactly(int(headers["content-length"]))
            return
        while size := int(self._file.readline(), 16):
            yield self._exactly(size)
            assert self._file.readline() == b"\r\n"
        assert self._file.readline() == b"\r\n"

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        assert len(data) == size, f"the response is incomplete: {len(data)} bytes instead of {size}"
        return data

    def can_send(self) -> bool:
        return bool(select.select([], [self.socket], [], 0)[1])

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Hang up as a killed client does, with an RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._file.close()
        self.socket.close()


class Http2Connection:
    """A client's end of one HTTP/2 connection, whose requests can be reset one by one."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self._h2 = h2.connection.H2Connection()
        self._h2.initiate_connection()
        self._heads: dict[int, int] = {}
        self._bodies: dict[int, bytes] = {}
        self._ends: dict[int, str] = {}

    def send(self, target: str, key: str = "", /, **headers: str) -> int:
        """Send a GET; its number."""
        number = self._h2.get_next_available_stream_id()
        fields = {":method": "GET", ":path": target, ":scheme": "http", ":authority": "test", "x-id": key}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        self._h2.send_headers(number, list(fields.items()), end_stream=True)
        self._flush()
        return number

    def reset(self, *numbers: int) -> None:
        """Hang up on these requests, and on no other of the connection."""
        for number in numbers:
            self._h2.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
        self._flush()

    def body_begins(self, number: int) -> bytes:
        """Wait for the first bytes of a body."""
        while not self._bodies.get(number):
            self._read()
        return self._bodies[number]

    def response(self, number: int) -> tuple[int, bytes, str]:
        """Status, body and how the response has ended: `whole` or `cut`."""
        while number not in self._ends:
            self._read()
        return self._heads.get(number, 0), self._bodies.get(number, b""), self._ends[number]

    def _read(self) -> None:
        data = self.socket.recv(65536)
        assert data, "the server has closed the whole connection"
        for event in self._h2.receive_data(data):
            self._take(event)
        self._flush()

    def _take(self, event: Any) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            self._heads[event.stream_id] = int(dict(event.headers)[b":status"])
        elif isinstance(event, h2.events.DataReceived):
            self._bodies[event.stream_id] = self._bodies.get(event.stream_id, b"") + event.data
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self._ends[event.stream_id] = "whole"
        elif isinstance(event, h2.events.StreamReset):
            self._ends[event.stream_id] = "cut"

    def _flush(self) -> None:
        self.socket.sendall(self._h2.data_to_send())

    def close(self) -> None:
        self.socket.close()


def new_key() -> str:
    return f"request-{next(_numbers)}"


def request(target: str, key: str = "", body: bytes | None = None, /, **headers: str | int) -> bytes:
    """A request's bytes; it is a POST if it has a body, be it one that is only announced by `content_length`."""
    if body is not None:
        headers.setdefault("content_length", len(body))
    method = "POST" if "content_length" in headers else "GET"
    fields = {"host": "test", "x-id": key} | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode() + (body or b"")


class Server:
    """A server that runs; its log holds everything that it printed."""

    def __init__(self, variant: Variant, log: Path) -> None:
        self.variant = variant
        self.expected = {SERVERS_FAULT}
        """Parts of complaints that it may make."""
        self._log = log
        self.port = free_port()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                variant.arguments(self.port), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )
        self._wait_until_it_answers()

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + STARTUP
        while time.monotonic() < deadline:
            with suppress(OSError):
                assert self.ask(self.variant.ready).status == 200
                return
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout=0.05)
                raise RuntimeError(f"{self.variant.name} ended with {code}: {self.log()}")
        self.stop()
        raise RuntimeError(f"{self.variant.name} does not answer: {self.log()}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        return self._log.read_text()

    def complaints(self, since: int = 0) -> list[str]:
        """The records of the log, from this character on, that an operator would have to look at."""
        records = RECORD.split(self.log()[since:])
        return [
            record
            for record in records
            if COMPLAINT.search(record) and not any(part in record for part in self.expected)
        ]

    def rss(self) -> int:
        """Resident bytes, of the workers too where the server has any."""
        parent = psutil.Process(self.pid)
        total: int = sum(process.memory_info().rss for process in [parent, *parent.children(recursive=True)])
        return total

    def connect(self) -> Connection:
        return Connection(self.port)

    def ask(self, target: str, key: str = "", body: bytes | None = None, /, **headers: str | int) -> Response:
        """One request on a connection of its own."""
        with closing(self.connect()) as connection:
            connection.send(request(target, key, body, **headers))
            return connection.response()

    def journal(self, key: str, event: str, count: int = 1) -> list[str]:
        """The events of a request, as soon as this one is among them; it must come."""
        events: list[str] = self.ask(f"/journal/{key}?event={event}&count={count}").json()
        assert events.count(event) >= count, f"no {event} x {count} in {events}"
        return events

    def open_gate(self, key: str) -> None:
        assert self.ask(f"/gates/{key}", "", b"").status == 200

    def wait(self) -> None:
        self._process.wait(PATIENCE)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise


@contextmanager
def started(variant: Variant, folder: Path) -> Iterator[Server]:
    """Run a server in a process of its own, and stop it afterwards."""
    server = Server(variant, folder / "log")
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def without_complaints(server: Server, *expected: str) -> Iterator[Server]:
    """Fail if what happens inside makes the server complain, but for what is expected, here or inside.

    What was expected before still is, as some write their log late.
    """
    before = len(server.log())
    server.expected.update(expected)
    yield server
    complaints = server.complaints(before)
    assert not complaints, f"{server.variant.name} complains: {''.join(complaints)}"


@pytest.fixture(scope="session")
def start_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Variant], Server]]:
    """A function that starts a server for all modules: `conftest` gives the cases of one variant to one worker."""
    with ExitStack() as stack:
        running: dict[Variant, Server] = {}

        def start(variant: Variant) -> Server:
            if variant not in running:
                running[variant] = stack.enter_context(started(variant, tmp_path_factory.mktemp("server")))
            return running[variant]

        yield start


@pytest.fixture(scope="session", params=VARIANTS, ids=lambda variant: variant.name)
def shared_server(request: pytest.FixtureRequest, start_once: Callable[[Variant], Server]) -> Server:
    return start_once(request.param)


@pytest.fixture(scope="module")
def server(shared_server: Server) -> Iterator[Server]:
    with without_complaints(shared_server) as server:
        yield server


# Seconds that a handler works, long enough for its door to listen.
WORKING = "0.03"


def let_it_listen(server: Server) -> None:
    """Give the requests in flight the time after which they are listened to, on the server's own clock."""
    for _ in range(2):
        server.ask("/bare/work", x_before=WORKING)
