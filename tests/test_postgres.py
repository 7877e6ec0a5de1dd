"""A cancelled request stops its query in a real PostgreSQL, and the pool that it came from stays whole."""

import gc
import itertools
import logging
import socket
import struct
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
import pytest
from anyio.abc import SocketAttribute, SocketStream
from starlette.types import ASGIApp, Message

from tests.machine import scaled
from tests.postgres import Observer, WebServer, lets_us_in, observer, postgres_server, uvicorn
from tests.postgres_app import (
    DATABASES,
    DOORS,
    WITH_CLEANUP,
    Database,
    PoolState,
    opened,
    pool_state,
    task_group_of_two,
)

pytestmark = [pytest.mark.anyio, pytest.mark.real]

TIMES_IN_A_ROW = 4
TIMEOUTS_IN_A_ROW = 2
HALF_A_SECOND = scaled(0.5)
# Long enough for the query to be seen running before its time is up, also by a busy machine.
TIMEOUT = scaled(0.8)

NO_SERVER = "postgresql://postgres@127.0.0.1:1/postgres"


ASYNCIO = "--http h11 --loop asyncio"
UVLOOP = "--http httptools --loop uvloop"
# Each driver meets each loop, once on its own and once under SQLAlchemy.
ON_UVICORN = {"sqlalchemy-asyncpg": UVLOOP, "sqlalchemy-psycopg": ASYNCIO, "asyncpg": ASYNCIO, "psycopg": UVLOOP}

Leave = Callable[[SocketStream], Awaitable[None]]

every_door = pytest.mark.parametrize("door", DOORS)
every_database = pytest.mark.parametrize("database", DATABASES)


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    with postgres_server() as found:
        yield found


@pytest.fixture
def anyio_backend() -> str:
    """The drivers talk asyncio and nothing else."""
    return "asyncio"


@dataclass
class Bench:
    """A pool of two connections to a real server, and somebody who watches what the server does for it."""

    database: Database
    watcher: Observer

    async def state(self) -> PoolState:
        """Both connections work, both at once, and the server knows of no third."""
        state = await pool_state(self.database)
        assert len(state.connections) == 2
        await self.watcher.until_connected(set(state.connections))
        return state


def new_name() -> str:
    """Ours alone, even on a server that other people's tests use at the same time."""
    return f"cancelable-{uuid.uuid4().hex}"


@asynccontextmanager
async def bench(url: str, make: Callable[[str, str], Database]) -> AsyncIterator[Bench]:
    name = new_name()
    async with observer(url, name) as watcher:
        database = make(url, name)
        async with opened(database):
            try:
                yield Bench(database, watcher)
            except BaseException:
                # Some pools wait for a query that runs on before they close.
                await watcher.end_all()
                raise


@dataclass
class Client:
    """One request over plain ASGI messages: its body is there at once, its end comes when we say so."""

    app: ASGIApp
    status: int | None = None
    left: anyio.Event = field(default_factory=anyio.Event)
    _asked: bool = False

    async def ask(self) -> None:
        await self.app(_scope(), self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]


def _scope() -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/work",
        "raw_path": b"/work",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"test")],
        "client": ("127.0.0.1", 1234),
        "server": ("127.0.0.1", 80),
    }


async def hang_up(app: ASGIApp, watcher: Observer, queries: int = 1) -> int | None:
    client = Client(app)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.ask)
        await watcher.until_running(queries)
        client.left.set()
        await watcher.until_clear(anyio.current_time() + HALF_A_SECOND)
    return client.status


async def time_out(app: ASGIApp, watcher: Observer) -> int | None:
    client = Client(app)
    deadline = anyio.current_time() + TIMEOUT
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.ask)
        await watcher.until_running(1)
        await watcher.until_clear(deadline + HALF_A_SECOND)
    return client.status


async def prove(
    make: Callable[[str, str], Database], door: str, url: str, *, timeout: float | None = None, status: int = 499
) -> None:
    """Cancelled requests in a row end with this status; the query of each is gone at once, the pool as it was."""
    end, times = (hang_up, TIMES_IN_A_ROW) if timeout is None else (time_out, TIMEOUTS_IN_A_ROW)
    async with bench(url, make) as work:
        app = DOORS[door](work.database, timeout)
        before = await work.state()
        assert [await end(app, work.watcher) for _ in range(times)] == [status] * times
        assert await work.state() == before
    # A task whose exception nobody saw complains when it is collected, to the loop, which must still be there to hear it.
    gc.collect()


