"""However late a cancellation comes, it never interrupts the next query on the connection of a pool of one."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass

import pytest
from psycopg_pool import ConnectionPool

from cancelable_deps import Cancelable, ManualCancelation
from tests.machine import scaled
from tests.mariadb import connected, kill_query, mariadb_or_skip
from tests.postgres import postgres_server

pytestmark = [pytest.mark.anyio, pytest.mark.real]

RACES = 2500
"""For each of two event loops and two places of the section: 10,000 for each database, in the end."""
FEWER = 60
LONGEST = 0.002
"""Seconds. A query takes as long at most, and is cancelled as late at most, so that each wins often."""
COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) SELECT max(i) FROM n"


@dataclass
class Lent:
    """A connection of a pool of one, as long as it is lent."""

    query: Callable[[float], object]
    """Run a query that takes so many seconds."""

    stop: Callable[[], object]


Pool = Callable[[], AbstractContextManager[Lent]]


@contextmanager
def postgres_pool() -> Iterator[Pool]:
    with postgres_server() as url, ConnectionPool(url, min_size=1, max_size=1, timeout=10, open=True) as pool:

        @contextmanager
        def lend() -> Iterator[Lent]:
            with pool.connection() as connection:
                yield Lent(
                    lambda seconds: connection.execute("select pg_sleep(%s)", [seconds]).fetchall(),
                    connection.cancel_safe,
                )

        yield lend
        # An interrupted connection is as good as any, and was never replaced.
        assert pool.get_stats()["connections_num"] == 1


@contextmanager
def sqlite_pool() -> Iterator[Pool]:
    lock = threading.Lock()
    with closing(sqlite3.connect(":memory:", check_same_thread=False)) as connection:

        @contextmanager
        def lend() -> Iterator[Lent]:
            # Some two million rows a second.
            with lock:
                yield Lent(
                    lambda seconds: connection.execute(COUNT, [round(seconds * 2e6)]).fetchall(), connection.interrupt
                )

        yield lend


@contextmanager
def mariadb_pool() -> Iterator[Pool]:
    mariadb_or_skip()
    lock = threading.Lock()
    with closing(connected()) as connection:

        def query(seconds: float) -> None:
            with connection.cursor() as cursor:
                cursor.execute("select sleep(%s)", [seconds])

        @contextmanager
        def lend() -> Iterator[Lent]:
            with lock:
                yield Lent(query, lambda: kill_query(connection))

        yield lend


async def in_the_thread(cancel: Cancelable, pool: Pool, seconds: float) -> None:
    def section() -> None:
        with pool() as lent, cancel.interrupting(lent.stop):
            lent.query(seconds)

    await cancel.run_in_thread(section)


async def in_the_loop(cancel: Cancelable, pool: Pool, seconds: float) -> None:
    with pool() as lent:
        async with cancel.interrupting(lent.stop):
            await cancel.run_in_thread(lent.query, seconds)


Place = Callable[[Cancelable, Pool, float], Awaitable[None]]


async def race(place: Place, pool: Pool, chance: random.Random, longest: float) -> bool:
    """Run a query and cancel it at a random moment; return whether it was stopped."""
    seconds, late = chance.uniform(0, longest), chance.uniform(0, longest)
    cancel = Cancelable()
    # From a thread, as a timer of the loop would not strike in the middle of leaving a section.
    timer = threading.Timer(late, cancel.cancel_nowait)
    timer.start()
    try:
        async with cancel:
            await place(cancel, pool, seconds)
    except ManualCancelation:
        return True
    finally:
        with pool() as lent:
            # In this thread, without a section: whatever comes late hits it.
            lent.query(chance.uniform(0, longest / 3))
        timer.join()
    return False


POOLS: dict[str, tuple[Callable[[], AbstractContextManager[Pool]], int, float]] = {
    "postgresql": (postgres_pool, RACES, LONGEST),
    "sqlite": (sqlite_pool, RACES, LONGEST),
    # Its second connection takes longer to reach the query.
    "mariadb": (mariadb_pool, FEWER, scaled(0.1)),
}


@pytest.mark.parametrize("place", [in_the_thread, in_the_loop])
@pytest.mark.parametrize("database", POOLS)
@pytest.mark.parametrize("part", range(2))
async def test_the_next_query_is_never_cancelled(
    place: Place, database: str, part: int, anyio_backend_name: str
) -> None:
    make, races, longest = POOLS[database]
    chance = random.Random(f"{place.__name__} {database} {part} {anyio_backend_name}")
    with make() as pool:
        stopped = [await race(place, pool, chance, longest) for _ in range(races // 2)]
    # Both win: otherwise nothing has been tested.
    assert 0 < sum(stopped) < len(stopped)
