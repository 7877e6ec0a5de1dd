"""A client at the level of ASGI messages: what a server would send, when the test says so."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Scope

CEILING = 10
"""Seconds after which a state that a test waits for will not come any more."""


class Call:
    """One request to ``app``: a queue of messages towards it, and a list of those that came back."""

    def __init__(
        self,
        app: ASGIApp,
        path: str = "/",
        *,
        method: str = "GET",
        body: bytes | Iterable[bytes] = b"",
        headers: dict[str, str] | None = None,
        query: str = "",
        spec_version: str = "2.3",
        once: bool = False,
    ) -> None:
        self.app = app
        self.sent: list[Message] = []
        self.once = once
        """Deliver ``http.disconnect`` once and then block, as hypercorn and daphne do, rather than repeat it."""
        self.readers = 0
        self.most_readers = 0
        self.received = 0
        self.error: BaseException | None = None
        self.gone = False
        self._complete = False
        self._delivered = False
        self._changed = anyio.Event()
        self.scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 80),
        }
        pieces = [body] if isinstance(body, bytes) else list(body)
        self._incoming: list[Message] = [
            {"type": "http.request", "body": piece, "more_body": index < len(pieces) - 1}
            for index, piece in enumerate(pieces)
        ]

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def receive(self) -> Message:
        self.readers += 1
        self.most_readers = max(self.readers, self.most_readers)
        self._notify()
        try:
            while True:
                message = self._next()
                if message is not None:
                    self.received += 1
                    return message
                await self._changed.wait()
        finally:
            self.readers -= 1

    def _next(self) -> Message | None:
        if self._incoming:
            return self._incoming.pop(0)
        if (self.gone or self._complete) and not (self.once and self._delivered):
            self._delivered = True
            return {"type": "http.disconnect"}
        return None

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        self._complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        self._notify()
        await anyio.lowlevel.checkpoint()

    def hang_up(self) -> None:
        self.gone = True
        self._notify()

    def deliver(self, body: bytes, *, more_body: bool = True) -> None:
        self._incoming.append({"type": "http.request", "body": body, "more_body": more_body})
        self._notify()

    async def run(self) -> Call:
        """Run the application to its end, and keep what it raises."""
        try:
            await self.app(self.scope, self.receive, self.send)
        except Exception as exc:
            self.error = exc
        return self

    async def completed(self) -> None:
        """Wait until the application has sent the last byte."""
        while not self._complete:
            await self._changed.wait()

    async def listened_to(self) -> None:
        """Wait until the application, or we for it, awaits ``receive()`` and stands still."""
        while not self.readers and not self.received:
            await self._changed.wait()
        await anyio.wait_all_tasks_blocked()

    @property
    def status(self) -> int | None:
        return next((message["status"] for message in self.sent if message["type"] == "http.response.start"), None)

    @property
    def response_headers(self) -> dict[str, str]:
        start = next(message for message in self.sent if message["type"] == "http.response.start")
        return {name.decode(): value.decode() for name, value in start["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent if m["type"] == "http.response.body")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def is_complete(self) -> bool:
        return self._complete


async def get(app: ASGIApp, path: str = "/", **options: Any) -> Call:
    """A request whose client stays."""
    with anyio.fail_after(CEILING):
        return await Call(app, path, **options).run()


@asynccontextmanager
async def running(app: ASGIApp, path: str = "/", **options: Any) -> AsyncGenerator[Call]:
    """A request that runs beside the test; leaving waits for its end."""
    call = Call(app, path, **options)
    with anyio.fail_after(CEILING):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call.run)
            yield call


async def hang_up_once(app: ASGIApp, started: anyio.Event, path: str = "/", **options: Any) -> Call:
    """A request whose client leaves as soon as the handler has set ``started``."""
    async with running(app, path, **options) as call:
        await started.wait()
        call.hang_up()
    return call
