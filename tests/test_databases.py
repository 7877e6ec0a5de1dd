"""`cancelable_session` and `limit_statements` without a server: sessions that only note what is done with them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.lowlevel
import pytest
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from cancelable_deps import Cancelable, CancelationError, RequestCancelationMiddleware, with_cancelation
from cancelable_deps.databases import cancelable_session, limit_statements
from tests.calls import get, hang_up
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

SOON = 0.02
LONG = 100


class Noted:
    """A session that notes what it is told; one of its steps may hang or fail."""

    def __init__(self, hangs: str = "", fails: str = "") -> None:
        self.done: list[str] = []
        self.hangs, self.fails = hangs, fails
        self.began = anyio.Event()

    async def step(self, name: str) -> None:
        self.done.append(name)
        self.began.set()
        if name == self.fails:
            raise ConnectionError(name)
        await (anyio.sleep(LONG) if name == self.hangs else anyio.lowlevel.checkpoint())
        self.done[-1] = f"{name} done"

    async def commit(self) -> None:
        await self.step("commit")

    async def rollback(self) -> None:
        await self.step("rollback")

    async def close(self) -> None:
        await self.step("close")

    async def invalidate(self) -> None:
        await self.step("invalidate")


class NotedInThread:
    def __init__(self, fails: str = "") -> None:
        self.done: list[str] = []
        self.fails = fails

    def step(self, name: str) -> None:
        if name == self.fails:
            raise ConnectionError(name)
        self.done.append(name)

    def commit(self) -> None:
        self.step("commit")

    def rollback(self) -> None:
        self.step("rollback")

    def close(self) -> None:
        self.step("close")

    def invalidate(self) -> None:
        self.step("invalidate")


class Maker:
    """As an `async_sessionmaker`: it knows the class of its sessions."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.class_ = type(session)

    def __call__(self) -> Any:
        return self.session


def opened(session: Noted, **options: Any) -> Any:
    return asynccontextmanager(cancelable_session(Maker(session), **options))()


def opened_in_thread(session: NotedInThread) -> Any:
    return contextmanager(cancelable_session(Maker(session)))()  # type: ignore[arg-type]


async def test_work_that_completes_is_committed() -> None:
    session = Noted()
    async with opened(session) as given:
        assert given is session
    assert session.done == ["commit done", "close done"]


async def test_work_that_fails_is_rolled_back() -> None:
    session = Noted()
    with pytest.raises(HTTPException):
        async with opened(session):
            raise HTTPException(404)
    assert session.done == ["rollback done", "close done"]


async def test_a_commit_that_fails_is_rolled_back_and_raised() -> None:
    session = Noted(fails="commit")
    with pytest.raises(ConnectionError, match="commit"):
        async with opened(session):
            pass
    assert session.done == ["commit", "rollback done", "close done"]


async def test_a_cancellation_of_another_author_rolls_back_undisturbed() -> None:
    session = Noted()
    async with nothing_left(), anyio.create_task_group() as tasks:

        async def work() -> None:
            async with opened(session):
                session.began.set()
                await anyio.sleep(LONG)

        tasks.start_soon(work)
        await session.began.wait()
        tasks.cancel_scope.cancel()
    assert session.done == ["rollback done", "close done"]


async def test_a_commit_is_not_cut_by_a_cancellation() -> None:
    session = Noted()
    async with Cancelable() as cancel:
        with suppress(CancelationError):
            async with opened(session):
                cancel.cancel_nowait()
    assert session.done == ["commit done", "close done"]


@pytest.mark.parametrize("step", ["rollback", "close"])
async def test_what_hangs_is_invalidated(step: str, caplog: pytest.LogCaptureFixture) -> None:
    session = Noted(hangs=step)
    with pytest.raises(CancelationError):
        async with Cancelable(timeout=SOON, cleanup_grace=SOON), opened(session):
            await anyio.sleep(LONG)
    assert session.done[-2:] == [step, "invalidate done"]
    assert "has not ended within 0.02 seconds; its connection is closed" in caplog.text


async def test_the_grace_may_be_the_sessions_own() -> None:
    session = Noted(hangs="rollback")
    with pytest.raises(KeyError):
        async with opened(session, cleanup_grace=SOON):
            raise KeyError
    assert session.done == ["rollback", "invalidate done"]


async def test_what_fails_is_invalidated(caplog: pytest.LogCaptureFixture) -> None:
    session = Noted(fails="rollback")
    with pytest.raises(KeyError):
        async with opened(session):
            raise KeyError
    assert session.done == ["rollback", "invalidate done"]
    assert "could not be ended: ConnectionError('rollback')" in caplog.text


