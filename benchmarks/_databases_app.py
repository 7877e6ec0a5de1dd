"""The application that `benchmarks.databases` measures: one way to reach a database, chosen by the environment."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from importlib import import_module
from typing import Any

from fastapi import FastAPI
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from cancelable_deps import Cancelable, RequestCancelable, RequestCancelationMiddleware, cancelation_lifespan
from cancelable_deps.databases import cancelable_session, limit_statements

POSTGRES = "postgresql://postgres@127.0.0.1:5432/test"
MYSQL: dict[str, Any] = {"host": "127.0.0.1", "user": "root", "password": "", "port": 3306}
FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
SECONDS = 20
TIMEOUT = 1.5

Work = Callable[[Cancelable, bool], Awaitable[object]]
"""Asks for a long query, or a short one if the flag is true."""


def postgres(is_short: bool) -> str:
    return f"select pg_sleep({0 if is_short else SECONDS})"


def mysql(name: str, is_short: bool) -> str:
    return f"select /* {name} */ sleep({0 if is_short else SECONDS})"


@asynccontextmanager
async def asyncpg_pool(name: str) -> AsyncIterator[Work]:
    asyncpg = import_module("asyncpg")
    async with asyncpg.create_pool(
        POSTGRES, min_size=1, max_size=1, server_settings={"application_name": name}
    ) as pool:

        async def work(cancel: Cancelable, is_short: bool) -> None:
            async with pool.acquire() as connection, connection.transaction():
                if "LIMITED" in os.environ:
                    await limit_statements(connection, cancel)
                await connection.execute(postgres(is_short))

        yield work


@asynccontextmanager
async def psycopg_pool(name: str) -> AsyncIterator[Work]:
    kind = import_module("psycopg_pool").AsyncConnectionPool
    async with kind(POSTGRES, min_size=1, max_size=1, kwargs={"application_name": name}, open=False) as pool:

        async def work(cancel: Cancelable, is_short: bool) -> None:
            async with pool.connection() as connection:
                await connection.execute(postgres(is_short))

        yield work


@asynccontextmanager
async def psycopg_in_threads(name: str) -> AsyncIterator[Work]:
    kind = import_module("psycopg_pool").ConnectionPool
    with kind(POSTGRES, min_size=1, max_size=1, kwargs={"application_name": name}, open=True) as pool:

        def query(cancel: Cancelable, is_short: bool) -> None:
            with pool.connection() as connection, cancel.interrupting(connection.cancel_safe):
                connection.execute(postgres(is_short))

        yield lambda cancel, is_short: cancel.run_in_thread(query, cancel, is_short)


def sqlalchemy(driver: str) -> Any:
    @asynccontextmanager
    async def opened(name: str) -> AsyncIterator[Work]:
        arguments: Any = {"application_name": name}
        engine = create_async_engine(
            POSTGRES.replace("postgresql", f"postgresql+{driver}"),
            pool_size=1,
            max_overflow=0,
            pool_timeout=5,
            connect_args={"server_settings": arguments} if driver == "asyncpg" else arguments,
        )
        session_of = asynccontextmanager(cancelable_session(async_sessionmaker(engine)))

        async def work(cancel: Cancelable, is_short: bool) -> None:
            async with session_of() as session:
                await session.execute(text(postgres(is_short)))

        yield work
        await engine.dispose()

    return opened


@asynccontextmanager
async def sqlalchemy_in_threads(name: str) -> AsyncIterator[Work]:
    engine = create_engine(
        POSTGRES.replace("postgresql", "postgresql+psycopg"),
        pool_size=1,
        max_overflow=0,
        pool_timeout=5,
        connect_args={"application_name": name},
    )
    maker = sessionmaker(engine)

    def query(cancel: Cancelable, is_short: bool) -> None:
        with maker.begin() as session:
            connection: Any = session.connection().connection.driver_connection
            with cancel.interrupting(connection.cancel_safe):
                session.execute(text(postgres(is_short)))

    yield lambda cancel, is_short: cancel.run_in_thread(query, cancel, is_short)
    engine.dispose()


def async_mysql(module: str) -> Any:
    @asynccontextmanager
    async def opened(name: str) -> AsyncIterator[Work]:
        pool = await import_module(module).create_pool(minsize=1, maxsize=1, db="test", **MYSQL)

        async def work(cancel: Cancelable, is_short: bool) -> None:
            async with pool.acquire() as connection, connection.cursor() as cursor:
                await cursor.execute(mysql(name, is_short))

        yield work
        pool.terminate()
        await pool.wait_closed()

    return opened


@asynccontextmanager
async def pymysql_in_threads(name: str) -> AsyncIterator[Work]:
    pymysql = import_module("pymysql")
    lock = threading.Lock()
    with closing(pymysql.connect(database="test", **MYSQL)) as connection:

        def stop() -> None:
            with closing(pymysql.connect(**MYSQL)) as second, second.cursor() as cursor:
                cursor.execute("kill query %s", [connection.thread_id()])

        def query(cancel: Cancelable, is_short: bool) -> None:
            with lock, cancel.interrupting(stop), connection.cursor() as cursor:
                cursor.execute(mysql(name, is_short))

        yield lambda cancel, is_short: cancel.run_in_thread(query, cancel, is_short)


@asynccontextmanager
async def sqlite_in_threads(name: str) -> AsyncIterator[Work]:
    lock = threading.Lock()
    with closing(sqlite3.connect(":memory:", check_same_thread=False)) as connection:

        def query(cancel: Cancelable, is_short: bool) -> None:
            with lock, cancel.interrupting(connection.interrupt):
                connection.execute("select 1" if is_short else FOREVER).fetchall()

        yield lambda cancel, is_short: cancel.run_in_thread(query, cancel, is_short)


@asynccontextmanager
async def aiosqlite_connection(name: str) -> AsyncIterator[Work]:
    async with import_module("aiosqlite").connect(":memory:") as connection:

        async def work(cancel: Cancelable, is_short: bool) -> None:
            async with connection.execute("select 1" if is_short else FOREVER) as cursor:
                await cursor.fetchall()

        yield work
        await connection.interrupt()


@asynccontextmanager
async def redis_pool(name: str) -> AsyncIterator[Work]:
    client = import_module("redis.asyncio").Redis(client_name=name, max_connections=1, socket_timeout=None)

    async def work(cancel: Cancelable, is_short: bool) -> None:
        await (client.ping() if is_short else client.blpop([name], timeout=SECONDS))

    yield work
    await client.aclose()


WAYS: dict[str, Any] = {
    "asyncpg": asyncpg_pool,
    "psycopg": psycopg_pool,
    "psycopg in threads": psycopg_in_threads,
    "SQLAlchemy over asyncpg": sqlalchemy("asyncpg"),
    "SQLAlchemy over psycopg": sqlalchemy("psycopg"),
    "SQLAlchemy in threads": sqlalchemy_in_threads,
    "aiomysql": async_mysql("aiomysql"),
    "asyncmy": async_mysql("asyncmy"),
    "PyMySQL in threads": pymysql_in_threads,
    "sqlite3 in threads": sqlite_in_threads,
    "aiosqlite": aiosqlite_connection,
    "redis-py": redis_pool,
}


def application() -> FastAPI:
    logging.basicConfig(level=logging.WARNING, format="LOGGED %(levelname)s %(name)s %(message)s")
    opened = WAYS[os.environ["WAY"]](os.environ["NAME"])

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with opened as app.state.work:
            yield

    app = FastAPI(lifespan=cancelation_lifespan(lifespan, grace=0.5))
    app.add_middleware(RequestCancelationMiddleware)

    @app.get("/{kind}")
    async def work(kind: str, cancel: RequestCancelable) -> str:
        async with cancel, Cancelable(timeout=TIMEOUT if kind == "limited" else 60) as limited:
            await app.state.work(limited, kind == "short")
        return "done"

    return app
