"""Work that goes on without the block that has started it, and what is known of such work in its event loop."""

from __future__ import annotations

from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import anyio

from .block import current
from .errors import CancelationError
from .foreign import ThisTask, as_failure
from .log import logger
from .loops.current import current_loop, runs_in_this_thread
from .reasons import CancelationReason
from .registry import Registry
from .remaining import leave_hidden
from .shields import leave_shields
from .unwrap import copied

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextvars import Context

    from .block import Block
    from .loops.base import EventLoop, Worker

R = TypeVar("R")


class DetachedObserver(Protocol):
    """An object that is told of all detached work of an event loop, in that loop."""

    def work_began(self, work: Detached[Any]) -> None:
        """Note that ``work`` has joined `AllDetached.running`."""

    def work_ended(self, work: Detached[Any]) -> None:
        """Note that ``work`` has left `AllDetached.running`."""


class AllDetached(Registry[DetachedObserver]):
    """The detached work of one event loop.

    :ivar running: what has not ended, in the order of its start.
    """

    def __init__(self) -> None:
        self.running: dict[Detached[Any], None] = {}
        super().__init__(self.running)

    def add(self, work: Detached[Any]) -> None:
        """Add work that begins."""
        self.running[work] = None
        for observer in self.observers:
            observer.work_began(work)

    def remove(self, work: Detached[Any]) -> None:
        """Remove work that has ended."""
        self.running.pop(work, None)
        for observer in self.observers:
            observer.work_ended(work)
        self.note_removal()


def all_detached(loop: EventLoop) -> AllDetached:
    """Return the detached work of ``loop``."""
    known: AllDetached | None = loop.extras.get(AllDetached)
    if known is None:
        known = loop.extras[AllDetached] = AllDetached()
    return known


class Detached(Generic[R]):
    """Work that goes on without the request or block that has started it. `Cancelable.detach` returns it."""

    def __init__(self, block: Block, cancelable: Any, work: Callable[[], Awaitable[R]]) -> None:
        self.cancelable = cancelable
        """The `Cancelable` of the work, which the work has got, too."""

        around = current.get()
        owner: Any = block.owner_of_client or (None if around is None else around.owner_of_client)
        # A request that has ended has left a substitute, which nobody knows.
        self.origin: Any = owner if hasattr(owner, "scope") else None
        """The request that the work was started in, until the observers know of the work: it is not kept alive."""

        self._work: Callable[[], Awaitable[R]] | None = work
        self._value: Any = None
        self._error: BaseException | None = None
        self._is_asked_for = 0
        self._task: Worker | None = None
        self._ended = anyio.Event()

    def __repr__(self) -> str:
        state = "running" if not self.has_ended else "finished" if self._error is None else "failed"
        return f"<Detached {self.name} ({state})>"

    @property
    def name(self) -> str:
        """The name of the work, for logs and lists."""
        return str(self.cancelable.name)

    @property
    def has_ended(self) -> bool:
        """Whether the work has ended: it has returned, raised, or was stopped."""
        return self._ended.is_set()

    @property
    def error(self) -> BaseException | None:
        """The exception that the work has raised, or its `CancelationError`; ``None`` before its end, or without one."""
        return self._error

    def cancel_nowait(self, reason: CancelationReason = CancelationReason.MANUAL, message: str | None = None) -> bool:
        """Stop the work, and return at once. May be called in any thread; `Cancelable.cancel_nowait` says the rest."""
        return bool(self.cancelable.cancel_nowait(reason, message))

    async def result(self) -> R:
        """Wait for the work, and return what it returns. A caller that is cancelled meanwhile leaves the work running.

        :raises CancelationError: if the work was stopped.
        :raises Exception: what the work has raised, in a copy for each caller. It is not logged then.
        """
        self._is_asked_for += 1
        try:
            await self._ended.wait()
        except BaseException:
            self._is_asked_for -= 1
            if self.has_ended:
                # It has ended at this very moment, and was not logged, as somebody waited.
                self._log_error()
            raise
        if self._error is not None:
            # Who raises it adds its own frames.
            raise copied(self._error).with_traceback(self._error.__traceback__)
        value: R = self._value
        return value

    def start(self, loop: EventLoop, context: Context) -> None:
        """Start the work in ``loop``, which runs in this thread."""
        try:
            all_detached(loop).add(self)
            # Kept, because asyncio itself refers to its tasks weakly.
            self._task = loop.spawn(self._run_in(loop), context)
        except BaseException:
            self._end(loop)
            raise
        finally:
            self.origin = None

    def _run_in(self, loop: EventLoop) -> Callable[[], Any]:
        async def detached() -> None:
            try:
                await self._run()
            finally:
                self._end(loop)

        detached.__qualname__ = f"detached {self.name}"
        return detached

    def _end(self, loop: EventLoop) -> None:
        self._work = self._task = None
        self._ended.set()
        all_detached(loop).remove(self)

    async def _run(self) -> None:
        work, this_task = self._work, ThisTask()
        assert work is not None
        try:
            async with self.cancelable:
                self._value = await work()
        except BaseException as exc:
            if this_task.is_ended_by(exc):
                # The event loop ends.
                self._error = exc
                raise
            self._error = as_failure(exc, self.name)
            self._log_error()
            if exc.__traceback__ is not None:
                # Without this frame, which knows this object: a cycle otherwise.
                exc.__traceback__ = exc.__traceback__.tb_next

    def _log_error(self) -> None:
        error = self._error
        if error is None or self._is_asked_for:
            return
        if isinstance(error, CancelationError) and error.reason is self.cancelable.reason:
            logger.info("detached work was stopped: %s (%s)", self.name, self.cancelable.reason)
        else:
            logger.error("detached work failed: %s", self.name, exc_info=error)


def detach(block: Block, cancelable: Any, work: Callable[[], Awaitable[R]]) -> Detached[R]:
    """Start ``work`` in ``cancelable``, a `Cancelable` that has nothing around it.

    :raises RuntimeError: if no event loop runs in this thread, and ``block`` belongs to none.
    """
    context = copy_context()
    context.run(_leave_blocks)
    detached = Detached(block, cancelable, work)
    if runs_in_this_thread():
        detached.start(current_loop(), context)
        return detached
    known = block.loop or block.home()
    loop = None if known is None else known.home
    if loop is None:
        raise RuntimeError("detach() needs an event loop: call it in one, or in a thread that a request has started")
    loop.call_from_thread(detached.start, loop, context)
    return detached


def _leave_blocks() -> None:
    """Leave all blocks and shields, in a context: what is detached has nothing around it, and keeps no request alive."""
    current.set(None)
    leave_shields()
    leave_hidden()
