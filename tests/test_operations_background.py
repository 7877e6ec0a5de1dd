"""Work that outlives its request: its start, its end, its result, and the shutdown."""

from __future__ import annotations

import gc
import json
import time
import weakref
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from cancelable_deps import (
    Cancelable,
    CancelationError,
    CancelationReason,
    CancelationToken,
    begin_shutdown,
    cancelation_lifespan,
)
from cancelable_deps.operations import (
    ANYONE,
    OperationBusy,
    OperationFailed,
    OperationLost,
    Operations,
    OperationState,
    OperationsUnavailable,
    OperationTaken,
    OperationUnknown,
)
from cancelable_deps.operations.backend import Record, Unavailable
from cancelable_deps.operations.memory import MemoryBackend
from cancelable_deps.testing import CancelableClient, advance
from tests.calls import CEILING, movable_clock
from tests.operations import Steps, ended, endless, nothing_is_kept, until, workers

pytestmark = [pytest.mark.anyio]


async def double(cancel: Cancelable, number: int = 21) -> int:
    return 2 * number


async def test_work_has_a_result_an_id_and_a_record() -> None:
    async with Operations() as operations:
        operation = await operations.start(double, 4, name="doubling", owner=7, key="k", labels={"size": "big"})
        assert (operation.kind, operation.name, operation.owner, operation.key) == ("background", "doubling", "7", "k")
        assert (operation.state, dict(operation.labels)) == (OperationState.RUNNING, {"size": "big"})
        assert await operations.result(operation.id, owner="7") == 8
        found = await operations.get(operation.id, owner=7)
        assert found is not None
        assert (found.state, found.reason, found.message) == (OperationState.FINISHED, None, None)
        for call in (operations.result(operation.id, owner="8"), operations.wait(operation.id, timeout=1, owner="8")):
            with pytest.raises(OperationUnknown):
                await call
        assert await operations.get(operation.id, owner="8") is None
        assert operations.worker.local.ends == {"finished": 1}
        nothing_is_kept(operations)


class Report(BaseModel):
    pages: int


@pytest.mark.parametrize(
    ("result", "kept"), [(None, None), ([1, "a"], [1, "a"]), (Report(pages=3), {"pages": 3}), ("ä", "ä")]
)
async def test_results_are_kept_as_json(result: object, kept: object) -> None:
    async def work(cancel: Cancelable) -> object:
        return result

    async with Operations() as operations:
        operation = await operations.start(work)
        assert await operations.result(operation.id) == kept


async def test_names_are_those_of_the_work() -> None:
    async with Operations(background_grace=0) as operations:
        assert (await operations.start(double)).name == "double"
        assert (await operations.start(partial(double, number=3))).name == "double"
        assert (await operations.start(Steps())).name == "Steps"
        assert (await operations.start(lambda cancel: double(cancel))).name == "<lambda>"


@movable_clock
async def test_a_result_is_forgotten_in_time() -> None:
    async with Operations(result_ttl=timedelta(minutes=5), memory=1) as operations:
        operation = await operations.start(double, id="mine")
        await ended(operations, operation)
        await advance(200)
        assert await operations.result("mine") == 42
        found = await operations.get("mine")
        assert found is not None
        assert found.elapsed < 100
        await advance(101)
        with pytest.raises(OperationUnknown):
            await operations.result("mine")
        assert await operations.get("mine") is None
        # So that its id may be used again.
        assert (await operations.start(double, id="mine")).state is OperationState.RUNNING


@movable_clock
async def test_a_record_says_how_long_work_took() -> None:
    async with workers(2, memory=1) as (_, (a, b)):
        steps = Steps()
        operation = await a.start(steps)
        await advance(30)
        steps.go_on.set()
        await ended(a, operation)
        await advance(20)
        for each in (a, b):
            found = await each.get(operation.id)
            assert found is not None
            assert found.ended is not None
            assert 29 < found.elapsed < 35
            assert 29 < (found.ended - found.started).total_seconds() < 35


