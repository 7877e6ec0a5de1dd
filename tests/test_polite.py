# pyright: reportPossiblyUnboundVariable=false
# It believes that `raises` may take an exception from entering the block.
# ruff: noqa: PT012 - what leaves a block is tested by leaving it, inside of `raises`
from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio

from cancelable_deps import Cancelable, CancelationError, CancelationToken, ManualCancelation, TimeoutCancelation
from cancelable_deps.kernel.loops.trio_scopes import _Stepper
from cancelable_deps.kernel.task_group import CancelableTaskGroup

from .calls import CEILING
from .leftovers import nothing_left

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])
on_trio = pytest.mark.parametrize("anyio_backend", ["trio"])

SOON = 0.02
LONG = 100


async def cleanup(journal: list[str]) -> None:
    """Every kind of ``await`` that a driver's cleanup may need."""
    await anyio.lowlevel.checkpoint()
    journal.append("checkpoint")
    await anyio.sleep(SOON)
    journal.append("sleep")
    await anyio.to_thread.run_sync(time.monotonic)
    journal.append("thread")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep, 0)
    journal.append("group")
    await answer_from_a_thread()
    journal.append("event")
    with anyio.move_on_after(SOON) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    await anyio.lowlevel.checkpoint()
    journal.append("scope")


CLEANED = ["checkpoint", "sleep", "thread", "group", "event", "scope"]


async def answer_from_a_thread() -> None:
    """What a driver's conversation with its server looks like to the loop."""
    event = anyio.Event()
    answer = partial(anyio.from_thread.run_sync, event.set, token=anyio.lowlevel.current_token())
    thread = threading.Thread(target=answer)
    thread.start()
    await event.wait()
    thread.join(10)


class Work:
    """Work that stands somewhere when it is cancelled; the journal says how often, and how its cleanup went."""

    def __init__(self, stand: Callable[[Work], Awaitable[object]], **options: Any) -> None:
        self.journal: list[str] = []
        self.block = Cancelable(**options)
        self.stand = stand
        self.release = anyio.Event()
        self.thread_release = threading.Event()

    async def run(self) -> None:
        try:
            async with self.block:
                try:
                    await self.stand(self)
                    # On trio a group inside takes the cancellation for its own; the next await has it again.
                    await anyio.lowlevel.checkpoint()
                    self.journal.append("went on")
                except anyio.get_cancelled_exc_class():
                    self.journal.append("cancelled")
                    await cleanup(self.journal)
                    raise
        except CancelationError as exc:
            self.journal.append(type(exc).__name__)


async def sleeping(work: Work) -> None:
    await anyio.sleep_forever()


async def in_its_own_timeout(work: Work) -> None:
    with anyio.move_on_after(LONG), anyio.fail_after(LONG):
        await anyio.sleep_forever()


async def waiting_for_children(work: Work) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        tasks.start_soon(anyio.sleep_forever)


async def beside_children(work: Work) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        await anyio.sleep_forever()


async def receiving(work: Work) -> None:
    send, receive = anyio.create_memory_object_stream[None]()
    with send, receive:
        await receive.receive()


