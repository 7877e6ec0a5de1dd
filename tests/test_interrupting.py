# pyright: reportPossiblyUnboundVariable=false
# It believes that `raises` may take an exception from entering the block.
# ruff: noqa: PT012 - what leaves a section is tested by leaving it, inside of `raises`
"""`Cancelable.interrupting`: a blocking call is interrupted by another thread, and never the one after it."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import FastAPI, HTTPException

from cancelable_deps import (
    Cancelable,
    CancelationError,
    CancelationReason,
    ManualCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    TimeoutCancelation,
    begin_shutdown,
    cancelation_lifespan,
    current_cancelable,
    with_cancelation,
)

from .calls import CEILING, running
from .leftovers import nothing_left
from .machine import scaled

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

SOON = 0.02
LONG = 100
DEADLINE = scaled(0.2)
"""Seconds; it must not have passed before the section is entered."""
FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"


class DriverError(Exception):
    pass


class Driver:
    """A connection whose one kind of call blocks its thread until another thread interrupts it."""

    def __init__(self) -> None:
        # Called in the middle of the call: a deadline might strike before it.
        self.strike: Callable[[], object] = bool
        self.interrupts = 0
        self.called = threading.Event()
        self.interrupted = threading.Event()

    def call(self) -> None:
        self.interrupted.clear()
        self.called.set()
        self.strike()
        assert self.interrupted.wait(CEILING)
        raise DriverError("interrupted")

    def interrupt(self) -> None:
        self.interrupts += 1
        self.interrupted.set()


def struck(driver: Driver, cleanup_grace: float | None = None) -> Cancelable:
    """Return a block whose time is up in the middle of the driver's call."""
    cancel = Cancelable(cleanup_grace=cleanup_grace)
    driver.strike = partial(cancel.cancel_nowait, CancelationReason.TIMEOUT)
    return cancel


async def until(event: threading.Event) -> None:
    assert await anyio.to_thread.run_sync(event.wait, CEILING)


async def until_logged(caplog: pytest.LogCaptureFixture) -> None:
    with anyio.fail_after(CEILING):
        while not caplog.records:  # noqa: ASYNC110 - the log has no event
            await anyio.sleep(0.001)


async def in_the_loop(cancel: Cancelable, driver: Any, call: Callable[[], Any]) -> Any:
    async with cancel.interrupting(driver.interrupt):
        return await cancel.run_in_thread(call)


async def in_the_thread(cancel: Cancelable, driver: Any, call: Callable[[], Any]) -> Any:
    def section() -> Any:
        with cancel.interrupting(driver.interrupt):
            return call()

    return await cancel.run_in_thread(section)


both_places = pytest.mark.parametrize("place", [in_the_loop, in_the_thread])


@both_places
async def test_the_error_of_the_driver_becomes_the_reason(place: Any) -> None:
    driver, cancel = Driver(), Cancelable()

    async def cancel_it() -> None:
        await until(driver.called)
        cancel.cancel_nowait(message="enough")

    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(cancel_it)
        with pytest.raises(ManualCancelation, match="enough") as caught:
            async with cancel:
                await place(cancel, driver, driver.call)
    assert isinstance(caught.value.__cause__, DriverError)
    assert driver.interrupts >= 1


@both_places
async def test_a_call_that_ends_by_itself_is_not_interrupted_later(place: Any) -> None:
    driver = Driver()
    async with nothing_left():
        with pytest.raises(ManualCancelation):
            async with Cancelable() as cancel:
                assert await place(cancel, driver, lambda: "result") == "result"
                await cancel.cancel()
    assert driver.interrupts == 0


