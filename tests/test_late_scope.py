"""On asyncio a request's block has no scope before the request is listened to, or something strikes.

What its task has entered by then counts.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
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
    CancelableRoute,
    CancelationToken,
    ManualCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    TimeoutCancelation,
    current_cancelable,
    with_cancelation,
)
from cancelable_deps.kernel.block import Block
from cancelable_deps.kernel.cancelable import block_of, cancelable_of
from cancelable_deps.kernel.loops import asyncio_scopes as polite
from cancelable_deps.request.blocks import RequestBlock
from cancelable_deps.request.state import RequestState
from cancelable_deps.request.watchers import Watcher

from .calls import get, hang_up
from .leftovers import nothing_left

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

LONG = 100


async def never() -> Message:
    await anyio.sleep_forever()
    raise AssertionError


def request_block(timeout: float | None = None) -> Cancelable:
    return cancelable_of(RequestBlock(RequestState({"type": "http", "headers": []}, never), timeout=timeout))


def begin(*cancelables: Cancelable) -> None:
    for cancelable in cancelables:
        block_of(cancelable).begun_scope()


async def begun_later(block: Block) -> None:
    # One that has been left has no scope any more.
    while block.scope is None and block.ended is None:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.001)


def scope_of(cancelable: Cancelable) -> Any:
    return block_of(cancelable).scope


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
async def test_a_block_that_is_left_soon_never_had_a_scope() -> None:
    async def work() -> None:
        async with request_block() as block:
            assert block.is_active
            assert current_cancelable() is block
            await anyio.lowlevel.checkpoint()
            assert innermost() is None
        assert not block.is_active

    async with nothing_left():
        await asyncio.create_task(work())


@on_asyncio
async def test_a_block_has_a_scope_when_the_request_is_listened_to() -> None:
    async def work() -> None:
        async with request_block(timeout=LONG) as block:
            await begun_later(block_of(block))
            assert innermost() is scope_of(block)
            assert anyio.current_effective_deadline() == pytest.approx(block.deadline, abs=0.1)

    with anyio.fail_after(5):
        async with nothing_left():
            await asyncio.create_task(work())


@on_asyncio
async def test_it_is_put_around_the_scopes_that_were_entered_after_it() -> None:
    async def work() -> None:
        async with request_block() as outer:
            with anyio.CancelScope() as between, anyio.CancelScope() as between_too:
                async with request_block() as inner:
                    with anyio.CancelScope() as after:
                        begin(outer)
                        await anyio.lowlevel.checkpoint()
                        expected = [scope_of(outer), between, between_too, scope_of(inner), after]
                        assert list(reversed(chain())) == expected
                        for parent, child in zip(chain()[1:], chain(), strict=False):
                            assert parent._child_scopes == {child}
                            assert not parent._tasks
                    assert innermost() is scope_of(inner)
                assert innermost() is between_too
            assert innermost() is scope_of(outer)
        assert innermost() is None

    async with nothing_left():
        await asyncio.create_task(work())


@on_asyncio
async def test_in_a_scope_it_has_its_own_at_once() -> None:
    # A thread that is started in there would otherwise ask the scope around, and never hear of ours.
    with anyio.CancelScope() as before:
        async with request_block() as block:
            assert list(reversed(chain()))[-2:] == [before, scope_of(block)]


@on_asyncio
@pytest.mark.parametrize("first", ["outer", "inner"])
@pytest.mark.parametrize("is_around", [True, False])
async def test_two_with_nothing_between_stand_in_their_order(first: str, is_around: bool) -> None:
    async def work() -> None:
        async with request_block() as outer, request_block() as inner:
            with anyio.CancelScope() if is_around else nullcontext() as after:
                begin(*((outer, inner) if first == "outer" else (inner, outer)))
                await anyio.lowlevel.checkpoint()
                assert list(reversed(chain())) == [scope_of(outer), scope_of(inner), *([after] if is_around else ())]

    async with nothing_left():
        await asyncio.create_task(work())


@on_asyncio
async def test_a_kernel_block_inside_is_entered_at_once_and_stays_inside() -> None:
    async def work() -> None:
        async with request_block() as outer, Cancelable(timeout=LONG) as inner:
            assert anyio.current_effective_deadline() == pytest.approx(inner.deadline, abs=0.1)
            await anyio.lowlevel.checkpoint()
            begin(outer)
            assert list(reversed(chain())) == [scope_of(outer), scope_of(inner)]

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


def ask() -> None:
    while True:
        anyio.from_thread.check_cancelled()
        time.sleep(0.001)


async def in_a_thread() -> None:
    await anyio.to_thread.run_sync(ask)


async def in_a_thread_in_a_scope() -> None:
    with anyio.CancelScope():
        await anyio.to_thread.run_sync(ask)


async def in_a_thread_of_a_child() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(in_a_thread)


THREADS = [in_a_thread, in_a_thread_in_a_scope, in_a_thread_of_a_child]


@pytest.mark.parametrize("stand", THREADS)
@pytest.mark.parametrize("kind", ["async", "def"])
@pytest.mark.parametrize("door", ["decorator", "middleware", "route", "handle", "inside of a scope"])
async def test_a_thread_that_is_started_first_thing_can_ask(stand: Callable[[], Any], kind: str, door: str) -> None:
    app = FastAPI()
    if door == "route":
        app.router.route_class = CancelableRoute
    elif door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    asked: list[BaseException] = []

    def work() -> None:
        try:
            ask()
        except BaseException as exc:
            asked.append(exc)
            raise

    async def endpoint(cancel: RequestCancelable) -> None:
        if door == "handle":
            async with cancel:
                await stand()
        elif door == "inside of a scope":
            with anyio.CancelScope():
                async with cancel:
                    await stand()
        else:
            await stand()

    if kind == "def":
        if door in {"handle", "inside of a scope"} or stand is not in_a_thread:
            pytest.skip("FastAPI starts the thread")
        app.get("/")(with_cancelation(work) if door == "decorator" else work)
    else:
        app.get("/")(with_cancelation(endpoint) if door == "decorator" else endpoint)
    with anyio.fail_after(10):
        assert (await hang_up(app)).status == 499
    assert len(asked) == (kind == "def")


@on_asyncio
async def test_a_scope_that_a_thread_asks_is_cancelled_for_nobody_else() -> None:
    started = threading.Event()

    def work() -> None:
        started.set()
        ask()

    async def wait() -> None:
        async with request_block() as block:
            blocks.append(block)
            await anyio.to_thread.run_sync(work)

    blocks: list[Cancelable] = []
    with anyio.fail_after(5):
        async with nothing_left():
            task = asyncio.create_task(wait())
            await anyio.to_thread.run_sync(started.wait)
            begin(*blocks)
            (scope,) = scope_of(blocks[0])._child_scopes
            blocks[0].cancel_nowait()
            assert not scope.cancel_called
            with pytest.raises(ManualCancelation):
                await task


async def test_a_token_that_is_cancelled_in_a_thread_before_the_first_await() -> None:
    token = CancelationToken()

    async def work() -> None:
        async with request_block() as block:
            token.listen(block_of(block))
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
async def test_a_native_cancellation_in_the_tick_of_ours_is_not_taken_for_ours() -> None:
    async def work() -> None:
        async with request_block() as block:
            blocks.append(block)
            await anyio.sleep_forever()

    blocks: list[Cancelable] = []
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
        async with cancelable_of(block):
            await begun_later(whole)

    state = RequestState({"type": "http", "headers": []}, never)
    broken, whole = RequestBlock(state), RequestBlock(state)
    monkeypatch.setattr(broken, "begin", fail)
    with anyio.fail_after(5):
        async with nothing_left():
            await asyncio.gather(work(broken), work(whole))
    assert {record.message for record in caplog.records} == {"a request could not be made cancelable"}


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


async def test_a_root_token_that_a_thread_makes_while_a_block_is_entered_stops_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = RequestState({"type": "http", "headers": []}, never)
    watch = state.watch

    def watch_after_the_thread(watcher: Watcher) -> None:
        thread = threading.Thread(target=lambda: state.token.cancel_nowait())
        thread.start()
        thread.join()
        watch(watcher)

    monkeypatch.setattr(state, "watch", watch_after_the_thread)
    with anyio.fail_after(5), pytest.raises(ManualCancelation):
        async with cancelable_of(RequestBlock(state)):
            await anyio.sleep_forever()
