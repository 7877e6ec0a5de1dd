"""Blocks in worker threads, and functions that a block runs in a worker thread or a worker process."""

from __future__ import annotations

import inspect
import threading
from asyncio import CancelledError
from concurrent.futures import CancelledError as CallCancelled
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread

from . import foreign as _foreign
from .block import Block, current
from .errors import CancelationError
from .foreign import as_failure, told, with_own_failures
from .log import logger
from .loops.current import current_loop, runs_in_this_thread
from .loops.thread_loop import ThreadLoop, ThreadScope
from .members import with_one_more, without
from .processes.pool import pool_of
from .token import close_unawaited
from .unwrap import raise_as_it_is

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio import CapacityLimiter

    from .loops.base import EventLoop
    from .token import CancelationToken, Cause


def enter_in_thread(block: Block) -> None:
    """Open ``block`` with a plain ``with``, in a thread without an event loop."""
    if block.loop is not None:
        raise block.entered_before()
    _refuse_a_running_loop(block)
    block.prepare_for_thread()
    parent = current.get()
    home = block.home() or _home_of(parent)
    if block.condition is not None and home is None:
        raise TypeError(
            "a condition is checked in an event loop, and neither a request nor an enclosing block gives this thread "
            "one. Check the condition yourself, next to `cancel.check()`."
        )
    loop = block.loop = ThreadLoop(home)
    block.started = loop.time()
    if block.timeout is not None:
        block.own_deadline = block.started + block.timeout
    _listen(block)
    block.scope = ThreadScope(threading.get_ident())
    _link(block, parent)
    block.outside = current.set(block)
    if home is not None:
        home.call_from_thread(_watch, block, home)


def leave_in_thread(block: Block, exc: BaseException | None) -> BaseException | None:
    """Close a block that was entered by `enter_in_thread`, and return the exception that should leave it."""
    loop = block.loop
    assert loop is not None
    block.scope = None
    block.ended = loop.time()
    block.unlisten()
    _unlink(block)
    with suppress(ValueError):
        # FastAPI enters a generator dependency in one thread and leaves it in another, each with its own context.
        current.reset(block.outside)
    del block.outside
    _close_what_cannot_be_awaited(block)
    outcome = exc if exc is None else block.outcome(exc, exc)
    if _home_of(block) is None:
        block.let_go()
    # The loop runs calls from threads in their order: this one after that of `enter_in_thread`, and before the loop
    # learns of the end of this thread's work.
    loop.call_from_thread(_stop, block)
    return outcome


def _watch(block: Block, home: EventLoop) -> None:
    block.rearm()
    block.watch(home)


def _stop(block: Block) -> None:
    block.stop_timers()
    block.unwatch()
    block.let_go()


def _refuse_a_running_loop(block: Block) -> None:
    if not runs_in_this_thread():
        return
    raise TypeError(
        f"an event loop runs in this thread, so {block!r} must be entered by `async with`. A plain `with` is for "
        "worker threads: a `def` endpoint, or a function given to `run_in_thread()`."
    )


def _listen(block: Block) -> None:
    if block.upstream is not None:
        block.upstream.listen(block)
    if block.timeout == 0:
        block.expire()
    if block.cause is not None:
        block.refuse(None, block.cause)


def _home_of(parent: Block | None) -> EventLoop | None:
    if parent is None or parent.loop is None:
        return None
    return parent.loop.home


def _link(block: Block, parent: Block | None) -> None:
    if parent is None or not parent.is_open:
        return
    block.parent = parent
    if parent.task == block.task:
        parent.children = with_one_more(parent.children, block)
    elif block.upstream is not parent.token:
        # Not one of its children: a block in the loop waits for these, and is notified in the loop when they are left.
        block.told_by_parent = _Marker(block)
        parent.token.listen(block.told_by_parent)


def _unlink(block: Block) -> None:
    parent = block.parent
    if parent is not None and parent.children and parent.task == block.task:
        parent.children = without(parent.children, block)
    if parent is not None and block.told_by_parent is not None:
        parent.token.unlisten(block.told_by_parent)


def _close_what_cannot_be_awaited(block: Block) -> None:
    for awaitable in block.to_await or ():
        logger.warning("an async on_cancel callback of %r was not awaited: a `with` block takes plain functions", block)
        close_unawaited(awaitable)