@pytest.mark.parametrize("way", ["hangs", "fails"])
async def test_a_connection_that_cannot_be_closed_is_reported(way: str, caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(Noted):
        async def rollback(self) -> None:
            raise ConnectionError

    with pytest.raises(KeyError):
        async with opened(Stuck(**{way: "invalidate"}), cleanup_grace=SOON):
            raise KeyError
    assert "could not be closed" in caplog.text


@on_asyncio
async def test_a_cancelled_task_invalidates_what_it_interrupts() -> None:
    session = Noted(hangs="rollback")

    async def work() -> None:
        async with opened(session):
            raise KeyError

    task = asyncio.create_task(work())
    await session.began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert session.done == ["rollback", "invalidate done"]


def test_in_a_thread() -> None:
    session = NotedInThread()
    with opened_in_thread(session):
        pass
    assert session.done == ["commit", "close"]
    session = NotedInThread()
    with pytest.raises(KeyError), opened_in_thread(session):
        raise KeyError
    assert session.done == ["rollback", "close"]


@pytest.mark.parametrize("step", ["rollback", "close"])
def test_in_a_thread_what_fails_is_invalidated(step: str, caplog: pytest.LogCaptureFixture) -> None:
    session = NotedInThread(fails=step)
    with pytest.raises(KeyError), opened_in_thread(session):
        raise KeyError
    assert session.done[-1] == "invalidate"
    assert "could not be ended" in caplog.text


@pytest.mark.parametrize("maker", [lambda: None, int, 5, partial(int)])
def test_what_makes_no_sessions_is_refused(maker: Any) -> None:
    with pytest.raises(TypeError, match="takes an async_sessionmaker"):
        cancelable_session(maker)


@pytest.mark.parametrize("dependency", [cancelable_session, limit_statements])
def test_it_is_no_dependency_without_a_call(dependency: Any) -> None:
    app = FastAPI()
    with pytest.raises(TypeError, match=dependency.__name__):

        @app.get("/")
        async def work(session: Annotated[Any, Depends(dependency)]) -> None: ...


# With SQLAlchemy and SQLite


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "test.db"
    with create_engine(f"sqlite:///{path}").begin() as connection:
        connection.execute(text("create table item (id integer primary key)"))
    return path


def items(path: Path) -> list[int]:
    with create_engine(f"sqlite:///{path}").connect() as connection:
        return list(connection.scalars(text("select id from item order by id")))


INSERT = text("insert into item values (1)")


@asynccontextmanager
async def application(path: Path) -> AsyncIterator[FastAPI]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    session_of = cancelable_session(async_sessionmaker(engine))
    plain = create_engine(f"sqlite:///{path}")
    plain_session_of = cancelable_session(sessionmaker(plain))
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)

    @app.post("/items")
    async def insert(session: Annotated[AsyncSession, Depends(session_of, scope="function")], wait: float = 0) -> str:
        await session.execute(INSERT)
        await anyio.sleep(wait)
        return "inserted"

    @app.post("/decorated")
    @with_cancelation
    async def decorated(session: Annotated[AsyncSession, Depends(session_of, scope="function")]) -> str:
        await session.execute(INSERT)
        await anyio.sleep(LONG)
        return "inserted"

    @app.post("/plain")
    def insert_plainly(
        session: Annotated[Session, Depends(plain_session_of, scope="function")], fail: bool = False
    ) -> str:
        session.execute(INSERT)
        if fail:
            raise HTTPException(409)
        return "inserted"

    yield app
    await engine.dispose()
    plain.dispose()


@on_asyncio
async def test_a_session_of_sqlalchemy(path: Path) -> None:
    async with application(path) as app:
        assert (await hang_up(app, f"/items?wait={LONG}", "POST")).status == 499
        assert (await hang_up(app, "/decorated", "POST")).status == 499
        assert items(path) == []
        assert (await get(app, "/items", "POST")).json() == "inserted"
        assert items(path) == [1]
        call = await get(app, "/items", "POST", raise_app_exceptions=False)
        assert call.status == 500
    schema = app.openapi()["paths"]["/items"]["post"]
    assert [parameter["name"] for parameter in schema["parameters"]] == ["wait"]


async def test_a_plain_session_of_sqlalchemy(path: Path) -> None:
    async with application(path) as app:
        assert (await get(app, "/plain?fail=true", "POST")).status == 409
        assert items(path) == []
        assert (await get(app, "/plain", "POST")).json() == "inserted"
        assert items(path) == [1]


@on_asyncio
async def test_a_commit_that_fails_is_seen_by_the_client(path: Path) -> None:
    class Refusing(AsyncSession):
        async def commit(self) -> None:
            raise IntegrityError("commit", None, ValueError("deferred"))

    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    app = FastAPI()
    session_of = cancelable_session(partial(Refusing, engine))

    @app.post("/items")
    async def insert(session: Annotated[Refusing, Depends(session_of, scope="function")]) -> str:
        await session.execute(INSERT)
        return "inserted"

    assert (await get(app, "/items", "POST", raise_app_exceptions=False)).status == 500
    await engine.dispose()
    assert items(path) == []


async def test_other_databases_have_no_such_limit(path: Path) -> None:
    async with Cancelable(timeout=LONG) as cancel:
        with Session(create_engine(f"sqlite:///{path}")) as session:
            with pytest.raises(TypeError, match="a connection to sqlite"):
                limit_statements(session, cancel)
            with pytest.raises(ValueError, match="margin must be"):
                limit_statements(session, cancel, margin=-1)


class Untouched:
    def execute(self, statement: str) -> Any:
        raise AssertionError(statement)


async def test_without_a_timeout_there_is_no_limit() -> None:
    async with Cancelable() as cancel:
        limit_statements(Untouched(), cancel)


async def test_no_limit_is_set_when_the_time_is_up() -> None:
    cancel = Cancelable()
    cancel.cancel_nowait()
    with pytest.raises(CancelationError):
        limit_statements(Untouched(), cancel)
