"""Lists, what is stopped together, and what is remembered."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from cancelable_deps import Cancelable, ManualCancelation
from cancelable_deps.operations import Operations, OperationState, OperationsUnavailable, OperationUnknown
from cancelable_deps.request.state import RequestState
from cancelable_deps.testing import advance
from tests.calls import movable_clock
from tests.operations import Steps, endless, nothing_is_kept, until, workers

pytestmark = [pytest.mark.anyio]


async def test_every_filter_across_workers() -> None:
    async with workers(2, background_grace=0) as (hub, (a, b)):
        ann = await a.start(endless, owner="ann", key="k", labels={"stage": "one", "size": "big"})
        bob = await b.start(endless, owner="bob", key="k", labels={"stage": "two"})
        async with AsyncExitStack() as stack:
            scope = stack.enter_context(anyio.CancelScope())
            await stack.enter_async_context(b.track(id="job", owner="ann"))
            cases: list[tuple[dict[str, Any], list[str]]] = [
                ({}, [ann.id, bob.id, "job"]),
                ({"owner": "ann"}, [ann.id, "job"]),
                ({"key": "k"}, [ann.id, bob.id]),
                ({"labels": {"stage": "one"}}, [ann.id]),
                ({"labels": {"stage": "one", "size": "small"}}, []),
                ({"kind": "tracked"}, ["job"]),
                ({"kind": "background", "owner": "bob"}, [bob.id]),
                ({"state": "running"}, [ann.id, bob.id, "job"]),
                ({"state": "stopping"}, []),
                ({"older_than": 1000}, []),
                ({"older_than": 0}, [ann.id, bob.id, "job"]),
                ({"route": "/x"}, []),
            ]
            for options, expected in cases:
                for each in (a, b):
                    found = await each.list(**options)
                    assert [item.id for item in found.items] == expected
                    assert (found.total, found.unreachable) == (len(expected), [])
            one = await a.list(limit=1)
            assert ([item.id for item in one.items], one.total) == ([ann.id], 3)
            hub.pause(b)
            silent = await a.list(timeout=0)
            assert ([item.id for item in silent.items], silent.unreachable) == ([ann.id], [bob.worker])
            hub.resume(b)
            scope.cancel()
        await a.cancel(ann.id)
        assert [item.id for item in (await b.list(state="cancelled")).items] == [ann.id]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"limit": 1001}, ValueError),
        ({"limit": -1}, ValueError),
        ({"limit": True}, TypeError),
        ({"kind": "nonsense"}, ValueError),
        ({"state": "nonsense"}, ValueError),
        ({"owner": None}, TypeError),
        ({"older_than": -1}, ValueError),
        ({"route": 7}, TypeError),
    ],
)
async def test_wrong_filters(options: dict[str, Any], error: type[Exception]) -> None:
    async with Operations() as operations:
        with pytest.raises(error):
            await operations.list(**options)


async def test_cancel_all_stops_what_fulfils_every_condition() -> None:
    async with workers(2) as (_, (a, b)):
        with pytest.raises(ValueError, match="needs a condition"):
            await a.cancel_all()
        wanted = [await each.start(endless, owner="ann", labels={"stage": "one"}) for each in (a, b)]
        spared = [await each.start(endless, owner="bob", labels={"stage": "one"}) for each in (a, b)]
        stopped = await a.cancel_all(owner="ann", labels={"stage": "one"}, message="enough")
        assert {each.operation and each.operation.id for each in stopped} == {each.id for each in wanted}
        for operation in wanted:
            assert (await b.wait(operation.id, timeout=10)).message == "enough"
        for operation in spared:
            assert (await a.get(operation.id)).state is OperationState.RUNNING  # type: ignore[union-attr]
        await b.cancel_all(older_than=0)
        await until(lambda: not a.worker.local.everything() and not b.worker.local.everything())
        nothing_is_kept(a, b)


async def test_cancel_all_stops_its_own_if_the_store_is_away() -> None:
    async with workers(2) as (hub, (a, _)):
        operations = [await a.start(endless) for _ in range(300)]
        hub.cut(a)
        with pytest.raises(OperationsUnavailable):
            await a.cancel_all(older_than=0)
        assert all(each.worker for each in operations)
        await until(lambda: all(each.state is not OperationState.RUNNING for each in a.worker.local.blocks()))
        hub.resume(a)


async def test_who_stops_all_may_be_among_them() -> None:
    async with Operations() as operations:
        for _ in range(300):
            await operations.start(endless)
        with pytest.raises(ManualCancelation):  # noqa: PT012
            async with operations.track(id="own"):
                await operations.cancel_all(older_than=0)
                await anyio.sleep_forever()
        await until(lambda: not operations.worker.local.everything())
        nothing_is_kept(operations)


async def test_others_get_their_turn_and_what_ends_meanwhile_is_left_out() -> None:
    async with Operations() as operations:
        in_flight = operations.worker.local.loop.in_flight
        scope: dict[str, Any] = {"type": "http", "method": "GET", "headers": [], "path": "/"}
        requests = []
        for _ in range(12_000):
            request = RequestState(dict(scope), _never)
            request.is_old = True
            in_flight.requests[request] = None
            requests.append(request)
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await anyio.lowlevel.checkpoint()
                turns += 1
                if turns == 1:
                    for request in requests[6000:]:
                        request.close()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(others)
            found = await operations.list(limit=1000, older_than=0)
            assert turns > 10
            assert len(found.items) == 1000
            assert found.total < 12_000
            turns = 2
            stopped = await operations.cancel_all(older_than=0)
            assert len(stopped) == 6000
            tasks.cancel_scope.cancel()
        for request in requests:
            request.close()
        nothing_is_kept(operations)


async def _never() -> Any:
    await anyio.sleep_forever()


async def test_what_is_remembered_is_bounded() -> None:
    async with Operations() as operations:
        for number in range(10_000):
            assert (await operations.cancel(f"unknown-{number}", wait=0)).outcome == "unknown"
        assert len(operations.worker.local.early) == 1000
        for number in range(10_500):
            async with operations.track(id=f"job-{number}"):
                pass
        assert len(operations.worker.local.ended) <= 10_001
        nothing_is_kept(operations)


@movable_clock
async def test_what_is_remembered_is_forgotten() -> None:
    async with Operations(memory=60) as operations:
        await operations.cancel("job")
        async with operations.track(id="other"):
            pass
        await advance(61)
        assert await operations.get("other") is None
        async with operations.track(id="job"):
            await anyio.lowlevel.checkpoint()


@movable_clock
async def test_what_is_remembered_is_forgotten_also_if_nothing_new_comes() -> None:
    async with workers(2, memory=60) as (_, (a, b)):
        await a.cancel("job", wait=0)
        async with a.track(id="other"):
            await b.list()
        held: list[Any] = [
            a.worker.local.early,
            a.worker.local.ended,
            a.worker.exchange._seen,
            a.worker.exchange._lasting,
        ]
        assert all(len(each) for each in held)
        await advance(66)
        await until(lambda: not any(len(each) for each in held))


async def test_a_cancel_is_for_a_whole_id_and_a_dead_worker_is_known() -> None:
    async with workers(2) as (hub, (a, b)):
        operation = await a.start(endless, id="abc")
        for id in ("ab", "abcd", "ABC"):
            assert (await b.cancel(id)).outcome == "unknown"
        gone = hub.operations()
        async with gone:
            left = await gone.start(endless)
            async with gone.track():
                minted = gone.worker.local.name(next(gone.worker.local.blocks()))
                await gone.cancel(left.id)
        assert (await a.cancel(minted)).outcome == "lost"
        assert (await a.cancel(minted, owner="ann")).outcome == "unknown"
        with pytest.raises(OperationUnknown):
            await a.wait(minted, timeout=0)
        assert (await b.cancel(operation.id)).outcome == "cancelled"


@pytest.mark.parametrize("is_remote", [False, True])
async def test_events_come_in_order_until_the_end(is_remote: bool) -> None:
    steps = Steps()

    async def work(cancel: Cancelable) -> None:
        await steps(cancel)
        await cancel.report_progress("half")

    async with workers(2) as (_, (a, b)):
        operation = await a.start(work)
        follower = b if is_remote else a
        kinds = []
        async for event in follower.events(operation.id):
            kinds.append(event.kind)
            if len(kinds) == 1:
                await steps.begun.wait()
                await until(lambda: not is_remote or vars(a.worker.watching)["_followers"])
                steps.go_on.set()
        assert (kinds[0], kinds[-1]) == ("state", "end")
        assert kinds.count("end") == 1
        early = await a.start(endless)
        events = follower.events(early.id)
        await anext(events)
        await events.aclose()
        assert all(not each.listeners or is_remote for each in a.worker.local.blocks())
        await a.cancel(early.id)
        nothing_is_kept(a, b)