async def test_a_result_that_is_too_large_or_is_none_fails(caplog: pytest.LogCaptureFixture) -> None:
    async def large(cancel: Cancelable) -> str:
        return "x" * 99

    async def strange(cancel: Cancelable) -> object:
        return {"value": object, 1: float("nan")}

    async with Operations(max_result=100) as operations:
        with pytest.raises(OperationFailed, match="101 bytes, and at most 100 are kept"):
            await operations.result((await operations.start(large)).id)
        operation = await operations.start(strange)
        assert (await ended(operations, operation)).state is OperationState.FAILED
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the encoder raises
            await operations.result(operation.id)
        nothing_is_kept(operations)


class Broken(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__()
        self.code = code


class Base(BaseException):
    pass


@pytest.mark.parametrize(
    "error", [ValueError("broken"), Broken(code=7), Base("base"), ExceptionGroup("g", [OSError()])]
)
async def test_an_exception_is_kept_as_it_is(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps()
    steps.error = error
    steps.go_on.set()
    async with Operations() as operations:
        operation = await operations.start(steps)
        found = await ended(operations, operation)
        assert (found.state, found.message) == (OperationState.FAILED, "The work failed")
        assert "failed" in caplog.text
        for _ in range(2):
            with pytest.raises(type(error)) as raised:
                await operations.result(operation.id)
            assert vars(raised.value) == vars(error)
            assert raised.value.args == error.args
            # Who asks does not leave its frames in what is kept.
            assert raised.value is not error
        assert error.__traceback__ is None
        nothing_is_kept(operations)


async def test_an_http_exception_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps()
    detail: Any = {"pay": "more"}
    steps.error = HTTPException(402, detail, headers={"x-a": "b"})
    steps.go_on.set()
    async with workers(2) as (_, (a, b)):
        operation = await a.start(steps)
        await ended(a, operation)
        for each in (a, b):
            with pytest.raises(HTTPException) as raised:
                await each.result(operation.id)
            assert (raised.value.status_code, raised.value.detail) == (402, detail)
            assert raised.value.headers == {"x-a": "b"}
        assert "Traceback" not in caplog.text


async def test_another_worker_hears_that_work_has_failed_and_no_more() -> None:
    steps = Steps()
    steps.error = ValueError("the password is 1234")
    async with workers(2) as (_, (a, b)):
        operation = await a.start(steps)
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                with pytest.raises(OperationFailed) as raised:
                    await b.result(operation.id)
                assert raised.value.detail == "The work failed"

            tasks.start_soon(ask)
            await until(lambda: vars(a.worker.watching)["_followers"])
            steps.go_on.set()
        nothing_is_kept(a, b)


async def test_a_cancelation_of_another_block_is_a_failure() -> None:
    token = CancelationToken()
    token.cancel_nowait(CancelationReason.ERROR, "elsewhere")

    async def work(cancel: Cancelable) -> None:
        async with Cancelable(token=token):
            await anyio.lowlevel.checkpoint()

    async with Operations() as operations:
        operation = await operations.start(work)
        assert (await ended(operations, operation)).state is OperationState.FAILED
        with pytest.raises(CancelationError):
            await operations.result(operation.id)


async def test_work_is_stopped_once() -> None:
    async with workers(2) as (_, (a, b)):
        steps = Steps()
        operation = await a.start(steps, owner="ann")
        await steps.begun.wait()
        assert (await b.cancel(operation.id, owner="bob")).outcome == "unknown"
        first = await b.cancel(operation.id, owner="ann", message="enough")
        assert first.outcome == "cancelled"
        second = await a.cancel(operation.id, owner="ann", message="again")
        assert second.outcome == "cancelled"
        assert second.operation is not None
        assert (second.operation.reason, second.operation.message) == (CancelationReason.MANUAL, "enough")
        for each in (a, b):
            with pytest.raises(CancelationError, match="enough"):
                await each.result(operation.id)
        nothing_is_kept(a, b)


async def test_without_a_message_a_record_has_none_either() -> None:
    async with workers(2) as (_, (a, b)):
        operation = await a.start(endless)
        await a.cancel(operation.id)
        here, there = await a.get(operation.id), await b.get(operation.id)
        assert here is not None
        assert there is not None
        assert (here.message, here.reason) == (there.message, there.reason) == (None, CancelationReason.MANUAL)


async def test_work_that_finishes_anyway_has_finished() -> None:
    steps = Steps()
    steps.swallows, steps.result = True, "done"
    async with Operations() as operations:
        operation = await operations.start(steps)
        await steps.begun.wait()
        assert (await operations.cancel(operation.id)).outcome == "finished"
        assert await operations.result(operation.id) == "done"
        found = await operations.get(operation.id)
        assert found is not None
        assert (found.state, found.reason, found.message) == (OperationState.FINISHED, None, None)


@movable_clock
async def test_work_has_a_timeout_of_its_own() -> None:
    async with Operations() as operations:
        operation = await operations.start(endless, timeout=30, key="k", when_busy="wait")
        next_one = await operations.start(endless, timeout=30, key="k", when_busy="wait")
        assert next_one.state is OperationState.WAITING
        await until(lambda: operations.worker.local.find(operation.id, owner_of(operation)) or True)
        await advance(1)
        found = await operations.get(operation.id)
        assert found is not None
        assert found.deadline is not None
        await advance(30)
        assert (await ended(operations, operation)).reason is CancelationReason.TIMEOUT
        with pytest.raises(CancelationError) as raised:
            await operations.result(operation.id)
        assert raised.value.status_code == 504
        # The time of its turn counts only from there on.
        await advance(28)
        assert (await operations.get(next_one.id)).state is OperationState.RUNNING  # type: ignore[union-attr]
        await advance(5)
        assert (await ended(operations, next_one)).reason is CancelationReason.TIMEOUT
        nothing_is_kept(operations)


def owner_of(operation: Any) -> Any:
    return operation.owner or "nobody"


async def test_one_id_starts_once() -> None:
    async with workers(2) as (_, (a, b)):
        steps = Steps()
        operation = await a.start(steps, id="mine", owner="ann")
        for each in (a, b):
            same = await each.start(endless, id="mine", owner="ann")
            assert (same.id, same.name, same.worker) == ("mine", "Steps", operation.worker)
            with pytest.raises(OperationTaken):
                await each.start(endless, id="mine", owner="bob")
            with pytest.raises(OperationTaken):
                await each.start(endless, id="mine")
        steps.go_on.set()
        await ended(a, "mine")
        assert (await b.start(endless, id="mine", owner="ann")).state is OperationState.FINISHED
        nothing_is_kept(a, b)


@pytest.mark.parametrize("count", [1, 2])
async def test_two_starts_of_one_id_at_the_same_time(count: int) -> None:
    begun: list[int] = []

    async def work(cancel: Cancelable) -> None:
        begun.append(1)
        await anyio.sleep_forever()

    async with workers(count) as (_, opened):
        found: list[Any] = []

        async def start(operations: Operations, key: str | None) -> None:
            when_busy = "run" if key is None else "wait"
            found.append(await operations.start(work, id="mine", owner="ann", key=key, when_busy=when_busy))

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(start, opened[number % count], "k" if number % 3 == 0 else None)
        await until(lambda: begun)
        assert [each.id for each in found] == ["mine"] * 10
        assert len({each.worker for each in found}) == 1
        await opened[0].cancel("mine")
        assert begun == [1]
        nothing_is_kept(*opened)


async def test_an_id_that_was_cancelled_before_does_not_start() -> None:
    async with workers(2) as (_, (a, b)):
        assert (await a.cancel("mine", message="no")).outcome == "unknown"
        assert (await a.cancel("hers", owner="ann")).outcome == "unknown"
        for id, owner in (("mine", "bob"), ("hers", "ann")):
            steps = Steps()
            await b.start(steps, id=id, owner=owner)
            assert (await ended(b, id)).state is OperationState.CANCELLED
            assert not steps.begun.is_set()
        nothing_is_kept(a, b)


async def test_when_busy() -> None:
    async with workers(2) as (_, (a, b)):
        first = await a.start(endless, key="k", when_busy="refuse")
        for each in (a, b):
            with pytest.raises(OperationBusy):
                await each.start(endless, key="k", when_busy="refuse")
        beside = await b.start(endless, key="k")
        waits = [await each.start(endless, key="k", when_busy="wait") for each in (b, a)]
        assert [each.state for each in waits] == [OperationState.WAITING] * 2
        await a.cancel(first.id)
        await until(lambda: b.worker.local.find(waits[0].id, ANYONE)[0].state is OperationState.RUNNING)
        assert (await a.get(waits[1].id)).state is OperationState.WAITING  # type: ignore[union-attr]
        # One that waits is stopped as well.
        assert (await b.cancel(waits[1].id)).outcome == "cancelled"
        latest = await a.start(endless, key="k", when_busy="cancel_previous")
        found = await ended(b, waits[0])
        assert (found.state, found.message) == (OperationState.CANCELLED, "superseded by a newer request")
        assert (await b.get(beside.id)).state is OperationState.RUNNING  # type: ignore[union-attr]
        for operation in (latest, beside):
            await a.cancel(operation.id)
        nothing_is_kept(a, b)


class Proxied:
    """What stands for a function, has its class and cannot be referred to weakly: a `LocalProxy` of Werkzeug is such."""

    __slots__ = ("_function",)

    def __init__(self, function: Any) -> None:
        self._function = function

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


async def test_work_may_be_what_only_seems_to_be_a_function() -> None:
    async with Operations() as operations:
        operation = await operations.start(Proxied(double), 4)
        assert await operations.result(operation.id) == 8


class LosingAnswers(MemoryBackend):
    """A store that does not answer when a record is created, and may hold a change of one back."""

    loses = True

    def __init__(self) -> None:
        super().__init__()
        self.held, self.is_held, self.goes_on = "", anyio.Event(), anyio.Event()

    async def create(self, id: str, fields: Any, *, ttl: float) -> Record:
        record = await super().create(id, fields, ttl=ttl)
        if self.loses:
            raise Unavailable
        return record

    async def change(self, id: str, fields: Any, *, end_ttl: float | None = None) -> bool:
        if id == self.held:
            self.is_held.set()
            await self.goes_on.wait()
        return await super().change(id, fields, end_ttl=end_ttl)


async def test_the_record_of_a_call_that_is_repeated_is_not_deleted() -> None:
    store = LosingAnswers()
    async with Operations(store) as operations:
        # One more than are looked for at the same time.
        ids = [f"id-{number}" for number in range(101)]
        for id in ids:
            with pytest.raises(OperationsUnavailable):
                await operations.start(endless, id=id)
        store.loses = False
        store.held = ids[0]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(operations.worker.background.doubtful.delete_all)
            await store.is_held.wait()
            await operations.start(endless, id=ids[-1])
            store.goes_on.set()
        assert [record is not None for record in await store.load(ids)] == [False] * 100 + [True]
        assert (await operations.cancel(ids[-1])).outcome == "cancelled"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((lambda: None,), {}, TypeError, "Cancelable"),
        ((double, 1, 2), {}, TypeError, "2 arguments"),
        (("work",), {}, TypeError, "async function"),
        ((time.sleep,), {}, TypeError, "not async"),
        ((endless,), {"id": "a b"}, ValueError, "id of an operation"),
        ((endless,), {"id": 7}, TypeError, "id of an operation"),
        ((endless,), {"id": "a" * 129}, ValueError, "id of an operation"),
        ((endless,), {"owner": ""}, ValueError, "owner"),
        ((endless,), {"owner": "a\r\nb"}, ValueError, "owner"),
        ((endless,), {"owner": "\ud800"}, ValueError, "owner"),
        ((endless,), {"key": ["k"]}, TypeError, "key"),
        ((endless,), {"labels": {"a": "x" * 257}}, ValueError, "label"),
        ((endless,), {"labels": ["a"]}, TypeError, "labels"),
        ((endless,), {"name": ""}, ValueError, "name"),
        ((endless,), {"when_busy": "refuse"}, TypeError, "needs a key"),
        ((endless,), {"when_busy": "stop", "key": "k"}, ValueError, "when_busy"),
        ((endless,), {"timeout": -1}, ValueError, "timeout"),
    ],
)
async def test_wrong_use(arguments: Any, options: Any, error: type[Exception], text: str) -> None:
    async with Operations() as operations:
        with pytest.raises(error, match=text):
            await operations.start(*arguments, **options)
        nothing_is_kept(operations)


