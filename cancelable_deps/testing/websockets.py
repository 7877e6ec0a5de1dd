"""WebSocket calls of an application, without a socket."""

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
    """The application has closed the WebSocket or refused its handshake: raised by the methods that wait for it."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the application closed with {code}" + (f": {reason}" if reason else ""))
        self.code = code
        """The close code; 1006 if there was no close frame, as after a refusal."""
        self.reason = reason
        """The text of the close frame, or how the handshake was refused."""


class SocketCall(Exchange):
    """A WebSocket that runs beside the test; made by `CancelableClient.websocket`."""

    def __init__(self, app: ASGIApp, scope: Scope, personality: Personality) -> None:
        super().__init__(app, personality)
        self.scope = scope
        self._incoming.append({"type": "websocket.connect"})
        self._messages: list[Message] = []
        self._gone: int | None = None
        self.subprotocol: str | None = None
        """The subprotocol that the application has chosen."""
        self.is_accepted = False
        """Whether the application has accepted the handshake."""
        self.close_code: int | None = None
        """The code with which the application has closed; ``None`` while it has not."""
        self.close_reason = ""
        """The text of the application's close frame."""

    def __repr__(self) -> str:
        return f"<WebSocket {self.scope['path']}: {self.describe()}>"

    @property
    def refusal(self) -> httpx.Response | None:
        """The HTTP response by which the application has refused the handshake; ``None`` if it sent none."""
        start = next((m for m in self.sent if m["type"] == "websocket.http.response.start"), None)
        body = [m for m in self.sent if m["type"] == "websocket.http.response.body"]
        if start is None or not body or body[-1].get("more_body", False):
            return None
        content = b"".join(m.get("body", b"") for m in body)
        return httpx.Response(start["status"], headers=list(start.get("headers", ())), content=content)

    async def accepted(self) -> None:
        """Wait until the application has accepted the handshake.

        :raises SocketClosed: if the application refuses it.
        """
        await self._until(lambda: self.is_accepted or self._is_over, "accepted the WebSocket")
        if not self.is_accepted:
            raise self._closed()

    async def send_text(self, text: str) -> None:
        """Send a text message, when the application has accepted.

        :raises SocketClosed: if the application refuses the handshake.
        """
        await self._say({"type": "websocket.receive", "text": text})

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary message, when the application has accepted.

        :raises SocketClosed: if the application refuses the handshake.
        """
        await self._say({"type": "websocket.receive", "bytes": data})

    async def send_json(self, value: Any) -> None:
        """Send ``value`` as a text message in JSON, when the application has accepted.

        :raises SocketClosed: if the application refuses the handshake.
        """
        await self.send_text(json.dumps(value))

    async def receive_text(self) -> str:
        """Wait for the next message of the application, and return its text.

        :raises SocketClosed: if the application closes the WebSocket instead.
        :raises AssertionError: if the message is binary, or none comes within the client's ``ceiling``.
        """
        text: str = await self._heard("text")
        return text

    async def receive_bytes(self) -> bytes:
        """Wait for the next message of the application, and return its bytes.

        :raises SocketClosed: if the application closes the WebSocket instead.
        :raises AssertionError: if the message is a text, or none comes within the client's ``ceiling``.
        """
        data: bytes = await self._heard("bytes")
        return data

    async def receive_json(self) -> Any:
        """Wait for the next message of the application, a text, and return it decoded from JSON.

        :raises SocketClosed: if the application closes the WebSocket instead.
        :raises AssertionError: if the message is binary, or none comes within the client's ``ceiling``.
        """
        return json.loads(await self.receive_text())

    async def drop(self) -> None:
        """Break the connection without a close frame: the application gets the close code 1006."""
        self.drop_nowait()
        await anyio.lowlevel.checkpoint()

    def drop_nowait(self) -> None:
        """Break the connection at once, also in the middle of a step of the application, as from a fake that it calls."""
        self._leave(_ABNORMAL)

    async def close(self, code: int = 1000) -> None:
        """Close the WebSocket from the client's side, with this close code."""
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
