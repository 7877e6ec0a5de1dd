"""The program of a worker process. It is run as a file and imports nothing of this package, so that it starts fast.

It reads pickled jobs from its standard input, each after its length in eight bytes. For each job it writes to its
standard output the byte `TAKEN` when it starts, then the length of the answer in eight bytes, and the answer. The first
byte of an answer is `RESULT`, before the pickled result, or `ERROR`, before a report that every process can unpickle.
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
"""The environment variable that is set while the main module is imported again.

A worker process that the main module started then would import it in turn, and so without end.
"""

TAKEN = b"+"
RESULT = b"="
ERROR = b"!"

_SECONDS_BETWEEN_LOOKS = 2.0


def main() -> None:
    """Run jobs until the standard input ends."""
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
    """Return copies of the standard input and output, and make them useless for the jobs.

    The standard output of a job becomes the standard error, and its standard input is empty.
    """
    jobs, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _forget(jobs, results))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    # As a pipe it has a block buffer, which is lost when this process is killed.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return jobs, results


def _forget(*pipes: IO[bytes]) -> None:
    """Detach a process that a job has forked from the pipes.

    It must not read the next job, nor write an answer, nor keep the pipes open when this process has ended.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for pipe in pipes:
        os.dup2(nothing, pipe.fileno(), inheritable=False)
    os.close(nothing)


def _end_with(parent: int, jobs: int) -> None:
    """End this process and all that it has started as soon as the parent has ended, even if it was killed."""
    import select  # loads late: not on every system

    watched = select.poll()
    watched.register(jobs, 0)
    # Another child of the parent may keep the other end of the pipe open, so the id of the parent is checked as well.
    while not watched.poll(_SECONDS_BETWEEN_LOOKS * 1000) and os.getppid() == parent:
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _answer(job: bytes) -> bytes:
    # Every exception: a SystemExit would end the server that awaits the result, and this process as well.
    try:
        result = _work(job)
    except BaseException as exc:
        return _error_answer(exc)
    try:
        return RESULT + pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
    except BaseException as exc:
        return _error_answer(TypeError(f"the result of the function cannot be pickled: {text_of(exc)}"))


def _work(job: bytes) -> Any:
    path, main_module, call = pickle.loads(job)
    sys.path = path
    if main_module is not None:
        _prepare(**main_module)
    func, args = pickle.loads(call)
    return func(*args)


@cache
def _prepare(**main_module: str) -> None:
    from multiprocessing import spawn  # loads late: few applications use processes

    os.environ[PREPARING] = "1"
    try:
        spawn.prepare(main_module)
    finally:
        del os.environ[PREPARING]


class Report(NamedTuple):
    """The report of an error, in built-in types that every process can unpickle."""

    pickled: bytes | None
    """The exception, which another process may fail to unpickle; ``None`` if it cannot be pickled."""

    stand_in: str
    """The text of an error that stands for the exception if it cannot be unpickled."""

    message: str
    """The message of an exception group."""

    members: list[tuple[Any, ...]] | None
    """The reports of the exceptions in an exception group; ``None`` if the exception is no group."""

    traceback: str


def _error_answer(exc: BaseException) -> bytes:
    try:
        report = _report(exc, _traceback_of(exc))
    except BaseException:
        # Such as a group that is nested too deeply.
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
    """Return the name and text of an exception, even if its ``__str__`` fails."""
    name = f"{_name_of(exc)}: " if named else ""
    try:
        # A plain `str`, because another process may not have the class of a subclass.
        return "".join([name, str(exc)])
    except BaseException as failure:
        return f"{name}<its text is not available: {_name_of(failure)}>"


def _name_of(exc: BaseException) -> str:
    # Not `__name__`, which a metaclass may override.
    name: str = type.__dict__["__name__"].__get__(type(exc))
    return name


def _traceback_of(exc: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(exc))
    except BaseException:
        # The notes of the exception, or of its cause or context, are not strings.
        return "".join([*traceback.format_tb(exc.__traceback__), text_of(exc)])


if __name__ == "__main__":
    main()
