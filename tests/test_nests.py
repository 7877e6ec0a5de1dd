"""Random nests of blocks, groups and scopes end as those of pure anyio do, and what has been told once is left alone."""

# pyright: reportPossiblyUnboundVariable=false
# It believes that `raises` may take an exception from entering the block.
# ruff: noqa: PT012 - what leaves a block is tested by leaving it, inside of `raises`
from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send
from trio._core._run import CancelStatus

from benchmarks import nests
from benchmarks.nests import Nest, run_nest
from cancelable_deps import Cancelable, CancelationError, RequestCancelationMiddleware, TimeoutCancelation
from cancelable_deps.kernel.loops.base import PoliteScope
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.kernel.task_group import CancelableTaskGroup
from cancelable_deps.testing import advance
from cancelable_deps.testing.clock import _clock

from .calls import movable_clock
from .leftovers import nothing_left

pytestmark = pytest.mark.anyio
on_trio = pytest.mark.parametrize("anyio_backend", ["trio"])

LONG = 100


# Besides the first ones, those in which something was found once.
FOUND = [197, 234, 372, 2387, 2844, 3351, 3750, 4071, 4640, 4716]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("seeds", [*(range(first, first + 20) for first in range(0, 120, 20)), FOUND], ids=str)
def test_nests_of_all_kinds_end_as_with_anyio_and_clean_up_undisturbed(seeds: Sequence[int], backend: str) -> None:
    faults = {str(Nest(seed)): run_nest(seed, backend) for seed in seeds}
    assert {nest: found for nest, found in faults.items() if found} == {}


def test_the_benchmark_says_which_nests_it_has_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert nests.main(["--first=3", "--count=2", "--backend=trio"]) == 0
    assert capsys.readouterr().out == "2 nests: no faults\n"


class Cleanup:
    """Work that is told once, or more often, that it is to end."""

    def __init__(self) -> None:
        self.journal: list[str] = []
        self.may_end = anyio.Event()

    async def run(self, work: Callable[[], Awaitable[object]] = anyio.sleep_forever) -> None:
        try:
            await work()
        except BaseException as exc:
            self.journal.append("told")
            try:
                await self.may_end.wait()
                await anyio.to_thread.run_sync(int)
                self.journal.append("undisturbed")
            except anyio.get_cancelled_exc_class():
                self.journal.append("disturbed")
                raise
            raise exc  # noqa: TRY201 - Python 3.11 knows by then which one, and pyright does not


TOLD_ONCE = ["told", "undisturbed"]


@asynccontextmanager
async def beside(work: Callable[[], Awaitable[object]]) -> AsyncGenerator[None]:
    """Run ``work``, which ends by an error of ours or well, beside a body that strikes."""

    async def run() -> None:
        with suppress(CancelationError):
            await work()

    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await settled()
        yield


async def check_that_it_becomes_firm(
    block: Cancelable, work: Callable[[], Awaitable[object]], cleanup: Cleanup
) -> None:
    """Stop a block whose grace is five seconds: the cleanup in it is disturbed after these, and not before."""
    async with beside(work):
        block.cancel_nowait()
        await advance(4.9)
        assert cleanup.journal == ["told"]
        await advance(0.2)
        await settled()
    assert cleanup.journal == ["told", "disturbed"]


async def settled() -> None:
    """Nothing more happens because of what has been done."""
    for _ in range(20):
        # What is scheduled for a later pass of the loop blocks no task.
        await anyio.lowlevel.checkpoint()
    await anyio.wait_all_tasks_blocked()


@movable_clock
@pytest.mark.parametrize("around", ["nothing", "a scope", "a group"])
async def test_deadline_of_an_inner_block_leaves_a_cleanup_alone_that_an_outer_one_has_begun(around: str) -> None:
    cleanup = Cleanup()

    async def work() -> None:
        async with Cancelable(timeout=1), Cancelable(timeout=2):
            with anyio.CancelScope() if around == "a scope" else nullcontext():
                async with anyio.create_task_group() if around == "a group" else nullcontext():
                    await cleanup.run()

    async with beside(work):
        await advance(1)
        await advance(1.5)
        await settled()
        cleanup.may_end.set()
    assert cleanup.journal == TOLD_ONCE


