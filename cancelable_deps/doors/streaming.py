"""Streaming responses whose body is stopped with their request."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from starlette.responses import StreamingResponse

from ..hosts.starlette import streams_listen
from ..kernel.cancelable import Cancelable, block_of, cancelable_of
from ..kernel.errors import CancelationError
from ..kernel.foreign import SENDING, with_own_failures
from ..kernel.options import seconds
from ..kernel.reasons import CancelationReason
from ..request.abort import abort_response
from ..request.blocks import RequestBlock
from ..request.connection import known_state
from ..request.lifetime import Lifetime
from ..request.response import send_or_leave
from ..request.state import SCOPE_KEY, RequestState
from .generators import ThreadedGenerator, close, feed

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from starlette.background import BackgroundTask
    from starlette.types import Message, Receive, Scope, Send

    from ..kernel.block import Block
    from ..kernel.loops.base import EventLoop, Timer
    from ..request.first_door import FirstDoorBlock

    Chunk = str | bytes | memoryview
    Content = AsyncIterable[Chunk] | Iterable[Chunk]


class CancelableStreamingResponse(StreamingResponse):
    """A `StreamingResponse` whose iterator is stopped with its request, or by ``cancel``.

    The iterator runs in one task from its first step to its last. Its cleanup runs in the same task, and may await
    undisturbed for ``cleanup_grace`` seconds. A generator gets the cancellation at the ``yield`` or ``await`` where it
    stands, so it may hold ``async with``, cancel scopes and task groups across a ``yield``. A plain iterator runs in a
    worker thread, and is stopped between two chunks.

    When the client has left, nothing more is sent. When the stream is stopped for another reason, the client can see
    that it is incomplete: the connection is closed without the last chunk, or, if the media type is
    ``text/event-stream``, the stream ends with ``event: cancelled`` and the data ``{"reason": ..., "message": ...}``. If
    the server offers no way to close the connection, the `CancelationError` is raised into the server, which logs it.
    Background tasks run when the stream has ended, also after a cancellation; they do not run if the iterator fails.

    :param cancel: another `Cancelable` that stops the stream. If it has not been entered, the response enters it around
        the iterator, and its timeout counts from there. The iterator may enter it once more.
    :param timeout: the seconds that the whole stream may take, from its start.
    :param gap_timeout: the seconds that the iterator may take for one chunk.
    :param send_timeout: the seconds that the client may take to make room for one chunk. If it stops reading, the stream
        is stopped with ``CancelationReason.TIMEOUT``, because the client has not left. This limit has no effect on
        granian, which buffers every chunk at once, and with hypercorn on trio, which shields its sending.
    :param cleanup_grace: the seconds that the iterator's cleanup may await undisturbed; the default is that of
        `configure`.
    :raises TypeError: if a limit is not a number, or ``cancel`` is not a `Cancelable`.
    :raises ValueError: if a limit is negative or NaN.
    """

    def __init__(
        self,
        content: Content,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str | None = None,
        background: BackgroundTask | None = None,
        *,
        cancel: Cancelable | None = None,
        timeout: float | timedelta | None = None,
        gap_timeout: float | timedelta | None = None,
        send_timeout: float | timedelta | None = None,
        cleanup_grace: float | None = None,
    ) -> None:
        if cancel is not None and not isinstance(cancel, Cancelable):
            raise TypeError(f"cancel must be a Cancelable, not {cancel!r}")
        limits = {
            "timeout": timeout,
            "gap_timeout": gap_timeout,
            "send_timeout": send_timeout,
            "cleanup_grace": cleanup_grace,
        }
        checked = {name: None if value is None else seconds(value, name) for name, value in limits.items()}
        self._timeout, self._gap_timeout, self._send_timeout, self._grace = checked.values()
        chunks = content if isinstance(content, AsyncIterable) else ThreadedGenerator(content)
        super().__init__(chunks, status_code, headers, media_type, background)
        self._cancel = cancel
        self._stalled = False
        self._last: bytes | memoryview = b""
        block = None if cancel is None else block_of(cancel)
        request = block.known_request if isinstance(block, RequestBlock) else None
        if request is not None:
            keep_for_stream(request, self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        state = known_state(scope)
        # A state that was kept open for us is ours to close; any other belongs to a middleware or route class.
        ours = state is None or state.lifetime is Lifetime.RESPONSE
        if state is None:
            state = RequestState(scope, receive, lifetime=Lifetime.RESPONSE)
        try:
            error = await self._run(state, send, ours)
            if error is not None and await self._abort(error, state, send):
                error = None
            elif error is not None and not ours:
                # The door around us raises it into the server. Raised here, it would meet exception handlers on the way.
                state.aborted_by, error = error, None
                state.cannot_be_aborted = True
        finally:
            if ours:
                with anyio.CancelScope(shield=True):
                    await state.aclose()
        if self.background is not None:
            if not ours and state.cause is not None and not state.is_closed:
                state.complete_response()
            await with_own_failures("the background of a response", self.background)
        if error is not None:
            raise error

    async def _run(self, state: RequestState, send: Send, ours: bool) -> CancelationError | None:
        """Send the stream; return the error that has stopped it after its start, if any."""
        block = RequestBlock(state, timeout=self._timeout, cleanup_grace=self._grace)
        stream = _Stream(self, block, state, send)
        try:
            async with cancelable_of(block):
                await self._run_inside(stream, block)
        except CancelationError as exc:
            if not stream.started:
                raise
            state.log(exc.reason, exc.message or exc.detail, exc.struck_at, block.delivered_at)
            # A `cancel` of another request may carry the disconnect of that request's client.
            return None if exc.reason is CancelationReason.DISCONNECT and state.has_left else exc
        if ours:
            # Before the last bytes are sent, because every server reports a disconnect after them.
            state.close()
        # Since ASGI 2.4 send() raises if the client has left, which it may do now that it has everything.
        with suppress(OSError):
            await with_own_failures(SENDING, send, {"type": "http.response.body", "body": b"", "more_body": False})
        return None

    async def _run_inside(self, stream: _Stream, block: RequestBlock) -> None:
        cancel = self._cancel
        if cancel is None:
            await stream.run()
        elif block_of(cancel).loop is None:
            async with cancel:
                # The generator may enter it, too.
                block_of(cancel).lends_itself = True
                await stream.run()
        else:
            # It is entered elsewhere, and stops this stream as well.
            cancel.token.listen(block)
            try:
                await stream.run()
            finally:
                cancel.token.unlisten(block)

    async def _abort(self, error: CancelationError, state: RequestState, send: Send) -> bool:
        """Abort the stream; return whether that was possible, or the client has left."""
        is_aborted = await abort_response(self.raw_headers, self._last, error, send, state, stalled=self._stalled)
        # A client may have left while the iterator cleaned up.
        return is_aborted or state.has_left


class _Stream:
    """The iterator and its limits, from its start to its end, in the task that runs the response."""

    started = False

    def __init__(
        self, response: CancelableStreamingResponse, block: RequestBlock, state: RequestState, send: Send
    ) -> None:
        self._response = response
        self._block = block
        self._state = state
        self._send = send
        self._chunks = _Limit(state.loop, response._gap_timeout, self._no_chunk)
        self._sends = _Limit(state.loop, response._send_timeout, self._no_room)

    async def run(self) -> None:
        iterator: Any = aiter(self._response.body_iterator)
        try:
            # Before the response starts, a cancellation can still be answered with its status.
            self._block.check()
            cancel = self._response._cancel
            blocks = (self._block,) if cancel is None else (self._block, block_of(cancel))
            await self._start(blocks)
            await feed(iterator, self._send_chunk, blocks, self._within_limit)
        finally:
            self._chunks.end()
            self._sends.end()
            del self._chunks, self._sends  # They refer to us: reference cycles.
            await close(iterator)

    async def _start(self, blocks: tuple[Block, ...]) -> None:
        response = self._response
        self.started = True
        message = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        # If the stream were stopped now, it would be unknown whether its start has been sent. So a stop waits until it has,
        # but no longer than a cleanup may take, because a send may block for ever.
        for block in blocks:
            block.hold()
        self._block.call_after_grace(lambda: _resume(blocks))
        try:
            await self._send_on(message)
        finally:
            self._block.drop_late_call()
            _resume(blocks)

    async def _send_chunk(self, chunk: Chunk) -> None:
        body = chunk.encode(self._response.charset) if isinstance(chunk, str) else chunk
        self._response._last = body or self._response._last
        await self._send_on({"type": "http.response.body", "body": body, "more_body": True})
        # Without this, a generator that never waits would never let us notice that a client which reads fast has left.
        await anyio.lowlevel.checkpoint()

    async def _within_limit(self, step: Any) -> Any:
        self._chunks.begin()
        try:
            return await step
        finally:
            self._chunks.end()

    async def _send_on(self, message: dict[str, Any]) -> None:
        self._sends.begin()
        try:
            await send_or_leave(self._send, message, self._state)
        finally:
            self._sends.end()

    def _no_chunk(self, limit: float) -> None:
        self._block.cancel_nowait(CancelationReason.TIMEOUT, f"No chunk for {limit:g} seconds")

    def _no_room(self, limit: float) -> None:
        self._response._stalled = True
        self._block.cancel_nowait(CancelationReason.TIMEOUT, f"The client read nothing for {limit:g} seconds")


def _resume(blocks: tuple[Block, ...]) -> None:
    for block in blocks:
        block.resume()


class _Limit:
    """A timeout that begins anew with each chunk."""

    def __init__(self, loop: EventLoop, seconds: float | None, passed: Callable[[float], None]) -> None:
        self._loop = loop
        self._seconds = seconds
        self._passed = passed
        self._timer: Timer | None = None

    def begin(self) -> None:
        if self._seconds is not None:
            self._timer = self._loop.call_at(self._loop.time() + self._seconds, self._pass)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pass(self) -> None:
        assert self._seconds is not None
        self._passed(self._seconds)


def keep_for_stream(state: RequestState, response: CancelableStreamingResponse) -> None:
    """Keep ``state`` open until the stream has ended, if the handler's return would close it."""
    if state.ends_with_handler:
        state.keep_through_response(response)


