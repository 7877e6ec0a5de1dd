"""A WebSocket client on a raw socket: every frame in and out, and every way of leaving."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from tests.servers import Connection, Response

if TYPE_CHECKING:
    import socket

TEXT, CLOSE, PING, PONG = 0x1, 0x8, 0x9, 0xA


class SocketClient(Connection):
    """Asks for a WebSocket at once; `accepted` says whether it was given one, else `refusal` is the answer."""

    refusal: Response | None = None

    def __init__(self, port: int, target: str, key: str = "", **headers: str) -> None:
        super().__init__(port)
        fields = {"x-id": key} | {name.replace("_", "-"): value for name, value in headers.items()}
        self.send(
            f"GET {target} HTTP/1.1\r\nhost: test\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
            "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n".encode(),
            "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode() + b"\r\n",
        )

    def accepted(self) -> bool:
        response = self.head()
        if response.status == 101:
            return True
        self.refusal = self.finish(response) if "content-length" in response.headers else response
        return False

    def say(self, *texts: str) -> None:
        self.send(b"".join(_frame(TEXT, text.encode()) for text in texts))

    def close_politely(self, code: int = 1000) -> None:
        self.send(_frame(CLOSE, struct.pack("!H", code)))
        # Some servers would wait for a long time for the client to close the connection as well.
        while (answer := self._next()) and answer[0] != CLOSE:
            pass
        self.close()

    def text(self) -> str:
        opcode, data = self._next()
        assert opcode == TEXT, f"no text, but {opcode} {data!r}"
        return data.decode()

    def closed(self) -> tuple[int, str]:
        """Code and text of the server's close frame, answered as the protocol demands."""
        opcode, data = self._next()
        assert opcode == CLOSE, f"no close, but {opcode} {data!r}"
        self.send(_frame(CLOSE, data[:2]))
        return (struct.unpack("!H", data[:2])[0], data[2:].decode()) if data else (1005, "")

    def _next(self) -> tuple[int, bytes]:
        while True:
            first, second = self._exactly(2)
            size = second & 0x7F
            if size == 126:
                size = struct.unpack("!H", self._exactly(2))[0]
            elif size == 127:
                size = struct.unpack("!Q", self._exactly(8))[0]
            data = self._exactly(size)
            if first & 0x0F == PING:
                self.send(_frame(PONG, data))
            else:
                return first & 0x0F, data

    def flood(self, text: str, limit: int) -> int:
        """Send ``text`` again and again until the server takes no more; how often it took it, at most ``limit``."""
        frame, sent = _frame(TEXT, text.encode()), 0
        client: socket.socket = self.socket
        client.settimeout(1)
        try:
            for sent in range(limit):  # noqa: B007 - the last number is what is asked for
                client.sendall(frame)
        except TimeoutError:
            return sent
        return limit


def _frame(opcode: int, data: bytes) -> bytes:
    """One frame of a client, masked."""
    size = len(data)
    head = bytes([0x80 | opcode])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 65536:
        head += bytes([0x80 | 126]) + struct.pack("!H", size)
    else:
        head += bytes([0x80 | 127]) + struct.pack("!Q", size)
    mask = os.urandom(4)
    stream = mask * (size // 4 + 1)
    masked = int.from_bytes(data, "big") ^ int.from_bytes(stream[:size], "big")
    return head + mask + masked.to_bytes(size, "big")
