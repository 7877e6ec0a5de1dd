# pyright: reportPossiblyUnboundVariable=false
# It believes that `raises` may take an exception from entering the block.
# ruff: noqa: PT012 - what leaves a block is tested by leaving it, inside of `raises`
from __future__ import annotations

import asyncio
import gc
import math
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

from cancelable_deps import (
    Cancelable,
    CancelationError,
    CancelationReason,
    CancelationToken,
    ConditionCancelation,
    DisconnectCancelation,
    ManualCancelation,
    ParentCancelation,
    SignalCancelation,
    TimeoutCancelation,
    current_cancelable,
)

from .calls import CEILING
from .leftovers import nothing_left

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

SOON = 0.02
LONG = 100


def cancelled_class() -> type[BaseException]:
    return anyio.get_cancelled_exc_class()


async def test_a_block_that_is_not_cancelled_changes_nothing() -> None:
    async with nothing_left(), Cancelable(timeout=LONG, token=CancelationToken(), name="work") as block:
        assert isinstance(block, Cancelable)
        assert block.is_active
        await anyio.lowlevel.checkpoint()
    assert (block.is_active, block.is_cancelled, block.reason, block.message) == (False, False, None, None)
    assert block.name == "work"


async def test_what_the_work_raises_leaves_as_it_is() -> None:
    error = ValueError()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        async with nothing_left(), Cancelable(timeout=LONG):
            raise error
    assert caught.value is error
    assert error.__context__ is None


async def test_entering_twice_says_what_to_do() -> None:
    block = Cancelable(name="work")
    async with block:
        with pytest.raises(RuntimeError, match=r"'work'.*Make another one.*share a CancelationToken"):
            async with block:
                pytest.fail("entered twice")
    with pytest.raises(RuntimeError, match="was entered before"):
        await block.__aenter__()


@pytest.mark.parametrize("token", ["token", 5, object(), CancelationReason.MANUAL])
async def test_what_is_no_token_is_refused(token: Any) -> None:
    with pytest.raises(TypeError, match="token must be a CancelationToken, not"):
        Cancelable(token=token)


async def test_its_repr_says_how_it_stands() -> None:
    block = Cancelable(name="work")
    assert repr(block) == "<Cancelable 'work' not entered>"
    async with block:
        assert repr(block) == "<Cancelable 'work' active>"
    assert repr(block) == "<Cancelable 'work' left>"
    cancelled = Cancelable()
    cancelled.cancel_nowait(message="enough")
    assert repr(cancelled) == "<Cancelable manual: enough>"


async def test_a_block_that_was_cancelled_before_does_not_run() -> None:
    block = Cancelable()
    assert block.cancel_nowait(CancelationReason.SIGNAL, "before")
    async with nothing_left():
        with pytest.raises(SignalCancelation, match="before"):
            async with block:
                pytest.fail("the body ran")
    assert current_cancelable() is None
    assert not block.is_active
    assert block.elapsed == 0.0


async def test_with_token_is_stopped_by_it() -> None:
    token = CancelationToken()
    async with nothing_left():
        with pytest.raises(DisconnectCancelation):
            async with Cancelable.with_token(token, name="work") as block:
                token.cancel_nowait(CancelationReason.DISCONNECT)
                await anyio.sleep_forever()
    assert block.reason is CancelationReason.DISCONNECT
    assert block.name == "work"
    assert block.token is not token


async def test_cancel_inside_its_own_block_raises_right_there() -> None:
    journal: list[object] = []
    async with nothing_left():
        with pytest.raises(ManualCancelation) as caught:
            async with Cancelable() as block:
                try:
                    journal.append(await block.cancel(message="enough"))
                except BaseException as exc:
                    journal.append(type(exc))
                    raise
    assert journal == [cancelled_class()]
    assert (caught.value.reason, caught.value.message) == (CancelationReason.MANUAL, "enough")
    assert isinstance(caught.value.__cause__, cancelled_class())
    assert (block.reason, block.message) == (CancelationReason.MANUAL, "enough")


async def test_cancelling_again_changes_nothing() -> None:
    with pytest.raises(ManualCancelation, match="first"):
        async with Cancelable() as block:
            assert block.cancel_nowait(message="first")
            assert not block.cancel_nowait(CancelationReason.TIMEOUT, "second")
            await anyio.sleep_forever()
    assert (block.reason, block.message) == (CancelationReason.MANUAL, "first")


