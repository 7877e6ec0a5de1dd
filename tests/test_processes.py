"""`run_in_process`: what becomes of the processes."""

# pyright: reportPossiblyUnboundVariable=false
# It believes that `raises` may take an exception from entering the block.
# ruff: noqa: ASYNC240 - small local files
from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from textwrap import dedent
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_process
import psutil
import pytest
from fastapi import FastAPI

from cancelable_deps import (
    Cancelable,
    ManualCancelation,
    RequestCancelable,
    TimeoutCancelation,
    begin_shutdown,
    cancelation_lifespan,
    with_cancelation,
)
from cancelable_deps.kernel.processes import pool as processes
from cancelable_deps.testing import CancelableClient

from . import jobs
from .calls import CEILING, running
from .leftovers import nothing_left

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent
SOON = 0.05
LONG = 100


@pytest.fixture
def told(tmp_path: Path) -> str:
    return str(tmp_path / "told")


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """When the event loop of a test has ended, so has every process of its pool."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not {process for process in left if "_child.py" in " ".join(process.cmdline())}


async def numbers_in(told: str) -> list[int]:
    await seen(lambda: Path(told).exists())
    return [int(number) for number in Path(told).read_text().split()]


async def seen(state: Any) -> None:
    with anyio.fail_after(CEILING):
        while not state():  # noqa: ASYNC110 - another process changes it
            await anyio.sleep(0.005)


def is_gone(pid: int) -> bool:
    """Ended, and waited for by its parent, be that init."""
    return not psutil.pid_exists(pid)


async def test_result_and_errors_arrive_as_themselves() -> None:
    async with Cancelable() as cancel:
        assert await cancel.run_in_process(jobs.divide, 6, 3) == 2
        with pytest.raises(ZeroDivisionError) as caught:
            await cancel.run_in_process(jobs.divide, 6, 0)
    assert "return number / by" in caught.value.__notes__[0]


async def test_large_arguments_and_results() -> None:
    data = os.urandom(3_000_000)
    async with Cancelable() as cancel:
        assert await cancel.run_in_process(jobs.reverse, data) == data[::-1]


async def test_one_process_does_one_job_after_another() -> None:
    async with Cancelable() as cancel:
        first = await cancel.run_in_process(jobs.process_id)
        assert await cancel.run_in_process(jobs.process_id) == first != os.getpid()
        async with anyio.create_task_group() as tasks:
            seen_at_once: list[int] = []

            async def run() -> None:
                seen_at_once.append(await cancel.run_in_process(jobs.process_id))

            tasks.start_soon(run)
            tasks.start_soon(run)
    assert len(set(seen_at_once)) == min(2, os.cpu_count() or 2)


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        (jobs.leave, RuntimeError, "ended with SystemExit"),
        (jobs.return_a_lambda, TypeError, "cannot be pickled"),
        (jobs.raise_odd, RuntimeError, "Odd, which cannot be pickled: 1 and 2"),
        (jobs.die, anyio.BrokenWorkerProcess, "signal SIGKILL.*die"),
        (jobs.die_without_a_name, anyio.BrokenWorkerProcess, r"signal \d+"),
        (lambda: None, TypeError, "Use a function from the top level"),
        (numbers_in, TypeError, "plain function"),
    ],
)
async def test_what_cannot_be_done_says_so(job: Any, error: type[Exception], message: str) -> None:
    async with Cancelable() as cancel:
        with pytest.raises(error, match=message):
            await cancel.run_in_process(job)
        assert await cancel.run_in_process(jobs.divide, 6, 3) == 2


def told_by(error: BaseException) -> str:
    """All that an error says of itself and of what has become of it."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return " ".join([type(error).__name__, text, *getattr(error, "__notes__", ())])


async def failure_of(cancel: Cancelable, job: Any, *args: Any) -> Exception:
    """What a job raises here; the process that has done it does the next one as well."""
    process = await cancel.run_in_process(jobs.process_id)
    try:
        await cancel.run_in_process(job, *args)
    except Exception as exc:
        assert await cancel.run_in_process(jobs.process_id) == process, job
        return exc
    pytest.fail("nothing was raised")


