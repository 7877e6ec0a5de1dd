"""One call of an application at the level of ASGI messages: what a server would say, when the test says so."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
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
    """How the server that the client stands for behaves."""

    disconnect: Disconnects
    spec_version: str
    send_raises: bool
    ceiling: float


@dataclass(frozen=True)
class HangUp:
    """The moment at which a client leaves by itself: `before_body`, `after_request`, `after_response` or `at_end`."""

    request_bytes: float = float("inf")
    response_bytes: float = float("inf")
    with_last_byte: bool = False

    @classmethod
    def before_body(cls) -> Self:
        """When the headers have been sent, and nothing of the body."""
        return cls(request_bytes=0)

    @classmethod
    def after_request(cls, count: int) -> Self:
        """When the application has been given ``count`` bytes of the request's body; the rest is not sent."""
        return cls(request_bytes=count)

    @classmethod
    def after_response(cls, count: int = 1) -> Self:
        """When the application has sent ``count`` bytes of the response's body; 0: when it has sent the headers."""
        return cls(response_bytes=count)

    @classmethod
    def at_end(cls) -> Self:
        """While the application sends the last byte: it is told before the response is complete."""
        return cls(with_last_byte=True)


class Exchange:
    """What HTTP and WebSocket calls share: the application's task, and a place to wait for what it does."""

    scope: Scope

    def __init__(self, app: ASGIApp, personality: Personality) -> None:
        self._app = app
        self._personality = personality
        self._changed = anyio.Event()
        self._scope = anyio.CancelScope()
        self._states: list[RequestState | FirstDoorBlock] = []
        self._incoming: list[Message] = []
        self._readers = 0
        self.most_readers = 0
        """The most that have awaited the server's ``receive()`` at one time.

        Two take each other's messages, and on some servers one of them waits for ever.
        """
        self._is_taken = self._may_be_heard = False
        self._disconnects = 0
        self._loop = current_loop()
        self._started = self._loop.time()
        self._ended: float | None = None
        self._before = tasks_now()
        self.sent: list[Message] = []
        """Every ASGI message that the application has sent, also those that no client could read any more."""
        self.outcome: Outcome = "running"
        """What became of the application: it is ``"running"``, has ``"returned"``, ``"raised"``, or was ``"cancelled"``."""
        self.exception: BaseException | None = None
        """What the application raised, if it did."""
        self.failure: Exception | None = None
        """What the test's own request body raised, which broke the connection; leaving the call raises it."""
        self.left_behind: list[Left] = []
        """Tasks that the call has started and that outlive it: the name of each and the line where it stands.

        While another call of this client runs nobody looks for them; those of other work in the test that began meanwhile
        are counted.
        """

    @property
    def reason(self) -> CancelationReason | None:
        """Why the call was cancelled by ``cancelable_deps``; ``None`` if it was not."""
        for state in self._states:
            if state.reason is not None:
                return state.reason
        return next((state.cause.reason for state in self._states if state.cause is not None), None)

    @property
    def elapsed(self) -> float:
        """Seconds from the call's start to the application's end, or to now; on the event loop's clock."""
        return (self._loop.time() if self._ended is None else self._ended) - self._started

    async def running(self) -> None:
        """Wait until the application has taken the call and stands still, or has ended.

        One that yields in a loop, and never waits for anything, is given half a second.
        """
        await self._until(lambda: self._is_taken, "taken the call")
        await all_stand_still(self._personality.ceiling)

    async def listened_to(self) -> None:
        """Wait until somebody awaits the server's ``receive()``, so that a hang-up is seen at once, and stands still.

        Our doors do after some milliseconds. A ``MockClock`` of trio, on which none pass, is moved by these.
        """
        await self._until(lambda: bool(self._readers) or self.has_ended, "begun to listen")
        await all_stand_still(self._personality.ceiling)

    async def ended(self) -> None:
        """Wait until the application has ended, background tasks included."""
        await self._until(lambda: self.has_ended, "ended")

    @property
    def has_ended(self) -> bool:
        return self.outcome != "running"

    async def run(self) -> None:
        """The application's task; the client starts it."""
        self.scope[PROBE_KEY] = self._states.append
        self._is_taken = True
        self._notify()
        try:
            with self._scope:
                await self._app(self.scope, self._receive, self._send)
                self.outcome = "returned"
            if self.outcome == "running":
                self.outcome = "cancelled"
        except Exception as exc:
            self.outcome, self.exception = "raised", exc
        except BaseException:
            self.outcome = "cancelled"
            raise
        finally:
            self._ended = self._loop.time()
            self._notify()

    def give_up(self) -> None:
        """Cancel the application, as no client can."""
        self._scope.cancel()

    async def look_for_what_is_left(self) -> None:
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
        """What has become of the call, in a sentence."""
        words = {"running": "still runs", "returned": "returned", "raised": f"raised {self.exception!r}"}
        told = f"the application {words.get(self.outcome, 'was cancelled from outside')}"
        why = "cancelable_deps did not cancel it" if self.reason is None else f"it was cancelled for {self.reason!s}"
        kinds = [(kind, len(list(same))) for kind, same in groupby(str(message["type"]) for message in self.sent)]
        sent = ", ".join(kind if count == 1 else f"{kind} x {count}" for kind, count in kinds) or "nothing"
        return f"{told} after {self.elapsed:.3f} seconds, and {why}; it sent {sent}"


