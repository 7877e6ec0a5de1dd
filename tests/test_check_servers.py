"""The start-up check under real servers, whose settings it reads."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.machine import scaled
from tests.ports import free_port

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"^(?:WARNING|INFO):cancelable_deps:(\S+) \(([^)]*)\)", re.MULTILINE)
PATIENCE = scaled(30)

UVICORN = "uvicorn --port {port} tests.check_app:app"
HYPERCORN = "hypercorn -b 127.0.0.1:{port} tests.check_app:app"
GUNICORN = "gunicorn -b 127.0.0.1:{port} tests.check_app:app"
GRANIAN = "granian --interface asgi --port {port} tests.check_app:app"


class Running:
    """A server that runs."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self._log = log

    def log(self) -> str:
        return self._log.read_text()

    def findings(self) -> set[tuple[str, str]]:
        """What was found at the start: codes and places; the same for each worker."""
        return set(LINE.findall(self.log()))

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + PATIENCE
        while text not in self.log():
            assert time.monotonic() < until, self.log()
            time.sleep(0.02)

    def answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5) as response:
            return bool(response.status == 200)
        return False


@contextmanager
def serving(command: str, folder: Path, **environment: str) -> Iterator[Running]:
    port = free_port()
    program, *rest = command.format(port=port).split()
    running = Running(port, folder / "log")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(
            [Path(sys.executable).with_name(program), *rest],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + PATIENCE
        while not running.answers():
            assert process.poll() is None, running.log()
            assert time.monotonic() < until, running.log()
            time.sleep(0.05)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


# The application needs 1 + 1 + 2 seconds.
GRACES = [
    pytest.param(f"{UVICORN} --timeout-graceful-shutdown 3", {("server-grace", "uvicorn")}, id="uvicorn, too short"),
    pytest.param(f"{UVICORN} --timeout-graceful-shutdown 4", set(), id="uvicorn"),
    pytest.param(UVICORN, set(), id="uvicorn without a limit"),
    pytest.param(f"{HYPERCORN} -w 0", {("server-grace", "hypercorn")}, id="hypercorn, too short"),
    pytest.param(f"{HYPERCORN} -w 0 --graceful-timeout 4", set(), id="hypercorn"),
    pytest.param(f"{HYPERCORN} -w 0 -k uvloop --graceful-timeout 4", set(), id="hypercorn, uvloop"),
    pytest.param(
        f"{HYPERCORN} -w 1 --graceful-timeout 4", {("shutdown-unheard", "hypercorn")}, id="hypercorn with a worker"
    ),
    pytest.param(
        f"{HYPERCORN} -w 0 -k trio", {("server-grace", "hypercorn"), ("shutdown-unheard", "hypercorn")}, id="trio"
    ),
    pytest.param(
        f"{GUNICORN} -k asgi --graceful-timeout 3",
        {("server-grace", "gunicorn")},
        id="gunicorn, too short",
    ),
    pytest.param(f"{GUNICORN} -k asgi", set(), id="gunicorn"),
    pytest.param(
        f"{GUNICORN} -k uvicorn_worker.UvicornWorker --graceful-timeout 3",
        {("server-grace", "gunicorn")},
        id="gunicorn with uvicorn, too short",
    ),
    pytest.param(f"{GUNICORN} -k uvicorn_worker.UvicornWorker", set(), id="gunicorn with uvicorn"),
    pytest.param(GRANIAN, set(), id="granian, which a worker cannot ask"),
]


@pytest.mark.parametrize(("command", "expected"), GRACES)
def test_the_grace_of_the_server(command: str, expected: set[tuple[str, str]], tmp_path: Path) -> None:
    with serving(command, tmp_path) as server:
        assert server.findings() == expected


def test_a_signal_that_trio_is_told_of(tmp_path: Path) -> None:
    with serving(f"{HYPERCORN} -w 0 -k trio --graceful-timeout 4", tmp_path, SIGTERM_IS_SIGINT="1") as server:
        assert server.findings() == set()


WORKERS = [
    pytest.param(f"{UVICORN} --workers 2", id="uvicorn"),
    pytest.param(f"{GUNICORN} -k asgi -w 2", id="gunicorn"),
    pytest.param(f"{GUNICORN} -k uvicorn_worker.UvicornWorker -w 2", id="gunicorn with uvicorn"),
    pytest.param(f"{HYPERCORN} -w 2 --graceful-timeout 4", id="hypercorn"),
]


@pytest.mark.parametrize("command", WORKERS)
def test_several_workers(command: str, tmp_path: Path) -> None:
    with serving(command, tmp_path, OPERATIONS="1") as server:
        assert ("memory-with-workers", "operations") in server.findings()


def test_one_worker(tmp_path: Path) -> None:
    with serving(UVICORN, tmp_path, OPERATIONS="1") as server:
        assert server.findings() == set()


@pytest.mark.parametrize(("period", "expected"), [(1, "interrupted"), (2, "whole")])
def test_the_grace_of_a_server_that_cancels_itself(period: int, expected: str, tmp_path: Path) -> None:
    command = f"{GUNICORN} -k asgi --asgi-disconnect-grace-period {period}"
    with serving(command, tmp_path) as server:
        found = {("disconnect-grace", "gunicorn")} if expected == "interrupted" else set()
        assert server.findings() == found
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"GET /cleanup HTTP/1.1\r\nhost: x\r\n\r\n")
            server.wait_for("work: begun")
        server.wait_for("cleanup: ")
        assert f"cleanup: {expected}" in server.log()


@pytest.mark.parametrize(("handle", "expected"), [("HANDLE", {("handle-without-door", "/stream")}), ("DOOR", set())])
def test_a_handle_under_granian(handle: str, expected: set[tuple[str, str]], tmp_path: Path) -> None:
    with serving(GRANIAN, tmp_path, **{handle: "1"}) as server:
        assert server.findings() == expected
