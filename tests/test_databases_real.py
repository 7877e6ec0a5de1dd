"""Blocking drivers, sessions and limits of statements with a real PostgreSQL, and what is left when a worker is killed."""

import signal
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import psycopg
import pytest
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from fastapi import Depends, FastAPI
from psycopg_pool import ConnectionPool
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from cancelable_deps import (
    Cancelable,
    RequestCancelable,
    RequestCancelationMiddleware,
    TimeoutCancelation,
)
from cancelable_deps.databases import cancelable_session, limit_statements
from tests.calls import running
from tests.database_worker import DRIVERS
from tests.machine import scaled
from tests.postgres import CEILING, driver_url, observer, postgres_server

pytestmark = [pytest.mark.anyio, pytest.mark.real]
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

SLEEP = "select pg_sleep(30)"
PID = "select pg_backend_pid()"
SOON = scaled(0.5)
LIMIT = scaled(4)
TIMES_IN_A_ROW = 3
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    with postgres_server() as found:
        yield found


@pytest.fixture
def name() -> str:
    return f"cancelable-{uuid.uuid4().hex}"


# Blocking drivers in threads. The observer talks asyncio only, so these look by themselves on both.


def pids(url: str, name: str) -> list[int]:
    with psycopg.connect(url, autocommit=True) as connection:
        found = connection.execute(
            "select pid from pg_stat_activity where application_name = %s and wait_event = 'PgSleep'", [name]
        )
        return [pid for (pid,) in found.fetchall()]


async def until_asleep(url: str, name: str, count: int) -> None:
    with anyio.fail_after(CEILING):
        while len(await anyio.to_thread.run_sync(pids, url, name)) != count:  # noqa: ASYNC110 - a server has no event
            await anyio.sleep(0.005)


def threaded(pool: ConnectionPool[Any]) -> FastAPI:
    app = FastAPI()

    def query(cancel: Cancelable) -> None:
        with pool.connection() as connection, cancel.interrupting(connection.cancel_safe):
            connection.execute(SLEEP)

    @app.get("/def")
    def in_the_thread(cancel: RequestCancelable) -> None:
        with cancel:
            query(cancel)

    @app.get("/async")
    async def in_the_loop(cancel: RequestCancelable) -> None:
        async with cancel:
            await cancel.run_in_thread(query, cancel)

    return app


@pytest.mark.parametrize("path", ["/def", "/async"])
async def test_a_hang_up_stops_the_query_of_a_thread(path: str, url: str, name: str) -> None:
    with ConnectionPool(url, kwargs={"application_name": name}, min_size=1, max_size=1, open=True) as pool:
        with pool.connection() as connection:
            before = connection.info.backend_pid
        for _ in range(TIMES_IN_A_ROW):
            async with running(threaded(pool), path) as call:
                await until_asleep(url, name, 1)
                await call.hang_up()
            assert call.status == 499
            await until_asleep(url, name, 0)
        with pool.connection() as connection:
            assert connection.info.backend_pid == before
        assert pool.get_stats().get("returns_bad", 0) == 0


def plain_sessions(engine: Any) -> FastAPI:
    app = FastAPI()
    session_of = cancelable_session(sessionmaker(engine))

    @app.get("/")
    def work(session: Annotated[Session, Depends(session_of, scope="function")], cancel: RequestCancelable) -> None:
        with cancel:
            connection: Any = session.connection().connection.driver_connection
            with cancel.interrupting(connection.cancel_safe):
                session.execute(text(SLEEP))

    return app


async def test_a_plain_session_is_as_good_as_new_after_a_hang_up(url: str, name: str) -> None:
    engine = create_engine(
        driver_url(url, "postgresql+psycopg"), pool_size=1, max_overflow=0, connect_args={"application_name": name}
    )
    with engine.connect() as connection:
        before = connection.scalar(text(PID))
    for _ in range(TIMES_IN_A_ROW):
        async with running(plain_sessions(engine), "/") as call:
            await until_asleep(url, name, 1)
            await call.hang_up()
        assert call.status == 499
    with engine.connect() as connection:
        assert connection.scalar(text(PID)) == before
    engine.dispose()


# Sessions


def engine_of(url: str, driver: str, name: str) -> AsyncEngine:
    arguments: dict[str, Any] = {"application_name": name}
    if driver == "asyncpg":
        arguments = {"server_settings": arguments}
    return create_async_engine(
        driver_url(url, f"postgresql+{driver}"), pool_size=1, max_overflow=0, pool_timeout=5, connect_args=arguments
    )


def sessions(engine: AsyncEngine) -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)
    session_of = cancelable_session(async_sessionmaker(engine))

    @app.get("/query")
    async def query(session: Annotated[AsyncSession, Depends(session_of, scope="function")]) -> None:
        await session.execute(text(SLEEP))

    @app.get("/idle")
    async def idle(session: Annotated[AsyncSession, Depends(session_of, scope="function")]) -> None:
        await session.execute(text(PID))
        await anyio.sleep(30)

    return app


