"""One application per door, whose handler waits for a query of thirty seconds, over several ways to reach PostgreSQL."""

import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Protocol

import anyio
import asyncpg  # type: ignore[import-untyped]
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from starlette.middleware.base import RequestResponseEndpoint

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    cancelable_dependency,
    cancelable_with_timeout,
    with_cancelation,
)
from tests.postgres import driver_url

SLEEP = "select pg_sleep(30)"
BACKEND = "select pg_backend_pid()"

Work = Callable[[], Coroutine[Any, Any, object]]
SessionKind = Callable[[str, str, dict[str, Any]], "Database"]


class Database(Protocol):
    """A pool of two connections."""

    keeps_interrupted: bool
    """Whether a connection whose query was cancelled is used again: SQLAlchemy replaces it, after any cancellation."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def work(self) -> Any:
        """The dependency that gives a handler its query: returns it, or yields it and cleans up afterwards."""
        ...

    async def backends(self) -> set[int]:
        """The server's process ids for both connections, in use at the same time."""
        ...

    def statistics(self) -> dict[str, int]: ...


@dataclass
class PoolState:
    """What cancelled queries must not change, and the two connections that are in the pool just now."""

    connections: list[int] = field(compare=False)
    kept: list[int]
    statistics: dict[str, int]


async def pool_state(database: Database) -> PoolState:
    connections = sorted(await database.backends())
    return PoolState(connections, connections if database.keeps_interrupted else [], database.statistics())


class AsyncpgPool:
    keeps_interrupted = True

    def __init__(self, url: str, name: str) -> None:
        self._pool: Any = asyncpg.create_pool(url, min_size=2, max_size=2, server_settings={"application_name": name})

    async def open(self) -> None:
        await self._pool

    async def close(self) -> None:
        await self._pool.close()

    def work(self) -> Work:
        return partial(self._pool.fetchval, SLEEP)

    async def backends(self) -> set[int]:
        async with self._pool.acquire() as one, self._pool.acquire() as other:
            return {await one.fetchval(BACKEND), await other.fetchval(BACKEND)}

    def statistics(self) -> dict[str, int]:
        return {"size": self._pool.get_size(), "idle": self._pool.get_idle_size()}


class AsyncpgTransaction(AsyncpgPool):
    """Its rollback awaits the server while the request is being cancelled."""

    def work(self) -> Work:
        return self._sleep

    async def _sleep(self) -> None:
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute(SLEEP)


class PsycopgPool:
    keeps_interrupted = True
    _COUNTED = ("pool_size", "pool_available", "requests_waiting", "connections_num", "connections_lost", "returns_bad")

    def __init__(self, url: str, name: str) -> None:
        self._pool = AsyncConnectionPool(url, kwargs={"application_name": name}, min_size=2, max_size=2, open=False)

    async def open(self) -> None:
        await self._pool.open(wait=True)

    async def close(self) -> None:
        await self._pool.close()

    def work(self) -> Work:
        return self._sleep

    async def _sleep(self) -> None:
        async with self._pool.connection() as connection:
            await connection.execute(SLEEP)

    async def backends(self) -> set[int]:
        async with self._pool.connection() as one, self._pool.connection() as other:
            return {one.info.backend_pid, other.info.backend_pid}

    def statistics(self) -> dict[str, int]:
        seen = self._pool.get_stats()
        return {key: seen.get(key, 0) for key in self._COUNTED}


class SqlAlchemy:
    keeps_interrupted = False

    def __init__(self, url: str, driver: str, connect_args: dict[str, Any]) -> None:
        self._engine: AsyncEngine = create_async_engine(
            driver_url(url, driver), pool_size=2, max_overflow=0, pool_timeout=5, connect_args=connect_args
        )

    async def open(self) -> None:
        """Connections are made as they are needed."""

    async def close(self) -> None:
        await self._engine.dispose()

    async def backends(self) -> set[int]:
        async with self._engine.connect() as one, self._engine.connect() as other:
            return {await one.scalar(text(BACKEND)), await other.scalar(text(BACKEND))}

    def statistics(self) -> dict[str, int]:
        pool: Any = self._engine.pool
        return {"in": pool.checkedin(), "out": pool.checkedout(), "overflow": pool.overflow()}


class OwnSession(SqlAlchemy):
    def work(self) -> Work:
        return self._sleep

    async def _sleep(self) -> None:
        async with AsyncSession(self._engine) as session:
            await session.execute(text(SLEEP))