async def locked_out(work: Work) -> None:
    lock = anyio.Lock()
    async with anyio.create_task_group() as tasks:

        async def hold(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            async with lock:
                task_status.started()
                await anyio.sleep_forever()

        await tasks.start(hold)
        await lock.acquire()


async def in_a_thread_that_may_be_left(work: Work) -> None:
    try:
        await anyio.to_thread.run_sync(work.thread_release.wait, 10, abandon_on_cancel=True)
    finally:
        work.thread_release.set()


STANDS = [
    sleeping,
    in_its_own_timeout,
    waiting_for_children,
    beside_children,
    receiving,
    locked_out,
    in_a_thread_that_may_be_left,
]


@pytest.mark.parametrize("from_thread", [False, True])
@pytest.mark.parametrize("stand", STANDS)
async def test_it_is_delivered_once_and_the_cleanup_is_not_disturbed(
    stand: Callable[[Work], Awaitable[object]], from_thread: bool
) -> None:
    work = Work(stand)
    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(work.run)
        await anyio.wait_all_tasks_blocked()
        if from_thread:
            assert await anyio.to_thread.run_sync(work.block.cancel_nowait)
        else:
            assert work.block.cancel_nowait()
    assert work.journal == ["cancelled", *CLEANED, "ManualCancelation"]


@pytest.mark.parametrize("around", ["nothing", "a scope", "a block", "a group", "a member"])
@pytest.mark.parametrize("inside", ["nothing", "a scope"])
async def test_what_a_worker_thread_calls_in_the_loop_cleans_up_undisturbed(around: str, inside: str) -> None:
    async def called() -> None:
        try:
            with anyio.CancelScope() if inside == "a scope" else nullcontext():
                work.release.set()
                try:
                    await anyio.sleep_forever()
                finally:
                    await cleanup(work.journal)
        finally:
            await cleanup(work.journal)

    async def in_a_thread() -> None:
        await anyio.to_thread.run_sync(anyio.from_thread.run, called)

    async def stand(work: Work) -> None:
        if around == "a scope":
            with anyio.fail_after(LONG):
                await in_a_thread()
        elif around == "a block":
            async with Cancelable():
                await in_a_thread()
        elif around == "a group":
            async with anyio.create_task_group():
                await in_a_thread()
        elif around == "a member":
            async with CancelableTaskGroup(Cancelable()) as group:
                group.start_soon(in_a_thread)
        else:
            await in_a_thread()

    work = Work(stand)
    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(work.run)
        await work.release.wait()
        await anyio.wait_all_tasks_blocked()
        assert work.block.cancel_nowait()
    assert work.journal == [*CLEANED, *CLEANED, "cancelled", *CLEANED, "ManualCancelation"]


async def being_the_caller(work: Work) -> None:
    await work.block.cancel()


async def being_the_caller_of_its_token(work: Work) -> None:
    await work.block.token.cancel()


async def before_its_first_await(work: Work) -> None:
    work.block.cancel_nowait()
    await anyio.sleep_forever()


async def before_a_loop_of_checkpoints(work: Work) -> None:
    work.block.cancel_nowait()
    while True:
        await anyio.lowlevel.checkpoint()


async def before_a_loop_of_sleeps_for_nothing(work: Work) -> None:
    work.block.cancel_nowait()
    while True:
        await anyio.lowlevel.checkpoint()


async def before_a_loop_that_only_asks(work: Work) -> None:
    work.block.cancel_nowait()
    while True:
        await anyio.lowlevel.checkpoint_if_cancelled()
        await anyio.lowlevel.cancel_shielded_checkpoint()


async def in_the_middle_of_checkpoints(work: Work) -> None:
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
    work.block.cancel_nowait()
    await anyio.lowlevel.checkpoint()


async def after_its_own_timeout(work: Work) -> None:
    with anyio.move_on_after(0):
        await anyio.sleep_forever()
    work.block.cancel_nowait()
    await anyio.sleep_forever()


async def before_a_scope_of_its_own(work: Work) -> None:
    work.block.cancel_nowait()
    with anyio.move_on_after(LONG):
        await anyio.lowlevel.checkpoint()


async def before_children(work: Work) -> None:
    work.block.cancel_nowait()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)


async def before_a_thread(work: Work) -> None:
    work.block.cancel_nowait()
    await anyio.to_thread.run_sync(pytest.fail, "the thread ran")


async def by_a_child(work: Work) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work.block.cancel)
        await anyio.sleep_forever()


SELF_STOPPED = [
    being_the_caller,
    being_the_caller_of_its_token,
    before_its_first_await,
    before_a_loop_of_checkpoints,
    before_a_loop_of_sleeps_for_nothing,
    before_a_loop_that_only_asks,
    in_the_middle_of_checkpoints,
    after_its_own_timeout,
    before_a_scope_of_its_own,
    before_children,
    before_a_thread,
    by_a_child,
]


@pytest.mark.parametrize("stand", SELF_STOPPED)
async def test_work_that_stops_itself_is_cancelled_at_its_next_await(
    stand: Callable[[Work], Awaitable[object]],
) -> None:
    work = Work(stand)
    async with nothing_left():
        await work.run()
    assert work.journal == ["cancelled", *CLEANED, "ManualCancelation"]


async def busy(work: Work) -> None:
    while True:
        await anyio.lowlevel.checkpoint()


async def busy_with_sleeps(work: Work) -> None:
    while True:
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("stand", [busy, busy_with_sleeps, sleeping])
async def test_work_that_never_waits_for_long_times_out(stand: Callable[[Work], Awaitable[object]]) -> None:
    work = Work(stand, timeout=SOON)
    async with nothing_left():
        await work.run()
    assert work.journal == ["cancelled", *CLEANED, "TimeoutCancelation"]


