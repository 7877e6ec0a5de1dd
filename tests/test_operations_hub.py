"""`OperationsHub`: workers without servers, and what happens to them."""

from __future__ import annotations

import math
from contextlib import suppress

import anyio
import pytest

from cancelable_deps import CancelationError
from cancelable_deps.operations import Operations, OperationState, OperationsUnavailable, OperationTaken
from cancelable_deps.testing import OperationsHub, advance
from tests.calls import movable_clock
from tests.operations import all_known, ended, endless, nothing_is_kept, until, workers

pytestmark = [pytest.mark.anyio]


async def test_workers_know_each_other() -> None:
    async with workers(3) as (_, (a, b, c)):
        for each in (a, b, c):
            found = await each.workers()
            assert [worker.name for worker in found] == [other.worker.local.worker for other in (a, b, c)]
            assert all(worker.is_reachable and worker.running == 0 for worker in found)


async def test_a_worker_that_leaves_is_not_waited_for() -> None:
    hub = OperationsHub()
    async with hub.operations() as a:
        async with hub.operations():
            await until(lambda: len(a.worker.exchange.alive) == 2)
        await until(lambda: len(a.worker.exchange.alive) == 1)
        assert (await a.list()).unreachable == []


@movable_clock
async def test_a_paused_worker_reads_nothing_until_it_is_resumed() -> None:
    async with workers(2) as (hub, (a, b)):
        operation = await b.start(endless)
        hub.pause(b)
        cancelled = await a.cancel(operation.id, wait=0)
        assert cancelled.outcome == "sent"
        await advance(60)
        assert (await b.get(operation.id)).state is OperationState.RUNNING  # type: ignore[union-attr]
        hub.resume(b)
        assert (await ended(b, operation)).state is OperationState.CANCELLED


async def note_outcome(operations: Operations, id: str, outcomes: list[str]) -> None:
    outcomes.append((await operations.cancel(id, wait=10)).outcome)


@movable_clock
async def test_the_record_knows_of_an_end_whose_answer_does_not_come() -> None:
    outcomes: list[str] = []
    async with workers(2) as (hub, (a, b)), anyio.create_task_group() as tasks:
        operation = await b.start(endless)
        hub.pause(a)
        tasks.start_soon(note_outcome, a, operation.id, outcomes)
        await advance(11)
        assert outcomes == ["cancelled"]
        hub.resume(a)


@movable_clock
async def test_a_cancel_that_was_sent_stays_so_when_its_record_cannot_be_read() -> None:
    outcomes: list[str] = []
    async with workers(2) as (hub, (a, b)), anyio.create_task_group() as tasks:
        operation = await b.start(endless)
        hub.pause(b)
        tasks.start_soon(note_outcome, a, operation.id, outcomes)
        await advance(5)
        hub.cut(a)
        await advance(6)
        assert outcomes == ["sent"]
        hub.resume(a)
        hub.resume(b)


@movable_clock
async def test_an_answer_that_cannot_be_sent_is_sent_again() -> None:
    outcomes: list[str] = []

    async def block() -> None:
        with suppress(CancelationError):
            async with b.track(id="block"):
                try:
                    await anyio.sleep_forever()
                finally:
                    hub.cut(b)
                    await anyio.sleep(1)

    async with workers(2) as (hub, (a, b)), anyio.create_task_group() as tasks:
        tasks.start_soon(block)
        await until(lambda: b.worker.local.everything())
        tasks.start_soon(note_outcome, a, "block", outcomes)
        await advance(2)
        assert outcomes == []
        hub.resume(b)
        await advance(2)
        assert outcomes == ["cancelled"]


@movable_clock
async def test_a_worker_that_is_cut_off_stops_its_own_and_nothing_else() -> None:
    async with workers(2) as (hub, (a, b)):
        theirs, own = await b.start(endless), await a.start(endless)
        hub.cut(a)
        with pytest.raises(OperationsUnavailable):
            await a.cancel(theirs.id)
        with pytest.raises(OperationsUnavailable):
            await a.start(endless)
        await a.cancel(own.id, wait=0)
        hub.resume(a)
        await advance(10)
        assert (await a.get(own.id)).state is OperationState.CANCELLED  # type: ignore[union-attr]
        assert (await a.cancel(theirs.id)).outcome == "cancelled"
    nothing_of = [each.is_open for each in (a, b)]
    assert nothing_of == [False, False]