async def test_cancelling_a_block_that_was_left_does_nothing() -> None:
    async with Cancelable() as block:
        pass
    assert not await block.cancel()
    assert not block.cancel_nowait()
    assert not block.is_cancelled


async def test_a_token_that_is_cancelled_when_the_block_was_left_does_nothing_to_it() -> None:
    token = CancelationToken()
    async with Cancelable(token=token) as block:
        pass
    token.cancel_nowait()
    assert not block.is_cancelled
    assert not token._listeners


async def test_the_token_of_a_block_stops_it() -> None:
    async with nothing_left():
        with pytest.raises(SignalCancelation):
            async with Cancelable() as block:
                block.token.cancel_nowait(CancelationReason.SIGNAL)
                await anyio.sleep_forever()


async def test_work_that_finishes_all_the_same_has_finished() -> None:
    async def work() -> str:
        async with Cancelable() as block:
            block.cancel_nowait()
            return "result"

    async with nothing_left():
        assert await work() == "result"


async def test_work_that_swallows_the_cancellation_and_finishes_has_finished() -> None:
    async def work() -> str:
        async with Cancelable() as block:
            try:
                await block.cancel()
            except BaseException:
                await anyio.lowlevel.checkpoint()
            return "result"

    async with nothing_left():
        assert await work() == "result"


async def test_what_the_cleanup_raises_is_not_replaced() -> None:
    error = ValueError()
    async with nothing_left():
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            async with Cancelable() as block:
                try:
                    await block.cancel()
                finally:
                    raise error
    assert caught.value is error
    assert isinstance(error.__context__, cancelled_class())


async def test_a_caller_that_catches_the_error_works_on() -> None:
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as block:
                await block.cancel()
        await anyio.lowlevel.checkpoint()
        await anyio.to_thread.run_sync(time.monotonic)


async def test_cancelling_from_a_thread() -> None:
    async with nothing_left():
        with pytest.raises(ManualCancelation, match="from a thread"):
            async with Cancelable() as block, anyio.create_task_group() as tasks:
                cancel = partial(block.cancel_nowait, message="from a thread")
                tasks.start_soon(anyio.to_thread.run_sync, cancel)
                await anyio.sleep_forever()


async def test_cancelling_from_another_task() -> None:
    journal: list[object] = []

    async def work(block: Cancelable) -> None:
        with pytest.raises(ManualCancelation):
            async with block:
                journal.append("started")
                await anyio.sleep_forever()

    block = Cancelable()
    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(work, block)
        await anyio.wait_all_tasks_blocked()
        journal.append(await block.cancel())
    assert journal == ["started", True]


@pytest.mark.parametrize("timeout", [SOON, timedelta(seconds=SOON)])
async def test_a_timeout_stops_it(timeout: float | timedelta) -> None:
    async with nothing_left():
        with pytest.raises(TimeoutCancelation) as caught:
            async with Cancelable(timeout=timeout) as block:
                await anyio.sleep_forever()
    assert caught.value.message == block.message == "Timed out after 0.02 seconds"
    assert block.reason is CancelationReason.TIMEOUT
    assert SOON <= block.elapsed < 10


async def test_with_timeout_is_a_timeout_error() -> None:
    with pytest.raises(TimeoutError):
        async with Cancelable.with_timeout(SOON, name="work") as block:
            await anyio.sleep_forever()
    assert block.name == "work"


async def test_a_timeout_of_zero_does_not_let_it_run() -> None:
    block = Cancelable(timeout=0)
    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            async with block:
                pytest.fail("the body ran")
    assert block.reason is CancelationReason.TIMEOUT


async def test_an_infinite_timeout_is_none() -> None:
    async with nothing_left(), Cancelable(timeout=math.inf) as block:
        assert block.deadline == block.remaining() == math.inf
        await anyio.lowlevel.checkpoint()


async def test_a_timeout_counts_from_entering() -> None:
    block = Cancelable(timeout=LONG)
    assert block.remaining() == LONG
    assert block.elapsed == 0.0
    before = anyio.current_time()
    async with block:
        assert before + LONG <= block.deadline <= anyio.current_time() + LONG
        assert LONG - 10 < block.remaining() <= LONG
        assert block.elapsed < 10
    elapsed = block.elapsed
    await anyio.lowlevel.checkpoint()
    assert block.elapsed == elapsed


async def test_anyio_knows_the_deadline() -> None:
    async with Cancelable(timeout=LONG) as block:
        assert anyio.current_effective_deadline() == pytest.approx(block.deadline, abs=0.1)
        async with Cancelable(timeout=LONG / 2) as inner:
            assert anyio.current_effective_deadline() == pytest.approx(inner.deadline, abs=0.1)
        async with Cancelable():
            assert anyio.current_effective_deadline() == pytest.approx(block.deadline, abs=0.1)
    assert anyio.current_effective_deadline() == math.inf