async def in_a_shield(work: Work) -> None:
    with work.block.shield():
        await work.release.wait()
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
    work.journal.append("finished")
    await anyio.sleep_forever()


async def in_a_shield_of_anyio(work: Work) -> None:
    with anyio.CancelScope(shield=True):
        await work.release.wait()
    work.journal.append("finished")
    await anyio.lowlevel.checkpoint()


async def in_a_shield_of_a_child(work: Work) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(in_a_shield_of_anyio, work)


async def in_a_thread(work: Work) -> None:
    await anyio.to_thread.run_sync(work.thread_release.wait, 10)
    work.journal.append("finished")
    await anyio.sleep_forever()


@pytest.mark.parametrize("stand", [in_a_shield, in_a_shield_of_anyio, in_a_thread, in_a_shield_of_a_child])
async def test_what_may_not_be_cancelled_is_finished_first(stand: Callable[[Work], Awaitable[object]]) -> None:
    work = Work(stand)
    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(work.run)
        await anyio.wait_all_tasks_blocked()
        assert work.block.cancel_nowait()
        await anyio.wait_all_tasks_blocked()
        assert work.journal == []
        work.release.set()
        work.thread_release.set()
    assert work.journal == ["finished", "cancelled", *CLEANED, "ManualCancelation"]


async def test_a_shielded_timeout_of_the_users_that_ends_while_ours_is_pending() -> None:
    async def stand(work: Work) -> None:
        work.block.cancel_nowait()
        with anyio.move_on_after(SOON, shield=True) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        work.journal.append("finished")
        await anyio.sleep_forever()

    work = Work(stand)
    async with nothing_left():
        with anyio.fail_after(4):
            await work.run()
    assert work.journal == ["finished", "cancelled", *CLEANED, "ManualCancelation"]


@pytest.mark.parametrize("ours_first", [True, False])
async def test_a_scope_of_the_users_that_is_cancelled_in_the_same_tick(ours_first: bool) -> None:
    async def stand(work: Work) -> None:
        with anyio.CancelScope() as scope:
            cancels: list[Callable[[], object]] = [work.block.cancel_nowait, scope.cancel]
            for cancel in cancels if ours_first else reversed(cancels):
                cancel()
            await anyio.sleep_forever()
        await anyio.sleep_forever()

    work = Work(stand)
    async with nothing_left():
        with anyio.fail_after(4):
            await work.run()
    assert work.journal == ["cancelled", *CLEANED, "ManualCancelation"]


async def busy_forever() -> None:
    while True:
        await anyio.lowlevel.checkpoint()


async def stop_at_every_await(journal: list[str]) -> None:
    for _ in range(3):
        try:
            await anyio.lowlevel.checkpoint()
            journal.append("undisturbed")
        except anyio.get_cancelled_exc_class():
            journal.append("repeated")


@pytest.mark.parametrize("end", [anyio.sleep_forever, busy_forever])
async def test_a_cleanup_that_never_ends_is_stopped_after_the_grace(end: Callable[[], Awaitable[None]]) -> None:
    journal: list[str] = []
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable(cleanup_grace=SOON) as block:
                try:
                    await block.cancel()
                finally:
                    await anyio.lowlevel.checkpoint()
                    journal.append("undisturbed")
                    started = anyio.current_time()
                    try:
                        await end()
                    finally:
                        assert SOON / 2 < anyio.current_time() - started < 10
                        await stop_at_every_await(journal)
    assert journal == ["undisturbed", "repeated", "repeated", "repeated"]


async def test_a_grace_of_zero_repeats_at_once() -> None:
    journal: list[str] = []
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable(cleanup_grace=0) as block:
                try:
                    await block.cancel()
                finally:
                    await stop_at_every_await(journal)
    assert journal == ["repeated"] * 3


async def test_the_default_grace_is_that_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cancelable_deps.kernel.settings.settings.cleanup_grace", 0.0)
    journal: list[str] = []
    with pytest.raises(ManualCancelation):
        async with Cancelable() as block:
            try:
                await block.cancel()
            finally:
                await stop_at_every_await(journal)
    assert journal == ["repeated"] * 3


async def test_work_that_swallows_the_cancellation_is_stopped_after_the_grace() -> None:
    journal: list[str] = []
    async with nothing_left():
        with anyio.fail_after(CEILING), pytest.raises(ManualCancelation):
            async with Cancelable(cleanup_grace=SOON) as block:
                try:
                    await block.cancel()
                except anyio.get_cancelled_exc_class():
                    journal.append("swallowed")
                await anyio.lowlevel.checkpoint()
                journal.append("went on")
                await anyio.sleep_forever()
    assert journal == ["swallowed", "went on"]