@movable_clock
@pytest.mark.parametrize("ours", [True, False])
async def test_deadline_of_a_block_in_a_child_leaves_a_cleanup_alone_that_the_group_has_begun(ours: bool) -> None:
    cleanup = Cleanup()

    async def child() -> None:
        async with Cancelable(timeout=2):
            await cleanup.run()

    async def work() -> None:
        block = Cancelable(timeout=1)
        if ours:
            async with CancelableTaskGroup(block) as group:
                group.start_soon(child)
        else:
            async with block, anyio.create_task_group() as plain:
                plain.start_soon(child)

    async with beside(work):
        await advance(1)
        await advance(1.5)
        await settled()
        cleanup.may_end.set()
    assert cleanup.journal == TOLD_ONCE


@pytest.mark.parametrize("in_plain_group", [False, True])
async def test_grandchildren_have_their_grace_when_a_sibling_fails_one_group_further_out(in_plain_group: bool) -> None:
    cleanups = [Cleanup(), Cleanup()]
    may_fail = anyio.Event()

    async def child() -> None:
        async with CancelableTaskGroup(Cancelable()) as inner:
            for cleanup in cleanups:
                inner.start_soon(cleanup.run)

    async def in_a_plain_group() -> None:
        async with anyio.create_task_group() as plain:
            plain.start_soon(child)

    async def fail() -> None:
        await may_fail.wait()
        raise KeyError

    async def work() -> None:
        with pytest.raises(KeyError):
            async with CancelableTaskGroup(Cancelable()) as outer:
                outer.start_soon(in_a_plain_group if in_plain_group else child)
                outer.start_soon(fail)

    async with beside(work):
        may_fail.set()
        await settled()
        for cleanup in cleanups:
            cleanup.may_end.set()
    assert [cleanup.journal for cleanup in cleanups] == [TOLD_ONCE] * 2


@pytest.mark.parametrize("how", ["check", "inner block", "group that fails", "error of the cleanup"])
async def test_outer_block_leaves_a_cleanup_alone_that_an_exception_has_begun(how: str) -> None:
    cleanup = Cleanup()
    outer = Cancelable()
    may_stop = anyio.Event()

    async def stop() -> None:
        await may_stop.wait()
        if how == "check":
            async with Cancelable() as inner:
                inner.cancel_nowait()
                await cleanup.run(lambda: raise_what_check_raises(inner))
        elif how == "group that fails":
            async with CancelableTaskGroup(Cancelable()) as group:
                group.start_soon(fail, KeyError())
                await anyio.sleep_forever()
        else:
            async with Cancelable() as inner:
                inner.cancel_nowait()
                try:
                    await anyio.sleep_forever()
                finally:
                    if how == "error of the cleanup":
                        raise KeyError

    async def work() -> None:
        try:
            async with outer:
                await (stop() if how == "check" else cleanup.run(stop))
        except KeyError:
            assert how in {"group that fails", "error of the cleanup"}

    async with beside(work):
        may_stop.set()
        await settled()
        assert cleanup.journal == ["told"]
        outer.cancel_nowait()
        await settled()
        cleanup.may_end.set()
    assert cleanup.journal == TOLD_ONCE


async def raise_what_check_raises(block: Cancelable) -> None:
    block.check()


async def fail(error: Exception) -> None:
    await anyio.lowlevel.checkpoint()
    raise error


@pytest.mark.parametrize("cause", ["sibling", "group"])
async def test_group_leaves_the_cleanup_of_a_child_alone_that_an_exception_has_begun(cause: str) -> None:
    cleanup = Cleanup()
    groups: list[CancelableTaskGroup] = []

    async def stop() -> None:
        async with Cancelable() as block:
            await block.cancel()

    async def work() -> None:
        try:
            async with CancelableTaskGroup(Cancelable()) as group:
                groups.append(group)
                group.start_soon(cleanup.run, stop)
                await anyio.sleep_forever()
        except KeyError:
            assert cause == "sibling"

    async with beside(work):
        assert cleanup.journal == ["told"]
        if cause == "sibling":
            groups[0].start_soon(fail, KeyError())
        else:
            groups[0].cancel_scope.cancel()
        await settled()
        cleanup.may_end.set()
    assert cleanup.journal == TOLD_ONCE


