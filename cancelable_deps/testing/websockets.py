"""One WebSocket of an application, without a socket."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import httpx

from .calls import Exchange, Personality, refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope

_ABNORMAL = 1006


class SocketClosed(Exception):
    """What receiving from a WebSocket raises that the application has closed or refused."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the application closed with {code}" + (f": {reason}" if reason else ""))
        self.code = code
        self.reason = reason


class SocketCall(Exchange):
    """One WebSocket that runs beside the test; `CancelableClient.websocket` makes it."""

    def __init__(self, app: ASGIApp, scope: Scope, personality: Personality) -> None:
        super().__init__(app, personality)
        self.scope = scope
        self._incoming.append({"type": "websocket.connect"})
        self._messages: list[Message] = []
        self._gone: int | None = None
        self.subprotocol: str | None = None
        """The one that the application has chosen."""
        self.is_accepted = False
        self.close_code: int | None = None
        """The code with which the application has closed; ``None`` while it has not."""
        self.close_reason = ""

    def __repr__(self) -> str:
        return f"<WebSocket {self.scope['path']}: {self.describe()}>"

    @property
    def refusal(self) -> httpx.Response | None:
        """The HTTP response by which the application has refused the handshake, if it sent one."""
        start = next((m for m in self.sent if m["type"] == "websocket.http.response.start"), None)
        body = [m for m in self.sent if m["type"] == "websocket.http.response.body"]
        if start is None or not body or body[-1].get("more_body", False):
            return None
        content = b"".join(m.get("body", b"") for m in body)
        return httpx.Response(start["status"], headers=list(start.get("headers", ())), content=content)

    async def accepted(self) -> None:
        """Wait until the application has accepted. Raises `SocketClosed` if it refuses."""
        await self._until(lambda: self.is_accepted or self._is_over, "accepted the WebSocket")
        if not self.is_accepted:
            raise self._closed()

    async def send_text(self, text: str) -> None:
        await self._say({"type": "websocket.receive", "text": text})

    async def send_bytes(self, data: bytes) -> None:
        await self._say({"type": "websocket.receive", "bytes": data})

    async def send_json(self, value: Any) -> None:
        """As text."""
        await self.send_text(json.dumps(value))

    async def receive_text(self) -> str:
        """Wait for the next message. Raises `SocketClosed` if the application closes instead."""
        text: str = await self._heard("text")
        return text

    async def receive_bytes(self) -> bytes:
        """Wait for the next message. Raises `SocketClosed` if the application closes instead."""
        data: bytes = await self._heard("bytes")
        return data

    async def receive_json(self) -> Any:
        """Wait for the next message, of text. Raises `SocketClosed` if the application closes instead."""
        return json.loads(await self.receive_text())

    async def drop(self) -> None:
        """Break the connection without a close frame: the application is told 1006, as servers say it."""
        self.drop_nowait()
        await anyio.lowlevel.checkpoint()

    def drop_nowait(self) -> None:
        """Break the connection in the middle of a step of the application: for a fake that the handler calls."""
        self._leave(_ABNORMAL)

    async def close(self, code: int = 1000) -> None:
        """Close from the client's side."""
        self._leave(code)
        await anyio.lowlevel.checkpoint()

    def _leave(self, code: int) -> None:
        if self._gone is None:
            self._gone = code
        self._notify()

    async def _say(self, message: Message) -> None:
        await self.accepted()
        self._incoming.append(message)
        self._notify()
        await anyio.lowlevel.checkpoint()

    async def _heard(self, kind: str) -> Any:
        await self._until(lambda: bool(self._messages) or self._is_over, "sent a message")
        if not self._messages:
            raise self._closed()
        message = self._messages.pop(0)
        if message.get(kind) is None:
            raise AssertionError(f"the application has not sent {kind}, but {message}")
        return message[kind]

    def _closed(self) -> SocketClosed:
        if self.close_code is None and self.exception is not None:
            raise self.exception
        if self.refusal is not None:
            return SocketClosed(_ABNORMAL, f"it refused the handshake with status {self.refusal.status_code}")
        return SocketClosed(self.close_code or _ABNORMAL, self.close_reason)

    @property
    def _is_over(self) -> bool:
        return self.close_code is not None or self.refusal is not None or self.has_ended

    def _next(self) -> Message | None:
        if self._incoming:
            return self._incoming.pop(0)
        code = self._gone if self._gone is not None else self.close_code
        if code is None or (self._personality.disconnect == "once" and self._disconnects):
            return None
        self._disconnects += 1
        return {"type": "websocket.disconnect", "code": code, "reason": ""}

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if self._gone is None:
            self._refuse_unexpected(kind)
        elif self._personality.send_raises:
            raise OSError("the client has left")
        self.sent.append(message)
        if self._gone is None:
            if kind == "websocket.accept":
                self.is_accepted = True
                self.subprotocol = message.get("subprotocol")
            elif kind == "websocket.send":
                self._messages.append(message)
        if kind == "websocket.close" and self.close_code is None:
            self.close_code = message.get("code", 1000)
            self.close_reason = message.get("reason") or ""
        self._notify()
        await anyio.lowlevel.checkpoint()

    def _refuse_unexpected(self, kind: str) -> None:
        if self.close_code is not None:
            expected: tuple[str, ...] = ()
        elif self.is_accepted:
            expected = ("websocket.send", "websocket.close")
        elif self.refusal is not None:
            expected = ()
        elif self.sent:
            expected = ("websocket.http.response.body",)
        else:
            expected = ("websocket.accept", "websocket.close", "websocket.http.response.start")
        if kind not in expected:
            refuse(kind, ", ".join(expected))