async def test_errors_that_cannot_be_sent_are_named_and_cost_no_process() -> None:
    async with Cancelable() as cancel:
        for name in (
            "NoText",
            "NoNotes",
            "Elsewhere",
            "Deadly",
            "DeadlyToPickle",
            "OddText",
            "PluginError",
            "PluginGroup",
            "CancelledError",
        ):
            assert name in told_by(await failure_of(cancel, jobs.raise_one, name))


async def test_an_error_that_takes_no_note_is_itself() -> None:
    async with Cancelable() as cancel:
        assert isinstance(await failure_of(cancel, jobs.raise_one, "NotesThatFail"), jobs.NotesThatFail)


async def test_what_would_end_the_server_arrives_as_an_error_that_names_it() -> None:
    async with Cancelable() as cancel:
        for name in ("Own", "KeyboardInterrupt", "GeneratorExit", "SystemExit"):
            error = await failure_of(cancel, jobs.raise_base, name)
            assert str(error).startswith(f"the function ended with {name}")
        error = await failure_of(cancel, jobs.raise_stop_iteration)
        assert str(error).startswith("the function ended with StopIteration")


async def test_a_group_keeps_the_members_that_can_be_sent() -> None:
    async with Cancelable() as cancel:
        error = await failure_of(cancel, jobs.raise_group)
    assert isinstance(error, ExceptionGroup)
    value, no_text, inner = error.exceptions
    assert (error.message, type(value)) == ("several", ValueError)
    assert "NoText" in told_by(no_text)
    assert isinstance(inner, ExceptionGroup)
    assert ["Deadly" in told_by(inner.exceptions[0]), "PluginError" in told_by(inner.exceptions[1])] == [True, True]
    assert "raise_group" in error.__notes__[0]


async def test_a_group_with_what_would_end_the_server_is_one_of_errors() -> None:
    async with Cancelable() as cancel:
        error = await failure_of(cancel, jobs.raise_base_group)
    assert isinstance(error, ExceptionGroup)
    assert [type(member) for member in error.exceptions] == [ValueError, RuntimeError]
    assert "KeyboardInterrupt" in told_by(error.exceptions[1])


async def test_a_group_that_is_nested_too_deeply_is_named() -> None:
    async with Cancelable() as cancel:
        assert "ExceptionGroup" in str(await failure_of(cancel, jobs.raise_deep_group))


async def test_results_that_cannot_be_unpickled_are_a_clear_error_and_cost_no_process() -> None:
    async with Cancelable() as cancel:
        for name in ("plugin", "raises", "leaves", "interrupts", "has no text"):
            error = await failure_of(cancel, jobs.return_one, name)
            assert type(error) is TypeError
            assert str(error).startswith("the result of return_one() cannot be unpickled in this process")
            assert "Return plain data" in str(error)
        error = await failure_of(cancel, jobs.return_what_ends_its_pickling)
        assert str(error) == "the result of the function cannot be pickled: SystemExit: 7"


