"""Sections of a block with a blocking call, which a function of the user interrupts when the block is cancelled."""

from __future__ import annotations

import math
import threading
from asyncio import CancelledError
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, Self

import anyio
from starlette.exceptions import HTTPException

from .errors import CancelationError
from .log import logger
from .loops.current import current_loop, runs_in_this_thread
from .options import runs_only_when_awaited
from .remaining import seconds_left
from .shields import is_shielded, open_sections
from .token import call_logged

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Token
    from types import TracebackType

    from .block import Block
    from .loops.base import Event, EventLoop
    from .token import CancelationToken, Cause

_AGAIN: Final = 0.25
_AT_LAST: Final = 4.0
"""Seconds until ``stop`` is called again: at first, and at most, as each pause is twice as long as the one before."""


class Interrupting:
    """A section in which ``stop`` interrupts a blocking call, for ``with`` in a thread and ``async with`` in a loop.

    Made by `Cancelable.interrupting`, for one use.
    """

    _was_entered = _is_shielded = _has_stopped = _is_given_up = False
    _holds = 0
    _waiter: tuple[EventLoop, Event] | None = None
    _outside: Token[Any]

    def __init__(self, block: Block, stop: Callable[[], object], discard: Callable[[], object] | None) -> None:
        _check_plain(stop, "stop")
        if discard is not None:
            _check_plain(discard, "discard")
        self._block = block
        self._stop = stop
        self._discard = discard
        # `pop` is atomic: a cancellation may come twice, and in a signal handler, which must not wait for a lock.
        self._first_cancellation = [None]
        self._left = threading.Event()
        self._not_held = threading.Event()
        self._not_held.set()
        # Held while `stop` runs.
        self._calling = threading.Lock()

    def __enter__(self) -> Self:
        if runs_in_this_thread():
            raise TypeError(
                "an event loop runs in this thread, and would be blocked: write `async with cancel.interrupting(...)` "
                "around `await cancel.run_in_thread(...)`, or a plain `with` in the function that runs in the thread."
            )
        self._enter()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()
        self._wait_for_stop()
        self._raise_reason(exc)

    async def __aenter__(self) -> Self:
        self._enter()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(exc, anyio.get_cancelled_exc_class()) and not self._is_shielded:
                # The thread may run on, and nobody waits for it: if it is abandoned, or by `task.cancel()` on asyncio.
                self._interrupt()
                await self._wait_in_loop(lambda: self._has_stopped and not self._calling.locked())
        finally:
            self._leave()
            await self._wait_in_loop(lambda: self._is_given_up or not self._calling.locked())
        self._raise_reason(exc)

    def _enter(self) -> None:
        block = self._block
        if not block.is_open:
            raise RuntimeError(
                f"interrupting() of {block!r} was entered outside of its block, where nothing can cancel it: enter it "
                "inside `async with cancel:`, or `with cancel:` in a thread."
            )
        if self._was_entered:
            raise RuntimeError("interrupting() serves one section: call it again for another one")
        self._is_shielded = is_shielded(block)
        if not self._is_shielded:
            block.check()
        self._was_entered = True
        self._context = copy_context()
        self._outside = open_sections.set((*open_sections.get(), self))
        if self._is_shielded:
            return
        block.token.listen(self)
        loop = block.loop
        if loop is not None and loop.is_thread and loop.home is None and block.deadline < math.inf:
            # No event loop has a timer for the deadline.
            threading.Thread(target=self._watch_deadline, name="cancelable_deps deadline", daemon=True).start()

    def _leave(self) -> None:
        self._block.token.unlisten(self)
        self._left.set()
        self._not_held.set()
        with suppress(ValueError):
            # FastAPI enters a generator dependency in one thread and leaves it in another, each with its own context.
            open_sections.reset(self._outside)

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None:
        """Interrupt the call, because the block is cancelled."""
        self._interrupt()

    def _interrupt(self) -> None:
        try:
            self._first_cancellation.pop()
        except IndexError:
            return
        # A daemon, because a `stop` that hangs must not keep the process from ending.
        thread = threading.Thread(
            target=self._context.run, args=(self._run,), name="cancelable_deps interrupting", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            self._has_stopped = True
            logger.exception("no thread could be started to interrupt a call: %r", self._stop)

    def _run(self) -> None:
        """Call ``stop`` until the section is left: before the call has reached the server, it has no effect."""
        pause = _AGAIN
        while self._call_stop() and not self._left.wait(pause):
            pause = min(2 * pause, _AT_LAST)

    def _call_stop(self) -> bool:
        """Call ``stop``, if that may still be done, and return whether it may be done again."""
        self._not_held.wait()
        try:
            # What is set before somebody waits for this lock has its effect.
            with self._calling:
                if self._left.is_set():
                    return False
                if self._not_held.is_set():
                    self._has_stopped = True
                    self._stop_logged()
        finally:
            self._tell_waiter()
        return True

    def _stop_logged(self) -> None:
        try:
            self._stop()
        except BaseException:
            logger.exception("the function that interrupts a call failed: %r", self._stop)

    def _tell_waiter(self) -> None:
        if self._waiter is not None:
            loop, event = self._waiter
            loop.call_from_thread(event.set)

    def hold(self) -> None:
        """Keep ``stop`` from being called until `resume`. In a thread, wait for a call of it that has begun."""
        self._holds += 1
        if not self._left.is_set():
            self._not_held.clear()
            if not runs_in_this_thread():
                self._is_over_in_time()

    def resume(self) -> None:
        """End `hold`; ``stop`` is called now if the block has been cancelled."""
        self._holds -= 1
        if not self._holds:
            self._not_held.set()

    def _wait_for_stop(self) -> None:
        """Wait in a thread for a call of ``stop`` that has begun."""
        if not self._is_over_in_time() and not self._give_up():
            with self._calling:
                pass

    def _is_over_in_time(self) -> bool:
        is_over = self._calling.acquire(timeout=min(self._block.cleanup_grace, threading.TIMEOUT_MAX))
        if is_over:
            self._calling.release()
        return is_over

    async def _wait_in_loop(self, is_over: Callable[[], bool]) -> None:
        """Wait in an event loop until ``is_over()``, which is asked each time that ``stop`` has returned."""
        if is_over():
            return
        loop = current_loop()
        left: BaseException | None = None
        ends = anyio.current_time() + self._block.cleanup_grace
        while True:
            event = loop.make_event()
            self._waiter = loop, event
            if is_over():
                break
            try:
                with anyio.CancelScope(shield=True, deadline=ends):
                    await event.wait()
            except CancelledError as exc:
                # A cancellation of the task passes the shield, and still the connection may not be left to others.
                left = exc
            if anyio.current_time() >= ends:
                ends = math.inf
                if not is_over() and self._give_up():
                    break
        self._waiter = None
        if left is not None:
            raise left

    def _give_up(self) -> bool:
        """Report that ``stop`` hangs; discard the connection, and return whether there was a way to do that."""
        logger.error(
            "the function that interrupts a call has not returned within %g seconds: %r; %s",
            self._block.cleanup_grace,
            self._stop,
            "waiting for it" if self._discard is None else f"calling {self._discard!r}",
        )
        if self._discard is None:
            return False
        self._is_given_up = True
        call_logged(self._discard)
        return True

    def _raise_reason(self, exc: BaseException | None) -> None:
        # An HTTPException is an answer of the application, and no driver's error.
        if self._has_stopped and isinstance(exc, Exception) and not isinstance(exc, HTTPException):
            try:
                self._block.check()
            except CancelationError as error:
                raise error from exc

    def _watch_deadline(self) -> None:
        block = self._block
        # The deadline may be moved meanwhile, also to infinity.
        while block.cause is None and not self._left.wait(min(seconds_left(block), threading.TIMEOUT_MAX)):
            with suppress(CancelationError):
                block.check()


def _check_plain(function: object, name: str) -> None:
    if not callable(function) or runs_only_when_awaited(function):
        raise TypeError(
            f"{name} of interrupting() is called in a thread, so it must be a plain function, not {function!r}"
        )
