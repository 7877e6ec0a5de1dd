# pyright: reportPossiblyUnboundVariable=false
# It believes that `raises` may take an exception from entering the block.
# ruff: noqa: PT012 - what leaves a block is tested by leaving it, inside of `raises`
from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import pytest
from starlette.exceptions import HTTPException

from cancelable_deps import (
    Cancelable,
    CancelationReason,
    CancelationToken,
    ManualCancelation,
    SignalCancelation,
    TimeoutCancelation,
    current_cancelable,
)
from cancelable_deps.kernel.task_group import CancelableTaskGroup
from cancelable_deps.testing import advance

from .calls import CEILING, movable_clock
from .leftovers import nothing_left

pytestmark = pytest.mark.anyio

SOON = 0.02
LONG = 100
CLEANED = ["checkpoint", "sleep", "thread", "group"]
variable = ContextVar("variable", default="nothing")


@asynccontextmanager
async def group(**options: Any) -> AsyncGenerator[CancelableTaskGroup]:
    async with nothing_left(), CancelableTaskGroup(Cancelable(**options)) as tasks:
        yield tasks


class Child:
    """Work in a child task whose journal says how often it was cancelled, and how its cleanup went."""

    def __init__(self) -> None:
        self.journal: list[str] = []
        self.release = anyio.Event()
        self.thread_release = threading.Event()

    async def run(self, stand: Callable[[Child], Awaitable[object]]) -> None:
        try:
            await stand(self)
            self.journal.append("went on")
        except anyio.get_cancelled_exc_class():
            self.journal.append("cancelled")
            await self._clean_up()
            raise

    async def _clean_up(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.journal.append("checkpoint")
        await anyio.sleep(SOON)
        self.journal.append("sleep")
        await anyio.to_thread.run_sync(threading.get_ident)
        self.journal.append("thread")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep, 0)
        self.journal.append("group")


async def sleeping(child: Child) -> None:
    await anyio.sleep_forever()


async def in_its_own_timeout(child: Child) -> None:
    with anyio.fail_after(LONG):
        await anyio.sleep_forever()


async def in_its_own_block(child: Child) -> None:
    async with Cancelable(timeout=LONG):
        await anyio.sleep_forever()


async def in_a_shield(child: Child) -> None:
    with anyio.CancelScope(shield=True):
        await child.release.wait()
    child.journal.append("finished")
    await anyio.sleep_forever()


async def in_a_thread(child: Child) -> None:
    await anyio.to_thread.run_sync(child.thread_release.wait, 10)
    child.journal.append("finished")
    await anyio.sleep_forever()


async def fail(error: Exception) -> None:
    await anyio.lowlevel.checkpoint()
    raise error


def cancel(tasks: CancelableTaskGroup, cause: str) -> None:
    if cause == "block":
        tasks.cancelable.cancel_nowait()
    elif cause == "group":
        tasks.cancel_scope.cancel()
    else:
        tasks.start_soon(fail, KeyError())


def ending(cause: str) -> AbstractContextManager[object]:
    """What leaves a group that was cancelled for that cause."""
    if cause == "group":
        return nullcontext()
    return pytest.raises(ManualCancelation if cause == "block" else KeyError)


every_cause = pytest.mark.parametrize("cause", ["block", "sibling", "group"])


async def test_it_waits_for_its_children() -> None:
    ended: list[int] = []

    async def child(number: int) -> None:
        await anyio.lowlevel.checkpoint()
        ended.append(number)

    async with group() as tasks:
        tasks.start_soon(child, 1)
        tasks.start_soon(child, 2)
        assert tasks.cancelable.is_active
        assert current_cancelable() is tasks.cancelable
    assert sorted(ended) == [1, 2]
    assert not tasks.cancelable.is_active


async def test_its_children_know_the_block() -> None:
    seen: list[Cancelable | None] = []

    async def child() -> None:
        seen.append(current_cancelable())

    async with group() as tasks:
        tasks.start_soon(child)
    assert seen == [tasks.cancelable]