async def test_what_a_job_prints_is_no_answer(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    async with Cancelable() as cancel:
        assert await cancel.run_in_process(jobs.print_and_read) == ""
    assert capfd.readouterr() == ("", "printed by the job\n")


async def test_what_a_job_has_forked_takes_no_job_and_gives_no_answer() -> None:
    async with Cancelable() as cancel:
        child = await cancel.run_in_process(jobs.fork)
        assert child
        await seen(lambda: has_ended(child))
        assert await cancel.run_in_process(jobs.divide, 6, 3) == 2


async def test_a_process_that_dies_is_noticed_though_what_it_has_forked_lives_on(told: str) -> None:
    with anyio.fail_after(CEILING):
        async with Cancelable() as cancel:
            with pytest.raises(anyio.BrokenWorkerProcess, match="SIGKILL"):
                await cancel.run_in_process(jobs.fork_and_die, told)
    (child,) = await numbers_in(told)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


async def test_cancellation_kills_the_process_and_what_it_has_started(told: str) -> None:
    cancel = Cancelable(cleanup_grace=math.inf)
    pids: list[int] = []

    async def stop() -> None:
        pids.extend(await numbers_in(told))
        cancel.cancel_nowait()

    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(stop)
        with pytest.raises(ManualCancelation):
            async with cancel:
                await cancel.run_in_process(jobs.spin_with_a_child, told)
        worker, child = pids
        assert is_gone(worker)
        await seen(lambda: has_ended(child))


async def test_other_jobs_go_on(told: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    results: list[int] = []
    limiter = anyio.CapacityLimiter(2)

    async def other() -> None:
        async with Cancelable() as cancel:
            results.append(await cancel.run_in_process(jobs.wait_for, f"{told}-other", str(go), limiter=limiter))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        (pid,) = await numbers_in(f"{told}-other")
        with pytest.raises(TimeoutCancelation):
            async with Cancelable(timeout=SOON) as cancel:
                await cancel.run_in_process(jobs.spin, told, limiter=limiter)
        go.touch()
    assert results == [pid]


async def test_cancelled_before_there_is_a_process(told: str) -> None:
    limiter = anyio.CapacityLimiter(1)
    await limiter.acquire_on_behalf_of(told)
    async with nothing_left():
        with pytest.raises(TimeoutCancelation):
            async with Cancelable(timeout=SOON) as cancel:
                await cancel.run_in_process(jobs.spin, told, limiter=limiter)
    assert not Path(told).exists()


async def test_cancelled_while_the_process_starts(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[anyio.abc.Process] = []
    open_process = anyio.open_process

    async def open_and_cancel(*args: Any, **options: Any) -> anyio.abc.Process:
        started.append(await open_process(*args, **options))
        cancel.cancel_nowait()
        await anyio.lowlevel.checkpoint()
        return started[0]

    monkeypatch.setattr(anyio, "open_process", open_and_cancel)
    with pytest.raises(ManualCancelation):
        async with Cancelable() as cancel:
            await cancel.run_in_process(jobs.spin, told)
    assert started[0].returncode == -signal.SIGKILL
    assert is_gone(started[0].pid)
    assert not Path(told).exists()


async def test_foreign_cancellation_kills_as_well(told: str) -> None:
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks, Cancelable() as cancel:

            async def stop() -> None:
                pids.extend(await numbers_in(told))
                scope.cancel()

            pids: list[int] = []
            tasks.start_soon(stop)
            await cancel.run_in_process(jobs.spin, told)
    assert scope.cancelled_caught
    assert is_gone(pids[0])


async def test_idle_process_that_somebody_has_killed_is_replaced() -> None:
    async with Cancelable() as cancel:
        first = await cancel.run_in_process(jobs.process_id)
        os.kill(first, signal.SIGKILL)
        # The event loop may know of it by now, or not.
        wait_until(lambda: has_ended(first))
        assert await cancel.run_in_process(jobs.process_id) != first


async def test_idle_processes_are_ended_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "IDLE_SECONDS", SOON)
    async with nothing_left():
        async with Cancelable() as cancel:
            first = await cancel.run_in_process(jobs.process_id)
        await seen(lambda: is_gone(first) and not any("Pool" in str(task.name) for task in anyio.get_running_tasks()))


@pytest.mark.parametrize("door", ["handle", "decorator"])
async def test_hang_up_kills_the_process_of_the_request(door: str, told: str) -> None:
    app = FastAPI()

    async def endpoint(cancel: RequestCancelable) -> None:
        async with cancel:
            await cancel.run_in_process(jobs.spin, told)

    app.get("/")(with_cancelation(endpoint) if door == "decorator" else endpoint)
    async with nothing_left(), running(app) as call:
        (pid,) = await numbers_in(told)
        await call.listened_to()
        await call.hang_up()
    assert call.status == 499
    assert is_gone(pid)


async def test_idle_processes_do_not_hinder_a_shutdown() -> None:
    ended: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        ended.append("own lifespan")

    app = FastAPI(lifespan=cancelation_lifespan(lifespan))

    @app.get("/")
    async def divide(cancel: RequestCancelable) -> float:
        async with cancel:
            return await cancel.run_in_process(jobs.divide, 6, 3)

    async with CancelableClient(app) as client:
        assert (await client.get("/")).json() == 2
        begin_shutdown()
    assert ended == ["own lifespan"]


@pytest.mark.parametrize("options", [{"use_uvloop": False}, {"use_uvloop": True}, None])
def test_nothing_is_left_when_the_loop_ends(options: dict[str, bool] | None, told: str) -> None:
    pids: list[int] = []

    async def main() -> None:
        async def work() -> None:
            async with Cancelable() as cancel:
                pids.append(await cancel.run_in_process(jobs.process_id))
                await cancel.run_in_process(jobs.spin, told)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            pids.extend(await numbers_in(told))
            async with Cancelable() as cancel:
                pids.append(await cancel.run_in_process(jobs.process_id))
            raise KeyError

    with pytest.raises(ExceptionGroup):
        anyio.run(main, backend="trio" if options is None else "asyncio", backend_options=options)
    assert len(pids) == 3
    assert all(map(is_gone, pids))


SERVER = """
    import os, sys, time, anyio
    from cancelable_deps import Cancelable
    from tests import jobs

    async def main():
        async with Cancelable() as cancel, anyio.create_task_group() as tasks:
            tasks.start_soon(cancel.run_in_process, jobs.spin_with_a_child, sys.argv[1])
            while not os.path.exists(sys.argv[1]):
                await anyio.sleep(0.01)
            if sys.argv[3] == "forked" and os.fork() == 0:
                time.sleep(1000)
            await anyio.sleep(1000)

    anyio.run(main, backend=sys.argv[2])
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("how", ["alone", "forked"])
def test_nothing_is_left_when_the_server_is_killed(backend: str, how: str, told: str) -> None:
    command = [sys.executable, "-c", dedent(SERVER), told, backend, how]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as server:
        try:
            wait_until(Path(told).exists)
            worker, child = (int(number) for number in Path(told).read_text().split())
            if how == "forked":
                # It holds the other end of the worker's pipe open, and outlives the server.
                wait_until(lambda: len(psutil.Process(server.pid).children()) == 2)
            server.kill()
            server.wait(CEILING)
            wait_until(lambda: has_ended(worker) and has_ended(child))
        finally:
            for group in (server.pid, int(Path(told).read_text().split()[0])):
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)


def has_ended(pid: int) -> bool:
    """Also if nobody waits for it: in a container its new parent may not."""
    return is_gone(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(state: Any) -> None:
    deadline = time.monotonic() + CEILING
    while not state():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


GUARDED = """
    import anyio
    from cancelable_deps import Cancelable

    class Point:
        def __init__(self, x):
            self.x = x

    def double(point):
        return Point(2 * point.x)

    async def main():
        async with Cancelable() as cancel:
            for number in (21, 4):
                print((await cancel.run_in_process(double, Point(number))).x)

    if __name__ == "__main__":
        anyio.run(main)
"""


def run_script(path: Path, text: str, *how: str) -> subprocess.CompletedProcess[str]:
    path.write_text(dedent(text))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(how or [path.name])]
    return subprocess.run(
        command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=CEILING * 3, check=False
    )


@pytest.mark.parametrize("how", [(), pytest.param(("-m", "script"), marks=pytest.mark.real)])
def test_function_of_the_main_module(tmp_path: Path, how: tuple[str, ...]) -> None:
    assert run_script(tmp_path / "script.py", GUARDED, *how).stdout.split() == ["42", "8"]


@pytest.mark.real
def test_main_module_without_a_guard_is_told(tmp_path: Path) -> None:
    done = run_script(tmp_path / "script.py", GUARDED.replace('if __name__ == "__main__":', "if True:"))
    assert "Put the code that starts your program under `if __name__ == '__main__':`" in done.stderr
    assert done.returncode == 1
