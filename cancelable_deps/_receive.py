"""The reader: the only code that awaits a request's ``receive()``."""

from __future__ import annotations

import math
from asyncio import CancelledError
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.lowlevel

from ._backend import current_loop
from ._exceptions import raise_as_it_is
from ._foreign import RECEIVING, told
from ._read_ahead import ReadAhead

if TYPE_CHECKING:
    from contextvars import Context

    from starlette.types import Message, Receive, Scope

READ_AHEAD_BYTES = 64 * 1024
# What a message counts however short its body, or a client that sends single bytes would have us hold thousands.
_MESSAGE_BYTES = 256


class Owner(Protocol):
    def client_left(self) -> None: ...

    @property
    def is_stopping(self) -> bool:
        """Whether a block around whoever reads is being cancelled."""
        ...

    @property
    def is_deferring(self) -> bool:
        """Whether nobody is to be told of the client's leaving until `deferral_over`."""
        ...

    async def deferral_over(self) -> None: ...


class Reader(ReadAhead):
    """Reads ahead of the application to see the client leave, and replays what it read.

    Until it is armed, and after it is stopped, it passes on what the server's ``receive()`` says. While it is armed a
    task of its own awaits that, at most `READ_AHEAD_BYTES` ahead of the application; then it waits for the application,
    so an upload is slowed down as it would be without us. Nobody else may await the server's ``receive()``.
    """

    _body_over = False
    _asked = False
    _told = False

    def __init__(self, scope: Scope, raw: Receive, owner: Owner | None, context: Context) -> None:
        super().__init__(raw, context)
        self._scope = scope
        self.owner: Owner | None = owner
        # A list: it is short, and an empty deque takes as much memory as all the rest of a reader.
        self._messages: list[Message] | None = None

    async def receive(self) -> Message:
        """The application's ``receive()``."""
        self._asked = True
        while True:
            if self._messages:
                return self._next()
            if self.end is not None:
                return await self._ended(self.end)
            if self._wanted is not None and self._worker is None and not self._pulling:
                self._start(self._wanted)
            if self._worker is not None or self._pulling:
                await self._change()
            elif self._is_fragile():
                await self._pull_by_task()
            else:
                return await self._pull()

    def _may_ask(self) -> bool:
        # The first receive() makes a server send `100 Continue`, and that is the application's to decide.
        return self._asked or not any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in self._scope["headers"]
        )

    def _is_full(self) -> bool:
        return self._held >= READ_AHEAD_BYTES

    def _keep(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self._take_end(message)
            # Before anybody who awaits a message is woken: they are to be cancelled at that very await.
            self._tell_owner()
            return
        self._note(message)
        if self._messages is None:
            self._messages = []
        self._messages.append(message)
        self._held += _size(message)
        self._notify()

    def _take_end(self, message: Message) -> None:
        self.end = message
        # hypercorn says it once, by a queue, and a response that listens after us would wait for it for ever.
        owner: Any = getattr(self.raw, "__self__", None)
        kind = (type(owner).__module__, type(owner).__name__)
        if kind == ("asyncio.queues", "Queue"):
            owner.put_nowait(message)
        elif kind == ("trio", "MemoryReceiveChannel"):
            # Private, as the channel's other end is the server's.
            owner._state.data.append(message)

    def _next(self) -> Message:
        assert self._messages is not None
        message = self._messages.pop(0)
        self._held -= _size(message)
        self._notify()
        return message

    async def _ended(self, end: Message | Exception) -> Message:
        if isinstance(end, Exception):
            raise end
        if self.owner is not None and self.owner.is_deferring:
            await self.owner.deferral_over()
        if not self._told and self.owner is not None and self.owner.is_stopping:
            # The caller would make a ClientDisconnect of it; the cancellation that is on its way is the better answer.
            # Once: `Request.is_disconnected()` asks from a cancelled scope, and would never be told.
            self._told = True
            await anyio.lowlevel.checkpoint()
        return dict(end)

    def _tell_owner(self) -> None:
        if self.owner is not None:
            self.owner.client_left()

    async def _pull(self) -> Message:
        self._pulling = True
        try:
            message = await self.raw()
            if message["type"] == "http.disconnect":
                self._take_end(message)
            else:
                self._note(message)
        except CancelledError as exc:
            raise_as_it_is(told(exc, current_loop(), RECEIVING))
        finally:
            self._pulling = False
            if self._wanted is not None and self.end is None:
                self._start(self._wanted)
            self._notify()
        if self.end is not None:
            self._tell_owner()
            return await self._ended(self.end)
        return message

    def _is_fragile(self) -> bool:
        """Whether a pending ``receive()`` must not be cancelled: granian, written in Rust, then lies to the next one."""
        return isinstance(self.raw, BuiltinMethodType) and (
            self._body_over or anyio.current_effective_deadline() == -math.inf
        )

    async def _pull_by_task(self) -> None:
        self._start(current_loop())
        await self._change()

    def _note(self, message: Message) -> None:
        if not message.get("more_body", False):
            self._body_over = True


def _size(message: Message) -> int:
    return max(len(message.get("body", b"")), _MESSAGE_BYTES)