@pytest.mark.parametrize(("strikes", "through_a_stack"), [("before", False), ("after", False), ("after", True)])
async def test_work_that_has_caught_the_error_is_stopped_at_once_by_something_new(
    strikes: str, through_a_stack: bool
) -> None:
    """Not when the grace is over, which is longer than this test may take."""
    outer = Cancelable(cleanup_grace=LONG)
    may_catch, caught = anyio.Event(), anyio.Event()

    async def stop() -> None:
        async with AsyncExitStack() if through_a_stack else nullcontext() as stack:
            if stack is not None:
                # It keeps what passes in a cycle.
                await stack.enter_async_context(Cancelable(cleanup_grace=LONG))
            async with Cancelable(cleanup_grace=LONG) as inner:
                await inner.cancel()

    async def work() -> None:
        async with outer:
            try:
                await stop()
            except CancelationError:
                await may_catch.wait()
            caught.set()
            await anyio.sleep_forever()

    with anyio.fail_after(10):
        async with beside(work):
            if strikes == "before":
                outer.cancel_nowait()
                await settled()
                assert not caught.is_set()
            may_catch.set()
            await caught.wait()
            if strikes == "after":
                outer.cancel_nowait()


@movable_clock
async def test_an_outer_block_becomes_firm_when_the_exception_is_still_on_its_way_after_the_grace() -> None:
    cleanup = Cleanup()
    outer = Cancelable(cleanup_grace=5)

    async def stop() -> None:
        async with Cancelable(cleanup_grace=5) as inner:
            await inner.cancel()

    async def work() -> None:
        async with outer:
            await cleanup.run(stop)

    await check_that_it_becomes_firm(outer, work, cleanup)


@movable_clock
@pytest.mark.parametrize("where", ["inner block", "child"])
async def test_whatever_was_covered_becomes_firm_with_the_scope_that_has_told(where: str) -> None:
    cleanup = Cleanup()
    block = Cancelable(cleanup_grace=5)

    async def inner() -> None:
        async with Cancelable(timeout=2, cleanup_grace=50):
            await cleanup.run()

    async def work() -> None:
        async with CancelableTaskGroup(block) as group:
            if where == "child":
                group.start_soon(inner)
            else:
                await inner()

    await check_that_it_becomes_firm(block, work, cleanup)


@movable_clock
async def test_when_the_loop_was_blocked_past_the_deadlines_of_nested_blocks_the_task_is_told_once() -> None:
    cleanups = [Cleanup(), Cleanup()]

    async def work() -> None:
        async with Cancelable(timeout=1):

            async def inside() -> None:
                async with Cancelable(timeout=2):
                    await cleanups[0].run()

            await cleanups[1].run(inside)

    async with beside(work):
        _clock().move(10)
        await settled()
        for cleanup in cleanups:
            cleanup.may_end.set()
    assert [cleanup.journal for cleanup in cleanups] == [TOLD_ONCE] * 2


@movable_clock
@pytest.mark.parametrize("by", ["scope", "block"])
async def test_a_scope_or_block_that_is_opened_in_the_cleanup_has_its_own_deadline(by: str) -> None:
    journal: list[str] = []

    async def work() -> None:
        async with Cancelable() as block:
            try:
                await block.cancel()
            finally:
                if by == "scope":
                    with anyio.move_on_after(1) as scope:
                        await anyio.sleep_forever()
                    assert scope.cancelled_caught
                else:
                    with pytest.raises(TimeoutCancelation):
                        async with Cancelable(timeout=1):
                            await anyio.sleep_forever()
                await anyio.lowlevel.checkpoint()
                journal.append("went on")

    async with beside(work):
        await advance(1)
    assert journal == ["went on"]


