# pyright: reportPossiblyUnboundVariable=false
# It believes that `raises` may take an exception from entering the block.
from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from contextvars import ContextVar, copy_context
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
import uvloop

from cancelable_deps.kernel.loops.asyncio_loop import AsyncioLoop
from cancelable_deps.kernel.loops.base import EventLoop
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.kernel.loops.trio_loop import TrioLoop

from .leftovers import nothing_left
from .machine import scaled

pytestmark = pytest.mark.anyio

variable = ContextVar("variable", default="nothing")


def test_outside_of_a_loop_there_is_none() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        current_loop()


async def test_the_running_loop_is_one_object(anyio_backend: str) -> None:
    loop = current_loop()
    assert loop is current_loop()
    assert loop.is_trio == (anyio_backend == "trio")
    assert loop.is_running_here()
    assert not await anyio.to_thread.run_sync(loop.is_running_here)


async def test_its_clock_is_that_of_anyio() -> None:
    before = anyio.current_time()
    assert before <= current_loop().time() <= anyio.current_time()


async def test_it_knows_the_task() -> None:
    loop = current_loop()
    seen: list[object] = []

    async def child() -> None:
        seen.append(loop.current_task())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child)
    assert loop.current_task() is loop.current_task()
    assert seen[0] not in (None, loop.current_task())


def test_each_loop_has_its_own() -> None:
    async def ask() -> EventLoop:
        return current_loop()

    first, second, third = (anyio.run(ask, backend=name) for name in ("asyncio", "trio", "asyncio"))
    assert isinstance(first, AsyncioLoop)
    assert isinstance(second, TrioLoop)
    assert third is not first
    assert not any(loop.is_running_here() for loop in (first, second, third))


@pytest.mark.parametrize("options", [{}, {"loop_factory": uvloop.new_event_loop}])
def test_loops_that_take_turns_in_a_thread_stay_what_they_are(options: dict[str, Any]) -> None:
    async def ask() -> EventLoop:
        return current_loop()

    with asyncio.Runner(**options) as one, asyncio.Runner(**options) as other:
        first, second = one.run(ask()), other.run(ask())
        assert one.run(ask()) is first
        assert other.run(ask()) is second


def test_trio_as_a_guest_of_asyncio_is_trio() -> None:
    async def guest() -> bool:
        return current_loop().is_trio

    async def host() -> tuple[bool, bool]:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=asyncio.get_running_loop().call_soon_threadsafe,
            done_callback=done.set_result,
        )
        return (await done).unwrap(), current_loop().is_trio

    assert asyncio.run(host()) == (True, False)


async def test_a_call_at_a_time() -> None:
    loop = current_loop()
    called = anyio.Event()
    when = loop.time() + 0.01
    async with nothing_left():
        loop.call_at(when, called.set)
        await called.wait()
    assert loop.time() >= when


async def test_a_call_in_the_past_is_made_at_once() -> None:
    called = anyio.Event()
    current_loop().call_at(current_loop().time() - 1, called.set)
    await called.wait()


async def test_a_cancelled_call_is_not_made() -> None:
    loop = current_loop()
    called: list[str] = []
    later = anyio.Event()
    async with nothing_left():
        loop.call_at(loop.time() + 0.01, lambda: called.append("too late")).cancel()
        loop.call_at(loop.time() + 0.02, later.set)
        await later.wait()
    assert called == []


async def test_a_call_does_not_keep_the_variables_of_who_asked_for_it() -> None:
    loop = current_loop()
    called = anyio.Event()
    seen: list[str] = []

    def look() -> None:
        seen.append(variable.get())
        called.set()

    variable.set("of the request")
    loop.call_at(loop.time(), look)
    await called.wait()
    assert seen == ["nothing"]