async def test_progress_is_seen_by_all() -> None:
    steps = Steps()

    async def work(cancel: Cancelable) -> None:
        await cancel.report_progress("half", {"done": 1, "total": 2})
        await cancel.report_progress("wrong", {"what": object()})
        await steps(cancel)

    async with workers(2) as (_, (a, b)):
        operation = await a.start(work)
        await steps.begun.wait()
        with anyio.fail_after(CEILING):
            for each in (a, b):
                while True:
                    found = await each.get(operation.id)
                    assert found is not None
                    if found.progress is not None:
                        break
                    await anyio.sleep(0.01)
                assert (found.progress.message, found.progress.metadata) == ("half", {"done": 1, "total": 2})
        steps.go_on.set()
        found = await ended(b, operation)
        assert found.progress is not None
        nothing_is_kept(a, b)


variable: ContextVar[object] = ContextVar("variable")


async def test_nothing_of_the_request_is_kept_alive() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    kept: list[weakref.ref[Any]] = []
    seen: list[object] = []

    class Thing:
        pass

    async def work(cancel: Cancelable) -> None:
        seen.append(variable.get(None))
        await anyio.sleep_forever()

    @app.post("/reports", status_code=202)
    async def start(request: Request) -> Any:
        thing = request.state.thing = Thing()
        variable.set(thing)
        kept.extend((weakref.ref(thing), weakref.ref(request)))
        return (await operations.start(work, id="mine")).accepted()

    async with CancelableClient(app, ceiling=CEILING) as client:
        answer = await client.post("/reports")
        assert (answer.status_code, answer.headers["retry-after"]) == (202, "1")
        assert answer.json()["id"] == "mine"
        del answer
        await until(lambda: seen)
        gc.collect()
        assert seen == [None]
        assert [each() for each in kept] == [None, None]
        await operations.cancel("mine")


