"""A process that runs a long query, for tests that kill it: `python -m tests.database_worker DRIVER URL NAME [LIMIT]`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import psycopg
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from cancelable_deps import Cancelable
from cancelable_deps.databases import limit_statements

SLEEP = "select pg_sleep(60)"


def with_driver(url: str, driver: str) -> str:
    return url.replace("postgresql", f"postgresql+{driver}", 1)


@asynccontextmanager
async def over_asyncpg(url: str, name: str) -> AsyncIterator[tuple[Any, Any]]:
    settings = {"application_name": name}
    async with (
        asyncpg.create_pool(url, min_size=1, server_settings=settings) as pool,
        pool.acquire() as connection,
        connection.transaction(),
    ):
        yield connection, SLEEP


@asynccontextmanager
async def over_psycopg(url: str, name: str) -> AsyncIterator[tuple[Any, Any]]:
    async with await psycopg.AsyncConnection.connect(url, application_name=name) as connection:
        yield connection, SLEEP


@asynccontextmanager
async def over_sqlalchemy(url: str, name: str) -> AsyncIterator[tuple[Any, Any]]:
    engine = create_async_engine(
        with_driver(url, "asyncpg"), connect_args={"server_settings": {"application_name": name}}
    )
    async with AsyncSession(engine) as session:
        yield session, text(SLEEP)


@asynccontextmanager
async def over_sqlalchemy_core(url: str, name: str) -> AsyncIterator[tuple[Any, Any]]:
    engine = create_async_engine(with_driver(url, "psycopg"), connect_args={"application_name": name})
    async with engine.connect() as connection:
        yield connection, text(SLEEP)


@contextmanager
def over_plain_psycopg(url: str, name: str) -> Iterator[tuple[Any, Any]]:
    with psycopg.connect(url, application_name=name) as connection:
        yield connection, SLEEP


@contextmanager
def over_plain_sqlalchemy(url: str, name: str) -> Iterator[tuple[Any, Any]]:
    with Session(create_engine(with_driver(url, "psycopg"), connect_args={"application_name": name})) as session:
        yield session, text(SLEEP)


ASYNC = {
    "asyncpg": over_asyncpg,
    "psycopg": over_psycopg,
    "sqlalchemy-session": over_sqlalchemy,
    "sqlalchemy-connection": over_sqlalchemy_core,
}
PLAIN = {"plain-psycopg": over_plain_psycopg, "plain-sqlalchemy": over_plain_sqlalchemy}
DRIVERS = [*ASYNC, *PLAIN]


async def work(opened: AbstractAsyncContextManager[tuple[Any, Any]], limit: float | None) -> None:
    async with Cancelable(timeout=limit) as cancel, opened as (connection, query):
        await limit_statements(connection, cancel)
        await connection.execute(query)


def work_plainly(opened: AbstractContextManager[tuple[Any, Any]], limit: float | None) -> None:
    with Cancelable(timeout=limit) as cancel, opened as (connection, query):
        limit_statements(connection, cancel)
        connection.execute(query)


def main(driver: str, url: str, name: str, limit: str | None = None) -> None:
    timeout = None if limit is None else float(limit)
    if driver in ASYNC:
        asyncio.run(work(ASYNC[driver](url, name), timeout))
    else:
        work_plainly(PLAIN[driver](url, name), timeout)


if __name__ == "__main__":
    main(*sys.argv[1:])
