"""Reading ahead of the application, in a task of ours and up to a limit: what both readers share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from ..kernel.foreign import EXITS, RECEIVING, ThisTask, as_failure

if TYPE_CHECKING:
    from contextvars import Context

    from starlette.types import Message, Receive

    from ..kernel.loops.base import EventLoop, Worker


class ReadAhead:
    """A reader that awaits the server's ``receive()`` from `arm` to `stop`, while there is room for its messages.

    The application awaits it directly (`_pulling`) only while no task of ours does. Nothing else may await it.
    """

    _worker: Worker | None = None
    _wanted: EventLoop | None = None
    _pulling = False
    _held = 0
    _stopped = False
    _changed: anyio.Event | None = None
    end: Message | Exception | None = None
    """The end of the messages: the server's disconnect, or the exception that its ``receive()`` raised."""

    def __init__(self, raw: Receive, context: Context) -> None:
        self.raw = raw
        self._context = context

    def arm(self, loop: EventLoop) -> None:
        """Start to listen for the disconnect, as soon as the server may be asked."""
        self._wanted = loop
        if self._worker is None and self.end is None and not self._pulling and self._may_ask():
            self._start(loop)

    def stop(self) -> None:
        """Stop listening; the messages that have been read are kept for the application."""
        self._wanted = None
        self._stopped = True
        if self._worker is not None:
            self._worker.cancel()

    async def join(self) -> None:
        """Wait, after `stop`, until our task has ended."""
        if self._worker is not None:
            await self._worker.join()

    @property
    def is_reading(self) -> bool:
        """Whether a task of ours has not ended yet."""
        return self._worker is not None

    @property
    def is_armed(self) -> bool:
        return self._wanted is not None

    def _may_ask(self) -> bool:
        """Return whether ``receive()`` may be awaited before the application asks for a message."""
        raise NotImplementedError

    def _is_full(self) -> bool:
        raise NotImplementedError

    def _keep(self, message: Message) -> None:
        """Keep a message for the application, or note that it is the disconnect."""
        raise NotImplementedError

    def _start(self, loop: EventLoop) -> None:
        self._stopped = False
        # In a copy: what the `receive()` of a middleware sets there, such as a span of its own, is not the request's.
        self._worker = loop.spawn(self._read, self._context.copy())

    async def _read(self) -> None:
        this_task = ThisTask()
        try:
            # A task that is stopped before it begins must not ask: granian loses the message of a cancelled receive().
            while self.end is None and not self._stopped:
                while self._is_full():
                    await self._change()
                self._keep(await self.raw())
        except BaseException as exc:
            if this_task.is_ended_by(exc):
                if isinstance(exc, EXITS):
                    self.end = as_failure(exc, RECEIVING)
                raise
            # A middleware may raise if a body grows too long: the application gets that error after the messages before it.
            self.end = as_failure(exc, RECEIVING)
        finally:
            self._worker = None
            if self._stopped and self._wanted is not None and self.end is None:
                # `arm` was called while this task was being stopped.
                self._start(self._wanted)
            self._notify()

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()
        # On asyncio, anyio does not cancel a task that is about to wake up anyway. A reader and a caller that wake each
        # other in every step of the loop are always about to, and could not be stopped.
        await anyio.lowlevel.checkpoint_if_cancelled()