async def test_a_request_that_ends_does_not_end_its_work() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    steps = Steps()

    @app.post("/reports", status_code=202)
    async def start() -> Any:
        await operations.start(steps, id="mine")
        await anyio.sleep_forever()

    async with CancelableClient(app, ceiling=CEILING) as client:
        async with client.start("POST", "/reports") as call:
            await steps.begun.wait()
            call.give_up()
        steps.go_on.set()
        assert (await ended(operations, "mine")).state is OperationState.FINISHED


@movable_clock
async def test_at_the_shutdown_work_has_its_grace_then_it_is_stopped() -> None:
    operations = Operations(background_grace=10)
    steps = Steps()
    log: list[str] = []

    async def long(cancel: Cancelable) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            log.append(str(cancel.reason))
            await anyio.sleep(2)
            log.append("cleaned up")

    async with anyio.create_task_group() as tasks:

        async def close() -> None:
            async with operations:
                await operations.start(long, id="long")
                await operations.start(steps, id="short")
                waiting = await operations.start(endless, id="held", key="k", when_busy="wait")
                waiting = await operations.start(endless, id="waits", key="k", when_busy="wait")
                assert waiting.state is OperationState.WAITING
                await steps.begun.wait()
            log.append("closed")

        tasks.start_soon(close)
        await steps.begun.wait()
        await advance(5)
        with pytest.raises((OperationsUnavailable, RuntimeError)):
            await operations.start(endless)
        steps.go_on.set()
        await advance(4)
        assert log == []
        await advance(1.5)
        assert log == ["signal"]
        await advance(2)
    assert log == ["signal", "cleaned up", "closed"]


