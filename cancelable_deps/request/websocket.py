"""One WebSocket: its request state, its blocks, and how a stopped one is closed."""

from __future__ import annotations

from asyncio import CancelledError
from contextlib import suppress
from contextvars import copy_context
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod, ref

import anyio
import anyio.lowlevel
from starlette.exceptions import WebSocketException
from starlette.responses import JSONResponse
from starlette.websockets import WebSocketDisconnect

from ..hosts.servers import can_refuse_socket_with
from ..kernel.block import current
from ..kernel.errors import CancelationError, DisconnectCancelation
from ..kernel.foreign import SENDING, told
from ..kernel.reasons import CancelationReason
from ..kernel.unwrap import raise_as_it_is
from .blocks import DoorBlock, RequestBlock
from .lifetime import Lifetime
from .state import RequestState
from .websocket_reader import SocketReader

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send
    from starlette.websockets import WebSocket

    from ..kernel.loops.base import EventLoop

# A close frame has room for 125 bytes, two of which are the code.
CLOSE_TEXT_BYTES = 123
_CLOSE_SECONDS = 5
_GONE = 1006


class SocketState(RequestState):
    """The state that all doors on one WebSocket share.

    The WebSocket is over when the application has closed or refused it. What the server reports after that is no
    disconnect by the client.
    """

    _reader: SocketReader  # type: ignore[assignment]  # pyright: ignore[reportIncompatibleVariableOverride]
    is_accepted = False
    is_over = False
    close_code = _GONE
    """The code of the client's close frame, as far as the server reports it."""

    _quiet = False
    _send_failed = False
    _error: ref[CancelationError] | None = None

    def __init__(
        self, scope: Scope, receive: Receive, *, lifetime: Lifetime = Lifetime.BLOCKS, is_connected: bool = False
    ) -> None:
        super().__init__(scope, receive, lifetime=lifetime)
        self._reader = SocketReader(  # pyright: ignore[reportIncompatibleVariableOverride]
            receive, self, copy_context(), is_connected=is_connected
        )

    @property
    def reader(self) -> SocketReader:  # type: ignore[override]
        return self._reader

    def take_over(self, reader: SocketReader) -> None:
        """Use the reader of an earlier state, which is closed, because it holds the messages that have been read."""
        self._reader = reader  # pyright: ignore[reportIncompatibleVariableOverride]
        reader.owner = self
        if isinstance(reader.end, dict):
            self.socket_left(reader.end, is_told=False)

    def socket_left(self, message: Message, *, is_told: bool) -> None:
        """Note that the client has left, as the reader or a failed ``send()`` reports it, and stop the work."""
        if self.is_over:
            return
        self.close_code = message.get("code") or _GONE
        if not self.has_left:
            # A handler that was waiting for a message gets the disconnect, and decides itself how to end.
            self._quiet = is_told
            self.client_left()
            self._quiet = False
        block = current.get()
        if is_told and block is not None and self.cause is not None:
            # The message or error notifies the task. From here it has as long as for a cleanup.
            block.is_told(self.cause, None)

    @property
    def has_listeners(self) -> bool:
        """``False``: a handler that waits for a message gets the disconnect as that message, before it is stopped."""
        return False

    @property
    def has_watchers(self) -> bool:
        """``False``, for the same reason."""
        return False

    def _disconnect(self) -> None:
        super()._disconnect()
        assert self.cause is not None
        self.log_once(self.cause.reason, self.cause, self.cause.struck_at, outcome="stopping")

    def note_disconnect(self) -> None:
        """Log nothing: the disconnect was logged when it came, or the handler that received it decides."""

    def log_once(self, reason: CancelationReason, cause: object, *more: Any, **others: Any) -> None:
        if not self._quiet:
            super().log_once(reason, cause, *more, **others)

    def translate(self, outcome: BaseException | None) -> BaseException | None:
        """Return the exception that leaves a block of ours, as one that Starlette answers with the right close code."""
        if isinstance(outcome, WebSocketDisconnect) and self._is_ours(outcome):
            # A failed send shows the disconnect before the reader does.
            self.socket_left({"type": "websocket.disconnect", "code": outcome.code}, is_told=False)
            self.log(CancelationReason.DISCONNECT, CancelationReason.DISCONNECT)
            error = DisconnectCancelation()
            error.__cause__ = outcome
            outcome = error
        return self.error(outcome) if isinstance(outcome, CancelationError) else outcome

    def _is_ours(self, outcome: WebSocketDisconnect) -> bool:
        # A handler that talks to other WebSockets may raise the disconnect of one of them.
        left = self.has_left or self._send_failed
        return left and not self.is_over and not isinstance(outcome, CancelationError)

    def error(self, error: CancelationError) -> Any:
        """Return ``error`` as an exception that is also a ``WebSocketException``."""
        twin: Any = error if isinstance(error, WebSocketException) else _twin_of(error, self.close_code)
        if self.is_accepted:
            # An HTTP status is impossible now: an exception handler that the application has for one would do nothing.
            twin.status_code = twin.code
        self._error = ref(twin)
        return twin

    async def answer(self, error: CancelationError, send: Send) -> None:
        """Close the WebSocket with the close code of ``error``, unless it is closed already."""
        twin = self.error(error)
        await self.send(send, {"type": "websocket.close", "code": twin.code, "reason": twin.reason})

    async def send(self, send: Send, message: Message) -> None:
        """Send a message of the application, or of Starlette on its behalf."""
        try:
            await self._send(send, message)
        except CancelledError as exc:
            raise_as_it_is(told(exc, self.loop, SENDING))

    async def _send(self, send: Send, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.close":
            await self._close(send, message)
            return
        if kind == "websocket.accept":
            self.is_accepted = True
        elif kind.startswith("websocket.http.response"):
            self.is_over = True
        try:
            await send(message)
        except (OSError, WebSocketDisconnect):
            self._note_failed_send()
            raise
        if kind == "websocket.send":
            # Some servers never wait in send(). A handler that only sends could then not be stopped, and would block the loop.
            await anyio.lowlevel.checkpoint()

    async def _close(self, send: Send, message: Message) -> None:
        ours = isinstance(message.get("reason"), CancelationReason)
        if self.has_left and not self.is_over:
            if not self.is_accepted:
                # The server may still wait for an answer to the handshake.
                with suppress(OSError, WebSocketDisconnect):
                    await send({**message, "reason": ""})
        elif not ours:
            await self._close_for_the_application(send, message)
        elif not self.is_over:
            self.is_over = True
            # A client that does not read must not block us.
            with anyio.move_on_after(_CLOSE_SECONDS), suppress(OSError, WebSocketDisconnect):
                await self._close_for_our_reason(send, message)

    async def _close_for_the_application(self, send: Send, message: Message) -> None:
        # Set before sending, because the server reports a disconnect at once, which is not the client's.
        self.is_over = True
        try:
            await send(message)
        except (OSError, WebSocketDisconnect):
            self.is_over = False
            self._note_failed_send()
            raise

    def _note_failed_send(self) -> None:
        """Note that the running task is about to get the error of a ``send()``, by which the server reports a disconnect.

        The reader reports it as well, perhaps later: that must not interrupt the cleanup which the error has begun.
        """
        self._send_failed = True
        self.socket_left({"type": "websocket.disconnect"}, is_told=True)

    async def _close_for_our_reason(self, send: Send, message: Message) -> None:
        error = None if self._error is None else self._error()
        text = message["reason"].text if error is None else error.detail
        if error is None or self.is_accepted or not self._can_refuse_with(error.status_code):
            await send({**message, "reason": close_text(text)})
            return
        refusal = JSONResponse({"detail": text}, status_code=error.status_code, headers=error.headers)
        await refusal(self.scope, self.reader.receive, send)
        # uvicorn complains if we return before it has seen its own connection end.
        for _ in range(2):
            await anyio.lowlevel.checkpoint()

    def _can_refuse_with(self, status_code: int) -> bool:
        is_announced = "websocket.http.response" in (self.scope.get("extensions") or {})
        return is_announced and can_refuse_socket_with(self.reader.raw, status_code)


class SocketBlock(RequestBlock):
    """A block whose errors Starlette answers by closing the WebSocket."""

    state: SocketState
    if TYPE_CHECKING:

        @property
        def known_request(self) -> SocketState | None: ...

    def enter(self, loop: EventLoop | None = None) -> None:
        try:
            super().enter(loop)
        except CancelationError as exc:
            raise self.state.error(exc) from None

    def leave(self, exc: BaseException | None) -> BaseException | None:
        return self.state.translate(super().leave(exc))

    def check(self) -> None:
        try:
            super().check()
        except CancelationError as exc:
            state = self.known_request
            raise _twin_of(exc, _GONE) if state is None else state.error(exc) from None


class SocketDoorBlock(SocketBlock, DoorBlock):
    """The block around the whole handler of a WebSocket."""


class _OnSocket(WebSocketException):
    """The base class that makes a `CancelationError` a ``WebSocketException``, which Starlette answers with its ``code``.

    Otherwise Starlette would answer with an HTTP response, which no server accepts on an open WebSocket.
    """


@cache
def _twin_class(cls: Any) -> Any:
    bases: list[type] = [_OnSocket, cls]
    if issubclass(cls, DisconnectCancelation):
        # Existing handlers catch the disconnect by `except WebSocketDisconnect`.
        bases.append(WebSocketDisconnect)
    return type(cls.__name__, tuple(bases), {"__module__": cls.__module__})


def _twin_of(error: CancelationError, close_code: int) -> CancelationError:
    kind: Any = type(error)
    cls = _twin_class(kind)
    twin = cls.__new__(cls)
    # `reason` stays a CancelationReason. Starlette expects a text there, and it is a string as well.
    vars(twin).update(vars(error), code=error.reason.close_code or close_code)
    twin.args, twin.__cause__ = error.args, error.__cause__
    result: CancelationError = twin
    return result


def close_text(text: str) -> str:
    """Return as much of ``text`` as fits into a close frame."""
    return text.encode()[:CLOSE_TEXT_BYTES].decode(errors="ignore")


class Outlet:
    """A ``send()`` that wraps a WebSocket's own, and does not keep the WebSocket alive."""

    def __init__(self, websocket: WebSocket, state: SocketState) -> None:
        self._send = WeakMethod(websocket.send)
        self._state = state

    async def __call__(self, message: Message) -> None:
        send = self._send()
        assert send is not None
        await self._state.send(send, message)