@movable_clock
async def test_a_block_in_a_shield_keeps_its_own_timeout_when_an_outer_one_is_cancelled() -> None:
    journal: list[str] = []
    outer = Cancelable()

    async def work() -> None:
        async with outer:
            with outer.shield():
                with pytest.raises(TimeoutCancelation):
                    async with Cancelable(timeout=1) as inner:
                        await anyio.sleep_forever()
                journal.append(str(inner.reason))
            await anyio.sleep_forever()

    async with beside(work):
        outer.cancel_nowait()
        await settled()
        await advance(1)
    assert journal == ["timeout"]


@pytest.mark.parametrize("inside", ["scope", "nursery"])
async def test_a_scope_of_the_users_that_strikes_in_the_cleanup_does_not_let_the_work_go_on(inside: str) -> None:
    journal: list[str] = []

    async def work() -> None:
        async with Cancelable() as block:
            if inside == "scope":
                with anyio.CancelScope() as scope:
                    await stop(block, scope)
            else:
                async with anyio.create_task_group() as group:
                    await stop(block, group.cancel_scope)
            journal.append("went on")

    async def stop(block: Cancelable, scope: anyio.CancelScope) -> None:
        try:
            await block.cancel()
        finally:
            scope.cancel()
            await anyio.lowlevel.checkpoint()

    async with beside(work):
        pass
    assert journal == []


@pytest.mark.parametrize("depth", [1, 2])
async def test_a_scope_that_lets_its_cancellation_pass_for_ours_has_delivered_it(depth: int) -> None:
    """Ours strikes while the scope's own is being cleaned up in a shield; what is outside of it is told by that one."""
    cleanup = Cleanup()
    scopes: list[anyio.CancelScope] = []
    block = Cancelable()
    may_go_on = anyio.Event()

    async def inside() -> None:
        with anyio.CancelScope() if depth == 2 else nullcontext(), anyio.CancelScope() as scope:
            scopes.append(scope)
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await may_go_on.wait()

    async def work() -> None:
        async with block:
            await cleanup.run(inside)

    async with beside(work):
        scopes[0].cancel()
        await settled()
        block.cancel_nowait()
        await settled()
        may_go_on.set()
        await settled()
        cleanup.may_end.set()
    assert cleanup.journal == TOLD_ONCE


# Only our own: nothing of ours blocks the cancellations of others.


@asynccontextmanager
async def scope_of_ours() -> AsyncGenerator[PoliteScope]:
    loop = current_loop()
    scope = loop.scopes.polite_scope(loop, LONG)
    scope.begin(math.inf, None)
    try:
        yield scope
    except BaseException as exc:
        if (remaining := scope.end(exc)) is not None:
            raise remaining from None
    else:
        scope.end(None)


def hold(scope: PoliteScope) -> None:
    scope.hold()


def release(scope: PoliteScope) -> None:
    scope.release()


def cancel_and_hold(scope: PoliteScope) -> None:
    scope.cancel_politely("test")
    scope.hold()


def hold_and_cancel(scope: PoliteScope) -> None:
    scope.hold()
    scope.cancel_politely("test")


def cancel_and_release(scope: PoliteScope) -> None:
    scope.cancel_politely("test")
    scope.release()


@pytest.mark.parametrize("do", [hold, release, cancel_and_hold, hold_and_cancel, cancel_and_release])
async def test_a_scope_that_is_held_or_released_lets_the_cancellations_of_others_through(
    do: Callable[[PoliteScope], None],
) -> None:
    reached: list[str] = []
    with anyio.fail_after(10), anyio.CancelScope() as others:
        async with scope_of_ours() as scope:
            do(scope)
            await anyio.lowlevel.checkpoint()
            reached.append("not ours")
            others.cancel()
            await anyio.sleep_forever()
    assert others.cancelled_caught
    assert reached == ["not ours"]


