"""Calls of an application in ASGI messages, which the test controls in place of a server."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

import anyio
import anyio.lowlevel
import httpx

from ..kernel.loops.current import current_loop
from ..request.state import PROBE_KEY, RequestState
from .clock import all_stand_still, let_doors_listen, real_seconds
from .tasks import Left, tasks_left, tasks_now

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope

    from ..kernel.reasons import CancelationReason
    from ..request.first_door import FirstDoorBlock

Outcome = Literal["running", "returned", "raised", "cancelled"]
Disconnects = Literal["repeats", "once"]


@dataclass(frozen=True)
class Personality:
    """The behaviour of the server that the client imitates."""

    disconnect: Disconnects
    spec_version: str
    send_raises: bool
    ceiling: float


@dataclass(frozen=True)
class HangUp:
    """The moment at which a client leaves by itself: `before_body`, `after_request`, `after_response` or `at_end`."""

    request_bytes: float = float("inf")
    """The bytes of the request's body that the client sends before it leaves."""

    response_bytes: float = float("inf")
    """The bytes of the response's body that the application sends before the client leaves."""

    with_last_byte: bool = False
    """Whether the client leaves while the last byte of the response is sent."""

    @classmethod
    def before_body(cls) -> Self:
        """Leave when the headers of the request have been sent, and nothing of its body."""
        return cls(request_bytes=0)

    @classmethod
    def after_request(cls, count: int) -> Self:
        """Leave when the application has received ``count`` bytes of the request's body; the rest is not sent."""
        return cls(request_bytes=count)

    @classmethod
    def after_response(cls, count: int = 1) -> Self:
        """Leave when the application has sent ``count`` bytes of the response's body; with 0, when it has sent headers."""
        return cls(response_bytes=count)

    @classmethod
    def at_end(cls) -> Self:
        """Leave while the application sends the last byte, so that it gets the disconnect before the response is complete."""
        return cls(with_last_byte=True)