async def test_a_shield_in_the_cleanup_outlasts_the_grace() -> None:
    journal: list[str] = []
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable(cleanup_grace=SOON) as block:
                try:
                    await block.cancel()
                finally:
                    with block.shield():
                        await anyio.sleep(3 * SOON)
                        journal.append("finished")
                    await stop_at_every_await(journal)
    assert journal == ["finished", "repeated", "repeated", "repeated"]


@on_asyncio
async def test_asyncio_timeout_in_the_cleanup_keeps_working() -> None:
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as block:
                try:
                    await block.cancel()
                finally:
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(SOON):
                            await anyio.sleep_forever()
                    await anyio.lowlevel.checkpoint()


@on_asyncio
async def test_a_cleanup_after_asyncio_timeout_that_we_interrupt_may_raise_what_it_cleans_up_for() -> None:
    """That is the timeout's, which withdraws it for ours: nobody else has asked for an end."""
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as block, asyncio.timeout(0):
                try:
                    await anyio.sleep_forever()
                finally:
                    with suppress(asyncio.CancelledError):
                        await block.cancel()
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]


@on_asyncio
async def test_asyncio_wait_for_in_the_cleanup_keeps_working() -> None:
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as block:
                try:
                    await block.cancel()
                finally:
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(asyncio.Event().wait(), SOON)
                    assert await asyncio.wait_for(asyncio.sleep(0, "result"), LONG) == "result"
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(asyncio.sleep(0))


async def test_the_cleanup_of_nested_blocks_is_not_disturbed() -> None:
    journal: list[str] = []
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as outer:
                try:
                    async with Cancelable() as middle, Cancelable():
                        try:
                            await outer.cancel()
                        finally:
                            await cleanup(journal)
                finally:
                    await cleanup(journal)
    assert journal == CLEANED * 2
    assert middle.is_cancelled


async def check_in_the_task(block: Cancelable) -> None:
    block.cancel_nowait()
    block.check()


async def check_past_the_deadline(block: Cancelable) -> None:
    while True:
        block.check()


@pytest.mark.parametrize("stand", [check_in_the_task, check_past_the_deadline])
async def test_the_cleanup_after_check_has_raised_is_not_disturbed(
    stand: Callable[[Cancelable], Awaitable[None]],
) -> None:
    journal: list[str] = []
    async with nothing_left():
        with pytest.raises((ManualCancelation, TimeoutCancelation)):
            async with Cancelable(timeout=SOON if stand is check_past_the_deadline else LONG) as block:
                try:
                    await stand(block)
                finally:
                    await cleanup(journal)
    assert journal == CLEANED


async def check_in_a_block_that_answers(token: CancelationToken) -> None:
    with pytest.raises(ManualCancelation):
        async with Cancelable(token=token, cleanup_grace=SOON) as block:
            token.cancel_nowait()
            block.check()
    await anyio.sleep_forever()


async def check_in_a_block_inside(token: CancelationToken) -> None:
    async with Cancelable(cleanup_grace=SOON) as block:
        token.cancel_nowait()
        try:
            block.check()
        finally:
            await anyio.sleep_forever()


@pytest.mark.parametrize("stand", [check_in_a_block_that_answers, check_in_a_block_inside])
async def test_work_that_goes_on_after_check_has_raised_is_stopped_after_the_grace(
    stand: Callable[[CancelationToken], Awaitable[None]],
) -> None:
    token = CancelationToken()
    async with nothing_left():
        with anyio.fail_after(CEILING), pytest.raises(ManualCancelation):
            async with Cancelable(token=token, cleanup_grace=SOON):
                await stand(token)


async def test_the_children_of_a_plain_group_are_stopped_with_the_block() -> None:
    """Without a member scope of their own they may be cancelled more than once, but none is forgotten."""
    ended: list[int] = []

    async def child(number: int) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(number)

    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            async with Cancelable(timeout=SOON), anyio.create_task_group() as tasks:
                for number in range(5):
                    tasks.start_soon(child, number)
    assert sorted(ended) == list(range(5))


