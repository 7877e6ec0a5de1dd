"""The reader of WebSockets: the only code that awaits a WebSocket's ``receive()``."""

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
    """The state of the WebSocket, as far as a reader uses it."""

    def socket_left(self, message: Message, *, is_told: bool) -> None:
        """Note that the client has left.

        :param is_told: whether the calling task is about to get the disconnect, as a message or an error.
        """


class SocketReader(ReadAhead):
    """A reader that reads ahead of the application to notice the disconnect, and replays the messages it has read.

    Until it is armed, after it is stopped, and for the ``websocket.connect`` of the handshake, it passes on the messages
    of the server's ``receive()``. While it is armed a task of its own awaits ``receive()``, at most `READ_AHEAD_BYTES` and
    `READ_AHEAD_MESSAGES` ahead of the application, or one message more. Then it waits for the application.

    A task that waits for a message when the client leaves gets the server's ``websocket.disconnect``, as it would without
    us. Only then is the owner notified, because such a handler expects to end by `WebSocketDisconnect`.
    """

    _told = False
    _receiving = 0

    def __init__(self, raw: Receive, owner: Owner, context: Context, *, is_connected: bool) -> None:
        super().__init__(raw, context)
        self.owner: Owner | None = owner
        self._is_connected = is_connected
        self._messages: list[Message] = []

    async def receive(self) -> Message:
        """Return the next message: this is the application's ``receive()``."""
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
            # The task that waited works on an earlier message, or has been cancelled: now it may be stopped.
            self._tell(is_told=False)

    def _may_ask(self) -> bool:
        return self._is_connected

    def _is_full(self) -> bool:
        return self._held >= READ_AHEAD_BYTES or len(self._messages) >= READ_AHEAD_MESSAGES

    def _keep(self, message: Message) -> None:
        if message["type"] == "websocket.disconnect":
            self.end = message
            if not self._receiving:
                self._tell(is_told=False)
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
        self._tell(is_told=True)
        return dict(self.end)

    def _tell(self, *, is_told: bool) -> None:
        if self.owner is None or self.end is None or isinstance(self.end, Exception):
            return
        if is_told or not self._told:
            self._told = True
            self.owner.socket_left(self.end, is_told=is_told)

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
    # Its size in memory, not its length: a character of a text may take four bytes.
    return sys.getsizeof(message.get("bytes") or message.get("text"))