class Exchange:
    """The base class of HTTP and WebSocket calls: runs the application in a task, and lets a test wait for its steps."""

    scope: Scope

    def __init__(self, app: ASGIApp, personality: Personality) -> None:
        self._app = app
        self._personality = personality
        self._changed = anyio.Event()
        self._cancel: Callable[[], None]
        self._states: list[RequestState | FirstDoorBlock] = []
        self._incoming: list[Message] = []
        self._readers = 0
        self.most_readers = 0
        """The largest number of tasks that have awaited the server's ``receive()`` at one time.

        It should be at most 1: two tasks take each other's messages, and on some servers one of them waits for ever.
        """
        self._is_taken = self._may_be_heard = False
        self._disconnects = 0
        self._loop = current_loop()
        self._started = self._loop.time()
        self._ended: float | None = None
        self._before = tasks_now()
        self.sent: list[Message] = []
        """Every ASGI message that the application has sent, also after the client has left."""
        self.outcome: Outcome = "running"
        """The state of the application: ``"running"``, ``"returned"``, ``"raised"``, or ``"cancelled"`` from outside."""
        self.exception: BaseException | None = None
        """The exception that the application has raised; ``None`` if it has not."""
        self.failure: Exception | None = None
        """The exception of the iterable that the test gave as the body; it breaks the connection. Leaving the call raises it."""
        self.left_behind: list[Left] = []
        """The tasks that began during the call and outlive it, each with its name and the line where it stands.

        Tasks that the test itself has started meanwhile are among them. Tasks are not looked for while another call of
        this client runs.
        """

    @property
    def reason(self) -> CancelationReason | None:
        """The reason for which ``cancelable_deps`` has cancelled the call; ``None`` if it has not."""
        for state in self._states:
            if state.reason is not None:
                return state.reason
        return next((state.cause.reason for state in self._states if state.cause is not None), None)

    @property
    def elapsed(self) -> float:
        """The seconds from the call's start to the application's end, or to now if it runs; on the event loop's clock."""
        return (self._loop.time() if self._ended is None else self._ended) - self._started

    async def running(self) -> None:
        """Wait until the application has begun the call and all its tasks wait for something, or until it has ended.

        A task that only yields in a loop never waits; after half a second this returns all the same.

        :raises AssertionError: if the application has not begun within the client's ``ceiling``.
        """
        await self._until(lambda: self._is_taken, "taken the call")
        await all_stand_still(self._personality.ceiling)

    async def listened_to(self) -> None:
        """Wait until the application awaits the server's ``receive()``, so that it notices a hang-up at once, or has ended.

        The doors of ``cancelable_deps`` begin to listen after some milliseconds. A ``MockClock`` of trio, which stands
        still, is moved by these.

        :raises AssertionError: if nothing listens within the client's ``ceiling``.
        """
        await self._until(lambda: bool(self._readers) or self.has_ended, "begun to listen")
        await all_stand_still(self._personality.ceiling)

    async def ended(self) -> None:
        """Wait until the application has ended, background tasks included.

        :raises AssertionError: if it has not ended within the client's ``ceiling``.
        """
        await self._until(lambda: self.has_ended, "ended")

    @property
    def has_ended(self) -> bool:
        """Whether the application has ended."""
        return self.outcome != "running"

    def begin(self, start: Callable[[Callable[[], Coroutine[Any, Any, None]]], Callable[[], None]]) -> None:
        """Run the application in a task: ``start`` starts it, and returns the function that cancels it."""
        self._cancel = start(self.run)

    def give_up(self) -> None:
        """Cancel the application from outside, as a server does when it is made to exit."""
        self._cancel()

    async def run(self) -> None:
        """Run the application: the client starts this as a task."""
        self.scope[PROBE_KEY] = self._states.append
        self._is_taken = True
        self._notify()
        try:
            await self._app(self.scope, self._receive, self._send)
            self.outcome = "returned"
        except Exception as exc:
            self.outcome, self.exception = "raised", exc
        except BaseException:
            self.outcome = "cancelled"
            raise
        finally:
            self._ended = self._loop.time()
            self._notify()

    async def look_for_what_is_left(self) -> None:
        """Set `left_behind`: the client calls this when no call runs."""
        self.left_behind = await tasks_left(self._before)

    async def _receive(self) -> Message:
        self._readers += 1
        self.most_readers = max(self.most_readers, self._readers)
        self._notify()
        try:
            while True:
                message = self._next()
                if message is not None:
                    return message
                await self._changed.wait()
        finally:
            self._readers -= 1
            self._notify()

    def _next(self) -> Message | None:
        raise NotImplementedError

    async def _send(self, message: Message) -> None:
        raise NotImplementedError

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _until(self, is_so: Callable[[], bool], what: str) -> None:
        with real_seconds(self._personality.ceiling) as scope:
            if not self._may_be_heard and not is_so():
                await let_doors_listen(is_so)
                self._may_be_heard = not is_so()
            while not is_so():
                await self._changed.wait()
        if scope.cancelled_caught:
            raise AssertionError(f"the application has not {what} within {self._personality.ceiling:g} seconds: {self}")

    def describe(self) -> str:
        """Return the state of the call in a sentence, as it stands in failures."""
        words = {"running": "still runs", "returned": "returned", "raised": f"raised {self.exception!r}"}
        told = f"the application {words.get(self.outcome, 'was cancelled from outside')}"
        why = "cancelable_deps did not cancel it" if self.reason is None else f"it was cancelled for {self.reason!s}"
        kinds = [(kind, len(list(same))) for kind, same in groupby(str(message["type"]) for message in self.sent)]
        sent = ", ".join(kind if count == 1 else f"{kind} x {count}" for kind, count in kinds) or "nothing"
        return f"{told} after {self.elapsed:.3f} seconds, and {why}; it sent {sent}"


