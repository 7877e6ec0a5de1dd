"""A server's end of one request, message by message, for the tests of our own reader.

Other tests use `cancelable_deps.testing`, by way of `tests.calls`. That client hides what these count: how many messages
were taken and how they were cut, all of them there from the beginning. And it keeps what it knows of a request, so that
nothing can be said of what is left as garbage.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from cancelable_deps.kernel.loops.current import current_loop
from tests.calls import CEILING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Scope


class Call:
    """One request to ``app``: a queue of messages towards it, and a list of those that came back."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        method: str = "GET",
        body: bytes | Iterable[bytes] = b"",
        headers: dict[str, str] | None = None,
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
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": "/",
            "raw_path": b"/",
            "root_path": "",
            "query_string": b"",
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

    async def run(self) -> None:
        """Run the application to its end, and keep what it raises."""
        try:
            await self.app(self.scope, self.receive, self.send)
        except Exception as exc:
            self.error = exc

    async def listened_to(self) -> None:
        """Wait until the application, or we for it, awaits ``receive()`` and stands still."""
        while not self.readers and not self.received:
            await self._changed.wait()
        await anyio.wait_all_tasks_blocked()

    @property
    def status(self) -> int | None:
        return next((message["status"] for message in self.sent if message["type"] == "http.response.start"), None)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent if m["type"] == "http.response.body")

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def get(app: ASGIApp, **options: Any) -> Call:
    """A request whose client stays."""
    with anyio.fail_after(CEILING):
        call = Call(app, **options)
        await call.run()
    return call


@asynccontextmanager
async def running(app: ASGIApp, **options: Any) -> AsyncGenerator[Call]:
    """A request that runs beside the test; leaving waits for its end."""
    call = Call(app, **options)
    with anyio.fail_after(CEILING):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call.run)
            yield call


async def as_by_a_server(call: Call) -> Call:
    """Run the application to its end in a task as a server starts it: without a scope of anyio around."""
    await current_loop().spawn(call.run, copy_context()).join()
    return call
