"""The worker processes of an event loop. Each runs one job at a time, so a job is stopped by ending its process.

Why not `anyio.to_process`? It loses a process whose start is cancelled. It runs the main module of the server again in
each process, which fails with `python -m hypercorn` and `-m granian`. And its processes do not end when the server is
killed during a job, nor do they end the processes that they have started.
"""

from __future__ import annotations

import inspect
import os
import pickle
import signal
import sys
from contextvars import Context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_process
from anyio.streams.buffered import BufferedByteReceiveStream

from . import child as _child

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio import CapacityLimiter
    from anyio.abc import Process

    from ..loops.base import EventLoop, Worker

IDLE_SECONDS = 60.0
"""The seconds that a process waits for the next job before it is ended."""


def pool_of(loop: EventLoop) -> Pool:
    """Return the pool of ``loop``, which is created on the first call."""
    pool: Pool | None = loop.extras.get(Pool)
    if pool is None:
        pool = loop.extras[Pool] = Pool(loop)
    return pool


class Pool:
    """The processes of one loop: the busy ones, and the idle ones, with the most recently used last.

    A background task, the keeper, runs while there is any process. It ends the processes that have been idle for too
    long, and all of them when the loop ends.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._all: set[WorkerProcess] = set()
        self._idle: list[WorkerProcess] = []
        self._keeper: Worker | None = None

    async def run(self, func: Callable[..., Any], args: tuple[Any, ...], limiter: CapacityLimiter | None) -> Any:
        """Run ``func(*args)`` in a process, and return its result or raise its exception."""
        job = _job(func, args)
        async with limiter or anyio.to_process.current_default_process_limiter():
            answer = await self._ask(job, func)
        body = memoryview(answer)[1:]
        if answer[:1] == _child.RESULT:
            return _result(body, func)
        raise _error(pickle.loads(body))

    async def _ask(self, job: bytes, func: Callable[..., Any]) -> bytes:
        while (worker := await self._take()) is not None:
            try:
                return await self._give(worker, job, func)
            except anyio.BrokenWorkerProcess:
                if worker.has_taken_job:
                    raise
                # The process was ended from outside while it was idle: another process can run the job.
        return await self._give(await self._start(), job, func)

    async def _give(self, worker: WorkerProcess, job: bytes, func: Callable[..., Any]) -> bytes:
        try:
            answer = await worker.ask(job)
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError, ConnectionError) as exc:
            code = await self._end(worker)
            raise anyio.BrokenWorkerProcess(
                f"the worker process ended by itself ({_how(code)}) before {_name(func)}() had returned"
            ) from exc
        except BaseException:
            await self._end(worker)
            raise
        worker.idle_since = self._loop.time()
        self._idle.append(worker)
        return answer

    async def _take(self) -> WorkerProcess | None:
        while self._idle:
            worker = self._idle.pop()
            if worker.process.returncode is None:
                return worker
            # The process has ended by itself, or was ended from outside.
            await self._end(worker)
        return None

    async def _start(self) -> WorkerProcess:
        # Shielded, because a start that is cancelled half-way would lose the process.
        worker = WorkerProcess()
        with anyio.CancelScope(shield=True):
            await worker.start()
        self._all.add(worker)
        if self._keeper is None:
            self._keeper = self._loop.spawn(self.keep, Context())
        return worker

    async def _end(self, worker: WorkerProcess) -> int:
        """Kill the process, wait for its end, and return its exit code."""
        code = await worker.end()
        self._all.discard(worker)
        if not self._all and self._keeper is not None:
            keeper, self._keeper = self._keeper, None
            keeper.cancel()
        return code

    async def keep(self) -> None:
        """End idle processes after a while, and all processes when the loop ends."""
        me = self._keeper
        try:
            while self._keeper is me:
                await anyio.sleep(IDLE_SECONDS / 4)
                await self._end_idle(self._loop.time() - IDLE_SECONDS)
        finally:
            if self._keeper is me:
                self._keeper = None
                self._idle.clear()
                for worker in list(self._all):
                    await self._end(worker)

    async def _end_idle(self, before: float) -> None:
        too_long = [worker for worker in self._idle if worker.idle_since < before]
        self._idle = [worker for worker in self._idle if worker not in too_long]
        for worker in too_long:
            await self._end(worker)


class WorkerProcess:
    """One process and its pipes."""

    process: Process
    idle_since = 0.0
    """The time of the loop's clock at which the last job has ended."""

    has_taken_job = False
    """Whether the process has confirmed that it runs the job."""

    async def start(self) -> None:
        """Start the process."""
        program = [sys.executable, "-P", str(Path(_child.__file__))]
        process = await anyio.open_process(program, stderr=None, start_new_session=os.name == "posix")
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._jobs = process.stdin
        self._answers = BufferedByteReceiveStream(process.stdout)

    async def ask(self, job: bytes) -> bytes:
        """Send a job, and return the answer."""
        self.has_taken_job = False
        await self._jobs.send(len(job).to_bytes(8) + job)
        self.has_taken_job = await self._answers.receive_exactly(1) == _child.TAKEN
        header = await self._answers.receive_exactly(8)
        return await self._answers.receive_exactly(int.from_bytes(header))

    async def end(self) -> int:
        """Kill the process, wait for its end, shielded, and return its exit code."""
        self._kill()
        with anyio.CancelScope(shield=True):
            await self.process.aclose()
        code = self.process.returncode
        assert code is not None
        return code

    def _kill(self) -> None:
        # Not if it has ended by itself: another process may have its id by now.
        if self.process.returncode is None:
            try:
                # The process leads a session of its own, so this kills all that it has started as well.
                os.killpg(self.process.pid, signal.SIGKILL)
            except (AttributeError, PermissionError):
                self.process.kill()
            except ProcessLookupError:
                pass


