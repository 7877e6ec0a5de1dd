"""WebSockets whose work stops with their client, with limits for the whole conversation and for silence."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import anyio
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..kernel.cancelable import Cancelable, cancelable_of
from ..kernel.errors import CancelationError
from ..kernel.options import seconds
from ..kernel.reasons import CancelationReason
from ..request.connection import connection_state, new_block
from ..request.websocket import SocketState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
    from datetime import timedelta
    from types import TracebackType

    from starlette.types import Message

T = TypeVar("T")


class CancelableWebSocket:
    """A WebSocket in a block, to be entered once: ``async with CancelableWebSocket(websocket, cancel) as socket:``.

    Every ``await`` inside the block, on the socket or elsewhere, is cancelled when one of these happens:

    - the client leaves,
    - ``cancel`` is cancelled,
    - ``timeout`` seconds have passed since the block was entered,
    - `receive` or one of its variants has waited ``idle_timeout`` seconds for a message.

    Leaving a block that was stopped closes the WebSocket, with the close code of the reason and its message as the close
    reason; before ``accept`` it refuses the handshake with the status of the reason. It then raises the
    `CancelationError`. Leaving the block otherwise does not close the WebSocket: you do, or the server does when the
    handler returns.

    Messages that arrive while the handler is busy are kept, in order: at most 64 messages and 64 KiB, or one message
    more. After that the client has to wait, as it would without this class, and its disconnect is not noticed until the
    handler receives.

    If the client leaves while a task waits for a message, that task gets ``WebSocketDisconnect``, as from a plain
    ``WebSocket``; the ``iter_`` methods end.

    :param websocket: the WebSocket of the route.
    :param cancel: a `RequestCancelable` or another `Cancelable`. It is entered here unless you have entered it.
    :param timeout: seconds from entering the block.
    :param idle_timeout: the seconds to wait for one message. A message that has been read ahead is there at once.
    :raises TypeError: if ``websocket`` or ``cancel`` is of another class, or a timeout is not a number.
    :raises ValueError: if a timeout is negative or NaN.
    """

    def __init__(
        self,
        websocket: WebSocket,
        cancel: Cancelable | None = None,
        *,
        timeout: float | timedelta | None = None,
        idle_timeout: float | timedelta | None = None,
    ) -> None:
        if not isinstance(websocket, WebSocket):
            raise TypeError(f"CancelableWebSocket takes the WebSocket of the route, not {websocket!r}")
        if cancel is not None and not isinstance(cancel, Cancelable):
            raise TypeError(
                f"cancel must be a Cancelable, such as a RequestCancelable in the route's signature, not {cancel!r}"
            )
        self._websocket = websocket
        self._cancel = cancel
        self._timeout = None if timeout is None else seconds(timeout, "timeout")
        self._idle_timeout = None if idle_timeout is None else seconds(idle_timeout, "idle_timeout")
        self._block: Cancelable | None = None

    @property
    def websocket(self) -> WebSocket:
        """The plain ``WebSocket``: for its headers, path and query parameters, and to receive without ``idle_timeout``."""
        return self._websocket

    @property
    def cancelable(self) -> Cancelable:
        """The block, with its ``reason``, ``remaining()`` and ``shield()``.

        :raises RuntimeError: before the block is entered, as every method does.
        """
        return self._entered()

    async def __aenter__(self) -> Self:
        """Enter the block, and ``cancel`` unless it has been entered; listening for the disconnect begins.

        :raises CancelationError: if the request has been cancelled already.
        :raises RuntimeError: if the block has been entered before.
        """
        if self._block is not None:
            raise RuntimeError("a CancelableWebSocket can be entered once: make another one for another block")
        state = connection_state(self._websocket, with_handler=True)
        assert isinstance(state, SocketState)
        self._state = state
        block = self._block = cancelable_of(new_block(state, timeout=self._timeout))
        async with AsyncExitStack() as stack:
            stack.push_async_exit(self._close_if_stopped)
            if self._cancel is not None and not self._cancel.is_active:
                await stack.enter_async_context(self._cancel)
            await stack.enter_async_context(block)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the block; if it was stopped, close the WebSocket and raise the `CancelationError`."""
        await self._stack.__aexit__(exc_type, exc, traceback)

    async def _close_if_stopped(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(exc, CancelationError):
            error = self._state.error(exc)
            await self._state.answer(error, self._websocket.send)
            if error is not exc:
                # It comes from a `cancel` that is not of a WebSocket's request.
                raise error from exc.__cause__

    async def accept(
        self, subprotocol: str | None = None, headers: Iterable[tuple[bytes, bytes]] | None = None
    ) -> None:
        """Accept the handshake, as ``WebSocket.accept``.

        :param subprotocol: the chosen one of those that the client has offered.
        :param headers: additional headers of the response to the handshake, as pairs of bytes.
        """
        self._entered()
        await self._websocket.accept(subprotocol, headers)

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        """Close the WebSocket for a reason of your own. The disconnect that the server reports after that stops nothing.

        :param code: the close code of RFC 6455.
        :param reason: the text of the close frame, at most 123 bytes in UTF-8.
        """
        self._entered()
        await self._websocket.close(code, reason)

    async def send(self, message: Message) -> None:
        """Send an ASGI message, as ``WebSocket.send``."""
        self._entered()
        await self._websocket.send(message)

    async def send_text(self, data: str) -> None:
        """Send a text message."""
        self._entered()
        await self._websocket.send_text(data)

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary message."""
        self._entered()
        await self._websocket.send_bytes(data)

    async def send_json(self, data: Any, mode: str = "text") -> None:
        """Send ``data`` as JSON.

        :param mode: ``"text"`` or ``"binary"``, the kind of message.
        """
        self._entered()
        await self._websocket.send_json(data, mode)

    async def receive(self) -> Message:
        """Return the next ASGI message; the last one is ``websocket.disconnect``.

        :raises TimeoutCancelation: after ``idle_timeout`` seconds without a message. The whole block is then cancelled.
        :raises RuntimeError: after the block was left, if there is an ``idle_timeout``.
        """
        return await self._receive(self._websocket.receive)

    async def receive_text(self) -> str:
        """Return the next message, which must be a text.

        :raises WebSocketDisconnect: if the client leaves instead.
        :raises TimeoutCancelation: after ``idle_timeout`` seconds without a message. The whole block is then cancelled.
        """
        return await self._receive(self._websocket.receive_text)

    async def receive_bytes(self) -> bytes:
        """Return the next message, which must be binary.

        :raises WebSocketDisconnect: if the client leaves instead.
        :raises TimeoutCancelation: after ``idle_timeout`` seconds without a message. The whole block is then cancelled.
        """
        return await self._receive(self._websocket.receive_bytes)

    async def receive_json(self, mode: str = "text") -> Any:
        """Return the next message, decoded from JSON.

        :param mode: ``"text"`` or ``"binary"``, the kind of message.
        :raises WebSocketDisconnect: if the client leaves instead.
        :raises TimeoutCancelation: after ``idle_timeout`` seconds without a message. The whole block is then cancelled.
        """
        return await self._receive(lambda: self._websocket.receive_json(mode))

    def iter_text(self) -> AsyncIterator[str]:
        """Return an asynchronous iterator over the text messages, which ends when the client leaves.

        Each message must arrive within ``idle_timeout`` seconds.
        """
        return _Messages(self.receive_text)

    def iter_bytes(self) -> AsyncIterator[bytes]:
        """Return an asynchronous iterator over the binary messages, which ends when the client leaves.

        Each message must arrive within ``idle_timeout`` seconds.
        """
        return _Messages(self.receive_bytes)

    def iter_json(self) -> AsyncIterator[Any]:
        """Return an asynchronous iterator over the messages, decoded from JSON, which ends when the client leaves.

        Each message must arrive within ``idle_timeout`` seconds.
        """
        return _Messages(self.receive_json)

    async def _receive(self, receive: Callable[[], Awaitable[T]]) -> T:
        block = self._entered()
        if self._idle_timeout is None:
            return await receive()
        if not block.is_active:
            raise RuntimeError(
                "this CancelableWebSocket has been left, so that its idle_timeout cannot stop a block: receive inside its "
                "`async with` block"
            )
        with anyio.move_on_after(self._idle_timeout):
            return await receive()
        block.cancel_nowait(CancelationReason.TIMEOUT, f"No message for {self._idle_timeout:g} seconds")
        block.check()
        raise AssertionError("a cancelled block passed its check")

    def _entered(self) -> Cancelable:
        if self._block is None:
            raise RuntimeError("this CancelableWebSocket is not open: use it inside its `async with` block")
        return self._block


class _Messages(Generic[T]):
    """An iterator over messages. A generator would stay open if the handler is stopped in the body of its loop."""

    def __init__(self, receive: Callable[[], Awaitable[T]]) -> None:
        self._receive = receive

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return await self._receive()
        except WebSocketDisconnect:
            raise StopAsyncIteration from None
