"""Whose cancellation it is that comes out of something which somebody else has written."""

from __future__ import annotations

from asyncio import CancelledError
from typing import TYPE_CHECKING, Final, TypeVar

from .loops.current import current_loop
from .unwrap import raise_as_it_is

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .loops.base import EventLoop

T = TypeVar("T")

EXITS: Final = (KeyboardInterrupt, SystemExit)
"""What ends the process: it passes through, after everybody has been told."""

RECEIVING: Final = "the server's receive()"
SENDING: Final = "the server's send()"


class ThisTask:
    """The running task, as it is before it calls or awaits what somebody else has written.

    A `CancelledError` that comes out of an ``await`` may be that of a task, a future or a thread which was awaited and
    which somebody else has cancelled. Nobody has asked us to end then: it is a failure of that thing, like any other.
    """

    __slots__ = ("_asked", "_loop", "_task")

    def __init__(self) -> None:
        loop = self._loop = current_loop()
        self._task = loop.current_task()
        self._asked = loop.times_asked(self._task)

    def is_ended_by(self, exc: BaseException) -> bool:
        """Whether ``exc`` ends this task, or the process: whoever gets it is to pass it on."""
        if isinstance(exc, Exception):
            return False
        if isinstance(exc, BaseExceptionGroup):
            return any(map(self.is_ended_by, exc.exceptions))
        if isinstance(exc, GeneratorExit):
            # Our coroutine is being closed, which nobody does while its task runs; or somebody has raised it by hand.
            return not self._is_running
        return isinstance(exc, EXITS) or self._loop.is_cancelled_by(exc, self._asked)

    def is_anothers(self, exc: BaseException) -> bool:
        """Whether ``exc`` is a cancellation, and not of this task."""
        return isinstance(exc, CancelledError) and not self.is_ended_by(exc)

    @property
    def _is_running(self) -> bool:
        try:
            return current_loop().current_task() is self._task
        except RuntimeError:
            return False


def is_anothers(exc: BaseException, loop: EventLoop) -> bool:
    """As `ThisTask.is_anothers`, where looking at the task before each call would cost every request.

    A task that was asked to end at any time before is taken for one that ends.
    """
    return isinstance(exc, CancelledError) and not loop.is_cancelled_by(exc, 0)


def told(exc: BaseException, loop: EventLoop, what: str) -> BaseException:
    """Return ``exc``, or if it `is_anothers` the failure of ``what`` that it stands for."""
    return as_failure(exc, what) if is_anothers(exc, loop) else exc


async def with_own_failures(what: str, function: Callable[..., Awaitable[T]], *args: object) -> T:
    """Await ``function(*args)``; another's cancellation arrives as a failure of ``what``."""
    this_task = ThisTask()
    try:
        return await function(*args)
    except CancelledError as exc:
        if this_task.is_anothers(exc):
            raise_as_it_is(as_failure(exc, what))
        raise


def call_in_thread(what: str, function: Callable[..., T], *args: object) -> T:
    """Call ``function(*args)``, in a thread that a coroutine waits for.

    A ``GeneratorExit`` would not be raised where it waits: thrown into coroutines, it closes all but the outermost.
    """
    try:
        return function(*args)
    except GeneratorExit as exc:
        raise as_failure(exc, what) from exc


def as_failure(exc: BaseException, what: str) -> Exception:
    """Return ``exc`` as an error of ``what`` that nobody takes for a cancellation, or for the end of a coroutine."""
    if isinstance(exc, Exception):
        return exc
    error = RuntimeError(f"{what} ended with {exc!r}, although nobody had cancelled it")
    error.__cause__ = exc
    return error
