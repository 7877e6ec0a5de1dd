"""The program of a worker process; it is run as a file, and imports nothing of ours, so that it starts fast.

On its standard input it is sent pickled jobs, on its standard output it returns what became of them, each after its
length in eight bytes; before that, one byte says that the job has been taken. An answer begins with one byte as well:
it is a pickled result, or a report of an error, which any process can read.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
from functools import cache
from typing import IO, Any, NamedTuple

PREPARING = "CANCELABLE_DEPS_PREPARING"
"""Set while the main module is imported once more: what starts a worker process then would start them without end."""

TAKEN = b"+"
RESULT = b"="
ERROR = b"!"

_SECONDS_BETWEEN_LOOKS = 2.0


def main() -> None:
    jobs, results = _take_pipes()
    if hasattr(os, "getppid") and hasattr(signal, "SIGKILL"):
        threading.Thread(target=_end_with, args=(os.getppid(), jobs.fileno()), daemon=True).start()
    while len(header := jobs.read(8)) == 8:
        job = jobs.read(int.from_bytes(header))
        _send(results, TAKEN)
        answer = _answer(job)
        _send(results, len(answer).to_bytes(8) + answer)


def _send(results: IO[bytes], data: bytes) -> None:
    results.write(data)
    results.flush()


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Out of the way of the functions: what they print goes to the standard error, and they have nothing to read."""
    jobs, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _forget(jobs, results))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    # It was opened as a pipe's, which keeps what it has until it is full, and we end by being killed.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return jobs, results


def _forget(*pipes: IO[bytes]) -> None:
    """In what a job has forked: it must not take the next job, nor answer, nor hide our end from who awaits an answer."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for pipe in pipes:
        os.dup2(nothing, pipe.fileno(), inheritable=False)
    os.close(nothing)


def _end_with(parent: int, jobs: int) -> None:
    """End this process and all that it has started as soon as the parent is dead, however that died."""
    import select  # loads late: not on every system

    watched = select.poll()
    watched.register(jobs, 0)
    # Another child of the parent may hold the other end of the pipe open; hence the look at who our parent is.
    while not watched.poll(_SECONDS_BETWEEN_LOOKS * 1000) and os.getppid() == parent:
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _answer(job: bytes) -> bytes:
    # Whatever it is: a SystemExit would end the server that awaits the result, and this process besides.
    try:
        result = _work(job)
    except BaseException as exc:
        return _error_answer(exc)
    try:
        return RESULT + pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
    except BaseException as exc:
        return _error_answer(TypeError(f"what the function returned cannot be pickled: {text_of(exc)}"))


def _work(job: bytes) -> Any:
    path, main_module, call = pickle.loads(job)
    sys.path = path
    if main_module is not None:
        _prepare(**main_module)
    func, args = pickle.loads(call)
    return func(*args)


@cache
def _prepare(**main_module: str) -> None:
    from multiprocessing import spawn  # loads late: few have a process

    os.environ[PREPARING] = "1"
    try:
        spawn.prepare(main_module)
    finally:
        del os.environ[PREPARING]


class Report(NamedTuple):
    """What is told of an error, in terms that need no class of the job's."""

    pickled: bytes | None
    """Itself; it may be that nobody else can unpickle it."""

    stand_in: str
    """What is said in its place."""

    message: str
    members: list[tuple[Any, ...]] | None
    """Of an exception group."""

    traceback: str


def _error_answer(exc: BaseException) -> bytes:
    try:
        report = _report(exc, _traceback_of(exc))
    except BaseException:
        # A group that is nested too deeply.
        report = Report(None, f"{_name_of(exc)}, which cannot be pickled", "", None, _traceback_of(exc))
    return ERROR + pickle.dumps(tuple(report), pickle.HIGHEST_PROTOCOL)


def _report(exc: BaseException, where: str = "") -> Report:
    try:
        pickled = pickle.dumps(exc, pickle.HIGHEST_PROTOCOL)
    except BaseException:
        pickled = None
    if not isinstance(exc, BaseExceptionGroup):
        return Report(pickled, _stand_in(exc), "", None, where)
    kind = type(exc)
    message = "".join(["", str(exc.args[0])]) if kind in (ExceptionGroup, BaseExceptionGroup) else text_of(exc)
    members = [tuple(_report(member)) for member in BaseExceptionGroup.exceptions.__get__(exc)]
    return Report(pickled, _stand_in(exc), message, members, where)


def _stand_in(exc: BaseException) -> str:
    if isinstance(exc, Exception) and not isinstance(exc, StopIteration):
        return f"{_name_of(exc)}, which cannot be pickled: {text_of(exc, named=False)}"
    return f"the function ended with {text_of(exc)}"


def text_of(exc: BaseException, *, named: bool = True) -> str:
    """What an exception says of itself, even if it cannot."""
    name = f"{_name_of(exc)}: " if named else ""
    try:
        # No subclass of str, which somebody else might not have.
        return "".join([name, str(exc)])
    except BaseException as failure:
        return f"{name}<its text cannot be had: {_name_of(failure)}>"


def _name_of(exc: BaseException) -> str:
    # Not what a metaclass makes of it.
    name: str = type.__dict__["__name__"].__get__(type(exc))
    return name


def _traceback_of(exc: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(exc))
    except BaseException:
        # Its notes, or those of one that it came from, are none.
        return "".join([*traceback.format_tb(exc.__traceback__), text_of(exc)])


if __name__ == "__main__":
    main()