async def test_a_child_of_a_plain_group_that_failed_is_seen_as_without_a_block() -> None:
    async def fail() -> None:
        raise KeyError

    async with nothing_left():
        with pytest.raises(ExceptionGroup) as raised:
            async with Cancelable(), anyio.create_task_group() as tasks:
                tasks.start_soon(fail)
                await anyio.sleep_forever()
    assert [type(exc) for exc in raised.value.exceptions] == [KeyError]


async def test_results_of_children_are_not_taken_for_complete_when_they_were_cancelled() -> None:
    """A group inside must not take our cancellation for its own, and the work go on without its results."""
    results: list[str] = []

    async def child() -> None:
        await anyio.sleep_forever()
        results.append("result")

    async def work() -> list[str]:
        async with Cancelable(timeout=SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(child)
                await anyio.sleep_forever()
            return results

    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            await work()


async def in_a_block_of_its_own(token: CancelationToken) -> None:
    async with Cancelable(token=token):
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.wait_all_tasks_blocked()


async def in_the_cleanup_of_its_own_scope(token: CancelationToken) -> None:
    with anyio.CancelScope() as own:
        own.cancel()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await token.wait()
                await anyio.wait_all_tasks_blocked()
    await anyio.sleep_forever()


@pytest.mark.parametrize("child", [in_a_block_of_its_own, in_the_cleanup_of_its_own_scope])
@pytest.mark.parametrize("of_ours", [True, False])
async def test_a_group_does_not_end_well_because_of_a_child_that_was_cancelled_by_itself(
    child: Callable[[CancelationToken], Coroutine[Any, Any, None]], of_ours: bool
) -> None:
    """What was asked of the child's task must not count for that of the group."""
    token = CancelationToken()

    async def work() -> str:
        block = Cancelable(token=token)
        if of_ours:
            async with CancelableTaskGroup(block) as tasks:
                tasks.start_soon(child, token)
        else:
            async with block, anyio.create_task_group() as tasks:
                tasks.start_soon(child, token)
        return "without the child's result"

    async def cancel() -> None:
        await anyio.wait_all_tasks_blocked()
        token.cancel_nowait()

    async with nothing_left():
        with anyio.fail_after(CEILING):
            async with anyio.create_task_group() as others:
                others.start_soon(cancel)
                with pytest.raises(ManualCancelation):
                    await work()


@on_asyncio
async def test_a_native_cancellation_in_the_tick_of_ours_counts_beside_that_of_a_child() -> None:
    token = CancelationToken()
    counts: list[int] = []

    async def work() -> None:
        try:
            async with Cancelable(token=token), anyio.create_task_group() as tasks:
                tasks.start_soon(in_a_block_of_its_own, token)
        finally:
            counts.append(asyncio.current_task().cancelling())  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]

    async with nothing_left():
        task = asyncio.create_task(work())
        await anyio.wait_all_tasks_blocked()
        token.cancel_nowait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert counts == [1]


@on_asyncio
async def test_a_scope_around_knows_a_cancellation_that_came_in_the_tick_of_ours() -> None:
    async with nothing_left():
        with anyio.CancelScope() as around:
            async with Cancelable() as block:
                block.cancel_nowait()
                try:
                    await anyio.sleep_forever()
                finally:
                    around.cancel()
        assert around.cancelled_caught
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]


def test_on_uvloop() -> None:
    work: list[Work] = []

    async def main() -> None:
        work.append(Work(sleeping, timeout=SOON))
        await work[0].run()

    anyio.run(main, backend="asyncio", backend_options={"use_uvloop": True})
    assert work[0].journal == ["cancelled", *CLEANED, "TimeoutCancelation"]


@on_asyncio
@pytest.mark.skipif(sys.version_info < (3, 12), reason="before, no task starts eagerly")
@pytest.mark.parametrize("how", ["result", "check"])
async def test_a_task_that_starts_eagerly_and_cancels_is_as_good_as_the_block_itself(how: str) -> None:
    journal: list[str] = []

    async def work() -> str:
        async with Cancelable() as block:
            canceller = loop.create_task(block.cancel())
            assert block.is_cancelled
            if how == "check":
                try:
                    block.check()
                finally:
                    await cleanup(journal)
        await canceller
        return "finished"

    loop = asyncio.get_running_loop()
    async with nothing_left():
        loop.set_task_factory(vars(asyncio)["eager_task_factory"])
        try:
            if how == "result":
                assert await loop.create_task(work()) == "finished"
            else:
                with pytest.raises(ManualCancelation):
                    await loop.create_task(work())
                assert journal == CLEANED
        finally:
            loop.set_task_factory(None)


