"""Reading ahead of the application, in a task of ours, as far as that may go."""

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
    """Awaits the server's ``receive()`` from `arm` to `stop`, while there is room for what it says.

    The application may await it as well when no task of ours does (`_pulling`), and nobody else.
    """

    _worker: Worker | None = None
    _wanted: EventLoop | None = None
    _pulling = False
    _held = 0
    _stopped = False
    _was_started = False
    _changed: anyio.Event | None = None
    end: Message | Exception | None = None
    """The last word: the server's disconnect, or what its ``receive()`` raised."""

    def __init__(self, raw: Receive, context: Context) -> None:
        self.raw = raw
        self._context = context

    def arm(self, loop: EventLoop) -> None:
        """Start to listen for the client's leaving, as soon as that may be."""
        self._wanted = loop
        if self._worker is None and self.end is None and not self._pulling and self._may_ask():
            self._start(loop)

    def stop(self) -> None:
        """Stop listening; what has been read stays for the application."""
        self._wanted = None
        self._stopped = True
        if self._worker is not None:
            self._worker.cancel()

    async def join(self) -> None:
        """After `stop`: wait until no task of ours is left."""
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
        """Whether the server may be asked before the application does."""
        raise NotImplementedError

    def _is_full(self) -> bool:
        raise NotImplementedError

    def _keep(self, message: Message) -> None:
        """Take a message, for the application or for ourselves."""
        raise NotImplementedError

    def _start(self, loop: EventLoop) -> None:
        self._stopped = False
        # The first has it to itself. A later one may be started from inside the one before, which still runs in it.
        context = self._context.copy() if self._was_started else self._context
        self._was_started = True
        self._worker = loop.spawn(self._read, context)

    async def _read(self) -> None:
        this_task = ThisTask()
        try:
            # Stopped before it has begun, it asks nothing: granian loses what a cancelled receive() was to get.
            while self.end is None and not self._stopped:
                while self._is_full():
                    await self._change()
                self._keep(await self.raw())
        except BaseException as exc:
            if this_task.is_ended_by(exc):
                if isinstance(exc, EXITS):
                    self.end = as_failure(exc, RECEIVING)
                raise
            # A middleware may refuse a body that grows too long: that is for the application to see, in its turn.
            self.end = as_failure(exc, RECEIVING)
        finally:
            self._worker = None
            if self._stopped and self._wanted is not None and self.end is None:
                # Somebody asked again while we were being stopped.
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
        # On asyncio, anyio cancels nobody who is about to wake up anyway. A reader and a caller that wake each other in
        # every step of the loop are so whenever it looks, and could not be stopped.
        await anyio.lowlevel.checkpoint_if_cancelled()