@both_places
async def test_a_call_that_fails_by_itself_fails_as_ever(place: Any) -> None:
    async with Cancelable() as cancel:
        with pytest.raises(ZeroDivisionError):
            await place(cancel, Driver(), lambda: 1 // 0)


@both_places
async def test_a_call_that_completes_all_the_same_has_completed(place: Any) -> None:
    driver = Driver()
    seen: list[object] = []

    def call() -> str:
        with pytest.raises(DriverError):
            driver.call()
        return "result"

    with pytest.raises(TimeoutCancelation):
        async with struck(driver) as cancel:
            seen.append(await place(cancel, driver, call))
            await anyio.lowlevel.checkpoint()
    assert seen == ["result"]


@both_places
async def test_an_answer_of_the_application_is_not_replaced(place: Any) -> None:
    driver = Driver()

    def call() -> None:
        try:
            driver.call()
        except DriverError:
            raise HTTPException(409) from None

    with pytest.raises(HTTPException) as caught:
        async with struck(driver) as cancel:
            await place(cancel, driver, call)
    assert caught.value.status_code == 409


@both_places
async def test_a_block_around_it_interrupts_and_gives_the_reason(place: Any) -> None:
    driver = Driver()
    with pytest.raises(TimeoutCancelation):
        async with struck(driver), Cancelable() as cancel:
            await place(cancel, driver, driver.call)
    assert driver.interrupts >= 1


class SlowStop(Driver):
    """Interrupting takes until `go_on`, although the call has ended already."""

    def __init__(self) -> None:
        super().__init__()
        self.stopping, self.go_on = threading.Event(), threading.Event()
        self.discarded = 0

    def interrupt(self) -> None:
        super().interrupt()
        self.stopping.set()
        assert self.go_on.wait(CEILING)

    def discard(self) -> None:
        self.discarded += 1
        self.go_on.set()


@both_places
async def test_leaving_waits_for_what_interrupts(place: Any) -> None:
    driver = SlowStop()
    left: list[bool] = []

    async def work() -> None:
        with pytest.raises(TimeoutCancelation):
            async with struck(driver) as cancel:
                try:
                    await place(cancel, driver, driver.call)
                finally:
                    left.append(driver.go_on.is_set())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        await until(driver.stopping)
        await anyio.wait_all_tasks_blocked()
        assert left == []
        driver.go_on.set()
    assert left == [True]


@on_asyncio
async def test_a_cancelled_task_waits_too() -> None:
    driver = SlowStop()

    async def work() -> None:
        async with struck(driver) as cancel:
            await in_the_loop(cancel, driver, driver.call)

    task = asyncio.create_task(work())
    await until(driver.stopping)
    for _ in range(3):
        task.cancel()
        await anyio.wait_all_tasks_blocked()
        assert not task.done()
    driver.go_on.set()
    with pytest.raises((asyncio.CancelledError, TimeoutCancelation)):
        await task
    assert driver.interrupts >= 1


def section_with_discard(cancel: Cancelable, driver: SlowStop) -> None:
    with cancel.interrupting(driver.interrupt, discard=driver.discard):
        driver.call()


async def loop_section_with_discard(cancel: Cancelable, driver: SlowStop) -> None:
    async with cancel.interrupting(driver.interrupt, discard=driver.discard):
        await cancel.run_in_thread(driver.call)


@pytest.mark.parametrize("in_thread", [True, False])
async def test_what_hangs_costs_the_connection(in_thread: bool, caplog: pytest.LogCaptureFixture) -> None:
    driver = SlowStop()
    with pytest.raises(TimeoutCancelation):
        async with struck(driver, cleanup_grace=SOON) as cancel:
            if in_thread:
                await cancel.run_in_thread(section_with_discard, cancel, driver)
            else:
                await loop_section_with_discard(cancel, driver)
    assert driver.discarded == 1
    (record,) = caplog.records
    assert "has not returned within 0.02 seconds" in record.getMessage()


@both_places
async def test_without_a_way_to_discard_the_wait_goes_on(place: Any, caplog: pytest.LogCaptureFixture) -> None:
    driver = SlowStop()

    async def work() -> None:
        with pytest.raises(TimeoutCancelation):
            async with struck(driver, cleanup_grace=SOON) as cancel:
                await place(cancel, driver, driver.call)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        await until(driver.stopping)
        await until_logged(caplog)
        await anyio.wait_all_tasks_blocked()
        assert not driver.go_on.is_set()
        driver.go_on.set()
    assert "waiting for it" in caplog.text


@both_places
async def test_what_fails_to_interrupt_is_logged(place: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Driver):
        def interrupt(self) -> None:
            super().interrupt()
            raise ConnectionError("too many connections")

    driver = Failing()
    with pytest.raises(TimeoutCancelation):
        async with struck(driver) as cancel:
            await place(cancel, driver, driver.call)
    assert "the function that interrupts a call failed" in caplog.text
    assert "too many connections" in caplog.text


@both_places
async def test_it_is_interrupted_again_if_the_call_had_not_begun(place: Any) -> None:
    driver = Driver()

    def call() -> None:
        driver.strike()
        assert driver.interrupted.wait(CEILING)
        driver.call()

    with pytest.raises(TimeoutCancelation):
        async with struck(driver) as cancel:
            await place(cancel, driver, call)
    assert driver.interrupts >= 2


async def test_a_cancelled_block_lets_nobody_in() -> None:
    driver = Driver()
    for section in (in_the_loop, in_the_thread):
        with pytest.raises(ManualCancelation):
            async with Cancelable() as cancel:
                cancel.cancel_nowait()
                with anyio.CancelScope(shield=True):
                    await section(cancel, driver, driver.call)
    assert (driver.interrupts, driver.called.is_set()) == (0, False)


async def test_sections_may_be_nested() -> None:
    outer, inner = Driver(), Driver()
    with pytest.raises(TimeoutCancelation):
        async with struck(inner) as cancel, cancel.interrupting(outer.interrupt):
            await in_the_thread(cancel, inner, inner.call)
    assert min(outer.interrupts, inner.interrupts) >= 1


async def test_wrong_use_says_how_to_do_it_right() -> None:
    cancel = Cancelable()
    with pytest.raises(TypeError, match="plain function"):
        cancel.interrupting(anyio.sleep_forever)
    with pytest.raises(TypeError, match="plain function"):
        cancel.interrupting(print, discard=anyio.sleep_forever)
    with pytest.raises(RuntimeError, match="inside `async with cancel:`"):
        async with cancel.interrupting(print):
            pass
    async with cancel:
        with pytest.raises(TypeError, match="write `async with"), cancel.interrupting(print):
            pass
        section = cancel.interrupting(print)
        async with section:
            with pytest.raises(RuntimeError, match="serves one section"):
                async with section:
                    pass


async def test_a_scope_of_another_author_interrupts_when_it_leaves() -> None:
    driver = Driver()
    async with Cancelable() as cancel:
        with anyio.move_on_after(SOON):
            async with cancel.interrupting(driver.interrupt):
                await anyio.sleep(LONG)
    assert driver.interrupts >= 1
    assert not cancel.is_cancelled


@on_asyncio
async def test_a_cancelled_task_stops_the_thread_that_it_leaves_behind() -> None:
    driver = Driver()
    ended = threading.Event()

    def call() -> None:
        try:
            driver.call()
        finally:
            ended.set()

    async def work() -> None:
        async with Cancelable() as cancel:
            await in_the_loop(cancel, driver, call)

    task = asyncio.create_task(work())
    loop = asyncio.get_running_loop()
    driver.strike = lambda: loop.call_soon_threadsafe(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(ended)
    assert driver.interrupts >= 1


async def test_an_abandoned_thread_is_interrupted() -> None:
    driver = Driver()
    ended = threading.Event()

    def call() -> None:
        try:
            with cancel.interrupting(driver.interrupt):
                driver.call()
        finally:
            ended.set()

    with pytest.raises(TimeoutCancelation):
        async with struck(driver) as cancel:
            await cancel.run_in_thread(call, abandon_on_cancel=True)
    await until(ended)
    assert driver.interrupts >= 1


async def test_a_section_in_a_shield_is_left_alone() -> None:
    driver = Driver()
    seen: list[str] = []

    def section() -> None:
        with cancel.interrupting(driver.interrupt):
            seen.append("work")

    with pytest.raises(ManualCancelation):
        async with Cancelable() as cancel:
            with cancel.shield():
                cancel.cancel_nowait()
                async with cancel.interrupting(driver.interrupt):
                    await cancel.run_in_thread(section)
            await anyio.lowlevel.checkpoint()
    assert (seen, driver.interrupts) == (["work"], 0)


async def test_a_block_in_a_shield_interrupts_its_own() -> None:
    driver = Driver()
    async with Cancelable() as outer:
        with outer.shield(), pytest.raises(TimeoutCancelation):
            async with struck(driver) as cancel:
                await in_the_loop(cancel, driver, driver.call)
    assert driver.interrupts >= 1


async def test_a_shield_in_a_section_delays() -> None:
    driver = Driver()
    seen: list[int] = []

    def call() -> None:
        with cancel.interrupting(driver.interrupt):
            with cancel.shield(), cancel.shield():
                cancel.cancel_nowait()
                time.sleep(SOON)
                seen.append(driver.interrupts)
            driver.call()

    with pytest.raises(ManualCancelation):
        async with Cancelable() as cancel:
            await cancel.run_in_thread(call)
    assert seen == [0]
    assert driver.interrupts


async def test_a_shield_waits_for_what_interrupts() -> None:
    driver = SlowStop()
    seen: list[bool] = []

    def call() -> None:
        with cancel.interrupting(driver.interrupt):
            driver.strike()
            assert driver.stopping.wait(CEILING)
            with cancel.shield():
                seen.append(driver.go_on.is_set())

    async with anyio.create_task_group() as tasks:
        cancel = struck(driver)

        async def work() -> None:
            async with cancel:
                await cancel.run_in_thread(call)

        tasks.start_soon(work)
        await until(driver.stopping)
        assert seen == []
        driver.go_on.set()
    assert seen == [True]


async def test_the_function_finds_its_block() -> None:
    seen: list[object] = []
    driver = Driver()

    def stop() -> None:
        seen.append(current_cancelable())
        driver.interrupt()

    with pytest.raises(TimeoutCancelation):
        async with struck(driver) as cancel, cancel.interrupting(stop):
            await cancel.run_in_thread(driver.call)
    assert set(seen) == {cancel}


# In threads without an event loop


def in_a_thread(function: Callable[[], object]) -> BaseException | None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(CEILING)
    assert not thread.is_alive()
    return raised[0] if raised else None


def test_a_deadline_needs_no_event_loop() -> None:
    driver = Driver()

    def work() -> None:
        with Cancelable(timeout=DEADLINE) as cancel, cancel.interrupting(driver.interrupt):
            driver.call()

    assert isinstance(in_a_thread(work), TimeoutCancelation)
    assert driver.interrupts >= 1


def test_a_deadline_that_is_moved_strikes_later() -> None:
    driver = Driver()
    cancel = Cancelable(timeout=DEADLINE)

    def work() -> None:
        with cancel, cancel.interrupting(driver.interrupt):
            cancel.extend(DEADLINE)
            driver.call()

    error = in_a_thread(work)
    assert isinstance(error, TimeoutCancelation)
    assert error.message == f"Timed out after {2 * DEADLINE:g} seconds"
    assert cancel.elapsed >= 2 * DEADLINE


def test_the_block_around_it_has_the_deadline() -> None:
    driver = Driver()

    def work() -> None:
        with Cancelable(timeout=DEADLINE), Cancelable() as cancel, cancel.interrupting(driver.interrupt):
            driver.call()

    assert isinstance(in_a_thread(work), CancelationError)
    assert driver.interrupts >= 1


def test_a_thread_is_cancelled_by_another() -> None:
    driver, cancel = Driver(), Cancelable()

    def work() -> None:
        with cancel, cancel.interrupting(driver.interrupt):
            driver.call()

    helper = threading.Thread(target=lambda: driver.called.wait(CEILING) and cancel.cancel_nowait())
    helper.start()
    assert isinstance(in_a_thread(work), ManualCancelation)
    helper.join()


# In handlers


def application(driver: Driver) -> FastAPI:
    app = FastAPI(lifespan=cancelation_lifespan(grace=0))

    @app.get("/handle")
    def handle(cancel: RequestCancelable) -> None:
        with cancel, cancel.interrupting(driver.interrupt):
            driver.call()

    @app.get("/decorator")
    @with_cancelation(timeout=LONG)
    def decorator() -> None:
        cancel = current_cancelable()
        assert cancel is not None
        with cancel.interrupting(driver.interrupt):
            driver.call()

    @app.get("/async")
    async def with_async(cancel: RequestCancelable) -> None:
        async with cancel, cancel.interrupting(driver.interrupt):
            await cancel.run_in_thread(driver.call)

    @app.get("/middleware")
    def middleware() -> None:
        cancel = current_cancelable()
        assert cancel is not None
        with cancel.interrupting(driver.interrupt):
            driver.call()

    return app


PATHS = ["/handle", "/decorator", "/async", "/middleware"]


def with_middleware(driver: Driver, path: str) -> Any:
    app: Any = application(driver)
    return RequestCancelationMiddleware(app) if path == "/middleware" else app


@pytest.mark.parametrize("path", PATHS)
async def test_a_client_that_leaves_interrupts(path: str) -> None:
    driver = Driver()
    async with running(with_middleware(driver, path), path) as call:
        await until(driver.called)
        await call.hang_up()
    assert (call.status, call.reason) == (499, CancelationReason.DISCONNECT)
    assert driver.interrupts >= 1


@pytest.mark.parametrize("path", PATHS)
async def test_the_shutdown_interrupts(path: str) -> None:
    driver = Driver()
    async with running(with_middleware(driver, path), path, lifespan=True) as call:
        await call.running()
        await until(driver.called)
        begin_shutdown()
    assert call.status == 503


async def test_sqlite_is_interrupted() -> None:
    with closing(sqlite3.connect(":memory:", check_same_thread=False)) as connection:
        with pytest.raises(TimeoutCancelation) as caught:
            async with Cancelable(timeout=DEADLINE) as cancel, cancel.interrupting(connection.interrupt):
                await cancel.run_in_thread(lambda: connection.execute(FOREVER).fetchall())
        assert str(caught.value.__cause__) == "interrupted"
        assert connection.execute("select 1").fetchall() == [(1,)]