async def test_a_call_from_a_thread_is_made_in_the_loop() -> None:
    loop = current_loop()
    called = anyio.Event()
    threads: list[int] = []

    def call(argument: str) -> None:
        threads.append(threading.get_ident())
        assert argument == "argument"
        called.set()

    await anyio.to_thread.run_sync(loop.call_from_thread, call, "argument")
    await called.wait()
    assert threads == [threading.get_ident()]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_call_to_a_closed_loop_is_dropped(backend: str) -> None:
    async def ask() -> EventLoop:
        return current_loop()

    called: list[str] = []
    anyio.run(ask, backend=backend).call_from_thread(called.append, "never")
    assert called == []


async def test_spawned_work_runs_in_its_context_and_ends() -> None:
    ended = anyio.Event()
    seen: list[str] = []

    async def work() -> None:
        seen.append(variable.get())
        await anyio.lowlevel.checkpoint()
        ended.set()

    context = copy_context()
    context.run(variable.set, "of the spawner")
    async with nothing_left():
        worker = current_loop().spawn(work, context)
        assert not worker.done
        await worker.join()
        assert worker.done
        assert ended.is_set()
        await worker.join()
    assert seen == ["of the spawner"]


async def test_spawned_work_is_cancelled() -> None:
    started = anyio.Event()
    seen: list[str] = []

    async def work() -> None:
        try:
            started.set()
            await anyio.sleep_forever()
        finally:
            seen.append("cancelled")

    async with nothing_left():
        worker = current_loop().spawn(work, copy_context())
        await started.wait()
        worker.cancel()
        await worker.join()
    assert seen == ["cancelled"]
    worker.cancel()


async def test_spawned_work_that_is_cancelled_at_once_still_begins() -> None:
    seen: list[str] = []

    async def work() -> None:
        seen.append("begun")
        await anyio.sleep_forever()

    async with nothing_left():
        worker = current_loop().spawn(work, copy_context())
        worker.cancel()
        assert (worker.done, seen) == (False, [])
        await worker.join()
    assert seen == ["begun"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_task_factory_of_the_users_has_no_say_in_spawned_work() -> None:
    # As many in use, it knows no contexts; an eager one would begin the work before its starter knows of it.
    def factory(loop: asyncio.AbstractEventLoop, coro: Any) -> Any:
        raise NotImplementedError

    loop = asyncio.get_running_loop()
    released = anyio.Event()
    loop.set_task_factory(factory)
    try:
        worker = current_loop().spawn(released.wait, copy_context())
    finally:
        loop.set_task_factory(None)
    released.set()
    await worker.join()


async def test_joining_does_not_cancel_the_work_when_the_joiner_is_cancelled() -> None:
    released = anyio.Event()
    worker = current_loop().spawn(released.wait, copy_context())
    with anyio.move_on_after(0):
        await worker.join()
    assert not worker.done
    async with nothing_left():
        released.set()
        await worker.join()
    assert worker.done


def test_failing_work_does_not_end_trio(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("a bug")

    async def main() -> str:
        worker = current_loop().spawn(fail, copy_context())
        await worker.join()
        return "went on"

    assert trio.run(main) == "went on"
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("cancelable_deps", logging.ERROR)


def test_whoever_runs_on_asyncio_does_not_load_trio() -> None:
    code = """
import asyncio, sys
from cancelable_deps import Cancelable
async def main():
    async with Cancelable(timeout=10):
        pass
asyncio.run(main())
assert "trio" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=scaled(50))


async def test_a_task_that_is_left_is_found() -> None:
    released = anyio.Event()
    with pytest.raises(AssertionError, match="tasks are left"):
        async with nothing_left():
            worker = current_loop().spawn(released.wait, copy_context())
    released.set()
    await worker.join()


async def test_a_timer_that_is_left_is_found() -> None:
    loop = current_loop()
    with pytest.raises(AssertionError, match="are left"):
        async with nothing_left():
            timer = loop.call_at(loop.time() + 100, anyio.Event().set)
    timer.cancel()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_timer_of_a_scope_that_is_left_is_found() -> None:
    with anyio.CancelScope() as scope, pytest.raises(AssertionError, match="are left"):
        async with nothing_left():
            scope.deadline = anyio.current_time() + 100