@movable_clock
async def test_the_grace_begins_with_the_signal() -> None:
    operations = Operations(background_grace=10)
    async with operations.lifespan(cancelation_lifespan(grace=100))(FastAPI()):
        operation = await operations.start(endless)
        begin_shutdown()
        await advance(5)
        with pytest.raises(OperationsUnavailable, match="shutting down"):
            await operations.start(endless)
        assert (await operations.get(operation.id)).state is OperationState.RUNNING  # type: ignore[union-attr]
        await advance(5.1)
        assert (await ended(operations, operation)).reason is CancelationReason.SIGNAL


async def test_a_lifespan_that_is_cancelled_ends_at_once() -> None:
    async with workers(2) as (hub, (a, _)):
        operations = hub.operations(background_grace=1000)
        started: list[Any] = []
        with anyio.CancelScope() as scope, anyio.fail_after(CEILING):
            async with operations:
                started.append(await operations.start(endless))
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert (await ended(a, started[0])).reason is CancelationReason.SIGNAL
        cut = hub.operations(background_grace=1000)
        with anyio.CancelScope() as scope, anyio.fail_after(CEILING):
            async with cut:
                await cut.start(endless)
                hub.cut(cut)
                scope.cancel()
                await anyio.lowlevel.checkpoint()


@movable_clock
async def test_a_result_is_written_when_the_store_is_back() -> None:
    async with workers(2) as (hub, (a, b)):
        steps = Steps()
        steps.result = 7
        operation = await a.start(steps)
        hub.cut(a)
        steps.go_on.set()
        await advance(3)
        assert (await b.get(operation.id)).state is OperationState.RUNNING  # type: ignore[union-attr]
        hub.resume(a)
        await advance(3)
        assert await b.result(operation.id) == 7
        nothing_is_kept(a, b)