async def test_the_nearest_deadline_counts() -> None:
    outer, longer, none, shorter = (Cancelable(timeout=timeout) for timeout in (LONG, 10 * LONG, None, 1))
    async with outer, longer, none, shorter:
        assert longer.deadline == none.deadline == outer.deadline
        assert longer.remaining() <= LONG
        assert shorter.deadline < outer.deadline
        assert shorter.remaining() <= 1


async def test_a_deadline_passes_although_the_loop_is_blocked() -> None:
    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            async with Cancelable(timeout=SOON) as block:
                while block.remaining():
                    pass
                await anyio.sleep_forever()
    assert block.reason is CancelationReason.TIMEOUT


@pytest.mark.parametrize("attempt", range(10))
async def test_a_loop_that_is_blocked_for_long_changes_nothing(attempt: int) -> None:
    told: list[CancelationReason | None] = []
    reasons: list[CancelationReason | None] = []
    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            async with Cancelable(timeout=SOON) as block:
                block.on_cancel(lambda block: told.append(block.reason))
                async with Cancelable() as inner:
                    inner.on_cancel(lambda block: reasons.append(block.reason))
                    # Past the deadline that anyio's scope has: it fires in the same turn as our timer.
                    while block.elapsed < SOON + 0.06:
                        pass
                    await anyio.sleep_forever()
    assert told == [CancelationReason.TIMEOUT]
    assert reasons == [CancelationReason.PARENT]


async def test_a_result_at_the_deadline_is_a_result() -> None:
    async with nothing_left(), Cancelable(timeout=SOON) as block:
        while block.remaining():
            pass
    assert not block.is_cancelled


async def test_check_passes_while_nothing_happened() -> None:
    async with Cancelable(timeout=LONG) as block:
        block.check()


async def test_check_raises_the_reason() -> None:
    async with nothing_left():
        with pytest.raises(SignalCancelation, match="now"):
            async with Cancelable() as block:
                block.cancel_nowait(CancelationReason.SIGNAL, "now")
                block.check()
                pytest.fail("check() let it pass")


async def test_check_sees_a_deadline_without_an_await() -> None:
    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            async with Cancelable(timeout=SOON) as block:
                while True:
                    block.check()
    assert block.reason is CancelationReason.TIMEOUT


async def test_check_sees_the_deadline_of_the_block_around() -> None:
    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            async with Cancelable(timeout=SOON) as outer, Cancelable(timeout=LONG) as inner:
                while True:
                    inner.check()
    assert outer.reason is CancelationReason.TIMEOUT


async def test_check_from_a_thread() -> None:
    def work(block: Cancelable) -> None:
        while True:
            block.check()

    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            async with Cancelable(timeout=SOON) as block:
                await anyio.to_thread.run_sync(work, block)
    assert block.reason is CancelationReason.TIMEOUT


async def test_check_before_entering() -> None:
    block = Cancelable(timeout=LONG)
    block.check()
    block.cancel_nowait()
    with pytest.raises(ManualCancelation):
        block.check()


@on_asyncio
async def test_a_native_cancellation_passes() -> None:
    journal: list[object] = []

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with Cancelable(timeout=LONG) as block:
                await anyio.sleep_forever()
        except asyncio.CancelledError:
            journal.extend([task.cancelling(), block.is_cancelled, current_cancelable()])
            raise

    async with nothing_left():
        task = asyncio.create_task(work())
        await anyio.wait_all_tasks_blocked()
        task.cancel("from outside")
        with pytest.raises(asyncio.CancelledError, match="from outside"):
            await task
    assert journal == [1, False, None]
    assert task.cancelled()


@on_asyncio
async def test_after_our_own_cancellation_the_task_counts_none() -> None:
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(ManualCancelation):
        async with Cancelable() as block:
            try:
                await block.cancel()
            finally:
                assert task.cancelling() == 1
    assert task.cancelling() == 0


