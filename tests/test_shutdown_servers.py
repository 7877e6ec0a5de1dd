"""Real signals to real servers: who is told, who is answered, and that the server ends by itself."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path

import pytest
import uvicorn

from tests.machine import scaled
from tests.ports import free_port
from tests.servers import COMPLAINT, RECORD, ROOT, Connection, Response, request
from tests.socket_client import SocketClient

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.platform == "win32", reason="the servers and signals of Unix"),
]

APP = "tests.shutdown_app:app"
CEILING = scaled(25)
UVICORN = "uvicorn --port {port}"
# uvicorn gives a new worker five seconds to be up; where that takes longer, it calls a reload off, and tells nobody.
PATIENT = f"--timeout-worker-healthcheck {CEILING:.0f}"
WORKERS = "--workers 2 " + (PATIENT if "timeout_worker_healthcheck" in signature(uvicorn.Config).parameters else "")
HYPERCORN = "hypercorn -b 127.0.0.1:{port} --graceful-timeout 10"
GUNICORN = "gunicorn -b 127.0.0.1:{port} --no-control-socket"
SERVERS = {
    "uvicorn-h11-asyncio": f"{UVICORN} --http h11 --loop asyncio",
    "uvicorn-httptools-uvloop": f"{UVICORN} --http httptools --loop uvloop",
    "uvicorn-workers": f"{UVICORN} {WORKERS}",
    "uvicorn-reload": f"{UVICORN} --reload --reload-dir tests",
    "hypercorn-asyncio": f"{HYPERCORN} -w 0 -k asyncio",
    "hypercorn-uvloop": f"{HYPERCORN} -w 0 -k uvloop",
    "hypercorn-trio": f"{HYPERCORN} -w 0 -k trio",
    "granian": "granian --interface asgi --port {port}",
    "granian-workers": "granian --interface asgi --port {port} --workers 2",
    "gunicorn-uvicorn": f"{GUNICORN} -k uvicorn_worker.UvicornWorker",
    "gunicorn-asgi": f"{GUNICORN} -k asgi",
    "gunicorn-asgi-asyncio": f"{GUNICORN} -k asgi --asgi-loop asyncio --workers 2",
}
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Each has a test of its own below.
OTHERWISE = {
    ("hypercorn-trio", signal.SIGTERM),
    ("gunicorn-uvicorn", signal.SIGINT),
    ("gunicorn-asgi", signal.SIGINT),
    ("gunicorn-asgi-asyncio", signal.SIGINT),
}
USUAL = [(name, number) for name in SERVERS for number in SIGNALS if (name, number) not in OTHERWISE]


class Server:
    """A server in a process group of its own, until it ends or the test does."""

    def __init__(self, command: str, log: Path, **environment: str) -> None:
        self._log = log
        self._port = free_port()
        self._connections: list[Connection] = []
        arguments = [sys.executable, "-m", *command.format(port=self._port).split(), APP]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
            )

    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, line: str, count: int = 1) -> None:
        deadline = time.monotonic() + CEILING
        while self.log().count(line) < count:
            assert self.process.poll() is None, f"the server has ended without {line!r}: {self.log()}"
            assert time.monotonic() < deadline, f"no {line!r}: {self.log()}"
            time.sleep(0.01)

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + CEILING
        while time.monotonic() < deadline:
            with suppress(OSError):
                assert self.begin("/").response().status == 200
                return
            time.sleep(0.01)
        raise AssertionError(f"no answer: {self.log()}")

    def begin(self, target: str, body: bytes | None = None) -> Connection:
        connection = Connection(self._port)
        self._connections.append(connection)
        connection.send(request(target, "", body, connection="close"))
        return connection

    def ask(self, target: str, body: bytes | None = None) -> Response:
        return self.begin(target, body).response()

    def begin_and_see(self, name: str, target: str) -> Connection:
        connection = self.begin(target)
        self.wait_for(f"{name} started")
        return connection

    def begin_socket_and_see(self, name: str, target: str) -> SocketClient:
        client = SocketClient(self._port, target)
        self._connections.append(client)
        assert client.accepted()
        self.wait_for(f"{name} started")
        return client

    def ended(self) -> int:
        return self.process.wait(CEILING)

    def journal(self) -> list[str]:
        return re.findall(r"^INFO journal: (.*)$", self.log(), re.MULTILINE)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def complaints(self) -> list[str]:
        # The start-up check complains, rightly, of hypercorn on trio.
        records = [record for record in RECORD.split(self.log()) if "shutdown-unheard (hypercorn)" not in record]
        return [record for record in records if COMPLAINT.search(record)]


@contextmanager
def serving(command: str, tmp_path: Path, **environment: str) -> Iterator[Server]:
    server = Server(command, tmp_path / "log", **environment)
    try:
        server.wait_until_it_answers()
        # All of them: granian's worker ignores a signal that comes before it is up, and lives on.
        server.wait_for("is up", 2 if "--workers 2" in command else 1)
        yield server
    finally:
        server.close()


@pytest.mark.parametrize(("name", "number"), USUAL, ids=[f"{name}-{number.name}" for name, number in USUAL])
def test_a_signal(name: str, number: signal.Signals, tmp_path: Path) -> None:
    with serving(SERVERS[name], tmp_path) as server:
        told = server.begin_and_see("told", "/mw/told")
        endless = server.begin_and_see("endless", "/mw/endless")
        decorated = server.begin_and_see("decorated", "/decorated")
        background = server.begin_and_see("background", "/mw/background")
        events = server.begin_and_see("events", "/events")
        socket = server.begin_socket_and_see("socket", "/socket")
        server.process.send_signal(number)
        assert told.response().json().startswith("signal: SIG")
        assert background.response().json() == "done"
        for connection in (endless, decorated):
            response = connection.response()
            assert (response.status, response.headers["retry-after"]) == (503, "7")
        assert b'event: cancelled\ndata: {"reason": "signal", ' in events.response().body
        if name.startswith("granian"):
            # It drops them at once, and tells neither side why.
            assert socket.line() == b""
        else:
            assert socket.closed()[0] == 1012
        assert server.ended() in (0, -number)
        journal = server.journal()
        assert journal.index("background cancelled") > max(
            journal.index(f"{name} cancelled") for name in ("endless", "decorated", "events", "socket")
        )
        assert journal[-1] == "lifespan ended"
        assert not server.complaints()


@pytest.mark.parametrize("name", ["uvicorn-workers", "uvicorn-reload", "granian-workers", "gunicorn-asgi"])
def test_a_signal_to_the_whole_group(name: str, tmp_path: Path) -> None:
    """As systemd sends it, and a terminal: the worker gets it twice, once from its parent."""
    with serving(SERVERS[name], tmp_path) as server:
        told = server.begin_and_see("told", "/mw/told")
        endless = server.begin_and_see("endless", "/mw/endless")
        os.killpg(server.process.pid, signal.SIGTERM)
        assert told.response().status == 200
        assert endless.response().status == 503
        server.ended()
        assert not server.complaints()


@pytest.mark.parametrize("name", ["uvicorn-workers", "granian", "gunicorn-asgi", "gunicorn-uvicorn"])
def test_a_reload_by_signal_drains_the_old_worker(name: str, tmp_path: Path) -> None:
    with serving(SERVERS[name], tmp_path) as server:
        told = server.begin_and_see("told", "/mw/told")
        endless = server.begin_and_see("endless", "/mw/endless")
        before = server.log().count("is up")
        server.process.send_signal(signal.SIGHUP)
        assert told.response().json() == "signal: SIGTERM"
        assert endless.response().status == 503
        server.wait_for("lifespan ended")
        server.wait_for("is up", before + 1)
        assert server.ask("/").status == 200
        assert not server.complaints()


def test_an_order_by_http_lets_the_server_live(tmp_path: Path) -> None:
    with serving(SERVERS["uvicorn-h11-asyncio"], tmp_path, REFUSE_NEW="1", GRACE="20") as server:
        told = server.begin_and_see("told", "/mw/told")
        assert server.ask("/shutdown", b"").json() is True
        assert told.response().json() == "signal: by order"
        refused = server.ask("/mw/")
        assert (refused.status, refused.headers["retry-after"]) == (503, "7")
        assert server.ask("/").status == 200
        server.process.terminate()
        assert server.ended() == -signal.SIGTERM
        assert not server.complaints()


def test_a_second_sigint_still_forces_uvicorn_to_end(tmp_path: Path) -> None:
    # On asyncio, since Python 3.12, uvicorn waits for its connections all the same, also without us.
    with serving(SERVERS["uvicorn-httptools-uvloop"], tmp_path, GRACE="60") as server:
        server.begin_and_see("endless", "/mw/endless")
        server.process.send_signal(signal.SIGINT)
        server.wait_for("shutdown begins")
        server.process.send_signal(signal.SIGINT)
        server.ended()


def test_uvicorns_own_grace_must_outlast_ours(tmp_path: Path) -> None:
    command = f"{SERVERS['uvicorn-h11-asyncio']} --timeout-graceful-shutdown 1"
    with serving(command, tmp_path, GRACE="60") as server:
        endless = server.begin_and_see("endless", "/mw/endless")
        server.process.terminate()
        # A 500 or nothing at all; what it is not is ours.
        assert b"503" not in endless.line()
        server.ended()


def test_hypercorn_on_trio_is_killed_by_sigterm(tmp_path: Path) -> None:
    with serving(SERVERS["hypercorn-trio"], tmp_path) as server:
        told = server.begin_and_see("told", "/mw/told")
        server.process.terminate()
        assert told.line() == b""
        assert server.ended() == -signal.SIGTERM


def test_hypercorn_on_trio_with_a_handler_of_ones_own(tmp_path: Path) -> None:
    with serving(SERVERS["hypercorn-trio"], tmp_path, SIGTERM_AS_SIGINT="1") as server:
        told = server.begin_and_see("told", "/mw/told")
        endless = server.begin_and_see("endless", "/mw/endless")
        server.process.terminate()
        assert told.response().json() == "signal: SIGTERM"
        assert endless.response().status == 503
        assert server.ended() == 0


def test_hypercorn_does_not_tell_its_workers(tmp_path: Path) -> None:
    command = "hypercorn -b 127.0.0.1:{port} --graceful-timeout 1 -w 1"
    with serving(command, tmp_path) as server:
        told = server.begin_and_see("told", "/mw/told")
        server.process.terminate()
        # Cut after hypercorn's own grace; on Python 3.12 and later it waits for its connections without limit.
        told.socket.settimeout(2)
        with suppress(TimeoutError):
            assert not re.search(b" (200|503) ", told.line())
        told.close()
        server.ended()
        assert "signal: SIG" not in server.log()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_gunicorns_quick_end_leaves_no_time(number: signal.Signals, tmp_path: Path) -> None:
    with serving(SERVERS["gunicorn-asgi"], tmp_path) as server:
        endless = server.begin_and_see("endless", "/mw/endless")
        server.process.send_signal(number)
        assert endless.line() == b""
        server.ended()
        assert "shutdown begins" not in server.log()


def test_gunicorn_with_uvicorns_worker_is_killed_in_a_quick_end(tmp_path: Path) -> None:
    command = f"{SERVERS['gunicorn-uvicorn']} --graceful-timeout 1"
    with serving(command, tmp_path) as server:
        endless = server.begin_and_see("endless", "/mw/endless")
        server.process.send_signal(signal.SIGINT)
        assert endless.line() == b""
        server.ended()
        assert "shutdown begins" not in server.log()
