"""On asyncio a request's block has no scope before its task waits for the first time; what the task does before counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import FastAPI
from starlette.types import Message

from cancelable_deps import (
    Cancelable,
    CancelationToken,
    ManualCancelation,
    RequestCancelationMiddleware,
    TimeoutCancelation,
    current_cancelable,
    with_cancelation,
)
from cancelable_deps.kernel.loops import asyncio_scopes as polite
from cancelable_deps.kernel.loops.asyncio_loop import AsyncioLoop
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.request.blocks import RequestBlock
from cancelable_deps.request.state import RequestState

from .calls import get, hang_up
from .leftovers import nothing_left

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

LONG = 100


async def never() -> Message:
    await anyio.sleep_forever()
    raise AssertionError


def request_block(timeout: float | None = None) -> RequestBlock:
    return RequestBlock(RequestState({"type": "http", "headers": []}, never), timeout=timeout)


def innermost() -> Any:
    """anyio's scope in which the current task stands."""
    task = asyncio.current_task()
    assert task is not None
    state = polite._states.get(task)
    return None if state is None else state.cancel_scope


def chain() -> list[Any]:
    scopes, scope = [], innermost()
    while scope is not None:
        scopes.append(scope)
        scope = scope._parent_scope
    return scopes


@on_asyncio
async def test_a_block_that_is_left_at_once_never_had_a_scope() -> None:
    async def work() -> None:
        async with request_block() as block:
            assert block.is_active
            assert current_cancelable() is block
            assert innermost() is None
        assert not block.is_active

    async with nothing_left():
        await asyncio.create_task(work())
    loop = current_loop()
    assert isinstance(loop, AsyncioLoop)
    assert not loop.newcomers


async def test_anyio_knows_the_deadline_from_the_first_await_on() -> None:
    async with request_block(timeout=LONG) as block:
        await anyio.lowlevel.checkpoint()
        assert anyio.current_effective_deadline() == pytest.approx(block.deadline, abs=0.1)


@on_asyncio
async def test_it_is_put_between_the_scopes_that_were_entered_before_and_after() -> None:
    async def work() -> None:
        with anyio.CancelScope() as before:
            async with request_block() as outer:
                with anyio.CancelScope() as between, anyio.CancelScope() as between_too:
                    async with request_block() as inner:
                        with anyio.CancelScope() as after:
                            await anyio.lowlevel.checkpoint()
                            assert list(reversed(chain())) == [
                                before,
                                outer._scope,
                                between,
                                between_too,
                                inner._scope,
                                after,
                            ]
                            for parent, child in zip(chain()[1:], chain(), strict=False):
                                assert parent._child_scopes == {child}
                                assert not parent._tasks
                        assert innermost() is inner._scope
                    assert innermost() is between_too
                assert innermost() is outer._scope
            assert innermost() is before
        assert innermost() is None

    async with nothing_left():
        await asyncio.create_task(work())


@on_asyncio
@pytest.mark.parametrize("first", ["outer", "inner"])
async def test_two_with_nothing_between_stand_in_their_order(first: str) -> None:
    async def work() -> None:
        async with request_block() as outer, request_block() as inner:
            (outer if first == "outer" else inner)._begun_scope()
            await anyio.lowlevel.checkpoint()
            assert list(reversed(chain())) == [outer._scope, inner._scope]

    async with nothing_left():
        await asyncio.create_task(work())


@on_asyncio
async def test_a_kernel_block_inside_is_entered_at_once_and_stays_inside() -> None:
    async def work() -> None:
        async with request_block() as outer, Cancelable(timeout=LONG) as inner:
            assert anyio.current_effective_deadline() == pytest.approx(inner.deadline, abs=0.1)
            await anyio.lowlevel.checkpoint()
            assert list(reversed(chain())) == [outer._scope, inner._scope]

    async with nothing_left():
        await asyncio.create_task(work())


async def in_a_scope() -> None:
    with anyio.CancelScope():
        await anyio.sleep_forever()


async def in_a_task_group() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        await anyio.sleep_forever()


async def in_a_child() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)


async def in_a_timeout() -> None:
    with anyio.fail_after(LONG):
        await anyio.sleep_forever()


async def in_a_block_of_its_own() -> None:
    async with Cancelable(timeout=LONG):
        await anyio.sleep_forever()


STANDS = [in_a_scope, in_a_task_group, in_a_child, in_a_timeout, in_a_block_of_its_own]


