"""Give each request a session that ends with it, and interrupt a blocking query in a thread.

    python -m examples.databases
    curl -X POST http://127.0.0.1:8000/visits
    curl -m 1 http://127.0.0.1:8000/count

SQLite, so that it runs anywhere. curl gives up the count after a second, and the server prints that the query is over.
"""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import StaticPool

from cancelable_deps import CancelationError, RequestCancelable, RequestCancelationMiddleware
from cancelable_deps.databases import cancelable_session

engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
maker = async_sessionmaker(engine)
SessionOfRequest = Annotated[AsyncSession, Depends(cancelable_session(maker), scope="function")]
FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.execute(text("create table visit (id integer primary key)"))
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
app.add_middleware(RequestCancelationMiddleware, default_timeout=30)


@app.post("/visits")
async def visit(session: SessionOfRequest) -> int:
    """Committed before the response is sent; rolled back if the client leaves first."""
    await session.execute(text("insert into visit default values"))
    return int((await session.execute(text("select count(*) from visit"))).scalar_one())


@app.get("/count")
def count(cancel: RequestCancelable) -> int:
    with cancel, closing(sqlite3.connect(":memory:", check_same_thread=False)) as connection:
        try:
            with cancel.interrupting(connection.interrupt):
                return int(connection.execute(FOREVER).fetchone()[0])
        except CancelationError as exc:
            print(f"the query is over: {exc.reason}", flush=True)
            raise


if __name__ == "__main__":
    uvicorn.run(app)