class Call(Exchange):
    """An HTTP request that runs beside the test; made by `CancelableClient.start`."""

    def __init__(
        self,
        app: ASGIApp,
        request: httpx.Request,
        scope: Scope,
        personality: Personality,
        hang_up: HangUp,
        body: object,
    ) -> None:
        super().__init__(app, personality)
        self.request = request
        self._body = body
        self.scope = scope
        self._plan = hang_up
        self._feeding = anyio.CancelScope()
        self._gone = False
        self._body_given = 0
        self._body_taken = 0
        self._request_over = False
        self._room: float = float("inf")
        self._received: list[bytes] = []
        self.is_complete = False
        """Whether the application has sent the last byte of its response."""

    def __repr__(self) -> str:
        return f"<{self.request.method} {self.request.url.path}: {self.describe()}>"

    async def run(self) -> None:
        """Run the application, and send no more of the body when it has ended."""
        try:
            await super().run()
        finally:
            self._feeding.cancel()

    async def feed(self, content: object) -> None:
        """Send the request's body, piece by piece as the application takes it: the client starts this as a task."""
        with self._feeding:
            try:
                await self._feed()
            except Exception as exc:
                self.failure = exc
                await self.hang_up()
            finally:
                if isinstance(content, AsyncGenerator):
                    await content.aclose()

    async def _feed(self) -> None:
        if self._plan.request_bytes <= 0:
            await self.hang_up()
        if self._body is None or self._gone:
            return
        async with aclosing(pieces_of(self._body)) as pieces:
            async for piece in pieces:
                await self._changed_until(lambda: not self._incoming or self._gone)
                if self._gone or self.has_ended:
                    return
                self._put(piece, more=True)
        self._put(b"", more=False)

    async def send_body(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece of the request's body, of a call that was started with ``body_by_hand=True``.

        :param more: whether another piece follows.
        """
        self._put(data, more=more)
        await anyio.lowlevel.checkpoint()

    def _put(self, data: bytes, *, more: bool) -> None:
        data = data[: int(min(len(data), max(0, self._plan.request_bytes - self._body_given)))]
        self._body_given += len(data)
        if self._body_given >= self._plan.request_bytes:
            # The client leaves here, and its body never ends.
            more = True
            if not data:
                return
        if self._incoming and not more and not data:
            self._incoming[-1]["more_body"] = False
        else:
            self._incoming.append({"type": "http.request", "body": data, "more_body": more})
        self._notify()

    async def _changed_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so() and not self.has_ended:
            await self._changed.wait()

    def _next(self) -> Message | None:
        if self._incoming:
            message = self._incoming.pop(0)
            self._body_taken += len(message["body"])
            if self._body_taken >= self._plan.request_bytes:
                self._gone = True
            return message
        if (self._gone or self.is_complete) and not (self._personality.disconnect == "once" and self._disconnects):
            self._disconnects += 1
            return {"type": "http.disconnect"}
        return None

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind != "http.response.start":
            await self._changed_until(lambda: self._room > 0 or self._gone)
        body: bytes = message.get("body", b"") if kind == "http.response.body" else b""
        last = kind == "http.response.body" and not message.get("more_body", False)
        gone_before = self._gone
        if last and self._plan.with_last_byte:
            # Listeners get the disconnect before the server has the byte, as when both happen at once. One checkpoint is
            # not enough: on trio a task that is woken may run after the one that woke it.
            self._gone = True
            self._notify()
            await self._changed_until(lambda: not self._readers or bool(self._disconnects))
            await anyio.lowlevel.checkpoint()
        if not gone_before:
            self._refuse_unexpected(kind)
        self.sent.append(message)
        if not gone_before:
            self._received.append(body)
            self._room -= len(body)
        self.is_complete = self.is_complete or last
        if kind.startswith("http.response") and len(self.body) >= self._plan.response_bytes:
            self._gone = True
        self._notify()
        if gone_before and self._personality.send_raises:
            raise OSError("the client has hung up")
        await anyio.lowlevel.checkpoint()

    def _refuse_unexpected(self, kind: str) -> None:
        expected = "http.response.start" if self.status is None else "http.response.body"
        if self.is_complete or kind != expected:
            refuse(kind, "" if self.is_complete else expected)

    async def hang_up(self) -> None:
        """Break the connection: a task of the application that listens gets ``http.disconnect``."""
        self.hang_up_nowait()
        await anyio.lowlevel.checkpoint()

    def hang_up_nowait(self) -> None:
        """Break the connection at once, also in the middle of a step of the application, as from a fake that it calls."""
        self._gone = True
        self._notify()

    def stop_reading(self, after: int = 0) -> None:
        """Read ``after`` more bytes of the response's body, and then nothing: ``send()`` blocks, as with a full socket."""
        self._room = after

    def resume_reading(self) -> None:
        """Read on after `stop_reading`, without limit."""
        self._room = float("inf")
        self._notify()

    async def response_started(self) -> None:
        """Wait until the application has sent status and headers.

        :raises AssertionError: if it ends without a response, or has not started one within the client's ``ceiling``.
        """
        await self._until(lambda: self.status is not None or self.has_ended, "started its response")
        if self.status is None:
            raise AssertionError(f"there is no response: {self}")

    def chunks(self) -> AsyncIterator[bytes]:
        """Return an asynchronous iterator over the response's body as it arrives; it ends at its end or at a hang-up.

        A chunk must arrive within the client's ``ceiling``. The iterator may be left before its end.
        """
        return _Chunks(self)

    async def _chunk(self, index: int) -> bytes | None:
        """Return the message body with that index: empty for the headers, ``None`` after the end."""
        await self._until(lambda: len(self._received) > index or self._is_read_out, "sent more")
        return self._received[index] if len(self._received) > index else None

    @property
    def has_left(self) -> bool:
        """Whether the client has hung up."""
        return self._gone

    @property
    def _is_read_out(self) -> bool:
        return self.is_complete or self._gone or self.has_ended

    async def response(self) -> httpx.Response:
        """Wait for the complete response, and return it; after a hang-up, as far as the application has sent it.

        If the application has raised before its response started, its exception is raised.

        :raises AssertionError: if it ends without a response, or takes longer than the client's ``ceiling``.
        """
        await self._until(lambda: self.is_complete or self.has_ended, "sent its response")
        if self.failure is not None:
            raise self.failure
        if self.status is None and self.exception is not None:
            raise self.exception
        if self.status is None:
            raise AssertionError(f"there is no response: {self}")
        body = b"" if self.request.method == "HEAD" else self.body
        # As a stream, because otherwise httpx adds a content-length that the application has not sent.
        response = httpx.Response(
            self.status, headers=self.headers, stream=httpx.ByteStream(body), request=self.request
        )
        response.read()
        response.elapsed = timedelta(seconds=self.elapsed)
        return response

    @property
    def status(self) -> int | None:
        """The status that the application has sent, also after a hang-up; ``None`` if it has sent none."""
        return next((message["status"] for message in self.sent if message["type"] == "http.response.start"), None)

    @property
    def headers(self) -> httpx.Headers:
        """The headers of the response; empty while it has not started."""
        start = next((message for message in self.sent if message["type"] == "http.response.start"), {})
        return httpx.Headers([(bytes(name), bytes(value)) for name, value in start.get("headers", ())])

    @property
    def body(self) -> bytes:
        """The response's body as far as the application has sent it."""
        return b"".join(message.get("body", b"") for message in self.sent if message["type"] == "http.response.body")

    def json(self) -> Any:
        """Return the response's body, decoded from JSON."""
        return json.loads(self.body)

    def describe(self) -> str:
        """Return the state of the call in a sentence, with the status of its response."""
        status = "no status" if self.status is None else f"status {self.status}"
        return f"{super().describe()} ({status})"


class _Chunks:
    """An iterator over chunks; no generator, because trio warns of a generator that is left before its end."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._index = 0

    def __aiter__(self) -> _Chunks:
        return self

    async def __anext__(self) -> bytes:
        while (chunk := await self._call._chunk(self._index)) is not None:
            self._index += 1
            if chunk:
                return chunk
        raise StopAsyncIteration


def refuse(kind: str, expected: str) -> NoReturn:
    """Raise the error of a server's ``send()`` for a message that is not expected."""
    raise RuntimeError(f"the application sends {kind}, and a server expects {expected or 'nothing more'}")


async def pieces_of(body: object) -> AsyncGenerator[bytes]:
    """Yield the pieces of a body: of an asynchronous or a plain iterable, or of httpx's stream."""
    if not isinstance(body, AsyncIterable):
        assert isinstance(body, Iterable)
        for piece in body:
            yield piece
        return
    iterator = aiter(body)
    try:
        async for piece in iterator:
            yield piece
    finally:
        # Otherwise trio warns of a generator that was not read to its end.
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()
