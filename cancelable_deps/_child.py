"""The program of a worker process; it is run as a file, and imports nothing of ours, so that it starts fast.

On its standard input it is sent pickled jobs, on its standard output it returns what became of them, each after its
length in eight bytes; before that, one byte says that the job has been taken.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
from functools import cache
from typing import IO, Any

PREPARING = "CANCELABLE_DEPS_PREPARING"
"""Set while the main module is imported once more: what starts a worker process then would start them without end."""

TAKEN = b"+"

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
    import select

    watched = select.poll()
    watched.register(jobs, 0)
    # Another child of the parent may hold the other end of the pipe open; hence the look at who our parent is.
    while not watched.poll(_SECONDS_BETWEEN_LOOKS * 1000) and os.getppid() == parent:
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _answer(job: bytes) -> bytes:
    try:
        result = _work(job)
    except Exception as exc:
        return _pickled_error(exc)
    except BaseException as exc:
        # A SystemExit would end the server that awaits the result.
        return _pickled_error(RuntimeError(f"the function ended with {exc!r}"))
    try:
        return pickle.dumps((True, result), pickle.HIGHEST_PROTOCOL)
    except Exception as exc:
        return _pickled_error(TypeError(f"what the function returned cannot be pickled: {exc}"))


def _work(job: bytes) -> Any:
    path, main_module, call = pickle.loads(job)
    sys.path = path
    if main_module is not None:
        _prepare(**main_module)
    func, args = pickle.loads(call)
    return func(*args)


@cache
def _prepare(**main_module: str) -> None:
    from multiprocessing import spawn

    os.environ[PREPARING] = "1"
    try:
        spawn.prepare(main_module)
    finally:
        del os.environ[PREPARING]


def _pickled_error(exc: Exception) -> bytes:
    where = "".join(traceback.format_exception(exc))
    exc.add_note(f"In the worker process:\n{where}")
    try:
        pickled = pickle.dumps((False, exc), pickle.HIGHEST_PROTOCOL)
        pickle.loads(pickled)
    except Exception:
        stand_in = RuntimeError(f"{type(exc).__name__}, which cannot be pickled: {exc}")
        stand_in.add_note(f"In the worker process:\n{where}")
        return pickle.dumps((False, stand_in), pickle.HIGHEST_PROTOCOL)
    return pickled


if __name__ == "__main__":
    main()