class _Marker:
    """A listener that marks a block in a thread when the block around the thread is cancelled."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None:
        self._block.mark(f"The enclosing {self._block.parent!r}")


async def run_in_thread(
    block: Block,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    abandon_on_cancel: bool,
    limiter: CapacityLimiter | None,
) -> Any:
    """Run ``func`` in a worker thread; see `Cancelable.run_in_thread`."""
    _refuse_outside(block, "run_in_thread")
    if inspect.iscoroutinefunction(func):
        raise TypeError(f"run_in_thread() takes a plain function, and {func!r} is `async def`: await it here")
    try:
        return await call_in_thread(partial(func, *args), abandon_on_cancel, limiter)
    except CancelationError as error:
        _tell_enclosing_blocks(error)
        raise


async def run_in_process(
    block: Block, func: Callable[..., Any], args: tuple[Any, ...], limiter: CapacityLimiter | None
) -> Any:
    """Run ``func`` in a worker process; see `Cancelable.run_in_process`."""
    _refuse_outside(block, "run_in_process")
    # Pickling and unpickling run code of the user in this process as well.
    return await with_own_failures("the job of a process", pool_of(current_loop()).run, func, args, limiter)


async def call_in_thread(
    call: Callable[[], Any], abandon_on_cancel: bool = False, limiter: CapacityLimiter | None = None
) -> Any:
    """Run ``call`` in a worker thread, which keeps its token of the limiter until it has really ended."""
    call = partial(_foreign.call_in_thread, _JOB, call)
    if abandon_on_cancel:
        return await _Abandonable(call, limiter).run()
    try:
        return await anyio.to_thread.run_sync(call, limiter=limiter)
    except CancelledError as exc:
        if _is_being_stopped():
            raise
        raise_as_it_is(told(exc, current_loop(), _JOB))


def _refuse_outside(block: Block, method: str) -> None:
    if not block.is_open or (block.loop is not None and block.loop.is_thread):
        raise RuntimeError(
            f"{method}() of {block!r} was called outside of its block, where nothing can cancel it: call it inside "
            "`async with cancel:`."
        )


def _is_being_stopped() -> bool:
    """Return whether a block around the caller is cancelled.

    A thread may have called ``check_cancelled()`` of anyio, which raises the ``CancelledError`` then.
    """
    block = current.get()
    while block is not None and block.cause is None:
        block = block.parent
    return block is not None


def _tell_enclosing_blocks(error: CancelationError) -> None:
    # The error came through the thread: the cancellation must not interrupt the cleanup of this task as well.
    block = current.get()
    while block is not None:
        if block.cause is not None:
            block.is_told(block.cause, error)
        block = block.parent


_JOB: Final = "the function in a worker thread"


class _Abandonable:
    """A call in a worker thread that its caller may abandon.

    A task of this package waits for the thread, and not the caller: the ``abandon_on_cancel`` of anyio returns the
    token of the limiter while the thread still runs, and so starts more threads than the limiter allows.
    """

    def __init__(self, call: Callable[[], Any], limiter: CapacityLimiter | None) -> None:
        self._call = call
        self._limiter = limiter
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()
        self._abandoned = False
        self._result: Any = None
        self._error: BaseException | None = None

    async def run(self) -> Any:
        """Wait for the result of the call; abandon it if the caller is cancelled."""
        current_loop().spawn(self._wait, copy_context())
        try:
            await self._ended.wait()
        except BaseException:
            self._abandon()
            raise
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None
        return self._result

    def _abandon(self) -> None:
        if self._ended.is_set():
            self._log_error()
        self._abandoned = True
        # It ends the wait for a free thread, and `anyio.from_thread.check_cancelled()` in the thread looks at it.
        self._scope.cancel()

    async def _wait(self) -> None:
        self._error = RuntimeError("the event loop was closed before the thread had ended")
        try:
            with self._scope:
                await anyio.to_thread.run_sync(self._run, limiter=self._limiter)
        finally:
            if self._abandoned:
                self._log_error()
            elif isinstance(self._error, CancelledError):
                # Nothing has been cancelled by this package, so it is a failure of the call.
                self._error = as_failure(self._error, _JOB)
            self._ended.set()

    def _run(self) -> None:
        self._error = None
        try:
            self._result = self._call()
        except BaseException as exc:
            self._error = exc

    def _log_error(self) -> None:
        error = self._error
        quiet = (CancelationError, CallCancelled, anyio.get_cancelled_exc_class())
        if error is not None and error.__traceback__ is not None and not isinstance(error, quiet):
            logger.error("a thread failed after its caller had been cancelled: %r", error, exc_info=error)
