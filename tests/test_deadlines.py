from __future__ import annotations

import gc
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Annotated, Any
from weakref import ref

import anyio
import anyio.lowlevel
import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelableStreamingResponse,
    CancelableWebSocket,
    CancelationError,
    CancelationReason,
    RequestCancelable,
    RequestCancelationMiddleware,
    TimeoutCancelation,
    TimeoutPolicy,
    cancelable_with_timeout,
    current_cancelable,
    timeout_policy,
    with_cancelation,
)
from cancelable_deps.kernel.cancelable import block_of
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.kernel.timeouts import TimeoutQueue, new_queue, wait_belatedly
from cancelable_deps.testing import advance

from .asgi import Call, get
from .calls import CEILING, checked_socket, movable_clock
from .leftovers import nothing_left

pytestmark = pytest.mark.anyio

LIMIT = 0.02


class Loop:
    """A loop whose clock is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []
        self.timeout_queues: dict[float, TimeoutQueue] = {}
        self.extras: dict[Any, Any] = {}

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        timer = Timer(self, when, callback)
        self.timers.append(timer)
        return timer

    def advance(self, until: float) -> None:
        """Call what is due on the way, each at its time."""
        while (due := min(self.timers, default=None, key=lambda timer: timer.when)) and due.when <= until:
            self.timers.remove(due)
            self.now = max(self.now, due.when)
            due.callback()
        self.now = until


class Timer:
    def __init__(self, loop: Loop, when: float, callback: Callable[[], object]) -> None:
        self.loop, self.when, self.callback = loop, when, callback

    def cancel(self) -> None:
        self.loop.timers.remove(self)


class Item:
    def __init__(self, told: Callable[[], object] = lambda: None) -> None:
        self.told_at: list[float] = []
        self._told = told
        self.timeout_queue: TimeoutQueue | None = None

    def time_is_up(self, now: float) -> None:
        self.told_at.append(now)
        self._told()

    def wait(self, loop: Any, limit: float, began: float | None = None) -> Item:
        self.timeout_queue = wait_belatedly(loop, limit, self, (loop.now if began is None else began) + limit)
        return self

    def leave(self) -> None:
        queue, self.timeout_queue = self.timeout_queue, None
        assert queue is not None
        queue.waiting.pop(self, None)
        if queue.timer is not None and not queue.waiting:
            queue.end()


def test_each_is_told_once_at_its_deadline() -> None:
    loop = Loop()
    items = []
    for number in range(10):
        loop.advance(number)
        items.append(Item().wait(loop, 30))
    loop.advance(100)
    assert [item.told_at for item in items] == [[30.0 + number] for number in range(10)]
    assert (loop.timers, loop.timeout_queues) == ([], {})


def test_equal_limits_have_one_timer_between_them() -> None:
    loop = Loop()
    for _ in range(100):
        Item().wait(loop, 30)
    assert len(loop.timers) == 1
    loop.advance(1)
    assert len(loop.timers) == 1
    loop.advance(29.95)
    assert {timer.when for timer in loop.timers} == {30.0}


def test_who_are_soon_gone_start_no_timer_each() -> None:
    loop = Loop()
    made: list[float] = []
    call_at = loop.call_at
    loop.call_at = lambda when, callback: made.append(when) or call_at(when, callback)  # type: ignore[method-assign, func-returns-value]
    for number in range(1000):
        item = Item().wait(loop, 30)
        loop.advance((number + 1) / 100_000)
        item.leave()
    assert len(made) <= 4


def test_when_the_last_has_left_its_timer_is_gone() -> None:
    loop = Loop()
    item = Item().wait(loop, 30)
    loop.advance(10)
    item.leave()
    assert (loop.timers, loop.timeout_queues) == ([], {})


def test_a_line_that_was_of_use_for_a_moment_goes_away() -> None:
    loop = Loop()
    for number in range(100):
        Item().wait(loop, 30 + number / 7).leave()
    loop.advance(1)
    assert (loop.timers, loop.timeout_queues, [sweep._watched for sweep in loop.extras.values()]) == ([], {}, [[]])


def test_who_leaves_is_not_told_and_those_behind_it_are() -> None:
    loop = Loop()
    first, second, third = (Item().wait(loop, 30) for _ in range(3))
    loop.advance(20)
    first.leave()
    third.leave()
    loop.advance(31)
    assert (first.told_at, second.told_at, third.told_at) == ([], [30.0], [])


@pytest.mark.parametrize("limit", [0, 0.001, 0.005, 0.02, 30])
def test_all_who_are_overdue_are_told_at_once_when_the_loop_was_blocked(limit: float) -> None:
    loop = Loop()
    items = [Item().wait(loop, limit) for _ in range(5)]
    loop.now = 100.0
    for timer in list(loop.timers):
        loop.timers.remove(timer)
        timer.callback()
    assert [item.told_at for item in items] == [[100.0]] * 5


@pytest.mark.parametrize("limit", [0, 0.001, 0.005, 0.0051, 0.02, 30])
def test_somebody_looks_no_later_than_the_first_deadline(limit: float) -> None:
    loop = Loop()
    for step in range(200):
        item = Item().wait(loop, limit)
        assert min(timer.when for timer in loop.timers) <= next(iter(item.timeout_queue.waiting.values()))  # type: ignore[union-attr]
        if step % 3:
            item.leave()
        loop.advance(loop.now + 0.0017)


def test_a_deadline_that_was_moved_is_kept_whatever_is_in_the_line() -> None:
    loop = Loop()
    loop.advance(20)
    newcomer = Item().wait(loop, 30)
    early = Item().wait(loop, 30, began=1)
    loop.advance(25)
    gone = Item().wait(loop, 60)
    gone.leave()
    close = Item().wait(loop, 60, began=25 - 60 + 2**-10)
    loop.advance(100)
    assert (early.told_at, close.told_at, newcomer.told_at) == ([31.0], [25 + 2**-10], [50.0])
    assert (loop.timers, loop.timeout_queues) == ([], {})


def test_one_that_ends_another_in_its_turn_is_the_only_one_told() -> None:
    loop = Loop()
    others: list[Item] = []
    first = Item(lambda: others[0].leave()).wait(loop, 30)
    others.append(Item().wait(loop, 30))
    last = Item().wait(loop, 30)
    loop.advance(40)
    assert (first.told_at, others[0].told_at, last.told_at) == ([30.0], [], [30.0])


def test_one_that_begins_when_another_is_told_has_its_own_time() -> None:
    loop = Loop()
    later: list[Item] = []
    Item(lambda: later.append(Item().wait(loop, 30))).wait(loop, 30)
    loop.advance(100)
    assert [item.told_at for item in later] == [[60.0]]


def test_one_that_fails_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()

    def fail() -> None:
        raise ValueError("told")

    Item(fail).wait(loop, 30)
    other = Item().wait(loop, 30)
    loop.advance(40)
    assert other.told_at == [30.0]
    assert "told" in caplog.text


def test_a_timer_that_goes_off_a_little_early_tells_all_the_same() -> None:
    loop = Loop()
    item = Item().wait(loop, 30)
    loop.advance(1)
    loop.advance(29.9996)
    loop.timers.pop().callback()
    assert item.told_at == [30.0]


def test_a_new_queue_is_that_of_its_limit() -> None:
    loop: Any = Loop()
    assert loop.timeout_queues == {30: new_queue(loop, 30)}


def test_who_is_moved_on_to_a_timer_of_its_own_may_still_leave() -> None:
    loop = Loop()
    item = Item().wait(loop, 30)
    loop.advance(29.95)
    item.leave()
    assert (loop.timers, loop.timeout_queues) == ([], {})


async def test_a_block_waits_in_the_line_of_its_limit_and_leaves_nothing() -> None:
    queues = current_loop().timeout_queues
    async with nothing_left():
        async with Cancelable(timeout=100) as one, Cancelable(timeout=100) as other:
            assert list(queues[100].waiting) == [block_of(one), block_of(other)]
            await anyio.sleep(0.03)
            assert queues[100].timer is not None
        assert 100 not in queues


async def test_what_moves_a_deadline_moves_the_block() -> None:
    queues = current_loop().timeout_queues
    async with nothing_left(), Cancelable(timeout=100) as cancel:
        cancel.extend(20)
        assert ([*queues[120].waiting], [*queues[100].waiting]) == ([block_of(cancel)], [])
        cancel.disable_timeout()
        assert not any(queue.waiting for queue in queues.values())


async def test_a_thread_that_extends_in_time_is_heard_before_the_deadline() -> None:
    cancel = Cancelable(timeout=LIMIT)
    with suppress(CancelationError):
        async with nothing_left(), cancel:
            thread = threading.Thread(target=cancel.extend, args=[100])
            thread.start()
            thread.join()
            block_the_loop()
            await anyio.sleep(4 * LIMIT)
    assert not cancel.is_cancelled


async def test_a_block_that_is_left_is_kept_by_no_line() -> None:
    async with Cancelable(timeout=100):
        left = Cancelable(timeout=100)
        async with left:
            await anyio.lowlevel.checkpoint()
        # trio knows what runs a step until the next.
        await anyio.lowlevel.checkpoint()
        known = ref(block_of(left))
        del left
        gc.collect()
        assert known() is None


def block_the_loop() -> None:
    loop = current_loop()
    loop.call_at(loop.time(), lambda: time.sleep(3 * LIMIT))


async def finish_late() -> str:
    """Work whose loop is blocked past its limit and past its own end, which so come in one pass."""
    block_the_loop()
    await anyio.sleep(1.5 * LIMIT)
    # On trio what is due in one pass comes in any order: the work is stopped at the next await at the latest.
    await anyio.lowlevel.checkpoint()
    return "finished"


async def work() -> str:
    return await finish_late()


def app_of(door: str) -> FastAPI:
    app = FastAPI()
    if door in ("middleware", "policy"):
        app.add_middleware(
            RequestCancelationMiddleware,
            default_timeout=LIMIT if door == "middleware" else 100,
            policies={"short": TimeoutPolicy(LIMIT)},
        )
    endpoint: Any = work
    if door == "decorator":
        endpoint = with_cancelation(timeout=LIMIT)(work)
    elif door == "handle":

        async def handle(cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(LIMIT))]) -> str:
            async with cancel:
                return await work()

        endpoint = handle
    elif door == "plain":

        async def plain() -> str:
            async with Cancelable(timeout=LIMIT):
                return await work()

        endpoint = plain
    elif door == "plain in a handle":

        async def nested(cancel: RequestCancelable) -> str:
            async with cancel, Cancelable(timeout=LIMIT):
                return await work()

        endpoint = nested
    if door == "route":
        router = APIRouter(route_class=CancelableRoute.with_timeout(LIMIT))
        router.get("/")(endpoint)
        app.include_router(router)
    else:
        app.get("/", dependencies=[Depends(timeout_policy("short"))] if door == "policy" else [])(endpoint)
    return app


DOORS = ["middleware", "policy", "route", "decorator", "handle", "plain", "plain in a handle"]


@pytest.mark.parametrize("door", DOORS)
async def test_a_loop_that_is_blocked_past_the_limit_and_the_works_end_stops_the_work(door: str) -> None:
    async with nothing_left():
        call = await get(app_of(door))
    assert (call.status, call.json) == (504, {"detail": f"Timed out after {LIMIT:g} seconds"})


@pytest.mark.parametrize("door", DOORS)
async def test_a_handler_that_blocks_the_loop_past_its_limit_is_stopped_at_its_first_await(
    door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def block_at_once() -> str:
        time.sleep(1.5 * LIMIT)  # noqa: ASYNC251
        await anyio.sleep(LIMIT / 2)
        await anyio.lowlevel.checkpoint()
        return "finished"

    monkeypatch.setattr("tests.test_deadlines.finish_late", block_at_once)
    async with nothing_left():
        call = await get(app_of(door))
    assert call.status == 504


@pytest.mark.parametrize("door", DOORS)
async def test_of_many_whose_limit_ends_in_one_pass_each_is_stopped(door: str) -> None:
    app = app_of(door)
    calls = [Call(app) for _ in range(20)]
    with anyio.fail_after(CEILING):
        async with anyio.create_task_group() as tasks:
            for call in calls:
                tasks.start_soon(call.run)
    assert {call.status for call in calls} == {504}


@pytest.mark.parametrize("limit", ["timeout", "gap_timeout"])
async def test_a_stream_is_stopped_though_the_loop_was_blocked_past_its_limit(limit: str) -> None:
    async def body() -> AsyncIterator[str]:
        yield "first"
        yield await finish_late()

    app = FastAPI()
    options: dict[str, Any] = {limit: LIMIT}
    app.get("/")(lambda: CancelableStreamingResponse(body(), media_type="text/event-stream", **options))
    async with nothing_left():
        call = await get(app)
    assert b"finished" not in call.body
    assert b"event: cancelled" in call.body


async def test_a_generator_endpoint_is_stopped_though_the_loop_was_blocked_past_its_limit() -> None:
    pytest.importorskip("fastapi.sse", reason="generator endpoints came with FastAPI 0.135")
    app = FastAPI()
    ended: list[CancelationReason | None] = []

    @app.get("/")
    @with_cancelation(timeout=LIMIT)
    async def numbers() -> AsyncIterator[int]:
        cancel = current_cancelable()
        assert cancel is not None
        try:
            yield 1
            await finish_late()
            yield 2
        finally:
            ended.append(cancel.reason)

    async with nothing_left():
        await get(app)
    assert ended == [CancelationReason.TIMEOUT]


async def test_a_websocket_is_stopped_though_the_loop_was_blocked_past_its_limit() -> None:
    app = FastAPI()
    outcomes: list[object] = []

    @app.websocket("/")
    async def talk(websocket: WebSocket) -> None:
        try:
            async with CancelableWebSocket(websocket, timeout=LIMIT) as socket:
                await socket.accept()
                outcomes.append(await finish_late())
        except TimeoutCancelation as error:
            outcomes.append(error.reason)

    async with checked_socket(app):
        pass
    assert outcomes == [CancelationReason.TIMEOUT]


@pytest.mark.parametrize("anyio_backend", ["asyncio", pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop")])
@pytest.mark.parametrize("door", DOORS)
async def test_a_sleep_that_ends_after_the_limit_loses_in_the_same_pass(
    door: str, monkeypatch: pytest.MonkeyPatch, anyio_backend: object
) -> None:
    """Where timers that are due in one pass run in their order, nothing need be awaited any more."""

    async def sleep_on() -> str:
        block_the_loop()
        await anyio.sleep(1.5 * LIMIT)
        return "finished"

    monkeypatch.setattr("tests.test_deadlines.finish_late", sleep_on)
    call = await get(app_of(door))
    assert call.status == 504


@pytest.mark.parametrize("anyio_backend", ["asyncio", pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop")])
@pytest.mark.parametrize("door", DOORS)
async def test_a_sleep_that_ends_before_the_limit_wins_in_the_same_pass(
    door: str, monkeypatch: pytest.MonkeyPatch, anyio_backend: object
) -> None:
    async def sleep_less() -> str:
        block_the_loop()
        await anyio.sleep(LIMIT / 10)
        return "finished"

    app = app_of(door)
    # The first request of an application takes some milliseconds before it comes to its handler.
    monkeypatch.setattr("tests.test_deadlines.finish_late", anyio.lowlevel.checkpoint)
    await get(app)
    monkeypatch.setattr("tests.test_deadlines.finish_late", sleep_less)
    call = await get(app)
    assert call.status == 200


@pytest.mark.parametrize("door", DOORS)
async def test_work_that_is_told_cleans_up_undisturbed(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[str] = []
    late = finish_late

    async def cleaning_up() -> str:
        try:
            return await late()
        finally:
            for _ in range(5):
                await anyio.sleep(0.001)
            cleaned.append("up")

    monkeypatch.setattr("tests.test_deadlines.finish_late", cleaning_up)
    call = await get(app_of(door))
    assert (call.status, cleaned) == (504, ["up"])


@movable_clock
@pytest.mark.parametrize("door", ["decorator", "middleware"])
async def test_a_limit_is_kept_on_a_clock_that_is_moved(door: str) -> None:
    app = FastAPI()
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, default_timeout=30)
    app.get("/")(with_cancelation(timeout=30)(_forever) if door == "decorator" else _forever)
    call = Call(app)
    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(call.run)
        await anyio.wait_all_tasks_blocked()
        await advance(29)
        assert call.status is None
        await advance(2)
    assert call.status == 504


async def _forever() -> None:
    await anyio.sleep_forever()
