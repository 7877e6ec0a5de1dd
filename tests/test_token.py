from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from cancelable_deps import (
    Cancelable,
    CancelationReason,
    CancelationToken,
    DisconnectCancelation,
    ManualCancelation,
    SignalCancelation,
)

from .calls import CEILING
from .leftovers import nothing_left

pytestmark = pytest.mark.anyio


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Let all of them start at the same moment, and wait until they have ended."""
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait(10)
        work(number)

    threads = [threading.Thread(target=run, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)


def test_a_new_token_is_not_cancelled() -> None:
    token = CancelationToken()
    assert (token.is_cancelled, token.reason, token.message, token.cancelled_at) == (False, None, None, None)
    assert repr(token) == "<CancelationToken not cancelled>"
    token.check()


def test_the_first_reason_stays() -> None:
    token = CancelationToken()
    before = datetime.now(UTC)
    assert token.cancel_nowait(CancelationReason.SIGNAL, "first")
    assert not token.cancel_nowait(CancelationReason.DISCONNECT, "second")
    assert token.is_cancelled
    assert (token.reason, token.message) == (CancelationReason.SIGNAL, "first")
    assert token.cancelled_at is not None
    assert before <= token.cancelled_at <= datetime.now(UTC)
    assert repr(token) == "<CancelationToken signal: first>"


def test_check_raises_the_error_of_the_reason() -> None:
    token = CancelationToken()
    token.cancel_nowait(CancelationReason.SIGNAL, "bye")
    with pytest.raises(SignalCancelation, match="bye") as first:
        token.check()
    with pytest.raises(SignalCancelation) as second:
        token.check()
    assert first.value is not second.value


@pytest.mark.parametrize("reason", ["manual", "nonsense", None, 499])
def test_what_is_no_reason_is_refused(reason: Any) -> None:
    token = CancelationToken()
    with pytest.raises(TypeError, match=r"such as CancelationReason\.MANUAL, not"):
        token.cancel_nowait(reason)
    assert not token.is_cancelled


async def test_cancel_by_await_does_the_same() -> None:
    token = CancelationToken()
    assert await token.cancel()
    assert not await token.cancel(CancelationReason.SIGNAL)
    assert token.reason is CancelationReason.MANUAL


@pytest.mark.parametrize("attempt", range(20))
def test_of_eight_threads_at_once_one_wins(attempt: int) -> None:
    token = CancelationToken()
    told: list[str | None] = []
    won: list[str] = []
    token.on_cancel(lambda token: told.append(token.message))

    def cancel(number: int) -> None:
        if token.cancel_nowait(message=str(number)):
            won.append(str(number))

    in_threads(8, cancel)
    assert [token.message] == won == told


@pytest.mark.parametrize("attempt", range(20))
def test_a_listener_that_comes_while_a_thread_cancels_is_told_once(attempt: int) -> None:
    token = CancelationToken()
    told: list[int] = []

    def race(number: int) -> None:
        if number == 0:
            token.cancel_nowait()
        else:
            token.on_cancel(lambda token: told.append(number))

    in_threads(8, race)
    assert sorted(told) == list(range(1, 8))


async def test_several_tasks_wait() -> None:
    token = CancelationToken()
    reasons: list[CancelationReason] = []

    async def wait() -> None:
        reasons.append(await token.wait())

    async with nothing_left(), anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert reasons == []
        token.cancel_nowait(CancelationReason.CONDITION)
    assert reasons == [CancelationReason.CONDITION] * 3
    assert not token._listeners


async def test_waiting_for_a_cancelled_token_returns_at_once() -> None:
    token = CancelationToken()
    token.cancel_nowait(CancelationReason.SIGNAL)
    with anyio.fail_after(10):
        assert await token.wait() is CancelationReason.SIGNAL


async def test_a_waiter_that_gives_up_is_forgotten() -> None:
    token = CancelationToken()
    with anyio.move_on_after(0):
        await token.wait()
    assert not token._listeners


async def test_a_waiter_is_woken_from_a_thread() -> None:
    token = CancelationToken()
    reasons: list[CancelationReason] = []

    async def wait() -> None:
        reasons.append(await token.wait())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert await anyio.to_thread.run_sync(token.cancel_nowait)
    assert reasons == [CancelationReason.MANUAL]


def test_a_callback_is_called_where_it_is_cancelled() -> None:
    token = CancelationToken()
    calls: list[tuple[CancelationToken, int]] = []

    @token.on_cancel
    def callback(token: CancelationToken) -> None:
        calls.append((token, threading.get_ident()))

    def cancel(number: int) -> None:
        calls.append((token, threading.get_ident()))
        token.cancel_nowait()

    in_threads(1, cancel)
    first, second = calls
    assert first == second == (token, first[1])
    assert first[1] != threading.get_ident()
    assert callback.__name__ == "callback"


def test_a_callback_that_comes_late_is_called_at_once_and_once() -> None:
    token = CancelationToken()
    token.cancel_nowait()
    calls: list[CancelationToken] = []
    token.on_cancel(calls.append)
    token.cancel_nowait()
    assert calls == [token]


def test_what_a_callback_raises_is_logged_only(caplog: pytest.LogCaptureFixture) -> None:
    token = CancelationToken()
    calls: list[str] = []

    def fail(token: CancelationToken) -> None:
        raise ValueError("a bug")

    token.on_cancel(lambda token: calls.append("before"))
    token.on_cancel(fail)
    token.on_cancel(lambda token: calls.append("after"))
    assert token.cancel_nowait()
    token.on_cancel(fail)
    assert sorted(calls) == ["after", "before"]
    assert [(record.name, record.levelname) for record in caplog.records] == [("cancelable_deps", "ERROR")] * 2


async def work(token: CancelationToken, journal: list[str]) -> None:
    try:
        async with Cancelable(token=token):
            journal.append("started")
            await anyio.sleep_forever()
    except DisconnectCancelation as exc:
        journal.append(f"stopped: {exc.message}")


async def test_blocks_in_several_tasks_share_it() -> None:
    token = CancelationToken()
    journals: list[list[str]] = [[], [], []]
    async with nothing_left(), anyio.create_task_group() as tasks:
        for journal in journals:
            tasks.start_soon(work, token, journal)
        await anyio.wait_all_tasks_blocked()
        token.cancel_nowait(CancelationReason.DISCONNECT, "gone")
    assert journals == [["started", "stopped: gone"]] * 3
    assert not token._listeners


def test_blocks_in_event_loops_of_several_threads_share_it() -> None:
    token = CancelationToken()
    started = threading.Barrier(5)
    journals: list[list[str]] = [[], [], [], []]

    async def main(journal: list[str]) -> None:
        async with nothing_left(), anyio.create_task_group() as tasks:
            tasks.start_soon(work, token, journal)
            await anyio.wait_all_tasks_blocked()
            await anyio.to_thread.run_sync(started.wait, 10)

    def run(number: int) -> None:
        if number == 4:
            started.wait(10)
            token.cancel_nowait(CancelationReason.DISCONNECT, "gone")
        else:
            anyio.run(main, journals[number], backend=("asyncio", "trio")[number % 2])

    in_threads(5, run)
    assert journals == [["started", "stopped: gone"]] * 4
    assert not token._listeners


async def test_a_block_that_waits_is_stopped_from_a_thread() -> None:
    token = CancelationToken()
    journal: list[str] = []
    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(work, token, journal)
        await anyio.wait_all_tasks_blocked()
        cancel = partial(token.cancel_nowait, CancelationReason.DISCONNECT, "from a thread")
        assert await anyio.to_thread.run_sync(cancel)
    assert journal == ["started", "stopped: from a thread"]


async def test_a_block_that_is_cancelled_before_it_is_entered_does_not_run() -> None:
    token = CancelationToken()
    token.cancel_nowait(CancelationReason.DISCONNECT, "before")
    journal: list[str] = []
    async with nothing_left():
        await work(token, journal)
    assert journal == ["stopped: before"]
    assert not token._listeners


async def test_cancelling_a_block_leaves_its_shared_token_alone() -> None:
    token = CancelationToken()
    with pytest.raises(ManualCancelation):
        async with Cancelable(token=token) as first:
            await first.cancel()
    assert not token.is_cancelled
    async with Cancelable(token=token) as second:
        await anyio.lowlevel.checkpoint()
    assert not second.is_cancelled


@pytest.mark.parametrize("attempt", range(20))
async def test_a_thread_that_cancels_while_the_block_is_entered_is_never_missed(attempt: int) -> None:
    token = CancelationToken()
    entering = threading.Event()

    def cancel() -> bool:
        entering.wait(10)
        return token.cancel_nowait(CancelationReason.DISCONNECT)

    async with nothing_left():
        thread = threading.Thread(target=cancel)
        thread.start()
        entering.set()
        with anyio.fail_after(10), pytest.raises(DisconnectCancelation):
            async with Cancelable(token=token):
                await anyio.sleep_forever()
        thread.join(10)


def test_a_block_whose_loop_was_closed_under_it_does_not_disturb_the_others() -> None:
    token = CancelationToken()
    journal: list[str] = []
    loop = asyncio.new_event_loop()
    abandoned: Any = loop.create_task(work(token, journal))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert journal == ["started"]
    told: list[CancelationToken] = []
    token.on_cancel(told.append)
    won: list[bool] = []
    in_threads(1, lambda number: won.append(token.cancel_nowait()))
    assert won == [True]
    assert told == [token]
    # Nothing can end it in an orderly way any more.
    abandoned._log_destroy_pending = False
    with pytest.raises((RuntimeError, ValueError)):
        abandoned.get_coro().close()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs a signal that nobody uses")
@pytest.mark.parametrize("how", ["block", "wait"])
async def test_a_signal_handler_wakes_a_loop_that_has_nothing_to_do(how: str) -> None:
    def send_signal() -> None:
        time.sleep(0.05)  # until the loop has gone to sleep; if that comes later, this shows nothing
        signal.pthread_kill(main, signal.SIGUSR1)

    token = CancelationToken()
    main = threading.get_ident()
    assert threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGUSR1, lambda *_: token.cancel_nowait(CancelationReason.SIGNAL))
    started = anyio.current_time()
    try:
        with anyio.fail_after(CEILING):
            threading.Thread(target=send_signal).start()
            if how == "wait":
                await token.wait()
            else:
                with pytest.raises(SignalCancelation):
                    async with Cancelable(token=token):
                        await anyio.sleep_forever()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    # The ceiling itself wakes the loop, and is then overtaken.
    assert anyio.current_time() - started < CEILING / 2