async def test_a_scope_that_is_released_in_its_cleanup_lets_the_cancellations_of_others_through() -> None:
    reached: list[str] = []
    with anyio.fail_after(10), anyio.CancelScope() as others:
        async with scope_of_ours() as scope:
            scope.cancel_politely("test")
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                reached.append("told")
            scope.release()
            await anyio.lowlevel.checkpoint()
            others.cancel()
            await anyio.sleep_forever()
    assert others.cancelled_caught
    assert reached == ["told"]


async def test_a_cancellation_that_is_on_its_way_when_its_scope_is_released_does_not_escape() -> None:
    async with scope_of_ours() as scope:
        scope.cancel_politely("test")
        try:
            await anyio.sleep_forever()
        finally:
            scope.release()
    await anyio.lowlevel.checkpoint()


async def test_a_scope_that_was_released_can_be_struck_once_more_and_tells_politely() -> None:
    journal: list[str] = []
    async with scope_of_ours() as scope:
        scope.release()
        await anyio.lowlevel.checkpoint()
        scope.resume()
        scope.cancel_politely("test")
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.lowlevel.checkpoint()
            journal.append("undisturbed")
    assert journal == ["undisturbed"]


@pytest.mark.parametrize("where", ["send", "background"])
async def test_a_response_that_has_started_does_not_outlive_the_cancellation_of_others(where: str) -> None:
    sent: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.lowlevel.checkpoint()
        await PlainTextResponse("answer", background=BackgroundTask(anyio.sleep_forever))(scope, receive, send)

    async def send(message: Message) -> None:
        sent.append(message["type"])
        if where == "send":
            await anyio.sleep_forever()

    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(RequestCancelationMiddleware(app), {"type": "http", "path": "/", "headers": []}, receive, send)
        await settled()
        assert sent[0] == "http.response.start"
        tasks.cancel_scope.cancel()


@on_trio
async def test_a_trio_scope_asks_its_status_when_it_closes_and_nobody_is_inside() -> None:
    asked: list[tuple[bool, bool]] = []

    class Asked(CancelStatus):
        __slots__ = ()

        @property
        def parent_cancellation_is_visible_to_us(self) -> bool:
            asked.append((bool(self._tasks or self._children), self._scope.cancel_called))
            return True

    with pytest.raises(trio.Cancelled), trio.CancelScope() as scope:
        status: Any = scope._cancel_status
        status.__class__ = Asked
        scope.cancel()
        assert all(has_tasks for has_tasks, _ in asked)
        await trio.sleep_forever()
    assert asked[-1] == (False, True)
    assert not scope.cancelled_caught


@on_trio
async def test_a_nursery_whose_children_were_cancelled_knows_it_before_its_task_goes_on() -> None:
    seen: list[tuple[bool, list[type[BaseException]]]] = []
    task: Any = trio.lowlevel.current_task()
    own = task.coro

    class Looking:
        def send(self, value: Any) -> Any:
            open_ones = task._child_nurseries[before:]
            seen.extend((nursery._closed, [type(exc) for exc in nursery._pending_excs]) for nursery in open_ones)
            return own.send(value)

    before = len(task._child_nurseries)
    with trio.CancelScope() as scope:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                await trio.lowlevel.cancel_shielded_checkpoint()
                scope.cancel()
                task.coro = Looking()
        finally:
            task.coro = own
    assert seen == [(True, [trio.Cancelled])]


@movable_clock
async def test_the_effective_deadline_is_that_of_the_block_and_then_that_of_the_grace() -> None:
    seen: list[float] = []

    async def work() -> None:
        async with Cancelable(timeout=30), Cancelable(timeout=20, cleanup_grace=7) as block:
            started = anyio.current_time()
            await anyio.lowlevel.checkpoint()
            seen.append(anyio.current_effective_deadline() - started)
            block.extend(5)
            seen.append(anyio.current_effective_deadline() - started)
            try:
                await block.cancel()
            finally:
                seen.append(anyio.current_effective_deadline() - anyio.current_time())

    async with beside(work):
        pass
    assert seen == pytest.approx([20, 25, 7], abs=1)
