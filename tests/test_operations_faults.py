"""What operations promise over every store, whatever befalls it: the same in memory, and in Redis by each client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

from cancelable_deps import Cancelable, CancelationError
from cancelable_deps.operations import Operations, OperationState, OperationsUnavailable
from cancelable_deps.operations.backend import Unavailable

from .machine import scaled
from .redis_workers import MARKS, forever, is_cancelled, is_in, know_each_other
from .stores import CEILING, Store, kinds, until

pytest_plugins = ["tests.redis_fixtures"]
pytestmark = MARKS


@pytest.fixture(params=kinds("redis-py", "coredis-asyncio", "coredis-trio", "valkey"))
def store_kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
def anyio_backend(store_kind: tuple[str, str]) -> str:
    return store_kind[1]


@asynccontextmanager
async def opened(store: Store, count: int = 2) -> AsyncIterator[list[Operations]]:
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(store.operations()) for _ in range(count)]
        await know_each_other(*workers)
        yield workers


@asynccontextmanager
async def block(operations: Operations, id: str) -> AsyncIterator[list[str]]:
    """A block that runs, until it is cancelled; and what is said when that has come to pass."""
    ends: list[str] = []

    async def run() -> None:
        try:
            async with operations.track(id=id):
                ends.append("begun")
                await anyio.sleep_forever()
        except CancelationError as exc:
            ends.append(str(exc.detail))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await until(lambda: holds(lambda: ends == ["begun"]), "the block has begun")
        yield ends
        tasks.cancel_scope.cancel()


async def holds(condition: Callable[[], bool]) -> bool:
    return condition()


@pytest.mark.parametrize("loss", ["nothing", "the last second", "everything"])
async def test_an_acknowledged_cancel_reaches_a_worker_that_was_cut_off(loss: str, store: Store) -> None:
    async with opened(store) as [a, b], block(b, "block") as ends:
        store.pause(b.backend)
        assert (await a.cancel("block", message="enough", wait=0.1)).outcome == "sent"
        if loss == "everything":
            store.lose_everything()
        elif loss == "the last second":
            store.lose_last(1)
        store.resume()
        await until(lambda: holds(lambda: ends == ["begun", "enough"]), "the block is stopped")


@pytest.mark.parametrize("memory", [0, 0.0001])
async def test_a_worker_of_operations_that_remember_nothing_opens_at_once(
    store: Store, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cancelable_deps.operations.exchange.CALL_SECONDS", 1000)
    with anyio.fail_after(scaled(CEILING)):
        async with store.operations(memory=memory):
            pass


async def test_what_was_cancelled_before_a_worker_came_does_not_start_in_it(store: Store) -> None:
    async with store.operations() as a:
        # More than one read of the log brings along.
        for number in range(150):
            await a.cancel(f"job-{number}", message="enough", wait=0)
        async with store.operations() as b:
            with pytest.raises(CancelationError, match="enough"):
                await run_job(b, "job-149")


async def run_job(operations: Operations, id: str) -> None:
    async with operations.track(id=id):
        await anyio.lowlevel.checkpoint()
        raise AssertionError("it has started")


async def test_who_could_not_be_told_of_a_newer_one_is_told_after_the_break(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(store) as [a, b]:
        older = await b.start(forever, key="key", when_busy="cancel_previous")
        send, lost = a.backend.send, list[bytes]()

        async def fail_once(worker: str, entry: bytes, id: str) -> bool:
            if not lost:
                lost.append(entry)
                raise Unavailable
            return await send(worker, entry, id)

        monkeypatch.setattr(a.backend, "send", fail_once)
        newer = await a.start(forever, key="key", when_busy="cancel_previous")
        await until(lambda: is_in(b, older.id, OperationState.CANCELLED), "the older one is stopped")
        assert [b"supersede" in entry for entry in lost] == [True]
        assert await is_in(a, newer.id, OperationState.RUNNING)


@pytest.mark.parametrize("loss", ["nothing", "the last second", "everything"])
async def test_an_acknowledged_cancel_of_background_work_reaches_its_worker(loss: str, store: Store) -> None:
    async with opened(store) as [a, b]:
        operation = await b.start(forever, owner="me")
        store.pause(b.backend)
        assert (await a.cancel(operation.id, owner="me", wait=0.1)).outcome == "sent"
        if loss == "everything":
            store.lose_everything()
        elif loss == "the last second":
            store.lose_last(1)
        store.resume()
        await until(lambda: is_in(b, operation.id, OperationState.CANCELLED), "the work is stopped")
        await until(lambda: is_in(a, operation.id, OperationState.CANCELLED), "its record says so")


async def test_a_store_that_stands_still_costs_others_and_not_the_own(store: Store) -> None:
    async with opened(store) as [a, b]:
        theirs, own = await b.start(forever), await a.start(forever, id="own")
        store.pause()
        with pytest.raises(OperationsUnavailable):
            await a.cancel(theirs.id)
        with pytest.raises(OperationsUnavailable):
            await a.start(forever)
        assert (await a.cancel(own.id, wait=0.5)).outcome in ("stopping", "cancelled")
        store.resume()
        await until(lambda: is_in(a, own.id, OperationState.CANCELLED), "its end is written")
        await until(lambda: is_cancelled(a, theirs.id), "the other worker is reached again")
        # Nobody was given up, and nothing is left of what could not be started.
        assert {each.state for each in (await a.list(state=None)).items} <= {OperationState.CANCELLED}


async def test_a_slow_store_is_used_and_one_that_is_too_slow_is_not(store: Store) -> None:
    async def work(cancel: Cancelable) -> int:
        return 42

    async with opened(store) as [a, b]:
        store.delay(0.05)
        operation = await a.start(work)
        assert await b.result(operation.id) == 42
        running = await a.start(forever)
        assert (await b.cancel(running.id, wait=10)).outcome == "cancelled"
        store.delay(2.5)
        with pytest.raises(OperationsUnavailable):
            await a.start(work)
        store.delay(0)

        async def is_started() -> bool:
            try:
                await a.start(work, id="again")
            except OperationsUnavailable:
                return False
            return True

        await until(is_started, "it is fast again")
        await until(lambda: is_in(b, "again", OperationState.FINISHED), "it has run")


async def test_after_a_loss_records_and_places_are_there_again(store: Store) -> None:
    async with opened(store) as [a, b]:
        holder = await a.start(forever, owner="me", key="key", when_busy="refuse")
        waiting = await b.start(forever, key="key", when_busy="wait")
        store.lose_everything()

        async def is_known() -> bool:
            return await b.get(holder.id, owner="me") is not None

        await until(is_known, "its record is there again")
        assert await is_in(b, waiting.id, OperationState.WAITING)
        await until(lambda: is_cancelled(b, holder.id), "it is reached")
        await until(lambda: is_in(a, waiting.id, OperationState.RUNNING), "the one that waited has its turn")


async def test_a_worker_that_is_cut_off_for_longer_than_its_lease_is_given_up(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(store, 3) as [a, b, c]:
        held = await b.start(forever, key="key", when_busy="refuse")
        waiting = await c.start(forever, key="key", when_busy="wait")
        store.pause(b.backend)
        await until(lambda: is_in(a, held.id, OperationState.LOST), "its work is lost")
        await until(lambda: is_in(a, waiting.id, OperationState.RUNNING), "the one that waited has its turn")
        store.resume()
        await until(lambda: holds(lambda: "given up by the others" in caplog.text), "it is told")
        assert await is_in(a, held.id, OperationState.LOST)
        await know_each_other(a, b, c)
        again = await b.start(forever)
        assert (await a.cancel(again.id, wait=10)).outcome == "cancelled"