class DependencySession(SqlAlchemy):
    """The session is opened and closed by a yield dependency, as FastAPI's own documentation does it."""

    async def work(self) -> AsyncIterator[Work]:
        async with AsyncSession(self._engine) as session:
            yield partial(session.execute, text(SLEEP))


def over_asyncpg(kind: SessionKind, url: str, name: str) -> Database:
    return kind(url, "postgresql+asyncpg", {"server_settings": {"application_name": name}})


def over_psycopg(kind: SessionKind, url: str, name: str) -> Database:
    return kind(url, "postgresql+psycopg", {"application_name": name})


DATABASES: dict[str, Callable[[str, str], Database]] = {
    "sqlalchemy-asyncpg": partial(over_asyncpg, OwnSession),
    "sqlalchemy-psycopg": partial(over_psycopg, OwnSession),
    "asyncpg": AsyncpgPool,
    "psycopg": PsycopgPool,
}
WITH_CLEANUP: dict[str, Callable[[str, str], Database]] = {
    "asyncpg-transaction": AsyncpgTransaction,
    "session-dependency-asyncpg": partial(over_asyncpg, DependencySession),
    "session-dependency-psycopg": partial(over_psycopg, DependencySession),
}


def decorator(database: Database, timeout: float | None = None) -> FastAPI:
    app = FastAPI()

    @app.get("/work")
    @with_cancelation(timeout=timeout)
    async def work(query: Annotated[Work, Depends(database.work)]) -> None:
        await query()

    return app


def middleware(database: Database, timeout: float | None = None) -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)

    @app.get("/work")
    async def work(query: Annotated[Work, Depends(database.work)]) -> None:
        await query()

    return app


def middleware_over_base(database: Database, timeout: float | None = None) -> FastAPI:
    """Inside ours stands a `BaseHTTPMiddleware`, which runs the handler in a task group of its own."""
    app = FastAPI()

    @app.middleware("http")
    async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)

    @app.get("/work")
    async def work(query: Annotated[Work, Depends(database.work)]) -> None:
        await query()

    return app


def route_class(database: Database, timeout: float | None = None) -> FastAPI:
    """The route class itself has no timeout: a block in the handler sets it."""
    router = APIRouter(route_class=CancelableRoute)

    @router.get("/work")
    async def work(query: Annotated[Work, Depends(database.work)]) -> None:
        if timeout is None:
            await query()
        else:
            async with Cancelable(timeout=timeout):
                await query()

    app = FastAPI()
    app.include_router(router)
    return app


def handle(database: Database, timeout: float | None = None) -> FastAPI:
    app = FastAPI()
    dependency = cancelable_dependency if timeout is None else cancelable_with_timeout(timeout)

    @app.get("/work")
    async def work(
        cancel: Annotated[Cancelable, Depends(dependency)], query: Annotated[Work, Depends(database.work)]
    ) -> None:
        async with cancel:
            await query()

    return app


def task_group_of_two(database: Database) -> FastAPI:
    """Both connections are busy for one request, in the group's body and in a child; another child ends before both."""
    app = FastAPI()

    @app.get("/work")
    async def work(get_task_group: RequestTaskGroup, query: Annotated[Work, Depends(database.work)]) -> None:
        async with get_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            tasks.start_soon(query)
            await query()

    return app


def task_group(database: Database, timeout: float | None = None) -> FastAPI:
    """The task group has no timeout of its own: the decorator sets the request's."""
    app = FastAPI()

    async def work(get_task_group: RequestTaskGroup, query: Annotated[Work, Depends(database.work)]) -> None:
        async with get_task_group() as tasks:
            tasks.start_soon(query)

    app.get("/work")(work if timeout is None else with_cancelation(timeout=timeout)(work))
    return app


DOORS: dict[str, Callable[[Database, float | None], FastAPI]] = {
    "decorator": decorator,
    "middleware": middleware,
    "middleware-over-base": middleware_over_base,
    "route-class": route_class,
    "handle": handle,
    "task-group": task_group,
}


def from_environment() -> FastAPI:
    """Every door, mounted under its name, for a server in another process; `/pool` tells how the pool is."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    database = DATABASES[os.environ["TEST_DATABASE"]](os.environ["TEST_URL"], os.environ["TEST_NAME"])
    app = FastAPI(lifespan=lambda _: opened(database))

    @app.get("/pool")
    async def pool() -> PoolState:
        return await pool_state(database)

    for name, door in DOORS.items():
        app.mount(f"/{name}", door(database, None))
    return app


@asynccontextmanager
async def opened(database: Database) -> AsyncIterator[None]:
    await database.open()
    try:
        yield
    finally:
        await database.close()