@pytest.mark.parametrize("stand", STANDS)
@pytest.mark.parametrize("cause", ["later", "at once", "timeout"])
async def test_what_was_entered_before_the_first_await_is_stopped(stand: Callable[[], Any], cause: str) -> None:
    async def work() -> None:
        async with request_block(timeout=0.01 if cause == "timeout" else None) as block:
            if cause == "at once":
                block.cancel_nowait()
            elif cause == "later":
                tasks.start_soon(cancel_later, block)
            await stand()

    async def cancel_later(block: Cancelable) -> None:
        await anyio.wait_all_tasks_blocked()
        block.cancel_nowait()

    with anyio.fail_after(5):
        async with nothing_left(), anyio.create_task_group() as tasks:
            with pytest.raises(TimeoutCancelation if cause == "timeout" else ManualCancelation):
                await work()


async def test_cancelling_before_the_first_await_lets_a_result_stand() -> None:
    async def work() -> str:
        async with request_block() as block:
            assert block.cancel_nowait()
            return "finished"
        raise AssertionError  # pragma: no cover

    async with nothing_left():
        assert await work() == "finished"


async def test_a_thread_that_is_started_first_thing_can_ask() -> None:
    asked: list[str] = []

    def ask() -> None:
        while True:
            try:
                anyio.from_thread.check_cancelled()
            except BaseException:
                asked.append("cancelled")
                raise

    @with_cancelation
    async def endpoint() -> None:
        await anyio.to_thread.run_sync(ask)

    app = FastAPI()
    app.get("/")(endpoint)
    assert (await hang_up(app)).status == 499
    assert asked == ["cancelled"]


async def test_a_token_that_is_cancelled_in_a_thread_before_the_first_await() -> None:
    token = CancelationToken()

    async def work() -> None:
        async with request_block() as block:
            token.listen(block)
            block.token.cancel_nowait()
            await anyio.sleep_forever()

    with anyio.fail_after(5), pytest.raises(ManualCancelation):
        await work()


async def test_a_foreign_cancellation_in_between_passes_through() -> None:
    reached: list[str] = []
    with anyio.CancelScope() as foreign:
        async with request_block():
            with anyio.CancelScope():
                foreign.cancel()
                await anyio.sleep_forever()
        reached.append("after")  # pragma: no cover
    assert foreign.cancelled_caught
    assert not reached


@on_asyncio
async def test_a_native_cancellation_in_between_passes_through() -> None:
    async def work() -> None:
        async with request_block() as block:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            block.cancel_nowait()
            await anyio.sleep_forever()

    async with nothing_left():
        task = asyncio.create_task(work())
        with pytest.raises(asyncio.CancelledError):
            await task


@on_asyncio
async def test_it_takes_the_task_over_from_the_scope_around_it() -> None:
    with anyio.CancelScope() as before:
        async with request_block() as block:
            await anyio.lowlevel.checkpoint()
            scope: Any = block._scope
            assert (before._tasks, scope._tasks) == (set(), {asyncio.current_task()})  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


@on_asyncio
async def test_a_native_cancellation_in_the_tick_of_ours_is_not_taken_for_ours() -> None:
    async def work() -> None:
        async with request_block() as block:
            blocks.append(block)
            await anyio.sleep_forever()

    blocks: list[RequestBlock] = []
    async with nothing_left():
        task = asyncio.create_task(work())
        await anyio.wait_all_tasks_blocked()
        blocks[0].cancel_nowait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@on_asyncio
async def test_one_that_cannot_begin_does_not_keep_the_others_from_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(loop: object) -> None:
        raise KeyError

    async def work(block: RequestBlock) -> None:
        async with block:
            await anyio.lowlevel.checkpoint()
            begun.append(block._scope is not None)

    begun: list[bool] = []
    broken, whole = request_block(), request_block()
    monkeypatch.setattr(broken, "_begin", fail)
    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(work, broken)
        tasks.start_soon(work, whole)
    assert begun == [False, True]
    assert [record.message for record in caplog.records] == ["a request could not be made cancelable"]


async def test_an_application_that_answers_in_one_step_is_never_listened_to() -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, default_timeout=LONG)

    @app.get("/")
    @with_cancelation(timeout=LONG)
    async def endpoint() -> str:
        return "done"

    async with nothing_left():
        call = await get(app)
    assert (call.status, call.json(), call.most_readers) == (200, "done", 0)
