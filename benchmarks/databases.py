"""What each database driver does when a request ends, measured on real servers: `python -m benchmarks.databases [WAY]`.

For every way to reach a database an application is started on uvicorn, with a pool of one connection. Its long query is
watched on the server, not in the client, while the client hangs up, the time is up, the server of the application is
told to stop, and its process is killed. A cell says whether the query has stopped within three seconds, what has become
of the connection (the same one is used again, or another one, or none answers), and what was logged from WARNING on.

Needs the dependency group `databases`, PostgreSQL (5432), MariaDB or MySQL (3306) and Redis (6379) on 127.0.0.1. What is
not there is said so. MongoDB is not measured: `pymongo` would need a server that this project does not start.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg

from ._databases_app import MYSQL, POSTGRES, WAYS

CEILING = 3.0
STARTUP = 30.0
PAUSE = 0.005
EVENTS = ("hang-up", "timeout", "shutdown", "kill -9")
NO_SERVER = ["pymongo, async (not measured: there is no server)"]


class Server:
    """Looks at what runs in a database server for one application."""

    def __init__(self, name: str) -> None:
        self.name = name

    def runs(self) -> bool:
        """Return whether the long query runs."""
        raise NotImplementedError

    def connections(self) -> set[Any]:
        """Return the connections of the application."""
        raise NotImplementedError


class Postgres(Server):
    def __init__(self, name: str, process: psutil.Process) -> None:
        super().__init__(name)
        self._connection = psycopg.connect(POSTGRES, autocommit=True)

    def _pids(self, state: str) -> set[Any]:
        query = "select pid from pg_stat_activity where application_name = %s and state like %s"
        return {pid for (pid,) in self._connection.execute(query, [self.name, state]).fetchall()}

    def runs(self) -> bool:
        return bool(self._pids("active"))

    def connections(self) -> set[Any]:
        return self._pids("%")


class Mysql(Server):
    def __init__(self, name: str, process: psutil.Process) -> None:
        super().__init__(name)
        self._connection: Any = import_module("pymysql").connect(**MYSQL)

    def _ids(self, condition: str) -> set[Any]:
        with self._connection.cursor() as cursor:
            cursor.execute(f"select id from information_schema.processlist where {condition} and id <> connection_id()")
            return {row[0] for row in cursor.fetchall()}

    def runs(self) -> bool:
        return bool(self._ids(f"info like '%/* {self.name} */%'"))

    def connections(self) -> set[Any]:
        return self._ids("db = 'test'")


class Redis(Server):
    def __init__(self, name: str, process: psutil.Process) -> None:
        super().__init__(name)
        self._client: Any = import_module("redis").Redis()

    def _clients(self) -> list[dict[str, str]]:
        return [client for client in self._client.client_list() if client["name"] == self.name]

    def runs(self) -> bool:
        return any("b" in client["flags"] for client in self._clients())

    def connections(self) -> set[Any]:
        return {client["id"] for client in self._clients()}


class Sqlite(Server):
    """There is no server: a thread of the application computes, which is seen within 0.2 seconds."""

    def __init__(self, name: str, process: psutil.Process) -> None:
        super().__init__(name)
        self._process = process

    def runs(self) -> bool:
        try:
            return self._process.cpu_percent(0.2) > 15
        except psutil.Error:
            return False

    def connections(self) -> set[Any]:
        return set()


def kind_of(way: str) -> Callable[[str, psutil.Process], Server]:
    if "mysql" in way.lower() or way == "asyncmy":
        return Mysql
    if "sqlite" in way:
        return Sqlite
    return Redis if "redis" in way else Postgres


@dataclass
class Application:
    """An application in a process of its own."""

    process: subprocess.Popen[str]
    server: Server
    lines: list[str] = field(default_factory=list)
    port: int = 0

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])

    def ask(self, path: str) -> socket.socket:
        """Send a request, and return its connection when the query runs."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(f"GET /{path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
        if not until(self.server.runs):
            raise RuntimeError(f"the query never ran: {self.lines[-5:]}")
        return connection

    def short(self) -> bool:
        """Return whether a short query is answered."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/short", timeout=CEILING).status_code == 200
        except httpx.HTTPError:
            return False

    def logged(self) -> str:
        """Return what was logged and not yet returned."""
        time.sleep(0.1)
        found = [
            line.removeprefix("LOGGED ") for line in self.lines if line.startswith(("LOGGED", "ERROR", "Traceback"))
        ]
        self.lines.clear()
        return "; ".join(dict.fromkeys(line[:90] for line in found))


def until(reached: Callable[[], bool]) -> bool:
    ends = time.monotonic() + CEILING
    while not (done := reached()) and time.monotonic() < ends:
        time.sleep(PAUSE)
    return done


@contextmanager
def started(way: str, **environment: str) -> Iterator[Application]:
    name = f"matrix-{uuid.uuid4().hex[:12]}"
    command = [sys.executable, "-m", "uvicorn", "--port", "0", "--log-level", "info", "--no-access-log", "--factory"]
    process = subprocess.Popen(
        [*command, "benchmarks._databases_app:application"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"WAY": way, "NAME": name} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    reader: threading.Thread | None = None
    try:
        application = Application(process, kind_of(way)(name, psutil.Process(process.pid)))
        reader = threading.Thread(target=application.read)
        reader.start()
        ends = time.monotonic() + STARTUP
        while not application.port:
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(" ".join(application.lines[-2:]))
            time.sleep(PAUSE)
        yield application
    finally:
        process.kill()
        process.wait()
        if reader is not None:
            reader.join()


def stopped(application: Application, before: set[Any]) -> str:
    since = time.monotonic()
    done = until(lambda: not application.server.runs())
    took = time.monotonic() - since
    cell = f"stops, {took * 1000:.0f} ms" if done else "**runs on**"
    if not application.short():
        pool = "**blocked**"
    elif not before:
        pool = "works"
    else:
        pool = "kept" if application.server.connections() == before else "replaced"
    return f"{cell}; connection {pool}; {said(application)}"


def said(application: Application) -> str:
    logged = application.logged()
    return f"logged: `{logged}`" if logged else "nothing logged"


def hang_up(application: Application) -> str:
    before = first(application)
    application.ask("long").close()
    return stopped(application, before)


def time_is_up(application: Application) -> str:
    before = first(application)
    with closing(application.ask("limited")) as connection:
        connection.settimeout(2 * CEILING)
        try:
            status = connection.recv(100).split()[1].decode()
        except TimeoutError:
            status = "no answer"
    return f"{status}; {stopped(application, before)}"


def first(application: Application) -> set[Any]:
    if not application.short():
        raise RuntimeError(f"no query works: {application.lines[-5:]}")
    application.logged()
    return application.server.connections()


def end(how: signal.Signals, path: str) -> Callable[[Application], str]:
    def event(application: Application) -> str:
        first(application)
        with closing(application.ask(path)):
            since = time.monotonic()
            application.process.send_signal(how)
            done = until(lambda: not application.server.runs())
            cell = f"stops, {(time.monotonic() - since) * 1000:.0f} ms" if done else "**runs on**"
            try:
                application.process.wait(2 * CEILING)
            except subprocess.TimeoutExpired:
                cell += "; the process **does not end**"
        return f"{cell}; {said(application)}" if how is signal.SIGTERM else cell

    return event


def measured(way: str, limit: bool = False) -> Iterator[str]:
    """Yield the cells of one row."""
    path = "limited" if limit else "long"
    events = (hang_up, time_is_up, end(signal.SIGTERM, path), end(signal.SIGKILL, path))
    for event in events:
        try:
            with started(way, **({"LIMITED": "1"} if limit else {})) as application:
                yield event(application)
        except (RuntimeError, OSError, psycopg.Error, ImportError) as exc:
            yield f"not measured: {str(exc)[-120:]}"


def main() -> None:
    ways = sys.argv[1:] or list(WAYS)
    print("| way | " + " | ".join(EVENTS) + " |")
    print("| --- " * (1 + len(EVENTS)) + "|")
    for way in ways:
        print(f"| {way} | " + " | ".join(measured(way)) + " |", flush=True)
        if way == "asyncpg":
            print("| asyncpg, `limit_statements` | " + " | ".join(measured(way, limit=True)) + " |", flush=True)
    for way in NO_SERVER:
        print(f"| {way} |" + " - |" * len(EVENTS))


if __name__ == "__main__":
    main()
