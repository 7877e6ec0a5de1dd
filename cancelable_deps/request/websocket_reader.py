"""The only code that awaits a WebSocket's ``receive()``."""

from __future__ import annotations

import sys
from asyncio import CancelledError
from typing import TYPE_CHECKING, Protocol

from ..kernel.foreign import RECEIVING, told
from ..kernel.loops.current import current_loop
from ..kernel.unwrap import raise_as_it_is
from .read_ahead import ReadAhead

if TYPE_CHECKING:
    from contextvars import Context

    from starlette.types import Message, Receive

READ_AHEAD_BYTES = 64 * 1024
READ_AHEAD_MESSAGES = 64


class Owner(Protocol):
    def socket_left(self, message: Message, *, by_receiving: bool) -> None:
        """The client has left; `by_receiving` if the calling task is about to get the message that says so."""


class SocketReader(ReadAhead):
    """Reads ahead of the application to see the client leave, and replays what it read.

    Until it is armed, after it is stopped and for the ``websocket.connect`` of the handshake it passes on what the
    server's ``receive()`` says. While it is armed a task of its own awaits that, at most `READ_AHEAD_BYTES` and
    `READ_AHEAD_MESSAGES` ahead of the application, one message more at worst; then it waits for the application.

    A task that waits for a message when the client leaves is given the server's ``websocket.disconnect``, as it would
    be without us, and only then the owner is told: `WebSocketDisconnect` is how such a handler expects to end.
    """

    _told = False
    _receiving = 0

    def __init__(self, raw: Receive, owner: Owner, context: Context, *, is_connected: bool) -> None:
        super().__init__(raw, context)
        self.owner: Owner | None = owner
        self._is_connected = is_connected
        self._messages: list[Message] = []

    async def receive(self) -> Message:
        """The application's ``receive()``."""
        self._receiving += 1
        try:
            while not self._messages and self.end is None:
                if self._worker is not None or self._pulling:
                    await self._change()
                elif self._wanted is None or not self._is_connected:
                    message = await self._pull()
                    if self.end is None:
                        return message
                else:
                    self._start(self._wanted)
            if self._messages:
                return self._next()
            return self._ended()
        finally:
            self._receiving -= 1
            # Whoever waited has another message to work on, or waits no more: now it is to be stopped.
            self._tell(by_receiving=False)

    def _may_ask(self) -> bool:
        return self._is_connected

    def _is_full(self) -> bool:
        return self._held >= READ_AHEAD_BYTES or len(self._messages) >= READ_AHEAD_MESSAGES

    def _keep(self, message: Message) -> None:
        if message["type"] == "websocket.disconnect":
            self.end = message
            if not self._receiving:
                self._tell(by_receiving=False)
        else:
            self._messages.append(message)
            self._held += _size(message)
        self._notify()

    def _next(self) -> Message:
        message = self._messages.pop(0)
        self._held -= _size(message)
        self._notify()
        return message

    def _ended(self) -> Message:
        if isinstance(self.end, Exception):
            raise self.end
        assert self.end is not None
        self._tell(by_receiving=True)
        return dict(self.end)

    def _tell(self, *, by_receiving: bool) -> None:
        if self.owner is None or self.end is None or isinstance(self.end, Exception):
            return
        if by_receiving or not self._told:
            self._told = True
            self.owner.socket_left(self.end, by_receiving=by_receiving)

    async def _pull(self) -> Message:
        self._pulling = True
        try:
            message = await self.raw()
            self._is_connected = True
            if message["type"] == "websocket.disconnect":
                self.end = message
            return message
        except CancelledError as exc:
            raise_as_it_is(told(exc, current_loop(), RECEIVING))
        finally:
            self._pulling = False
            if self._wanted is not None:
                self.arm(self._wanted)
            self._notify()


def _size(message: Message) -> int:
    # What it takes in memory: a text of four bytes a character counts four times what it is long.
    return sys.getsizeof(message.get("bytes") or message.get("text"))