async def test_a_block_that_was_cancelled_before_starts_nothing() -> None:
    block = Cancelable()
    block.cancel_nowait(CancelationReason.SIGNAL)
    async with nothing_left():
        with pytest.raises(SignalCancelation):
            async with CancelableTaskGroup(block):
                pytest.fail("the body ran")


async def test_entering_twice_says_what_to_do() -> None:
    async with group() as tasks:
        pass
    with pytest.raises(RuntimeError, match="was entered before"):
        await tasks.__aenter__()


async def test_before_entering_no_task_can_be_started() -> None:
    tasks = CancelableTaskGroup(Cancelable())
    with pytest.raises(RuntimeError):
        tasks.start_soon(anyio.sleep_forever)
    with pytest.raises(RuntimeError):
        await tasks.start(fail, KeyError())


async def test_after_leaving_no_task_can_be_started() -> None:
    async with group() as tasks:
        pass
    with pytest.raises(RuntimeError):
        tasks.start_soon(anyio.sleep_forever)


async def test_what_is_no_coroutine_is_refused_at_once() -> None:
    async with group() as tasks:
        with pytest.raises(TypeError, match="coroutine"):
            tasks.create_task(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_the_exception_of_one_child_arrives_as_itself() -> None:
    error = KeyError()
    with pytest.raises(KeyError) as caught:
        async with group() as tasks:
            tasks.start_soon(fail, error)
            await anyio.sleep_forever()
    assert caught.value is error
    assert not tasks.cancelable.is_cancelled


async def test_the_exception_of_the_body_arrives_as_itself() -> None:
    error = KeyError()
    child = Child()
    with pytest.raises(KeyError) as caught:
        async with group() as tasks:
            tasks.start_soon(child.run, sleeping)
            await anyio.wait_all_tasks_blocked()
            raise error
    assert caught.value is error
    assert child.journal == ["cancelled", *CLEANED]


async def test_an_http_exception_beside_another_one_is_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    ready = anyio.Event()

    async def fail_together(error: Exception) -> None:
        with anyio.CancelScope(shield=True):
            await ready.wait()
        raise error

    bug = KeyError("a bug")
    with pytest.raises(HTTPException) as caught:
        async with group() as tasks:
            tasks.start_soon(fail_together, HTTPException(409))
            tasks.start_soon(fail_together, bug)
            await anyio.wait_all_tasks_blocked()
            ready.set()
    assert caught.value.status_code == 409
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("cancelable_deps", logging.ERROR)
    assert record.exc_info is not None
    assert record.exc_info[1] is bug


async def test_several_exceptions_without_an_answer_are_a_group() -> None:
    ready = anyio.Event()

    async def fail_together(error: Exception) -> None:
        with anyio.CancelScope(shield=True):
            await ready.wait()
        raise error

    with pytest.raises(ExceptionGroup) as caught:
        async with group() as tasks:
            tasks.start_soon(fail_together, KeyError())
            tasks.start_soon(fail_together, ValueError())
            await anyio.wait_all_tasks_blocked()
            ready.set()
    assert {type(exc) for exc in caught.value.exceptions} == {KeyError, ValueError}


async def test_what_a_child_raises_in_its_cleanup_is_not_replaced() -> None:
    async def child() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise KeyError

    with pytest.raises(KeyError):
        async with group() as tasks:
            tasks.start_soon(child)
            await anyio.wait_all_tasks_blocked()
            await tasks.cancelable.cancel()


async def test_a_child_that_cancels_the_block_stops_everyone() -> None:
    child = Child()
    with pytest.raises(ManualCancelation, match="enough"):
        async with group() as tasks:
            tasks.start_soon(child.run, sleeping)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(partial(tasks.cancelable.cancel, message="enough"))
    assert child.journal == ["cancelled", *CLEANED]


async def test_a_child_does_not_end_well_because_its_own_group_took_the_cancellation() -> None:
    async def child() -> str:
        async with anyio.create_task_group() as own:
            own.start_soon(anyio.sleep_forever)
        return "without a result"

    with pytest.raises(TimeoutCancelation):
        async with group(timeout=SOON) as tasks:
            tasks.start_soon(child)


STANDS = [sleeping, in_its_own_timeout, in_its_own_block]
SHIELDED = [in_a_shield, in_a_thread]


@pytest.mark.parametrize("body_waits", [True, False])
@pytest.mark.parametrize("stand", STANDS)
async def test_when_the_block_is_cancelled_each_child_has_its_grace(
    stand: Callable[[Child], Awaitable[object]], body_waits: bool
) -> None:
    children = [Child(), Child()]
    with pytest.raises(ManualCancelation):
        async with group() as tasks:
            for child in children:
                tasks.start_soon(child.run, stand)
            await anyio.wait_all_tasks_blocked()
            tasks.cancelable.cancel_nowait()
            if body_waits:
                await anyio.sleep_forever()
    assert [child.journal for child in children] == [["cancelled", *CLEANED]] * 2


@pytest.mark.parametrize("stand", STANDS)
async def test_when_its_token_is_cancelled_in_a_thread(stand: Callable[[Child], Awaitable[object]]) -> None:
    token = CancelationToken()
    child = Child()
    with pytest.raises(ManualCancelation):
        async with group(token=token) as tasks:
            tasks.start_soon(child.run, stand)
            await anyio.wait_all_tasks_blocked()
            assert await anyio.to_thread.run_sync(token.cancel_nowait)
    assert child.journal == ["cancelled", *CLEANED]


@movable_clock
@pytest.mark.parametrize("stand", STANDS)
async def test_when_it_times_out(stand: Callable[[Child], Awaitable[object]]) -> None:
    child = Child()
    with pytest.raises(TimeoutCancelation):
        async with group(timeout=LONG / 2) as tasks:
            tasks.start_soon(child.run, stand)
            await advance(LONG / 2)
    assert child.journal == ["cancelled", *CLEANED]


@pytest.mark.parametrize("stand", STANDS)
async def test_when_a_sibling_fails(stand: Callable[[Child], Awaitable[object]]) -> None:
    child = Child()
    with pytest.raises(KeyError):
        async with group() as tasks:
            tasks.start_soon(child.run, stand)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(fail, KeyError())
    assert child.journal == ["cancelled", *CLEANED]


@pytest.mark.parametrize("stand", STANDS)
async def test_when_the_user_cancels_the_group(stand: Callable[[Child], Awaitable[object]]) -> None:
    child = Child()
    async with group() as tasks:
        tasks.start_soon(child.run, stand)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert child.journal == ["cancelled", *CLEANED]
    assert not tasks.cancelable.is_cancelled


@pytest.mark.parametrize("stand", SHIELDED)
@every_cause
async def test_a_child_that_may_not_be_cancelled_finishes_first(
    cause: str, stand: Callable[[Child], Awaitable[object]]
) -> None:
    child = Child()

    async def release() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()
            assert child.journal == []
            child.release.set()
            child.thread_release.set()

    with ending(cause):
        async with group() as tasks:
            tasks.start_soon(child.run, stand)
            await anyio.wait_all_tasks_blocked()
            cancel(tasks, cause)
            tasks.start_soon(release)
    assert child.journal == ["finished", "cancelled", *CLEANED]


async def test_a_child_that_may_not_be_cancelled_is_not_forgotten_while_the_body_cleans_up() -> None:
    child = Child()
    seen: list[list[str]] = []
    with pytest.raises(ManualCancelation):
        async with group() as tasks:
            tasks.start_soon(child.run, in_a_shield)
            await anyio.wait_all_tasks_blocked()
            try:
                await tasks.cancelable.cancel()
            finally:
                child.release.set()
                with anyio.move_on_after(1):
                    while child.journal[-1:] != CLEANED[-1:]:
                        await anyio.lowlevel.checkpoint()
                seen.append(list(child.journal))
    assert seen == [["finished", "cancelled", *CLEANED]]


async def test_a_child_that_has_not_run_yet_is_cancelled_at_its_first_await() -> None:
    child = Child()
    with pytest.raises(ManualCancelation):
        async with group() as tasks:
            tasks.start_soon(child.run, sleeping)
            tasks.cancelable.cancel_nowait()
    assert child.journal == ["cancelled", *CLEANED]


async def test_a_child_started_in_the_cleanup_of_the_body_is_cancelled() -> None:
    child = Child()
    with pytest.raises(ManualCancelation):
        async with group() as tasks:
            try:
                await tasks.cancelable.cancel()
            finally:
                tasks.start_soon(child.run, sleeping)
                await anyio.lowlevel.checkpoint()
    assert child.journal == ["cancelled", *CLEANED]


@every_cause
async def test_the_body_has_its_grace_too(cause: str) -> None:
    body = Child()
    with ending(cause):
        async with group() as tasks:
            cancel(tasks, cause)
            await body.run(sleeping)
    assert body.journal == ["cancelled", *CLEANED]


@every_cause
@pytest.mark.parametrize("grace", [0, SOON])
async def test_a_child_whose_cleanup_never_ends_is_stopped(grace: float, cause: str) -> None:
    journal: list[str] = []

    async def child() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            try:
                await anyio.sleep_forever()
            finally:
                journal.append("stopped")
                await anyio.sleep_forever()

    with anyio.fail_after(CEILING), ending(cause):
        async with group(cleanup_grace=grace) as tasks:
            tasks.start_soon(child)
            await anyio.wait_all_tasks_blocked()
            cancel(tasks, cause)
    assert journal == ["stopped"]


async def test_a_child_that_swallows_the_cancellation_is_stopped_after_its_grace() -> None:
    journal: list[str] = []

    async def child() -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            journal.append("swallowed")
        await anyio.sleep_forever()

    with anyio.fail_after(CEILING), pytest.raises(ManualCancelation):
        async with group(cleanup_grace=SOON) as tasks:
            tasks.start_soon(child)
            await anyio.wait_all_tasks_blocked()
            tasks.cancelable.cancel_nowait()
    assert journal == ["swallowed"]


async def test_an_outer_scope_stops_everyone_and_passes() -> None:
    child = Child()
    async with nothing_left():
        with anyio.CancelScope() as scope:
            async with CancelableTaskGroup(Cancelable()) as tasks:
                tasks.start_soon(child.run, sleeping)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
    assert scope.cancelled_caught
    assert not tasks.cancelable.is_cancelled
    assert child.journal[0] == "cancelled"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_native_cancellation_passes() -> None:
    child = Child()

    async def work() -> None:
        async with CancelableTaskGroup(Cancelable()) as tasks:
            tasks.start_soon(child.run, sleeping)
            await anyio.sleep_forever()

    async with nothing_left():
        task = asyncio.create_task(work())
        await anyio.wait_all_tasks_blocked()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert task.cancelling() == 1
    assert child.journal[0] == "cancelled"


async def answer(value: int = 42) -> int:
    await anyio.lowlevel.checkpoint()
    return value


async def test_a_handle_has_the_result() -> None:
    async with group() as tasks:
        handle = tasks.start_soon(answer, 5)
        assert await handle == 5
        assert await tasks.create_task(answer()) == 42
    assert handle.return_value == 5
    assert handle.exception is None


async def test_a_handle_has_the_exception() -> None:
    error = KeyError()
    with pytest.raises(KeyError):
        async with group() as tasks:
            handle = tasks.start_soon(fail, error)
    assert handle.status is anyio.TaskHandle.Status.FAILED
    assert handle.exception is error


async def test_a_handle_knows_that_the_child_was_cancelled() -> None:
    with pytest.raises(ManualCancelation):
        async with group() as tasks:
            handle = tasks.start_soon(anyio.sleep_forever)
            await anyio.wait_all_tasks_blocked()
            await tasks.cancelable.cancel()
    assert handle.status is anyio.TaskHandle.Status.CANCELLED


async def test_a_handle_cancels_one_child_only() -> None:
    async with group() as tasks:
        handle = tasks.start_soon(anyio.sleep_forever)
        other = tasks.start_soon(answer)
        await anyio.wait_all_tasks_blocked()
        handle.cancel()
    assert handle.status is anyio.TaskHandle.Status.CANCELLED
    assert other.return_value == 42


async def name_of_task() -> str:
    return anyio.get_current_task().name or ""


async def test_children_have_the_names_of_their_functions() -> None:
    async with group() as tasks:
        soon = tasks.start_soon(name_of_task)
        created = tasks.create_task(name_of_task())
        named = tasks.start_soon(name_of_task, name="named")
        created_named = tasks.create_task(name_of_task(), name="named too")
    assert soon.return_value == soon.name
    assert soon.name.endswith("name_of_task")
    assert (created.name, created.return_value) == ("name_of_task", "name_of_task")
    assert (named.name, named.return_value) == ("named", "named")
    assert (created_named.name, created_named.return_value) == ("named too", "named too")


async def test_a_child_runs_in_the_context_that_is_given() -> None:
    async def look() -> str:
        return variable.get()

    context = copy_context()
    context.run(variable.set, "given")
    async with group() as tasks:
        given = tasks.create_task(look(), context=context)
        own = tasks.create_task(look())
    assert (given.return_value, own.return_value) == ("given", "nothing")


async def serve(
    journal: list[str], then: Callable[[], Awaitable[object]], *, task_status: anyio.abc.TaskStatus[int]
) -> str:
    journal.append(anyio.get_current_task().name or "")
    await anyio.lowlevel.checkpoint()
    task_status.started(7)
    await then()
    return "served"


async def test_start_waits_until_the_child_has_started() -> None:
    journal: list[str] = []
    async with group() as tasks:
        assert await tasks.start(serve, journal, answer) == 7
        handle = await tasks.start(serve, journal, answer, name="named", return_handle=True)
        assert handle.start_value == 7
        assert await handle == "served"
    assert journal[0].endswith("serve")
    assert journal[1] == "named"


async def test_start_takes_what_has_no_name_of_its_own() -> None:
    journal: list[str] = []
    async with group() as tasks:
        assert await tasks.start(partial(serve, journal, answer)) == 7


async def test_a_child_that_never_says_that_it_started() -> None:
    async def forget(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        await anyio.lowlevel.checkpoint()

    async with group() as tasks:
        with pytest.raises(RuntimeError, match="started"):
            await tasks.start(forget)


async def test_a_child_that_fails_before_it_started() -> None:
    async def fail_early(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        raise KeyError

    async with group() as tasks:
        with pytest.raises(KeyError):
            await tasks.start(fail_early)
        await anyio.lowlevel.checkpoint()


@every_cause
async def test_a_started_child_is_cancelled_politely(cause: str) -> None:
    child = Child()
    with ending(cause):
        async with group() as tasks:
            await tasks.start(serve, [], partial(child.run, sleeping))
            await anyio.wait_all_tasks_blocked()
            cancel(tasks, cause)
    assert child.journal == ["cancelled", *CLEANED]


async def test_a_child_that_is_just_starting_is_cancelled_politely() -> None:
    child = Child()

    async def start_slowly(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        await child.run(sleeping)
        task_status.started()

    with pytest.raises(ManualCancelation):
        async with group() as tasks:
            tasks.start_soon(tasks.cancelable.cancel)
            await tasks.start(start_slowly)
    assert child.journal == ["cancelled", *CLEANED]


async def test_groups_inside_groups() -> None:
    child = Child()
    with pytest.raises(SignalCancelation):
        async with group() as outer, CancelableTaskGroup(Cancelable()) as inner:
            inner.start_soon(child.run, sleeping)
            await anyio.wait_all_tasks_blocked()
            outer.cancelable.cancel_nowait(CancelationReason.SIGNAL)
    assert inner.cancelable.reason is CancelationReason.PARENT
    assert child.journal == ["cancelled", *CLEANED]


@pytest.mark.parametrize("count", [0, 1, 20])
async def test_nothing_is_left_of_many_children(count: int) -> None:
    token = CancelationToken()
    with pytest.raises(ManualCancelation):
        async with group(token=token, timeout=LONG) as tasks:
            for _ in range(count):
                tasks.start_soon(anyio.sleep_forever)
            await anyio.lowlevel.checkpoint()
            await tasks.cancelable.cancel()
    assert not token._listeners
    assert current_cancelable() is None
