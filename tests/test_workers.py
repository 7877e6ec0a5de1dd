"""Blocks in threads, and `def` endpoints under every door."""

# pyright: reportPossiblyUnboundVariable=false
# It believes that `raises` may take an exception from entering the block.
# ruff: noqa: PT012 - what leaves a block is tested by leaving it, inside of `raises`
from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException
from starlette.applications import Starlette
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelationError,
    CancelationReason,
    CancelationToken,
    CancellationEvent,
    DisconnectCancelation,
    ManualCancelation,
    ParentCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    TimeoutCancelation,
    cancelable_with_timeout,
    current_cancelable,
    with_cancelation,
)
from cancelable_deps.testing import Call, advance

from .calls import CEILING, get, movable_clock, running
from .leftovers import nothing_left

pytestmark = pytest.mark.anyio

SOON = 0.03
LONG = 100


def until(ask: Callable[[], object]) -> None:
    """What a busy thread does: ask again and again, until that raises or is true."""
    deadline = time.monotonic() + CEILING
    while time.monotonic() < deadline:
        if ask():
            return
        time.sleep(0.001)
    raise AssertionError("the thread was never told to stop")


def check_until_stopped() -> None:
    cancel = current_cancelable()
    assert cancel is not None
    until(cancel.check)


class Thread:
    """A handler's thread, as the test sees it: that it has started, when it may go on, and how it ended."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.may_end = threading.Event()
        self.ended: list[str] = []

    def work(self, ask: Callable[[], object] | None = None) -> str:
        """Ask until that raises; without anything to ask, wait until the test lets it end."""
        self.started.set()
        try:
            if ask is None:
                assert self.may_end.wait(CEILING)
            else:
                until(ask)
        except BaseException as exc:
            self.ended.append(type(exc).__name__)
            raise
        self.ended.append("finished")
        return "finished"

    async def has_started(self) -> None:
        await seen(self.started.is_set)


async def seen(state: Callable[[], object]) -> None:
    with anyio.fail_after(CEILING):
        while not state():  # noqa: ASYNC110 - it is a thread that changes it
            await anyio.sleep(0.001)


async def thread_is_free() -> None:
    """Wait until the default limiter has all its places back, and whoever waited for the thread knows."""
    await seen(lambda: anyio.to_thread.current_default_thread_limiter().borrowed_tokens == 0)
    await anyio.wait_all_tasks_blocked()


@pytest.fixture
def thread() -> Iterator[Thread]:
    thread = Thread()
    yield thread
    thread.may_end.set()


def test_block_that_is_not_cancelled_changes_nothing() -> None:
    with Cancelable(timeout=LONG, name="work") as block:
        assert current_cancelable() is block
        assert block.is_active
        assert 0 < block.remaining() <= LONG
        assert block.deadline < time.monotonic() + LONG + 1
        block.check()
        with block.shield():
            block.check()
    assert current_cancelable() is None
    assert (block.is_active, block.is_cancelled, block.reason) == (False, False, None)
    assert block.elapsed < CEILING


def test_timeout_counts_from_entering_and_is_seen_at_the_next_check() -> None:
    block = Cancelable.with_timeout(SOON)
    time.sleep(2 * SOON)
    with pytest.raises(TimeoutCancelation) as caught, block:
        block.check()
        time.sleep(2 * SOON)
        block.check()
    assert caught.value.detail == f"Timed out after {SOON} seconds"
    assert block.reason is CancelationReason.TIMEOUT


def test_block_that_finishes_all_the_same_has_finished() -> None:
    with Cancelable() as block:
        block.cancel_nowait()
    assert block.reason is CancelationReason.MANUAL


def test_what_the_work_raises_leaves_as_it_is() -> None:
    with pytest.raises(KeyError), Cancelable() as block:
        block.cancel_nowait()
        raise KeyError


def test_token_and_cancel_from_another_thread() -> None:
    token = CancelationToken()
    told: list[CancelationReason | None] = []
    entered = threading.Event()

    def stop() -> None:
        assert entered.wait(CEILING)
        token.cancel_nowait(message="enough")

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(ManualCancelation, match="enough"), Cancelable(token=token) as block:
        block.on_cancel(lambda cancel: told.append(cancel.reason))
        entered.set()
        until(block.check)
    stopper.join()
    assert told == [CancelationReason.MANUAL]
    with pytest.raises(ManualCancelation), Cancelable(token=token):
        pytest.fail("entered with a cancelled token")


def test_timeout_of_zero_is_refused_on_entering() -> None:
    with pytest.raises(TimeoutCancelation), Cancelable(timeout=0):
        pytest.fail("entered")


def test_nested_blocks() -> None:
    with Cancelable() as outer:
        with pytest.raises(TimeoutCancelation), Cancelable(timeout=SOON) as inner:
            until(inner.check)
        assert current_cancelable() is outer
        outer.check()
    with pytest.raises(ManualCancelation), Cancelable() as outer, Cancelable() as inner:
        outer.cancel_nowait()
        assert inner.reason is CancelationReason.PARENT
        with pytest.raises(ParentCancelation):
            inner.check()
        current = current_cancelable()
        assert current is not None
        current.check()
    with pytest.raises(TimeoutCancelation), Cancelable(timeout=SOON) as outer, Cancelable(timeout=LONG) as inner:
        assert inner.deadline == outer.deadline
        until(inner.check)


def test_entered_twice_is_refused() -> None:
    block = Cancelable()
    with block, pytest.raises(RuntimeError, match="entered before"), block:
        pytest.fail("entered twice")


def test_condition_needs_an_event_loop() -> None:
    with (
        pytest.raises(TypeError, match="condition is checked in an event loop"),
        Cancelable.with_condition(lambda: True),
    ):
        pytest.fail("entered")


async def test_with_where_an_event_loop_runs_is_refused() -> None:
    block = Cancelable()
    with pytest.raises(TypeError, match="async with"), block:
        pytest.fail("entered")
    async with block:
        pass


async def test_block_around_the_thread_stops_the_block_in_it(thread: Thread) -> None:
    inner: list[Cancelable] = []

    def work() -> None:
        with Cancelable(timeout=LONG) as block:
            inner.append(block)
            thread.work(block.check)

    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            async with Cancelable(timeout=SOON) as outer:
                await anyio.to_thread.run_sync(work)
    assert inner[0].reason is CancelationReason.PARENT
    assert outer.reason is CancelationReason.TIMEOUT
    # Of the outer block, if the thread was the first to see its deadline.
    assert thread.ended in (["ParentCancelation"], ["TimeoutCancelation"])


async def test_callback_of_a_timeout_interrupts_what_does_not_check(thread: Thread) -> None:
    def work() -> str:
        with Cancelable(timeout=SOON) as block:
            block.on_cancel(lambda cancel: thread.may_end.set())
            return thread.work()

    async with nothing_left(), Cancelable(timeout=LONG):
        assert await anyio.to_thread.run_sync(work) == "finished"


async def test_condition_in_a_thread_is_asked_by_the_loop() -> None:
    full = threading.Event()

    def work() -> None:
        with Cancelable.with_condition(full.is_set, interval=0.001) as block:
            full.set()
            until(block.check)

    async with nothing_left(), Cancelable():
        with pytest.raises(CancelationError) as caught:
            await anyio.to_thread.run_sync(work)
        assert caught.value.reason is CancelationReason.CONDITION
        await anyio.wait_all_tasks_blocked()


async def test_async_callback_in_a_thread_is_closed_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    async def never() -> None: ...

    def work() -> None:
        with Cancelable() as block:
            block.on_cancel(lambda cancel: never())
            block.cancel_nowait()

    await anyio.to_thread.run_sync(work)
    assert "takes plain functions" in caplog.text


async def test_run_in_thread_returns_and_raises_what_the_function_does() -> None:
    def divide(number: int, by: int) -> float:
        return number / by

    async with nothing_left(), Cancelable() as cancel:
        for abandon in (False, True):
            assert await cancel.run_in_thread(divide, 6, 3, abandon_on_cancel=abandon) == 2
            with pytest.raises(ZeroDivisionError):
                await cancel.run_in_thread(divide, 6, 0, abandon_on_cancel=abandon)


async def test_run_in_thread_of_what_is_to_be_awaited_is_refused() -> None:
    async with Cancelable() as cancel:
        with pytest.raises(TypeError, match="is `async def`: await it here"):
            await (await cancel.run_in_thread(anyio.sleep, 0))


@pytest.mark.parametrize("when", ["before", "after"])
async def test_run_in_thread_outside_of_the_block_is_refused(when: str) -> None:
    cancel = Cancelable()
    if when == "after":
        async with cancel:
            pass
    with pytest.raises(RuntimeError, match="outside of its block"):
        await cancel.run_in_thread(time.sleep, 0)
    with pytest.raises(RuntimeError, match="outside of its block"):
        await cancel.run_in_process(time.sleep, 0)


@pytest.mark.parametrize("abandon", [False, True])
async def test_thread_that_checks_is_stopped(thread: Thread, abandon: bool) -> None:
    def work() -> str:
        cancel = current_cancelable()
        assert cancel is not None
        return thread.work(cancel.check)

    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            async with Cancelable(timeout=SOON) as cancel:
                await cancel.run_in_thread(work, abandon_on_cancel=abandon)
        await thread_is_free()
    assert thread.ended == ["TimeoutCancelation"]


@pytest.mark.parametrize("abandon", [False, True])
async def test_check_cancelled_of_anyio_works_too(thread: Thread, abandon: bool) -> None:
    cancelled = anyio.get_cancelled_exc_class().__name__
    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            async with Cancelable(timeout=SOON) as cancel:
                await cancel.run_in_thread(thread.work, anyio.from_thread.check_cancelled, abandon_on_cancel=abandon)
        await thread_is_free()
    assert thread.ended == [cancelled]


async def test_thread_that_finishes_anyway_has_finished(thread: Thread) -> None:
    async with nothing_left(), Cancelable() as cancel:
        cancel.on_cancel(lambda cancel: thread.may_end.set())
        async with anyio.create_task_group() as tasks:

            async def stop() -> None:
                await thread.has_started()
                cancel.cancel_nowait()

            tasks.start_soon(stop)
            assert await cancel.run_in_thread(thread.work) == "finished"
    assert cancel.is_cancelled


async def test_cleanup_after_the_threads_error_is_not_hit(thread: Thread) -> None:
    cleaned: list[bool] = []

    def work() -> None:
        cancel = current_cancelable()
        assert cancel is not None
        thread.work(cancel.check)

    with pytest.raises(TimeoutCancelation):
        async with Cancelable(timeout=SOON) as cancel:
            try:
                await cancel.run_in_thread(work)
            finally:
                await anyio.sleep(SOON)
                cleaned.append(True)
    assert cleaned == [True]


async def test_abandoned_thread_keeps_its_place_until_it_has_ended(
    thread: Thread, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = anyio.CapacityLimiter(1)

    def work() -> None:
        thread.work()
        raise KeyError("too late")

    with pytest.raises(ManualCancelation):
        async with Cancelable() as cancel, anyio.create_task_group() as tasks:
            tasks.start_soon(stop_when_started, thread, cancel)
            await cancel.run_in_thread(work, abandon_on_cancel=True, limiter=limiter)
    assert (limiter.borrowed_tokens, thread.ended, caplog.records) == (1, [], [])
    with pytest.raises(TimeoutCancelation):
        async with Cancelable(timeout=SOON) as cancel:
            await cancel.run_in_thread(pytest.fail, "it had no thread", abandon_on_cancel=True, limiter=limiter)
    async with nothing_left():
        thread.may_end.set()
        await seen(lambda: caplog.records)
    assert limiter.borrowed_tokens == 0
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("ERROR", "a thread failed after its caller had been cancelled: KeyError('too late')")
    ]


async def stop_when_started(thread: Thread, cancel: Cancelable) -> None:
    await thread.has_started()
    cancel.cancel_nowait()


async def test_waiting_for_a_thread_is_cancelled(thread: Thread) -> None:
    limiter = anyio.CapacityLimiter(1)
    await limiter.acquire_on_behalf_of(thread)
    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            async with Cancelable(timeout=SOON) as cancel:
                await cancel.run_in_thread(thread.work, limiter=limiter)
    assert not thread.started.is_set()


def app_for(door: str, endpoint: Callable[..., Any], timeout: float | None = None) -> FastAPI:
    app = FastAPI()
    if door == "decorator":
        app.get("/")(with_cancelation(timeout=timeout)(endpoint))
    elif door == "route class":
        router = APIRouter(route_class=CancelableRoute.with_timeout(timeout))
        router.get("/")(endpoint)
        app.include_router(router)
    else:
        app.get("/")(endpoint)
        app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)
    return app


DOORS = pytest.mark.parametrize("door", ["decorator", "route class", "middleware"])


@DOORS
async def test_def_endpoint_works(door: str) -> None:
    def endpoint(number: int = 1) -> dict[str, Any]:
        return {"number": number, "in_a_thread": threading.current_thread() is not threading.main_thread()}

    app = app_for(door, endpoint, LONG)
    async with nothing_left():
        call = await get(app, "/?number=7")
    assert call.json() == {"number": 7, "in_a_thread": True}
    assert (await get(app, "/?number=x")).status == 422
    plain = FastAPI()
    plain.get("/")(endpoint)
    assert app.openapi() == plain.openapi()


@movable_clock
@DOORS
@pytest.mark.parametrize("how", ["check", "check_cancelled", "with"])
async def test_def_endpoint_is_stopped_by_a_timeout(door: str, how: str, thread: Thread) -> None:
    def endpoint(cancel: RequestCancelable) -> str:
        if how == "check_cancelled":
            return thread.work(anyio.from_thread.check_cancelled)
        if how == "with":
            with cancel:
                return thread.work(cancel.check)
        around = current_cancelable()
        assert around is not None
        return thread.work(around.check)

    async with nothing_left(), running(app_for(door, endpoint, 5)) as call:
        await thread.has_started()
        await advance(5)
    assert (call.status, call.json()) == (504, {"detail": "Timed out after 5 seconds"})
    assert len(thread.ended) == 1
    assert thread.ended != ["finished"]


@DOORS
async def test_def_endpoint_is_stopped_by_a_hang_up(
    door: str, thread: Thread, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")

    def endpoint() -> str:
        around = current_cancelable()
        assert around is not None
        return thread.work(around.check)

    async with nothing_left(), running(app_for(door, endpoint)) as call:
        await thread.has_started()
        await call.hang_up()
    assert (call.status, thread.ended, call.most_readers) == (499, ["DisconnectCancelation"], 1)
    assert [record.levelname for record in caplog.records] == ["INFO"]


@DOORS
async def test_def_endpoint_behind_a_base_http_middleware(door: str, thread: Thread) -> None:
    def endpoint() -> str:
        around = current_cancelable()
        assert around is not None
        return thread.work(around.check)

    app = app_for(door, endpoint)

    @app.middleware("http")
    async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    async with nothing_left(), running(app) as call:
        await thread.has_started()
        await call.hang_up()
    assert (call.status, thread.ended) == (499, ["DisconnectCancelation"])


@movable_clock
@pytest.mark.parametrize("after", [False, True])
async def test_thread_that_does_not_check_is_waited_for(thread: Thread, after: bool) -> None:
    @with_cancelation(timeout=5)
    def endpoint() -> str:
        return thread.work()

    app = FastAPI()
    app.get("/")(endpoint)
    async with nothing_left(), running(app) as call:
        await thread.has_started()
        if after:
            await advance(5)
            assert call.sent == []
        thread.may_end.set()
    assert (call.status, call.json()) == (200, "finished")


@movable_clock
@pytest.mark.parametrize("door", ["route class", "middleware"])
@pytest.mark.parametrize("validated", [False, True])
async def test_thread_that_does_not_check_is_waited_for_under_other_doors(
    door: str, validated: bool, thread: Thread
) -> None:
    def plain():  # type: ignore[no-untyped-def]
        return thread.work()

    def annotated() -> str:
        return thread.work()

    async with nothing_left(), running(app_for(door, annotated if validated else plain, 5)) as call:
        await thread.has_started()
        await advance(5)
        assert call.sent == []
        thread.may_end.set()
    # FastAPI validates what a `def` endpoint returns in a thread as well. By then the handler has returned.
    assert (call.status, thread.ended) == (200, ["finished"])


@movable_clock
async def test_thread_that_is_abandoned_answers_at_once(thread: Thread, caplog: pytest.LogCaptureFixture) -> None:
    slots = anyio.to_thread.current_default_thread_limiter()

    @with_cancelation(timeout=5, abandon_thread=True)
    def endpoint() -> None:
        thread.work()
        raise KeyError("too late")

    app = FastAPI()
    app.get("/")(endpoint)
    async with running(app) as call:
        await thread.has_started()
        await advance(5)
    assert (call.status, thread.ended, slots.borrowed_tokens) == (504, [], 1)
    async with nothing_left():
        thread.may_end.set()
        await thread_is_free()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "a thread failed after its caller had been cancelled: KeyError('too late')"
    ]


async def test_requests_that_wait_for_a_thread_do_not_pile_onto_a_busy_pool(thread: Thread) -> None:
    slots = anyio.to_thread.current_default_thread_limiter()
    entered: list[int] = []

    @with_cancelation(timeout=0.2, abandon_thread=True)
    def endpoint(number: int) -> str:
        entered.append(number)
        return thread.work()

    app = FastAPI()
    app.get("/{number}")(endpoint)
    before, slots.total_tokens = slots.total_tokens, 1
    try:
        calls = [await get(app, f"/{number}") for number in range(3)]
        assert [call.status for call in calls] == [504, 504, 504]
        thread.may_end.set()
        await seen(lambda: slots.borrowed_tokens == 0)
        assert entered == [0]
    finally:
        slots.total_tokens = before


@pytest.mark.parametrize("abandon", [False, True])
async def test_http_exception_and_bug_of_a_def_endpoint_arrive_as_themselves(abandon: bool) -> None:
    @with_cancelation(timeout=LONG, abandon_thread=abandon)
    def endpoint(kind: str) -> None:
        raise HTTPException(418, "teapot") if kind == "http" else KeyError(kind)

    app = FastAPI()
    app.get("/{kind}")(endpoint)
    async with nothing_left():
        assert (await get(app, "/http")).status == 418
        with pytest.raises(KeyError, match="bug"):
            await get(app, "/bug")


async def test_def_endpoint_status_codes_on_cancel_and_nested_decorators(thread: Thread) -> None:
    told: list[CancelationReason | None] = []

    @with_cancelation
    @with_cancelation(
        timeout=SOON, status_codes={CancelationReason.TIMEOUT: 503}, on_cancel=lambda cancel: told.append(cancel.reason)
    )
    def endpoint() -> str:
        around = current_cancelable()
        assert around is not None
        return thread.work(around.check)

    app = FastAPI()
    app.get("/")(endpoint)
    assert (await get(app)).status == 503
    assert told == [CancelationReason.TIMEOUT]


async def test_def_endpoint_called_without_a_request() -> None:
    @with_cancelation(timeout=SOON)
    def endpoint(wait: bool) -> str:
        if wait:
            check_until_stopped()
        return "done"

    assert await endpoint(False) == "done"
    with pytest.raises(TimeoutCancelation):
        await endpoint(True)


async def test_plain_starlette_def_endpoint(thread: Thread) -> None:
    @with_cancelation
    def endpoint(request: Request) -> Response:
        around = current_cancelable()
        assert around is not None
        return PlainTextResponse(thread.work(around.check))

    async with nothing_left(), running(Starlette(routes=[Route("/", endpoint)])) as call:
        await thread.has_started()
        await call.hang_up()
    assert (call.status, thread.ended) == (499, ["DisconnectCancelation"])


def test_abandon_thread_is_for_def_handlers() -> None:
    async def endpoint() -> None: ...

    with pytest.raises(TypeError, match="abandon_thread is for `def` handlers"):
        with_cancelation(abandon_thread=True)(endpoint)


async def hang_up_when_started(app: FastAPI, thread: Thread, **options: Any) -> Call:
    async with nothing_left(), running(app, **options) as call:
        await thread.has_started()
        await call.hang_up()
    return call


@pytest.mark.parametrize("disconnect", ["repeats", "once"])
async def test_handle_in_a_def_endpoint(thread: Thread, disconnect: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    app = FastAPI()

    @app.get("/")
    def endpoint(cancel: RequestCancelable) -> str:
        with cancel:
            return thread.work(cancel.check)

    call = await hang_up_when_started(app, thread, disconnect=disconnect)
    assert (call.status, thread.ended, call.most_readers) == (499, ["DisconnectCancelation"], 1)
    assert [record.message.split(" cancelled")[0] for record in caplog.records] == ["GET /"]


async def test_handle_with_timeout_in_a_def_endpoint(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    app = FastAPI()

    @app.get("/")
    def endpoint(cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(SOON))]) -> None:
        with cancel:
            assert cancel.remaining() <= SOON
            until(cancel.check)

    async with nothing_left():
        assert (await get(app)).status == 504
    assert len(caplog.records) == 1


async def test_event_in_a_def_endpoint(thread: Thread) -> None:
    app = FastAPI()

    @app.get("/")
    def endpoint(event: CancellationEvent) -> dict[str, Any]:
        thread.started.set()
        until(event.is_set)
        return {"stopped_by": event.reason}

    call = await hang_up_when_started(app, thread)
    assert (call.status, call.json()) == (200, {"stopped_by": "disconnect"})


async def test_handle_in_a_def_dependency(thread: Thread) -> None:
    app = FastAPI()

    def load(cancel: RequestCancelable) -> str:
        with cancel:
            return thread.work(cancel.check)

    @app.get("/")
    async def endpoint(loaded: str = Depends(load)) -> str:
        return loaded

    call = await hang_up_when_started(app, thread)
    assert (call.status, thread.ended) == (499, ["DisconnectCancelation"])


async def test_handle_in_a_def_generator_dependency() -> None:
    app = FastAPI()
    left: list[bool] = []

    def covered(cancel: RequestCancelable) -> Iterator[Cancelable]:
        with cancel:
            yield cancel
        left.append(cancel.is_active)

    @app.get("/")
    def endpoint(cancel: Cancelable = Depends(covered)) -> bool:
        cancel.check()
        return cancel.is_active

    async with nothing_left():
        call = await get(app)
    assert (call.status, left) == (200, [False])


async def test_quick_def_endpoint_costs_no_listener() -> None:
    app = FastAPI()

    @app.get("/")
    def endpoint(cancel: RequestCancelable) -> float:
        with cancel:
            return 1 if math.isinf(cancel.remaining()) else 0

    async with nothing_left():
        call = await get(app)
    assert (call.json(), call.most_readers) == (1, 0)


async def test_body_is_there_for_a_def_endpoint_that_is_covered() -> None:
    app = FastAPI()

    @app.post("/")
    @with_cancelation(timeout=LONG)
    def endpoint(item: dict[str, int]) -> dict[str, int]:
        time.sleep(SOON)
        return item

    call = await get(app, "/", "POST", json={"a": 1})
    assert call.json() == {"a": 1}


async def test_disconnect_is_seen_in_a_thread_of_an_async_endpoint(thread: Thread) -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(cancel: RequestCancelable) -> str:
        async with cancel:
            return await cancel.run_in_thread(lambda: thread.work(cancel.check))

    call = await hang_up_when_started(app, thread)
    assert (call.status, thread.ended) == (499, [DisconnectCancelation.__name__])