@on_asyncio
@pytest.mark.parametrize("ours_first", [True, False])
async def test_a_native_cancellation_wins_over_ours_in_the_same_tick(ours_first: bool) -> None:
    block = Cancelable()
    counts: list[int] = []

    async def work() -> None:
        try:
            async with block:
                await anyio.sleep_forever()
        finally:
            task = asyncio.current_task()
            assert task is not None
            counts.append(task.cancelling())

    async with nothing_left():
        task = asyncio.create_task(work())
        await anyio.wait_all_tasks_blocked()
        cancels: list[Callable[[], object]] = [block.cancel_nowait, task.cancel]
        for cancel in cancels if ours_first else reversed(cancels):
            cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert counts == [1]
    assert task.cancelled()


@on_asyncio
async def test_a_native_cancellation_during_our_cleanup_passes() -> None:
    block = Cancelable()
    cleaning = anyio.Event()

    async def work() -> None:
        async with block:
            try:
                await anyio.sleep_forever()
            finally:
                cleaning.set()
                await anyio.sleep_forever()

    async with nothing_left():
        task = asyncio.create_task(work())
        await anyio.wait_all_tasks_blocked()
        block.cancel_nowait()
        await cleaning.wait()
        await anyio.wait_all_tasks_blocked()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert task.cancelled()
    assert task.cancelling() == 1


async def test_an_outer_scope_of_anyio_passes() -> None:
    journal: list[object] = []
    async with nothing_left():
        with anyio.CancelScope() as scope:
            try:
                async with Cancelable(timeout=LONG) as block:
                    scope.cancel()
                    await anyio.sleep_forever()
            except cancelled_class():
                journal.append(block.is_cancelled)
                raise
    assert journal == [False]
    assert scope.cancelled_caught


@pytest.mark.parametrize("ours_first", [True, False])
async def test_an_outer_scope_wins_over_ours_in_the_same_tick(ours_first: bool) -> None:
    async with nothing_left():
        with anyio.CancelScope() as scope:
            async with Cancelable() as block:
                cancels: list[Callable[[], object]] = [block.cancel_nowait, scope.cancel]
                for cancel in cancels if ours_first else reversed(cancels):
                    cancel()
                await anyio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_scope_inside_keeps_working() -> None:
    async with nothing_left(), Cancelable() as block:
        with anyio.move_on_after(SOON) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError):
            with anyio.fail_after(SOON):
                await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
    assert not block.is_cancelled


@on_asyncio
async def test_asyncio_timeout_around() -> None:
    async with nothing_left():
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(SOON):
                async with Cancelable(timeout=LONG) as block:
                    await anyio.sleep_forever()
    assert type(caught.value) is TimeoutError
    assert not block.is_cancelled


@on_asyncio
async def test_asyncio_timeout_around_does_not_mind_ours() -> None:
    async with nothing_left():
        async with asyncio.timeout(LONG):
            with pytest.raises(ManualCancelation):
                async with Cancelable() as block:
                    await block.cancel()
            await anyio.lowlevel.checkpoint()


@on_asyncio
async def test_asyncio_timeout_inside() -> None:
    async with nothing_left(), Cancelable(timeout=LONG) as block:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SOON):
                await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
    assert not block.is_cancelled


@on_asyncio
async def test_asyncio_timeout_inside_does_not_take_ours_for_its_own() -> None:
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as block:
                async with asyncio.timeout(LONG):
                    await block.cancel()


@on_asyncio
async def test_an_asyncio_task_group_around() -> None:
    async def work(block: Cancelable) -> None:
        async with block:
            await anyio.sleep_forever()

    cancelled, other = Cancelable(), Cancelable()
    async with nothing_left():
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(work(cancelled))
                tasks.create_task(work(other))
                await anyio.wait_all_tasks_blocked()
                cancelled.cancel_nowait()
    assert [type(exc) for exc in caught.value.exceptions] == [ManualCancelation]
    assert not other.is_cancelled


@on_asyncio
async def test_an_asyncio_task_group_inside() -> None:
    ended: list[str] = []

    async def child(name: str) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(name)

    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as block, asyncio.TaskGroup() as tasks:
                tasks.create_task(child("one"))
                tasks.create_task(child("two"))
                await anyio.lowlevel.checkpoint()
                block.cancel_nowait()
    assert sorted(ended) == ["one", "two"]


@on_asyncio
async def test_wait_for_inside() -> None:
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as block:
                asyncio.get_running_loop().call_soon(block.cancel_nowait)
                await asyncio.wait_for(asyncio.Event().wait(), LONG)


async def test_when_the_inner_block_is_cancelled_the_outer_goes_on() -> None:
    async with nothing_left(), Cancelable() as outer:
        with pytest.raises(ManualCancelation):
            async with Cancelable() as inner:
                await inner.cancel()
        await anyio.lowlevel.checkpoint()
    assert inner.is_cancelled
    assert not outer.is_cancelled


