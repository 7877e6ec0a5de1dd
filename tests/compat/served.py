"""A uvicorn in a subprocess that serves one of the applications in `tests.compat.apps`, and what it printed."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tests.machine import scaled
from tests.servers import COMPLAINT, RECORD, ROOT, Connection, Response, new_key, request

CEILING = scaled(20)
"""Seconds that a server on a busy machine may take for what a test waits for; reached only by a failure."""
STARTUP = scaled(50)
"""The same for its start, which imports much."""
STEP = 0.01


class Served:
    """A server that runs. Each line ``EVENT key words`` of its log is something that the application says happened."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.expected: set[str] = set()
        """Parts of complaints that it may make."""
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.compat.serve", name],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            self.port = int(self._line_of("server", "listening on (.*)", ceiling=STARTUP))
        except BaseException:
            self._process.kill()
            self._process.communicate()
            raise

    def log(self) -> str:
        return self._log.read_text()

    def events(self, key: str) -> list[str]:
        return re.findall(rf"^EVENT {re.escape(key)} (.*)$", self.log(), re.MULTILINE)

    def wait_for(self, key: str, *words: str, count: int = 1) -> list[str]:
        """The events of ``key``, as soon as all of ``words`` are among them; they must come."""
        for word in words:
            self._line_of(key, re.escape(word) + "()", count)
        return self.events(key)

    def _line_of(self, key: str, pattern: str, count: int = 1, ceiling: float = CEILING) -> str:
        end = time.monotonic() + ceiling
        while True:
            found = [match[1] for match in (re.fullmatch(pattern, event) for event in self.events(key)) if match]
            if len(found) >= count:
                return found[-1]
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError(
                    f"no {pattern!r} x {count} of {key}, but {self.events(key)}; the log ends:\n{self.log()[-1500:]}"
                )
            time.sleep(STEP)

    def complaints(self) -> list[str]:
        """The records of the log that an operator would have to look at."""
        return [
            record
            for record in RECORD.split(self.log())
            if COMPLAINT.search(record) and not record.startswith("EVENT ")
            if not any(part in record for part in self.expected)
        ]

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        with closing(Connection(self.port)) as connection:
            yield connection

    def open(self, *packets: bytes) -> Connection:
        """A connection on which these have been sent; the caller closes it."""
        connection = Connection(self.port)
        connection.send(*packets)
        return connection

    def ask(self, target: str, key: str = "", body: bytes | None = None, /, **headers: str | int) -> Response:
        with self.connect() as connection:
            connection.send(request(target, key, body, **headers))
            return connection.response()

    def hang_up(self, target: str, body: bytes | None = None, /, *, after: str, **headers: str | int) -> str:
        """Send a request, reset its connection when the application has said ``after``, and return its key."""
        key = new_key()
        connection = Connection(self.port)
        connection.send(request(target, key, body, **headers))
        self.wait_for(key, after)
        connection.reset()
        return key

    def read_until_closed(self, target: str, key: str) -> bytes:
        """Everything that comes in answer to a request, until the response is complete or the server closes."""
        with self.connect() as connection:
            connection.send(request(target, key, connection="close"))
            received = []
            with suppress(ConnectionResetError):
                while data := connection.socket.recv(65536):
                    received.append(data)
            return b"".join(received)

    def answer_of_its_end(self, key: str, packets: bytes) -> Response:
        """What a request is answered whose work has started when the server is told to stop; the server ends."""
        with self.connect() as connection:
            connection.send(packets)
            self.wait_for(key, "started")
            self.begin_to_stop()
            response = connection.response()
        self.wait()
        return response

    def tell(self, line: str) -> None:
        """Write to the server's standard input, which needs no connection: it takes none when it stops."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def begin_to_stop(self) -> None:
        self._process.terminate()

    def wait(self) -> None:
        self._process.wait(CEILING)

    def stop(self) -> None:
        self.begin_to_stop()
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            assert self._process.stdin is not None
            self._process.stdin.close()


def is_whole(raw: bytes) -> bool:
    """Whether a chunked response came to its regular end."""
    return raw.endswith(b"0\r\n\r\n")