@pytest.fixture
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nobody logs above INFO."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelno > logging.INFO] == []


@every_door
@every_database
@pytest.mark.usefixtures("silence")
async def test_a_hang_up_stops_the_query(door: str, database: str, url: str) -> None:
    await prove(DATABASES[database], door, url)


@every_door
@every_database
@pytest.mark.usefixtures("silence")
async def test_a_timeout_stops_the_query(door: str, database: str, url: str) -> None:
    await prove(DATABASES[database], door, url, timeout=TIMEOUT, status=504)


@every_door
@pytest.mark.parametrize("database", WITH_CLEANUP)
@pytest.mark.usefixtures("silence")
async def test_a_hang_up_stops_a_query_that_has_cleanup_around_it(door: str, database: str, url: str) -> None:
    await prove(WITH_CLEANUP[database], door, url)


@every_database
@pytest.mark.usefixtures("silence")
async def test_a_hang_up_stops_the_queries_of_two_tasks(database: str, url: str) -> None:
    async with bench(url, DATABASES[database]) as work:
        app = task_group_of_two(work.database)
        before = await work.state()
        assert [await hang_up(app, work.watcher, queries=2) for _ in range(TIMES_IN_A_ROW)] == [499] * TIMES_IN_A_ROW
        assert await work.state() == before


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
@every_database
@pytest.mark.usefixtures("silence")
async def test_a_hang_up_stops_the_query_under_uvloop(database: str, url: str) -> None:
    await prove(DATABASES[database], "middleware-over-base", url)


async def close(connection: SocketStream) -> None:
    await connection.aclose()


async def reset(connection: SocketStream) -> None:
    """Leave as a killed client does, with an RST."""
    connection.extra(SocketAttribute.raw_socket).setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    await connection.aclose()


async def hang_up_on(server: WebServer, door: str, leave: Leave, watcher: Observer) -> None:
    connection = await server.connect()
    await connection.send(f"GET /{door}/work HTTP/1.1\r\nhost: test\r\n\r\n".encode())
    await watcher.until_running(1)
    await leave(connection)
    await watcher.until_clear(anyio.current_time() + HALF_A_SECOND)


async def pool_of(server: WebServer) -> PoolState:
    async with httpx.AsyncClient() as client:
        return PoolState(**(await client.get(f"http://127.0.0.1:{server.port}/pool")).json())


@pytest.mark.parametrize(("database", "arguments"), ON_UVICORN.items())
async def test_a_hang_up_on_uvicorn_stops_the_query(database: str, arguments: str, url: str) -> None:
    name = new_name()
    environment = {"TEST_DATABASE": database, "TEST_URL": url, "TEST_NAME": name}
    application = "--factory tests.postgres_app:from_environment"
    async with observer(url, name) as watcher, uvicorn(f"{arguments} {application}", environment) as server:
        before = await pool_of(server)
        for door, leave in itertools.product(DOORS, (close, reset)):
            await hang_up_on(server, door, leave, watcher)
        assert await pool_of(server) == before
    assert [line for line in server.log if not line.startswith("INFO")] == []
    assert len([line for line in server.log if line.startswith("INFO cancelable_deps")]) == 2 * len(DOORS)


async def test_a_plain_scope_costs_the_pool_a_connection(url: str) -> None:
    """Why we are polite: anyio alone cancels again at once, and that interrupts the driver's talk with the server.

    Whether the query runs on is a race then; that the pool throws the connection away is not.
    """
    async with bench(url, DATABASES["psycopg"]) as work:
        before = await work.state()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work.database.work())
            await work.watcher.until_running(1)
            tasks.cancel_scope.cancel()
        assert (await pool_state(work.database)).kept != before.kept


async def test_a_machine_without_a_server_gets_one_of_our_own() -> None:
    with postgres_server([NO_SERVER]) as url:
        for database in DATABASES:
            await prove(DATABASES[database], "decorator", url)
    assert not lets_us_in(url)


def test_the_named_server_comes_before_our_own(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = url.replace("postgresql", "postgresql+asyncpg")
    monkeypatch.setenv("DATABASE_URL", named)
    with postgres_server() as taken:
        assert taken == url


def test_another_kind_of_database_is_passed_over(url: str) -> None:
    assert lets_us_in(url)
    assert not lets_us_in(url.replace("postgresql", "mysql"))
    assert not lets_us_in("not a URL")