class Call(Exchange):
    """One HTTP request that runs beside the test; `CancelableClient.start` makes it."""

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
        try:
            await super().run()
        finally:
            self._feeding.cancel()

    async def feed(self, content: object) -> None:
        """Send the request's body, piece by piece as the application takes it; the client starts it."""
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
        """Send a piece of the body, of a call that was started with ``content=None, body_by_hand=True``.

        :param more: whether another one follows.
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
            # Told before the server has it, as one is who listens when both happen at once. Not one checkpoint: on trio
            # a task that is woken may run after the one that woke it.
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
        """Leave: the connection breaks, and the application is told by ``http.disconnect`` if somebody listens."""
        self.hang_up_nowait()
        await anyio.lowlevel.checkpoint()

    def hang_up_nowait(self) -> None:
        """Leave in the middle of a step of the application: for a fake that the handler calls."""
        self._gone = True
        self._notify()

    def stop_reading(self, after: int = 0) -> None:
        """Take ``after`` more bytes of the response's body, and then nothing: ``send()`` blocks, as with a full socket."""
        self._room = after

    def resume_reading(self) -> None:
        self._room = float("inf")
        self._notify()

    async def response_started(self) -> None:
        """Wait until the application has sent status and headers."""
        await self._until(lambda: self.status is not None or self.has_ended, "started its response")
        if self.status is None:
            raise AssertionError(f"there is no response: {self}")

    def chunks(self) -> AsyncIterator[bytes]:
        """The response's body as it arrives, until its end or a hang-up; it may be left before."""
        return _Chunks(self)

    async def _chunk(self, index: int) -> bytes | None:
        """What the client has read as number ``index``; empty for the headers, ``None`` after the end."""
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
        """Wait for the whole response. It raises what the application raised before it had started one.

        After a hang-up it is the response that nobody could read any more.
        """
        await self._until(lambda: self.is_complete or self.has_ended, "sent its response")
        if self.failure is not None:
            raise self.failure
        if self.status is None and self.exception is not None:
            raise self.exception
        if self.status is None:
            raise AssertionError(f"there is no response: {self}")
        body = b"" if self.request.method == "HEAD" else self.body
        # As a stream, or httpx adds a content-length that the application has not sent.
        response = httpx.Response(
            self.status, headers=self.headers, stream=httpx.ByteStream(body), request=self.request
        )
        response.read()
        response.elapsed = timedelta(seconds=self.elapsed)
        return response

    @property
    def status(self) -> int | None:
        """The status that the application sent, also if nobody could read it any more; ``None`` if it sent none."""
        return next((message["status"] for message in self.sent if message["type"] == "http.response.start"), None)

    @property
    def headers(self) -> httpx.Headers:
        """Those of the response; none while it has not started."""
        start = next((message for message in self.sent if message["type"] == "http.response.start"), {})
        return httpx.Headers([(bytes(name), bytes(value)) for name, value in start.get("headers", ())])

    @property
    def body(self) -> bytes:
        """As much of the response's body as the application has sent."""
        return b"".join(message.get("body", b"") for message in self.sent if message["type"] == "http.response.body")

    def json(self) -> Any:
        """The response's body, from JSON."""
        return json.loads(self.body)

    def describe(self) -> str:
        status = "no status" if self.status is None else f"status {self.status}"
        return f"{super().describe()} ({status})"


class _Chunks:
    """No generator: of one that is left before its end trio warns."""

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
    """What a server's ``send()`` does, which logs it as an error."""
    raise RuntimeError(f"the application sends {kind}, and a server expects {expected or 'nothing more'}")


async def pieces_of(body: object) -> AsyncGenerator[bytes]:
    """Of bytes that come slowly, or of httpx's stream."""
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
        # Else trio warns of a generator that was not read to its end.
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()
