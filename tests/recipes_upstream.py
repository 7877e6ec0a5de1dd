"""The service behind the reverse proxy of `examples/recipes`: bare ASGI, so that it sees what comes, and who leaves.

The header `x-id` names a request in the journal. The journal and the gates are asked directly, not through the proxy.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from urllib.parse import parse_qs

import anyio
import anyio.lowlevel
from starlette.types import Receive, Scope, Send

from tests.machine import scaled
from tests.server_app import Journal

journal = Journal()
gates: defaultdict[str, anyio.Event] = defaultdict(anyio.Event)

HEADERS = [
    (b"set-cookie", b"one=1"),
    (b"set-cookie", b"two=2"),
    (b"connection", b"x-of-this-hop"),
    (b"x-of-this-hop", b"secret"),
    (b"keep-alive", b"timeout=5"),
    (b"x-of-the-service", b"kept"),
]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    handler = HANDLERS[scope["path"].split("/")[1]]
    await handler(scope, receive, send)


def key_of(scope: Scope) -> str:
    key: bytes = dict(scope["headers"]).get(b"x-id", b"")
    return key.decode()


async def answer(send: Send, body: Any, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    content = json.dumps(body).encode()
    all_headers = [(b"content-length", b"%d" % len(content)), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": content})


async def ready(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, "ready")


async def told(scope: Scope, receive: Receive, send: Send) -> None:
    parameters = parse_qs(scope["query_string"].decode())
    key = scope["path"].removeprefix("/journal/")
    await answer(send, await journal.wait(key, parameters["event"][0], int(parameters["count"][0])))


async def open_gate(scope: Scope, receive: Receive, send: Send) -> None:
    gates[scope["path"].removeprefix("/gates/")].set()
    await answer(send, None)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """What came here, and a response with headers of all kinds."""
    body = await read(receive, lambda part: None)
    headers = [(name.decode(), value.decode()) for name, value in scope["headers"]]
    target = (scope["raw_path"].partition(b"?")[0] + b"?" + scope["query_string"]).decode()
    seen = {"method": scope["method"], "target": target, "headers": headers, "body": body.decode()}
    await answer(send, seen, 201, HEADERS)


async def read(receive: Receive, note: Callable[[bytes], None]) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        part: bytes = message.get("body", b"")
        body += part
        note(body)
        if not message.get("more_body"):
            return body


async def upload(scope: Scope, receive: Receive, send: Send) -> None:
    """Note each state of the body."""
    key = key_of(scope)
    try:
        body = await read(receive, lambda body: journal.add(key, f"read:{body.decode()}"))
    except ConnectionError:
        journal.add(key, "left")
        return
    await answer(send, body.decode())


async def stream(scope: Scope, receive: Receive, send: Send) -> None:
    """Send one part; another when the gate is open; and nothing more when the other side leaves."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"first\n", "more_body": True})

    async def rest() -> None:
        await send({"type": "http.response.body", "body": b"second\n"})

    await at_the_gate(scope, receive, rest)


async def wait(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer nothing until the gate is open."""

    async def reply() -> None:
        await answer(send, "at last")

    await at_the_gate(scope, receive, reply)


async def at_the_gate(scope: Scope, receive: Receive, go_on: Callable[[], Awaitable[None]]) -> None:
    key = key_of(scope)
    journal.add(key, "started")

    async def work() -> None:
        await gates[key].wait()
        await go_on()

    await until_left(key, receive, work)


async def flood(key: str, send_part: Callable[[], Awaitable[None]]) -> None:
    """Send without an end, and note when the other side takes no more."""
    sent = 0

    async def watch() -> None:
        before = -1
        while before != sent:
            before = sent
            await anyio.sleep(scaled(0.3))
        journal.add(key, "stalled")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        while True:
            await send_part()
            sent += 1
            await anyio.lowlevel.checkpoint()  # uvicorn's `send` returns at once when the other side has left


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    """Send more than a client takes that does not read."""
    await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send_part() -> None:
        await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})

    await until_left(key_of(scope), receive, partial(flood, key_of(scope), send_part))


async def until_left(key: str, receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Work until the other side leaves, and note that."""
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            await work()
            tasks.cancel_scope.cancel()

        tasks.start_soon(run)
        while (await receive())["type"] != "http.disconnect":
            pass
        journal.add(key, "left")
        tasks.cancel_scope.cancel()


async def break_off(scope: Scope, receive: Receive, send: Send) -> None:
    """Announce more than comes."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
    await send({"type": "http.response.body", "body": b"less", "more_body": True})


HANDLERS = {
    "bare": ready,
    "journal": told,
    "gates": open_gate,
    "echo": echo,
    "upload": upload,
    "stream": stream,
    "endless": endless,
    "wait": wait,
    "break-off": break_off,
}