async def test_when_the_outer_block_is_cancelled_the_inner_says_so_and_passes() -> None:
    passed: list[BaseException] = []
    async with nothing_left():
        with pytest.raises(ManualCancelation, match="enough"):
            async with Cancelable(name="outer") as outer:
                try:
                    async with Cancelable() as inner, Cancelable() as innermost:
                        await outer.cancel(message="enough")
                except BaseException as exc:
                    passed.append(exc)
                    raise
    assert isinstance(passed[0], cancelled_class())
    assert inner.reason is innermost.reason is CancelationReason.PARENT
    assert inner.message is not None
    assert "'outer'" in inner.message
    assert outer.reason is CancelationReason.MANUAL


async def test_check_in_the_inner_block_and_the_outer_answers() -> None:
    raised: list[CancelationReason] = []
    async with nothing_left():
        with pytest.raises(SignalCancelation):
            async with Cancelable() as outer:
                try:
                    async with Cancelable() as inner:
                        outer.cancel_nowait(CancelationReason.SIGNAL)
                        inner.check()
                except ParentCancelation as exc:
                    raised.append(exc.reason)
                    raise
    assert raised == [CancelationReason.PARENT]


async def test_of_two_that_share_a_token_the_inner_raises() -> None:
    token = CancelationToken()
    raised: list[BaseException] = []
    async with nothing_left():
        with pytest.raises(SignalCancelation):
            async with Cancelable(token=token) as outer:
                try:
                    async with Cancelable(token=token) as inner:
                        token.cancel_nowait(CancelationReason.SIGNAL)
                        await anyio.sleep_forever()
                except SignalCancelation as exc:
                    raised.append(exc)
                    await anyio.lowlevel.checkpoint()
                    raise
    assert len(raised) == 1
    assert inner.reason is outer.reason is CancelationReason.SIGNAL
    assert not token._listeners


async def test_the_outer_one_is_stopped_firmly_when_its_grace_is_over() -> None:
    token = CancelationToken()
    async with nothing_left():
        with anyio.fail_after(CEILING), pytest.raises(SignalCancelation):
            async with Cancelable(token=token, cleanup_grace=SOON) as outer:
                with pytest.raises(SignalCancelation):
                    async with Cancelable(token=token):
                        token.cancel_nowait(CancelationReason.SIGNAL)
                        await anyio.sleep_forever()
                await anyio.sleep_forever()
    assert outer.reason is CancelationReason.SIGNAL


@pytest.mark.parametrize("between", [nullcontext, Cancelable], ids=["nothing between", "another block between"])
async def test_the_cleanup_between_two_that_share_a_token_is_not_disturbed(between: Any) -> None:
    token = CancelationToken()
    journal: list[str] = []
    async with nothing_left():
        with pytest.raises(SignalCancelation):
            async with Cancelable(token=token), between():
                try:
                    async with Cancelable(token=token):
                        token.cancel_nowait(CancelationReason.SIGNAL)
                        await anyio.sleep_forever()
                finally:
                    await anyio.lowlevel.checkpoint()
                    journal.append("cleaned")
    assert journal == ["cleaned"]


async def test_an_inner_block_that_finished_all_the_same_leaves_the_stopping_to_the_outer_one() -> None:
    token = CancelationToken()
    journal: list[str] = []
    async with nothing_left():
        with pytest.raises(SignalCancelation):
            async with Cancelable(token=token, cleanup_grace=SOON):
                async with Cancelable(token=token, cleanup_grace=SOON):
                    token.cancel_nowait(CancelationReason.SIGNAL)
                try:
                    await anyio.sleep_forever()
                finally:
                    await anyio.lowlevel.checkpoint()
                    journal.append("cleaned")
    assert journal == ["cleaned"]


async def test_a_block_after_one_that_was_cancelled_is_its_own() -> None:
    with pytest.raises(ManualCancelation):
        async with Cancelable() as first:
            await first.cancel()
    async with nothing_left(), Cancelable() as second:
        await anyio.lowlevel.checkpoint()
    assert not second.is_cancelled


async def test_a_block_opened_in_the_cleanup_of_another_works() -> None:
    journal: list[str] = []
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as outer:
                try:
                    await outer.cancel()
                finally:
                    async with Cancelable(timeout=LONG):
                        await anyio.lowlevel.checkpoint()
                        journal.append("cleaned")
                    with pytest.raises(TimeoutCancelation):
                        async with Cancelable(timeout=SOON):
                            await anyio.sleep_forever()
                    journal.append("timed out")
    assert journal == ["cleaned", "timed out"]