@on_asyncio
async def test_anyio_walks_down_the_scopes_and_cancels_where_the_hook_sees_it() -> None:
    scope_class: Any = type(anyio.CancelScope())
    seen: list[tuple[object, int, bool]] = []

    class Hooked(scope_class):  # type: ignore[misc]
        def _deliver_cancellation(self, origin: Any) -> bool:
            before = self._host_task.cancelling()
            retry: bool = super()._deliver_cancellation(origin)
            seen.append((origin, self._host_task.cancelling() - before, retry))
            return retry

    with anyio.CancelScope() as outer, Hooked() as hooked, anyio.CancelScope():
        outer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await anyio.sleep_forever()
        # Shielded from here on, as the polite scope does it: nothing more arrives.
        hooked.shield = True
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
    assert [(origin is outer, count, retry) for origin, count, retry in seen[-1:]] == [(True, 1, True)]
    assert sum(count for _, count, _ in seen) == 1
    assert list(inspect.signature(scope_class._deliver_cancellation).parameters) == ["self", "origin"]


@on_asyncio
async def test_anyio_cancels_a_task_in_one_place_only() -> None:
    callers: list[str] = []

    class Watched(asyncio.Task[Any]):
        def cancel(self, msg: Any = None) -> bool:
            callers.append(sys._getframe(1).f_code.co_qualname)
            return super().cancel(msg)

    async def fail() -> None:
        raise KeyError

    async def work() -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anyio.sleep_forever()
        with anyio.move_on_after(0):
            await anyio.sleep_forever()
        with anyio.CancelScope() as scope, anyio.CancelScope():
            with anyio.CancelScope(shield=True):
                scope.cancel()
                await anyio.lowlevel.checkpoint()
            await anyio.sleep_forever()
        with pytest.raises(ExceptionGroup):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fail)
                tasks.start_soon(anyio.sleep_forever)
                await anyio.sleep_forever()
        async with anyio.create_task_group() as tasks:
            handle = tasks.start_soon(anyio.sleep_forever)
            await anyio.lowlevel.checkpoint()
            handle.cancel()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()

    loop = asyncio.get_running_loop()
    loop.set_task_factory(lambda loop, coro, **options: Watched(coro, loop=loop, **options))  # pyright: ignore[reportArgumentType]
    try:
        await loop.create_task(work())
    finally:
        loop.set_task_factory(None)
    assert set(callers) == {"CancelScope._deliver_cancellation"}
    assert len(callers) >= 8


class Recorder:
    """Stands for the coroutine of a trio task."""

    def __init__(self) -> None:
        self.sent: list[object] = []
        task: Any = trio.lowlevel.current_task()
        self.task = task
        self.coro = task.coro
        task.coro = self

    def send(self, value: Any) -> Any:
        self.sent.append(value)
        return self.coro.send(value)

    def remove(self) -> None:
        self.task.coro = self.coro


@on_trio
@pytest.mark.parametrize("wait", [trio.sleep_forever, partial(trio.sleep, 0), trio.lowlevel.checkpoint])
async def test_trio_sends_a_cancellation_through_the_coroutine_of_the_task(
    wait: Callable[[], Awaitable[object]],
) -> None:
    with trio.CancelScope() as scope:
        scope.cancel("enough")
        recorder = Recorder()
        try:
            with pytest.raises(trio.Cancelled):
                await wait()
        finally:
            recorder.remove()
    errors = [getattr(value, "error", None) for value in recorder.sent]
    assert [type(error) for error in errors if error is not None] == [trio.Cancelled]
    assert errors[-1] is not None
    assert errors[-1].reason == "enough"


@on_trio
async def test_after_the_block_the_task_has_its_own_coroutine_back() -> None:
    task: Any = trio.lowlevel.current_task()
    own = task.coro
    with pytest.raises(ManualCancelation):
        async with Cancelable() as block:
            assert isinstance(task.coro, _Stepper)
            async with Cancelable():
                assert isinstance(task.coro, _Stepper)
            await block.cancel()
    assert task.coro is own
    assert inspect.iscoroutine(own)


@on_trio
async def test_trio_can_still_look_into_a_task_inside_a_block() -> None:
    task = trio.lowlevel.current_task()
    async with Cancelable(), Cancelable():
        frames: list[str] = []

        async def look() -> None:
            frames.extend(frame.f_code.co_name for frame, _ in task.iter_await_frames())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
    assert "test_trio_can_still_look_into_a_task_inside_a_block" in frames