def _job(func: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    if inspect.iscoroutinefunction(func):
        raise TypeError(f"run_in_process() takes a plain function: {_name(func)}() is `async def`. Await it here.")
    if _child.PREPARING in os.environ:
        raise RuntimeError(
            "run_in_process() was called while a worker process imported your main module. Put the code that starts "
            "your program under `if __name__ == '__main__':`."
        )
    try:
        call = pickle.dumps((func, args), pickle.HIGHEST_PROTOCOL)
    except Exception as exc:
        raise TypeError(
            f"run_in_process() sends {_name(func)}() and its arguments to another process, and they cannot be pickled "
            f"({exc}). Use a function from the top level of a module, not a lambda or closure, and plain data."
        ) from exc
    return pickle.dumps((sys.path, _main_module() if b"__main__" in call else None, call), pickle.HIGHEST_PROTOCOL)


def _result(pickled: memoryview, func: Callable[..., Any]) -> Any:
    try:
        return pickle.loads(pickled)
    except KeyboardInterrupt:
        # Ctrl+C is meant for the server.
        raise
    except BaseException as exc:
        raise TypeError(
            f"the result of {_name(func)}() cannot be unpickled in this process ({_child.text_of(exc)}). Return plain "
            "data, or objects of classes that can be imported here."
        ) from exc


def _error(told: tuple[Any, ...]) -> Exception:
    """Return the exception of a job, or an error that names it if it cannot be unpickled here."""
    report = _child.Report(*told)
    error = _unpickled(report.pickled)
    if error is None and report.members is not None:
        error = ExceptionGroup(report.message, [_error(member) for member in report.members])
    if error is None:
        error = RuntimeError(report.stand_in)
    if report.traceback:
        # Added here, because pickling may lose the notes of the exception. `add_note` may fail.
        _quietly(lambda: error.add_note(f"In the worker process:\n{report.traceback}"))
    return error


def _unpickled(pickled: bytes | None) -> Exception | None:
    error = None if pickled is None else _quietly(lambda: pickle.loads(pickled))
    # A plain BaseException would end the server or look like a cancellation, and no coroutine can raise StopIteration.
    return error if isinstance(error, Exception) and not isinstance(error, StopIteration) else None


def _quietly(call: Callable[[], Any]) -> Any:
    """Return the result of ``call``, which runs code of the user; ``None`` if it raises."""
    try:
        return call()
    except KeyboardInterrupt:
        # Ctrl+C is meant for the server.
        raise
    except BaseException:
        return None


def _main_module() -> dict[str, str]:
    # The data that `multiprocessing` gives a spawned process about the parent's main module, which has the function.
    from multiprocessing import spawn  # loads late: few applications use processes

    known = spawn.get_preparation_data("cancelable_deps")
    return {name: known[name] for name in known if name.startswith("init_main_from")}


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__qualname__", repr(func))


def _how(code: int) -> str:
    # A real-time signal has no name in Python.
    name = next((known.name for known in signal.Signals if known == -code), -code)
    return f"signal {name}" if code < 0 else f"exit code {code}"
