"""The reader of HTTP requests: the only code that awaits a request's ``receive()``."""

from __future__ import annotations

import math
from asyncio import CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.lowlevel

from ..hosts.servers import loses_what_is_cancelled, server_of
from ..kernel.foreign import RECEIVING, told
from ..kernel.loops.current import current_loop
from ..kernel.unwrap import raise_as_it_is
from .read_ahead import ReadAhead

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextvars import Context

    from starlette.types import Message, Receive, Scope

READ_AHEAD_BYTES = 64 * 1024
# The least that a message counts. A client that sends single bytes would otherwise make us hold thousands of messages.
_MESSAGE_BYTES = 256


class Owner(Protocol):
    """The request state, as far as a reader uses it."""

    def client_left(self) -> None:
        """Note that the client has left, and stop the work."""

    def is_work(self, task: object) -> bool:
        """Return whether a cancellation of the request reaches ``task`` first."""
        ...

    def is_parsing_body(self, task: object) -> bool:
        """Return whether the framework reads the body in ``task``; it would answer an early end as the client's error."""
        ...

    @property
    def is_stopping(self) -> bool:
        """Whether a block around the work is being cancelled."""
        ...

    @property
    def is_deferring(self) -> bool:
        """Whether the disconnect is withheld until `deferral_over` returns."""
        ...

    async def deferral_over(self) -> None:
        """Wait until the disconnect is not deferred any more."""


class Reader(ReadAhead):
    """A reader that reads ahead of the application to notice the disconnect, and replays the messages it has read.

    Until it is armed, and after it is stopped, it passes on the messages of the server's ``receive()``. While it is armed
    a task of its own awaits ``receive()``, at most `READ_AHEAD_BYTES` ahead of the application. Then it waits for the
    application, so an upload is slowed down as it would be without us. Nothing else may await the server's ``receive()``.

    A task of the application that waits for a message gets the disconnect before the work is cancelled, because it may
    have an orderly end of its own. The exception is a framework that parses the body: it would answer that the body is
    malformed.
    """

    _body_over = False
    _asked = False
    _told = False
    _waiting: tuple[object, ...] = ()
    """The tasks of the application that wait for a message, once for each call."""

    def __init__(self, scope: Scope, raw: Receive, owner: Owner | None, context: Context) -> None:
        super().__init__(raw, context)
        self._scope = scope
        self.owner: Owner | None = owner
        # A list: it is short, and an empty deque takes as much memory as all the rest of a reader.
        self._messages: list[Message] | None = None

    async def receive(self) -> Message:
        """Return the next message: this is the application's ``receive()``."""
        self._asked = True
        while True:
            if self._messages:
                return self._next()
            if self.end is not None:
                return await self._ended(self.end)
            if self._wanted is not None and self._worker is None and not self._pulling:
                self._start(self._wanted)
            if self._worker is not None or self._pulling:
                await self._wait()
            elif self._is_fragile() or (self._body_over and self.owner is not None):
                # A listener does not await the server's receive() itself, because we may have to wake it as well.
                await self._pull_by_task()
            else:
                return await self._pull()

    @property
    def has_listeners(self) -> bool:
        """Whether a task of the application waits for a message and may be given the disconnect."""
        return any(self._is_listener(task) for task in self._waiting)

    @property
    def has_watchers(self) -> bool:
        """Whether a task of the application waits for the disconnect alone, and not for the body that its work needs."""
        return any(self._body_over or self.owner is None or not self.owner.is_work(task) for task in self._waiting)

    def tell_listeners(self) -> None:
        """Give the disconnect to all tasks that wait for a message, and to every later call."""
        if self.end is None:
            self.end = {"type": "http.disconnect"}
        self._notify()

    def _is_listener(self, task: object) -> bool:
        return self._body_over or self.owner is None or not self.owner.is_parsing_body(task)

    @contextmanager
    def _known_to_wait(self) -> Iterator[None]:
        task = current_loop().current_task()
        self._waiting += (task,)
        try:
            yield
        finally:
            waiting = list(self._waiting)
            waiting.remove(task)
            self._waiting = tuple(waiting)

    async def _wait(self) -> None:
        with self._known_to_wait():
            await self._change()

    def _may_ask(self) -> bool:
        # The first receive() makes a server send `100 Continue`, which the application should decide.
        return self._asked or not any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in self._scope["headers"]
        )

    def _is_full(self) -> bool:
        return self._held >= READ_AHEAD_BYTES

    def _keep(self, message: Message) -> None:
        if message["type"] == "http.disconnect":
            self._take_end(message)
            # Before a task that awaits a message is woken: it is to be cancelled at that very await.
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
        server_of(self.raw, self._scope).say_again(message)

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
            with self._known_to_wait():
                await self.owner.deferral_over()
        is_cancelled = not self._told and self.owner is not None and self.owner.is_stopping
        if is_cancelled and not self._is_listener(current_loop().current_task()):
            # FastAPI would answer a disconnect here with 400; the cancellation that is on its way gives the better answer.
            # Only once, because `Request.is_disconnected()` asks from a cancelled scope and would never get the disconnect.
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
            with self._known_to_wait():
                self._tell_owner()
            return await self._ended(self.end)
        return message

    def _is_fragile(self) -> bool:
        """Return whether a pending ``receive()`` must not be cancelled."""
        return loses_what_is_cancelled(self.raw) and (
            self._body_over or anyio.current_effective_deadline() == -math.inf
        )

    async def _pull_by_task(self) -> None:
        self._start(current_loop())
        await self._wait()

    def _note(self, message: Message) -> None:
        if not message.get("more_body", False):
            self._body_over = True


def _size(message: Message) -> int:
    return max(len(message.get("body", b"")), _MESSAGE_BYTES)
