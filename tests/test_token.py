from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import count
from types import FrameType
from typing import Any, Self

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
    TimeoutPolicy,
)
from cancelable_deps.kernel.token import Callback, Cause

from .calls import CEILING
from .leftovers import nothing_left

pytestmark = pytest.mark.anyio


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Let all of them start at the same moment, and wait until they have ended."""
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait(CEILING)
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
    with anyio.fail_after(CEILING):
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
            started.wait(CEILING)
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
        entering.wait(CEILING)
        return token.cancel_nowait(CancelationReason.DISCONNECT)

    async with nothing_left():
        thread = threading.Thread(target=cancel)
        thread.start()
        entering.set()
        with anyio.fail_after(CEILING), pytest.raises(DisconnectCancelation):
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


class _Strikes:
    """Does something in the midst of `CancelationToken.cancel_because`, before one of its instructions."""

    def __init__(self, at: int, strike: Callable[[], object]) -> None:
        self.left = at
        self.strike = strike

    def __enter__(self) -> Self:
        self.previous = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self.previous)

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code not in _CANCELLING:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                self.strike()
        return self.trace


def _never() -> None:
    raise AssertionError


_CANCELLING = {CancelationToken.cancel_because.__code__, CancelationToken._is_first.__code__}


def _strike_everywhere(
    strike: Callable[[CancelationToken], object],
) -> Iterator[tuple[CancelationToken, bool, list[str]]]:
    """For each instruction that it strikes before: the token, whether the call that was struck did it, who was told."""
    # The first Pythons 3.12 trace the instructions of a function from its second call on.
    with _Strikes(0, _never):
        CancelationToken().cancel_nowait()
    for at in count(1):
        token = CancelationToken()
        told: list[str] = []
        token.on_cancel(lambda token, told=told: told.append(str(token.message)))
        strikes = _Strikes(at, partial(strike, token))
        with strikes:
            done = token.cancel_nowait(message="struck")
        yield token, done, told
        if strikes.left > 0:
            return


def _in_a_thread(work: Callable[[], object]) -> None:
    in_threads(1, lambda number: work())


def _by_a_signal(work: Callable[[], object]) -> None:
    previous = signal.signal(signal.SIGTERM, lambda *_: work())
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("how", [lambda work: work(), _in_a_thread, _by_a_signal], ids=["again", "thread", "signal"])
def test_a_second_cancellation_may_strike_anywhere_in_the_first(how: Callable[[Callable[[], object]], object]) -> None:
    seen: set[str | None] = set()
    strikes = 0
    others: list[bool] = []

    def strike(token: CancelationToken) -> None:
        def cancel() -> None:
            others.append(token.cancel_nowait(CancelationReason.SIGNAL, "striking"))
            # Whoever comes second may rely on the first.
            assert token.is_cancelled

        how(cancel)

    for token, done, told in _strike_everywhere(strike):
        won = [done, *others]
        assert sum(won) == 1
        assert told == [token.message] == ["struck" if done else "striking"]
        assert set(map(type, token._listeners)) == {Callback}
        seen.add(token.message)
        strikes += 1
        others.clear()
    assert seen == {"struck", "striking"}
    assert strikes > 20


def test_a_listener_may_come_anywhere_in_a_cancellation() -> None:
    late: list[CancelationToken] = []

    def strike(token: CancelationToken) -> None:
        token.on_cancel(late.append)

    for token, done, told in _strike_everywhere(strike):
        assert done
        assert told == ["struck"]
        assert late in ([token], [])
        late.clear()


@pytest.mark.parametrize("message", [b"why", 3, ValueError("why"), ["why"]])
async def test_what_is_no_message_is_refused(message: Any) -> None:
    token, block = CancelationToken(), Cancelable()
    for cancelable in (token, block):
        with pytest.raises(TypeError, match=r"message must be a string, or None .* use str\(\)"):
            cancelable.cancel_nowait(message=message)
        with pytest.raises(TypeError, match="message must be a string"):
            await cancelable.cancel(message=message)
        assert not cancelable.is_cancelled
    async with block:
        pass
    with pytest.raises(TypeError, match="message must be a string"):
        block.cancel_nowait(message=message)
    with pytest.raises(TypeError, match="reason must be"):
        block.cancel_nowait("manual")  # type: ignore[arg-type]


def test_a_callback_that_was_taken_back_is_not_called() -> None:
    token = CancelationToken()
    told: list[str] = []

    def tell(token: CancelationToken) -> None:
        told.append("tell")

    token.on_cancel(tell)
    token.on_cancel(lambda token: told.append("other"))
    assert token.remove_callback(tell) == 1
    assert token.remove_callback(tell) == 0
    token.cancel_nowait()
    assert told == ["other"]


def test_a_callback_that_was_registered_twice_is_taken_back_twice() -> None:
    token = CancelationToken()
    told: list[CancelationToken] = []
    for _ in range(2):
        # A method is another object each time.
        token.on_cancel(told.append)
    assert token.remove_callback(told.append) == 2
    assert not token._listeners
    token.cancel_nowait()
    assert told == []


@pytest.mark.parametrize("kind", ["token", "block"])
def test_callbacks_may_be_taken_back_in_a_callback(kind: str) -> None:
    cancelable: Any = CancelationToken() if kind == "token" else Cancelable()
    counts: list[int] = []
    told: list[str] = []

    def never(cancelled: object) -> None:
        told.append("never")

    def remove(cancelled: object) -> None:
        # The last that was registered is called first.
        counts.extend([cancelable.remove_callback(never), cancelable.remove_callback(remove)])
        told.append("removed")

    for callback in (never, never, remove):
        cancelable.on_cancel(callback)
    cancelable.cancel_nowait()
    assert (told, counts) == (["removed"], [2, 0])


def test_callbacks_of_a_block_may_be_taken_back() -> None:
    told: list[object] = []

    async def tell(*args: object) -> None:
        told.append(args)

    block = Cancelable()
    block.on_cancel(tell)
    block.on_cancel(tell)
    block.on_progress(tell)
    assert block.remove_callback(tell) == 3
    assert block.remove_callback(tell) == 0

    async def work() -> None:
        async with block:
            await block.report_progress("half")
            await block.cancel()

    with pytest.raises(ManualCancelation):
        anyio.run(work)
    assert told == []


async def _async_function(token: CancelationToken) -> None: ...


async def _async_generator(token: CancelationToken) -> Any:
    yield


def _generator(token: CancelationToken) -> Any:
    yield


class _AsyncCallable:
    async def __call__(self, token: CancelationToken) -> None: ...

    async def method(self, token: CancelationToken) -> None: ...


@pytest.mark.parametrize(
    "callback",
    [
        _async_function,
        partial(_async_function),
        partial(partial(_AsyncCallable().method)),
        _AsyncCallable(),
        partial(_AsyncCallable()),
        _AsyncCallable().method,
        _async_generator,
        _generator,
    ],
)
def test_a_callback_that_nobody_would_await_is_refused(callback: Any) -> None:
    token = CancelationToken()
    with pytest.raises(TypeError, match=r"nothing would await .* on_cancel\(\) of a Cancelable"):
        token.on_cancel(callback)
    assert not token._listeners


@pytest.mark.parametrize("early", [True, False])
def test_what_a_plain_callback_returns_to_be_awaited_is_closed_and_said_so(
    early: bool, caplog: pytest.LogCaptureFixture
) -> None:
    token = CancelationToken()
    if not early:
        token.cancel_nowait()
    # A coroutine that is not closed would complain, and the test fail.
    token.on_cancel(lambda token: _async_function(token))
    token.cancel_nowait()
    assert [(record.levelname, "not awaited" in record.getMessage()) for record in caplog.records] == [("ERROR", True)]


def test_a_plain_callback_may_start_a_task(caplog: pytest.LogCaptureFixture) -> None:
    told: list[CancelationToken] = []

    async def tell(token: CancelationToken) -> None:
        told.append(token)

    async def main() -> None:
        tasks: list[asyncio.Task[None]] = []
        token = CancelationToken()

        def start(token: CancelationToken) -> asyncio.Task[None]:
            tasks.append(asyncio.create_task(tell(token)))
            return tasks[0]

        token.on_cancel(start)
        token.cancel_nowait()
        await tasks[0]
        assert told == [token]

    asyncio.run(main())
    assert not caplog.records


def test_the_error_of_a_cause_has_its_status_headers_and_policy() -> None:
    policy = TimeoutPolicy(1)
    headers = {"retry-after": "7"}
    cause = Cause(CancelationReason.SIGNAL, "Later", status_code=502, headers=headers, policy=policy)
    one, other = cause.error(), cause.error()
    assert isinstance(one, SignalCancelation)
    assert (one.status_code, one.headers, one.policy, one.detail) == (502, headers, policy, "Later")
    # Each is raised into an application that may change it.
    assert one is not other
    assert one.headers is not other.headers


def test_the_error_of_a_bare_cause_is_that_of_its_reason() -> None:
    error = Cause(CancelationReason.SIGNAL, None).error()
    assert (error.status_code, error.headers, error.policy) == (503, {"retry-after": "5"}, None)