@movable_clock
async def test_a_worker_that_is_killed_is_missed_when_its_lease_is_over() -> None:
    async with workers(2) as (hub, (a, b)):
        await advance(25)  # Only who has been there for a lease may say that of others.
        operation = await b.start(endless, owner="me")
        hub.kill(b)
        assert (await a.list(timeout=0)).unreachable == [operation.worker]
        await advance(25)
        found = await a.get(operation.id)
        assert found is not None
        assert found.state is OperationState.LOST
        assert (await a.list()).unreachable == []
        assert (await a.cancel(operation.id)).outcome == "lost"


@movable_clock
async def test_calls_can_be_slow() -> None:
    async with workers(2) as (hub, (a, b)):
        operation = await b.start(endless)
        hub.delay(0.5)
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                assert (await a.cancel(operation.id, wait=10)).outcome == "cancelled"

            tasks.start_soon(cancel)
            await advance(0.4)
            assert (await b.get(operation.id)) is not None
            assert not b.worker.local.find(operation.id, owner="me")
            await advance(10)
        hub.delay(1)
        async with anyio.create_task_group() as tasks:

            async def start() -> None:
                with pytest.raises(OperationsUnavailable):
                    await a.start(endless)

            tasks.start_soon(start)
            await advance(2)
        hub.delay(0)


@movable_clock
async def test_what_is_lost_is_written_again() -> None:
    async with workers(3) as (hub, (a, b, c)):
        operation = await b.start(endless)
        hub.pause(b)
        assert (await a.cancel("of-a-client", wait=0)).outcome == "sent"
        assert (await a.cancel(operation.id, wait=0)).outcome == "sent"
        hub.lose_last(math.inf)
        hub.resume(b)
        await advance(10)
        assert (await c.get(operation.id)).state is OperationState.CANCELLED  # type: ignore[union-attr]
        assert len(b.worker.local.early) == 1


@movable_clock
async def test_all_can_be_lost() -> None:
    async with workers(2) as (hub, (a, b)):
        operation = await b.start(endless, id="mine")
        hub.lose_everything()
        await advance(10)
        await all_known(a, b)
        assert (await a.get("mine")) is not None
        assert (await a.cancel("mine")).outcome == "cancelled"
        assert (await ended(a, operation)).state is OperationState.CANCELLED
        nothing_is_kept(a, b)


@pytest.mark.parametrize(("lease", "error"), [("1", TypeError), (-1, ValueError), (math.nan, ValueError)])
def test_a_lease_is_a_number(lease: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        OperationsHub(lease=lease)


@movable_clock
async def test_work_that_begins_after_a_loss_is_lost_if_its_worker_dies_at_once() -> None:
    async with workers(2) as (hub, (a, b)):
        await advance(25)
        hub.lose_everything()
        operation = await b.start(endless, key="k", when_busy="wait")
        hub.kill(b)
        await advance(45)
        assert (await a.get(operation.id)).state is OperationState.LOST  # type: ignore[union-attr]
        assert (await a.start(endless, key="k", when_busy="refuse")).state is OperationState.RUNNING


@movable_clock
async def test_a_cancel_whose_mail_is_lost_comes_to_a_worker_that_the_store_has_forgotten() -> None:
    async with workers(2) as (hub, (a, b)):
        operation = await b.start(endless)
        hub.pause(b)
        assert (await a.cancel(operation.id, wait=0)).outcome == "sent"
        hub.lose_everything()
        # `a` notices it first.
        await advance(6)
        hub.resume(b)
        assert (await ended(b, operation)).state is OperationState.CANCELLED


@movable_clock
async def test_an_id_whose_record_is_lost_names_the_work_that_runs() -> None:
    async with workers(1) as (hub, (a,)):
        first = await a.start(endless, id="chosen", owner="me")
        hub.lose_everything()
        second = await a.start(endless, id="chosen", owner="me")
        with pytest.raises(OperationTaken):
            await a.start(endless, id="chosen", owner="another")
        assert (second.id, second.started) == (first.id, first.started)
        assert (await a.list()).total == 1
        await advance(6)
        assert (await a.cancel("chosen")).outcome == "cancelled"
        hub.lose_everything()
        # Not once more, either: a client that repeats its request wants one report.
        assert (await a.start(endless, id="chosen", owner="me")).state is OperationState.CANCELLED