def keep_listening(response: StreamingResponse, scope: Scope) -> None:
    """Listen until the stream that a handler has returned has ended.

    Our own response closes the state itself. Starlette's is made to listen through our reader.
    """
    found: RequestState | FirstDoorBlock | None = scope.get(SCOPE_KEY)
    if found is None:
        return
    if isinstance(response, CancelableStreamingResponse):
        keep_for_stream(found.state, response)
    elif found.is_listening:
        state = found.state
        _listen_through(response, state)


def _listen_through(response: StreamingResponse, state: RequestState) -> None:
    # Starlette's response would await the server's receive() beside our reader. The reader must not be cancelled for that,
    # because granian then reports a client as gone that is still there. So the response listens through our reader.
    if not streams_listen(state.scope) or state.outermost is not None:
        # It does not listen, or a door passes it our reader.
        return

    listen, stream_response = response.listen_for_disconnect, response.stream_response

    async def listen_for_disconnect(receive: Receive) -> None:
        try:
            await listen(state.receive)
        finally:
            with anyio.CancelScope(shield=True):
                await state.aclose()

    async def stream_until_the_end(send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                state.close()
            await send(message)

        # A foreign CancelledError would look to Starlette's task group like the end of a cancelled task: the group would
        # then wait for the client to leave.
        await with_own_failures("the body of a StreamingResponse", stream_response, send_and_close)

    state.keep_through_response()
    response.listen_for_disconnect = listen_for_disconnect  # type: ignore[method-assign]
    response.stream_response = stream_until_the_end  # type: ignore[method-assign]


def cancelable_streaming_response(
    iterator: Content,
    cancel: Cancelable | None = None,
    media_type: str | None = None,
    *,
    status_code: int = 200,
    headers: Mapping[str, str] | None = None,
    background: BackgroundTask | None = None,
    timeout: float | timedelta | None = None,
    gap_timeout: float | timedelta | None = None,
    send_timeout: float | timedelta | None = None,
    cleanup_grace: float | None = None,
) -> CancelableStreamingResponse:
    """Return a `CancelableStreamingResponse`, whose documentation says what happens on cancellation.

    :param iterator: the chunks of the body, from an asynchronous or a plain iterable.
    :param cancel: another `Cancelable` that stops the stream, such as the handler's `RequestCancelable`.
    :param timeout: the seconds that the whole stream may take.
    :param gap_timeout: the seconds that the iterator may take for one chunk.
    :param send_timeout: the seconds that the client may take to make room for one chunk.
    :param cleanup_grace: the seconds that the iterator's cleanup may await undisturbed.
    :raises TypeError: if a limit is not a number, or ``cancel`` is not a `Cancelable`.
    :raises ValueError: if a limit is negative or NaN.
    """
    return CancelableStreamingResponse(
        iterator,
        status_code,
        headers,
        media_type,
        background,
        cancel=cancel,
        timeout=timeout,
        gap_timeout=gap_timeout,
        send_timeout=send_timeout,
        cleanup_grace=cleanup_grace,
    )