async def test_a_block_in_a_child_task_is_stopped_with_the_block_around_the_task() -> None:
    ended: list[str] = []

    async def child() -> None:
        async with Cancelable():
            try:
                await anyio.sleep_forever()
            finally:
                ended.append("child")

    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as outer, anyio.create_task_group() as tasks:
                tasks.start_soon(child)
                await anyio.wait_all_tasks_blocked()
                await outer.cancel()
    assert ended == ["child"]


@pytest.mark.parametrize("style", ["with", "async with"])
async def test_a_shielded_section_is_finished_first(style: str) -> None:
    journal: list[str] = []

    async def section(block: Cancelable) -> None:
        block.cancel_nowait()
        await anyio.lowlevel.checkpoint()
        journal.append("finished")

    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as block:
                if style == "with":
                    with block.shield():
                        await section(block)
                else:
                    async with block.shield():
                        await section(block)
                await anyio.lowlevel.checkpoint()
                journal.append("went on")
    assert journal == ["finished"]


async def test_a_shielded_section_lets_its_exception_out() -> None:
    with pytest.raises(KeyError):
        async with Cancelable() as block:
            with block.shield():
                raise KeyError


async def test_a_callback_is_told_at_the_moment_of_cancelling() -> None:
    journal: list[str] = []
    with pytest.raises(ManualCancelation):
        async with Cancelable() as block:

            @block.on_cancel
            def told(cancelled: Cancelable) -> None:
                journal.append(f"told {cancelled.reason} {cancelled is block}")

            block.cancel_nowait()
            journal.append("went on")
            await anyio.sleep_forever()
    assert journal == ["told manual True", "went on"]
    assert told.__name__ == "told"


async def test_a_callback_that_comes_late_is_told_at_once() -> None:
    journal: list[object] = []
    with pytest.raises(ManualCancelation):
        async with Cancelable() as block:
            block.cancel_nowait()
            block.on_cancel(journal.append)
            assert journal == [block]
            await anyio.sleep_forever()
    assert journal == [block]


async def test_a_callback_of_a_block_that_ends_well_is_not_told() -> None:
    journal: list[object] = []
    awaited: list[object] = []

    async def callback(block: Cancelable) -> None:
        awaited.append(block)

    async with Cancelable() as block:
        block.on_cancel(journal.append)
        block.on_cancel(callback)
    assert not block.token._listeners
    assert journal == awaited == []


async def test_a_plain_callback_of_a_block_that_is_refused_is_told() -> None:
    journal: list[object] = []
    block = Cancelable()
    block.on_cancel(journal.append)
    block.cancel_nowait()
    with pytest.raises(ManualCancelation):
        await block.__aenter__()
    assert journal == [block]


async def test_an_async_callback_is_awaited_before_the_error_is_raised() -> None:
    journal: list[str] = []

    async def callback(block: Cancelable) -> None:
        await anyio.lowlevel.checkpoint()
        journal.append(f"awaited {block.reason} {block.is_active}")

    async with nothing_left():
        try:
            async with Cancelable(timeout=SOON) as block:
                assert block.on_cancel(callback) is callback
                try:
                    await anyio.sleep_forever()
                finally:
                    journal.append("cleaned")
        except TimeoutCancelation:
            journal.append("raised")
    assert journal == ["cleaned", "awaited timeout False", "raised"]


async def test_an_async_callback_is_shielded_against_an_outer_scope() -> None:
    journal: list[str] = []

    async def callback(block: Cancelable) -> None:
        await anyio.lowlevel.checkpoint()
        journal.append("awaited")

    with anyio.CancelScope() as scope:
        async with Cancelable() as block:
            block.on_cancel(callback)
            scope.cancel()
            await block.cancel()
    assert journal == ["awaited"]


async def test_async_callbacks_have_the_grace() -> None:
    journal: list[str] = []

    async def callback(block: Cancelable) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            journal.append("stopped")

    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable(cleanup_grace=SOON) as block:
                block.on_cancel(callback)
                await block.cancel()
    assert journal == ["stopped"]


