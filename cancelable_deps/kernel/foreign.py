"""Tell a cancellation of the running task from that of an awaited task, future or thread, in code of other authors."""

from __future__ import annotations

from asyncio import CancelledError
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import ref

from .loops.current import current_loop
from .unwrap import raise_as_it_is

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .loops.base import EventLoop

T = TypeVar("T")

EXITS: Final = (KeyboardInterrupt, SystemExit)
"""The exceptions that end the process. They are passed on, after all listeners have been called."""

RECEIVING: Final = "the server's receive()"
SENDING: Final = "the server's send()"


class ThisTask:
    """The running task, as it is before it calls or awaits code of another author.

    A ``CancelledError`` from an ``await`` may be that of an awaited task, future or thread, which other code has
    cancelled. The running task has not been cancelled then, so it is a failure of the awaited object like any other.
    """

    __slots__ = ("_asked", "_loop", "_task")

    def __init__(self) -> None:
        loop = self._loop = current_loop()
        task: Any = loop.current_task()
        # A task that ends cancelled keeps the exception, whose traceback knows this object: a cycle otherwise.
        self._task = None if task is None else ref(task)
        self._asked = loop.times_asked(task)

    def is_ended_by(self, exc: BaseException) -> bool:
        """Return whether ``exc`` ends this task or the process, so that it must be passed on."""
        if isinstance(exc, Exception):
            return False
        if isinstance(exc, BaseExceptionGroup):
            return any(map(self.is_ended_by, exc.exceptions))
        if isinstance(exc, GeneratorExit):
            # Either our coroutine is being closed, which does not happen while its task runs, or code has raised it.
            return not self._is_running
        return isinstance(exc, EXITS) or self._loop.is_cancelled_by(exc, self._asked)

    def is_anothers(self, exc: BaseException) -> bool:
        """Return whether ``exc`` is a cancellation, and not one of this task."""
        return isinstance(exc, CancelledError) and not self.is_ended_by(exc)

    @property
    def _is_running(self) -> bool:
        try:
            return current_loop().current_task() is (None if self._task is None else self._task())
        except RuntimeError:
            return False


def is_anothers(exc: BaseException, loop: EventLoop) -> bool:
    """Return whether ``exc`` is a cancellation, and not one of the running task.

    Unlike `ThisTask.is_anothers`, it does not look at the task before each call, which would cost every request time.
    So in a task that has ever been cancelled before, every cancellation is regarded as one of the task.
    """
    return isinstance(exc, CancelledError) and not loop.is_cancelled_by(exc, 0)


def told(exc: BaseException, loop: EventLoop, what: str) -> BaseException:
    """Return ``exc``; if it is a cancellation of another task, return a failure of ``what`` in its place."""
    return as_failure(exc, what) if is_anothers(exc, loop) else exc


async def with_own_failures(what: str, function: Callable[..., Awaitable[T]], *args: object) -> T:
    """Await ``function(*args)``; raise a cancellation of another task as a failure of ``what``."""
    this_task = ThisTask()
    try:
        return await function(*args)
    except CancelledError as exc:
        if this_task.is_anothers(exc):
            raise_as_it_is(as_failure(exc, what))
        raise


def call_in_thread(what: str, function: Callable[..., T], *args: object) -> T:
    """Call ``function(*args)``, in a thread that a coroutine waits for; raise a ``GeneratorExit`` as a failure.

    A ``GeneratorExit`` would not be raised where the coroutine waits: thrown into nested coroutines, it closes all but
    the outermost.
    """
    try:
        return function(*args)
    except GeneratorExit as exc:
        raise as_failure(exc, what) from exc


def as_failure(exc: BaseException, what: str) -> Exception:
    """Return ``exc`` as an error of ``what`` that cannot be mistaken for a cancellation or the end of a coroutine."""
    if isinstance(exc, Exception):
        return exc
    error = RuntimeError(f"{what} ended with {exc!r}, although it had not been cancelled")
    error.__cause__ = exc
    return error