@on_asyncio
@pytest.mark.parametrize("path", ["/query", "/idle"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_session_leaves_nothing_open_when_its_client_hangs_up(
    driver: str, path: str, url: str, name: str
) -> None:
    engine = engine_of(url, driver, name)
    async with observer(url, name) as watcher:
        for _ in range(TIMES_IN_A_ROW):
            async with running(sessions(engine), path) as call:
                await call.running()
                if path == "/query":
                    await watcher.until_running(1)
                await call.hang_up()
            assert call.status == 499
            await watcher.until_clear(anyio.current_time() + CEILING)
            async with engine.connect() as connection:
                assert await connection.scalar(text("select 1")) == 1
                state = await connection.scalar(
                    text("select count(*) from pg_stat_activity where application_name = :name"), {"name": name}
                )
                assert state == 1
        await engine.dispose()


class Proxy:
    """A way to the server that can stop to carry anything, as a network does that has failed."""

    def __init__(self, url: str) -> None:
        self._goal = make_url(url)
        self.open = anyio.Event()
        self.open.set()

    def block(self) -> None:
        self.open = anyio.Event()

    async def serve(self, client: SocketStream) -> None:
        async with client, await self._connect() as server, anyio.create_task_group() as tasks:
            tasks.start_soon(self._carry, client, server)
            await self._carry(server, client)
            tasks.cancel_scope.cancel()

    async def _connect(self) -> ByteStream:
        port = self._goal.port or 5432
        if self._goal.host is None:
            return await anyio.connect_unix(f"{self._goal.query['host']}/.s.PGSQL.{port}")
        return await anyio.connect_tcp(self._goal.host, port)

    async def _carry(self, source: ByteStream, goal: ByteStream) -> None:
        try:
            async for data in source:
                await self.open.wait()
                await goal.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    proxy = Proxy(url)
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, proxy.serve)
        port = listener.extra(SocketAttribute.local_port)
        yield proxy, make_url(url).set(host="127.0.0.1", port=port, query={}).render_as_string(hide_password=False)
        tasks.cancel_scope.cancel()


@on_asyncio
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_connection_without_an_answer_does_not_return_to_the_pool(
    driver: str, url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with proxied(url) as (proxy, by_proxy):
        engine = engine_of(by_proxy, driver, name)
        session_of = asynccontextmanager(cancelable_session(async_sessionmaker(engine)))
        before = 0
        with suppress(TimeoutCancelation):
            async with Cancelable(timeout=SOON, cleanup_grace=SOON), session_of() as session:
                before = await session.scalar(text(PID))
                proxy.block()
                await anyio.sleep(60)
        assert before
        assert "its connection is closed, and does not return to the pool" in caplog.text
        proxy.open.set()
        async with engine.connect() as connection:
            assert await connection.scalar(text(PID)) != before
        await engine.dispose()


# Limits that the server keeps


@asynccontextmanager
async def worker(*arguments: str) -> AsyncIterator[Any]:
    command = [sys.executable, "-m", "tests.database_worker", *arguments]
    async with await anyio.open_process(command, cwd=ROOT, stdout=None, stderr=None) as process:
        try:
            yield process
        finally:
            with anyio.CancelScope(shield=True):
                if process.returncode is None:
                    process.kill()
                await process.wait()


@on_asyncio
@pytest.mark.parametrize("driver", DRIVERS)
async def test_the_server_ends_the_query_of_a_killed_worker(driver: str, url: str, name: str) -> None:
    unlimited = f"{name}-unlimited"
    async with observer(url, name) as watcher, observer(url, unlimited) as other:
        async with worker(driver, url, name, f"{LIMIT}") as limited, worker(driver, url, unlimited) as free:
            await watcher.until_running(1)
            await other.until_running(1)
            for process in (limited, free):
                process.kill()
                assert await process.wait() == -signal.SIGKILL
        await watcher.until_clear(anyio.current_time() + LIMIT + CEILING)
        assert len(await other.running()) == 1


def limit_of(connection: psycopg.Connection[Any]) -> int:
    """Return the limit in milliseconds."""
    row = connection.execute("select setting::int from pg_settings where name = 'statement_timeout'").fetchone()
    assert row is not None
    return int(row[0])


@on_asyncio
async def test_where_a_limit_would_have_no_effect_it_is_refused(url: str) -> None:
    engine = create_engine(driver_url(url, "postgresql+psycopg"))
    async with Cancelable(timeout=60) as cancel:
        with psycopg.connect(url, autocommit=True) as connection:
            usual = limit_of(connection)
            with pytest.raises(RuntimeError, match="none is open"):
                limit_statements(connection, cancel)
            with connection.transaction():
                limit_statements(connection, cancel)
                assert 59_000 < limit_of(connection) <= 60_250
            assert limit_of(connection) == usual
        autocommitting = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        with autocommitting, pytest.raises(RuntimeError, match="none is open"):
            limit_statements(autocommitting, cancel)
    engine.dispose()