async def test_what_callbacks_raise_is_logged_only(caplog: pytest.LogCaptureFixture) -> None:
    journal: list[object] = []

    def fail(block: Cancelable) -> None:
        raise ValueError("a bug")

    async def fail_later(block: Cancelable) -> None:
        await anyio.lowlevel.checkpoint()
        raise ValueError("a bug")

    async def callback(block: Cancelable) -> None:
        journal.append(block)

    with pytest.raises(ManualCancelation):
        async with Cancelable() as block:
            for each in (fail, fail_later, journal.append, callback):
                block.on_cancel(each)
            await block.cancel()
    assert journal == [block, block]
    assert [(record.name, record.levelname) for record in caplog.records] == [("cancelable_deps", "ERROR")] * 2


class Listener:
    def __init__(self) -> None:
        self.journal: list[object] = []

    async def method(self, block: Cancelable, *more: object) -> None:
        await anyio.lowlevel.checkpoint()
        self.journal.append(block)

    async def __call__(self, block: Cancelable) -> None:
        await self.method(block)


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize(
    "kind",
    [
        lambda listener: listener.method,
        lambda listener: partial(listener.method),
        lambda listener: listener,
        lambda listener: lambda block: listener.method(block),
    ],
    ids=["method", "partial", "object", "lambda"],
)
async def test_every_kind_of_async_callback_is_awaited(kind: Callable[[Listener], Callable[..., object]]) -> None:
    listener = Listener()
    with pytest.raises(ManualCancelation):
        async with Cancelable() as block:
            block.on_cancel(kind(listener))
            await block.cancel()
    gc.collect()
    assert listener.journal == [block]


async def test_progress_is_reported_to_everyone(caplog: pytest.LogCaptureFixture) -> None:
    reports: list[object] = []

    def plain(message: str | None, metadata: Mapping[str, Any]) -> None:
        reports.append(("plain", message, dict(metadata)))

    async def later(message: str | None, metadata: Mapping[str, Any]) -> None:
        await anyio.lowlevel.checkpoint()
        reports.append(("later", message, dict(metadata)))

    def fail(message: str | None, metadata: Mapping[str, Any]) -> None:
        raise ValueError("a bug")

    async def fail_later(message: str | None, metadata: Mapping[str, Any]) -> None:
        raise ValueError("a bug")

    async with nothing_left(), Cancelable() as block:
        await block.report_progress("nobody listens")
        for each in (fail, fail_later, plain, later):
            assert block.on_progress(each) is each
        await block.report_progress("half", {"rows": 5})
        await block.report_progress()
    assert reports == [
        ("plain", "half", {"rows": 5}),
        ("later", "half", {"rows": 5}),
        ("plain", None, {}),
        ("later", None, {}),
    ]
    assert {record.levelname for record in caplog.records} == {"ERROR"}
    assert len(caplog.records) == 4


async def test_work_that_reports_can_be_stopped() -> None:
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as block:
                block.cancel_nowait()
                await block.report_progress("half")
                pytest.fail("went on")


async def test_a_condition_that_comes_true_stops_it() -> None:
    answers = iter([False, False, True])
    async with nothing_left():
        with pytest.raises(ConditionCancelation):
            async with Cancelable.with_condition(lambda: next(answers), 0, name="work") as block:
                await anyio.sleep_forever()
    assert (block.reason, block.message) == (CancelationReason.CONDITION, "The condition came true")
    assert block.name == "work"


async def test_a_condition_that_is_true_on_entering_stops_it_at_once() -> None:
    asked: list[Cancelable | None] = []

    def ask() -> bool:
        asked.append(current_cancelable())
        return True

    async with nothing_left():
        with pytest.raises(ConditionCancelation):
            async with Cancelable.with_condition(ask, LONG) as block:
                await anyio.sleep_forever()
    assert asked == [block]


async def test_an_async_condition() -> None:
    ready = anyio.Event()

    async def ask() -> bool:
        await ready.wait()
        return True

    async with nothing_left():
        with pytest.raises(ConditionCancelation):
            async with Cancelable.with_condition(ask, timedelta(0)):
                await anyio.wait_all_tasks_blocked()
                ready.set()
                await anyio.sleep_forever()


async def test_a_condition_that_fails_stops_it_and_tells_nobody_outside_why() -> None:
    def ask() -> bool:
        raise KeyError("secret")

    async with nothing_left():
        with pytest.raises(CancelationError) as caught:
            async with Cancelable.with_condition(ask):
                await anyio.sleep_forever()
    assert type(caught.value) is CancelationError
    assert caught.value.reason is CancelationReason.ERROR
    assert caught.value.message == "The condition failed: KeyError('secret')"
    assert "secret" not in caught.value.detail


