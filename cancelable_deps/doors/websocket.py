"""A WebSocket whose every step stops with the request, and whose client must not be silent for too long."""

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
    """A WebSocket in a block, entered once: ``async with CancelableWebSocket(websocket, cancel) as socket:``.

    All that is awaited in the block, on the socket or elsewhere, stops when the client drops, when ``cancel`` is
    cancelled, when the block has lasted for ``timeout``, or when the client has said nothing for ``idle_timeout`` while
    `receive` (or one of its kind) waited for it. Leaving a stopped block closes the socket with the close code of the
    reason and its message as the text, before ``accept`` with the status of the reason, and raises its
    `CancelationError`. Leaving it otherwise does not close: that is yours, or the server's when the handler returns.

    What the client sends while the handler is busy is kept, in order: at most 64 messages and 64 KiB, one message more
    at worst. Beyond that the client has to wait, as it would without us; while it waits its leaving is not seen.

    A task that waits for a message when the client leaves gets ``WebSocketDisconnect``, as from a plain ``WebSocket``;
    the ``iter_`` methods end.

    :param cancel: a `RequestCancelable` or another `Cancelable`. It is entered here unless you have entered it.
    :param timeout: seconds from entering the block.
    :param idle_timeout: seconds that one message may be waited for. A message that has been read ahead counts as there.
    :raises ValueError: for a timeout that is negative or NaN, :exc:`TypeError` for one that is no number.
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
        """The plain one, for its headers, path and query parameters, and for a ``receive`` without idle timeout."""
        return self._websocket

    @property
    def cancelable(self) -> Cancelable:
        """The block, for its ``reason``, ``remaining()`` and ``shield()``."""
        return self._entered()

    async def __aenter__(self) -> Self:
        if self._block is not None:
            raise RuntimeError("a CancelableWebSocket serves one block: make another one for another block")
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
        await self._stack.__aexit__(exc_type, exc, traceback)

    async def _close_if_stopped(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(exc, CancelationError):
            error = self._state.error(exc)
            await self._state.answer(error, self._websocket.send)
            if error is not exc:
                # Of a `cancel` that knows nothing of WebSockets.
                raise error from exc.__cause__

    async def accept(
        self, subprotocol: str | None = None, headers: Iterable[tuple[bytes, bytes]] | None = None
    ) -> None:
        self._entered()
        await self._websocket.accept(subprotocol, headers)

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        """Close for a reason of your own. That the server then reports the client as gone stops nothing."""
        self._entered()
        await self._websocket.close(code, reason)

    async def send(self, message: Message) -> None:
        self._entered()
        await self._websocket.send(message)

    async def send_text(self, data: str) -> None:
        self._entered()
        await self._websocket.send_text(data)

    async def send_bytes(self, data: bytes) -> None:
        self._entered()
        await self._websocket.send_bytes(data)

    async def send_json(self, data: Any, mode: str = "text") -> None:
        self._entered()
        await self._websocket.send_json(data, mode)

    async def receive(self) -> Message:
        """The next ASGI message, the last of which is ``websocket.disconnect``.

        :raises TimeoutCancelation: after ``idle_timeout`` seconds without one; all of the block is stopped then.
        """
        return await self._receive(self._websocket.receive)

    async def receive_text(self) -> str:
        return await self._receive(self._websocket.receive_text)

    async def receive_bytes(self) -> bytes:
        return await self._receive(self._websocket.receive_bytes)

    async def receive_json(self, mode: str = "text") -> Any:
        return await self._receive(lambda: self._websocket.receive_json(mode))

    def iter_text(self) -> AsyncIterator[str]:
        """All texts until the client leaves."""
        return _Messages(self.receive_text)

    def iter_bytes(self) -> AsyncIterator[bytes]:
        """All binary messages until the client leaves."""
        return _Messages(self.receive_bytes)

    def iter_json(self) -> AsyncIterator[Any]:
        """All messages, decoded, until the client leaves."""
        return _Messages(self.receive_json)

    async def _receive(self, receive: Callable[[], Awaitable[T]]) -> T:
        block = self._entered()
        if self._idle_timeout is None:
            return await receive()
        if not block.is_active:
            raise RuntimeError(
                "this CancelableWebSocket has been left, and its idle_timeout has nothing to stop any more: receive inside "
                "its `async with` block"
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
    """No generator: that would be left open by a handler which is stopped in the body of its loop."""

    def __init__(self, receive: Callable[[], Awaitable[T]]) -> None:
        self._receive = receive

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return await self._receive()
        except WebSocketDisconnect:
            raise StopAsyncIteration from None