@movable_clock
async def test_a_worker_that_was_given_up_stops_its_work_and_is_not_believed() -> None:
    async with workers(2) as (hub, (a, b)):
        await advance(25)
        steps = Steps()
        steps.swallows, steps.result = True, "late"
        operation = await a.start(steps)
        hub.cut(a)
        await advance(25)
        assert (await b.get(operation.id)).state is OperationState.LOST  # type: ignore[union-attr]
        hub.resume(a)
        await advance(10)
        assert steps.is_left.is_set()
        with pytest.raises(OperationLost):
            await b.result(operation.id)
        assert (await b.get(operation.id)).state is OperationState.LOST  # type: ignore[union-attr]
        again = await a.start(double)
        assert again.worker != operation.worker
        assert await b.result(again.id) == 42
        nothing_is_kept(a, b)


@movable_clock
async def test_work_that_waits_is_not_forgotten_with_the_store() -> None:
    async with workers(1) as (hub, (a,)):
        first = await a.start(endless, key="k", when_busy="wait")
        second = await a.start(double, key="k", when_busy="wait")
        hub.lose_everything()
        await advance(10)
        await a.cancel(first.id)
        await advance(10)
        assert await a.result(second.id) == 42
        nothing_is_kept(a)


@pytest.mark.real
async def test_work_of_a_process_is_killed_by_the_cancel() -> None:
    async def work(cancel: Cancelable) -> None:
        await cancel.run_in_process(time.sleep, 3600)

    async with Operations() as operations:
        operation = await operations.start(work)
        await anyio.sleep(0.5)
        assert (await operations.cancel(operation.id, wait=CEILING)).outcome == "cancelled"


async def test_many_starts() -> None:
    async with Operations() as operations:
        started = [await operations.start(double, number) for number in range(1000)]
        assert [await operations.result(each.id) for each in started] == [2 * number for number in range(1000)]
        nothing_is_kept(operations)


def test_an_operation_can_be_sent() -> None:
    async def main() -> str:
        async with Operations() as operations:
            return (await operations.start(double)).model_dump_json()

    assert json.loads(anyio.run(main))["state"] == "running"