async def test_a_condition_is_not_asked_when_the_block_was_left() -> None:
    async def never() -> bool:
        await anyio.sleep_forever()
        return True

    for predicate, interval in ((lambda: False, 0), (lambda: False, LONG), (never, 0)):
        async with nothing_left(), Cancelable.with_condition(predicate, interval) as block:
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
        assert not block.is_cancelled


@pytest.mark.parametrize("predicate", [True, None, "done"])
async def test_what_is_no_condition_is_refused(predicate: Any) -> None:
    with pytest.raises(TypeError, match="a condition must be a function without arguments that returns a bool, not"):
        Cancelable.with_condition(predicate)


async def test_the_current_block_is_the_innermost() -> None:
    assert current_cancelable() is None
    async with Cancelable() as outer:
        assert current_cancelable() is outer
        async with Cancelable() as inner:
            assert current_cancelable() is inner
        assert current_cancelable() is outer
    assert current_cancelable() is None


async def test_the_current_block_is_known_in_child_tasks_and_threads() -> None:
    seen: list[Cancelable | None] = []

    async def child() -> None:
        seen.append(current_cancelable())

    async with Cancelable() as block:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
        seen.append(await anyio.to_thread.run_sync(current_cancelable))
    assert seen == [block, block]


async def test_a_task_that_outlives_the_block_sees_that_it_was_left() -> None:
    seen: list[bool] = []
    left = anyio.Event()

    async def child() -> None:
        await left.wait()
        block = current_cancelable()
        assert block is not None
        seen.append(block.is_active)
        async with Cancelable():
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        async with Cancelable():
            tasks.start_soon(child)
        left.set()
    assert seen == [False]


async def ends_with_result(block: Cancelable) -> None:
    await anyio.lowlevel.checkpoint()


async def ends_with_error(block: Cancelable) -> None:
    raise ValueError


async def ends_cancelled(block: Cancelable) -> None:
    await block.cancel()


async def ends_by_thread(block: Cancelable) -> None:
    await anyio.to_thread.run_sync(block.cancel_nowait)
    await anyio.sleep_forever()


async def ends_in_the_tick_of_its_result(block: Cancelable) -> None:
    await anyio.lowlevel.checkpoint()
    block.cancel_nowait()


async def ends_when_its_grace_is_over(block: Cancelable) -> None:
    try:
        await block.cancel()
    finally:
        await anyio.sleep_forever()


async def ends_after_swallowing(block: Cancelable) -> None:
    try:
        await block.cancel()
    except BaseException:
        await anyio.lowlevel.checkpoint()


async def ends_in_a_shield(block: Cancelable) -> None:
    with block.shield():
        await block.cancel()


ENDINGS: list[Callable[[Cancelable], Awaitable[None]]] = [
    ends_with_result,
    ends_with_error,
    ends_cancelled,
    ends_by_thread,
    ends_in_the_tick_of_its_result,
    ends_when_its_grace_is_over,
    ends_after_swallowing,
    ends_in_a_shield,
]


@pytest.mark.parametrize("grace", [0, SOON, LONG])
@pytest.mark.parametrize("end", ENDINGS)
async def test_nothing_is_left_of_a_block(end: Callable[[Cancelable], Awaitable[None]], grace: float) -> None:
    if end is ends_when_its_grace_is_over and grace == LONG:
        grace = SOON
    token = CancelationToken()
    block = Cancelable(timeout=LONG, token=token, cleanup_grace=grace)
    async with nothing_left():
        try:
            async with block:
                await end(block)
        except (ValueError, CancelationError):
            pass
    assert not token._listeners
    assert not block.token._listeners
    assert current_cancelable() is None
    assert not block.is_active


async def test_a_block_that_shares_the_token_of_one_around_it_delivers_once() -> None:
    cleaned = False
    with pytest.raises(TimeoutCancelation):
        async with Cancelable(timeout=0.02), Cancelable() as middle:
            try:
                async with Cancelable(token=middle.token):
                    await anyio.sleep_forever()
            finally:
                await anyio.sleep(0.02)
                cleaned = True
    assert cleaned


async def test_a_stopped_block_is_no_work_for_the_garbage_collector() -> None:
    """The traceback of its error knows the frames that it has left, and these must not know the error."""

    class Held:
        pass

    async def work(held: Held) -> None:
        async with Cancelable() as block:
            await block.cancel()

    held = Held()
    alive = weakref.ref(held)
    gc.disable()
    try:
        with suppress(ManualCancelation):
            await work(held)
        del held
        await anyio.wait_all_tasks_blocked()
        assert alive() is None
    finally:
        gc.enable()
