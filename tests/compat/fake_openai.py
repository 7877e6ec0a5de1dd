"""A service with the API of OpenAI, as far as a chat that is streamed needs it: bare ASGI, so that it sees who leaves.

The text of a question is ``key step step ...``. A step is a number of tokens, ``gate`` (wait until it is open: the first
one is ``key-0``), ``flood``, ``finish``, ``usage``, ``end``, or the status of a refusal.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from starlette.types import Receive, Scope, Send

from tests import recipes_upstream
from tests.recipes_upstream import answer, flood, gates, journal, read, until_left

PROMPT_TOKENS, COMPLETION_TOKENS = 7, 42
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "fake"}


async def complete(scope: Scope, receive: Receive, send: Send) -> None:
    asked = json.loads(await read(receive, lambda body: None))
    assert asked["stream"] is True
    assert asked["stream_options"] == {"include_usage": True}
    key, *steps = asked["messages"][0]["content"].split()
    await until_left(key, receive, partial(Stream(key, send).run, steps))


class Stream:
    def __init__(self, key: str, send: Send) -> None:
        self._key = key
        self._send = send
        self._gates = 0
        self._tokens = 0

    async def run(self, steps: list[str]) -> None:
        if len(steps[0]) == 3:
            journal.add(self._key, "refused")
            await answer(self._send, {"error": {"message": "no"}}, int(steps[0]))
            return
        headers = [(b"content-type", b"text/event-stream")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        for step in steps:
            await self._take(step)

    async def _take(self, step: str) -> None:
        if step == "gate":
            journal.add(self._key, f"at-gate-{self._gates}")
            await gates[f"{self._key}-{self._gates}"].wait()
            self._gates += 1
        elif step == "flood":
            await flood(self._key, partial(self._choose, {"content": "x" * 65536}, None))
        elif step == "finish":
            await self._choose({}, "stop")
        elif step == "usage":
            total = PROMPT_TOKENS + COMPLETION_TOKENS
            numbers = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS, "total_tokens": total}
            await self._event(json.dumps({**HEAD, "choices": [], "usage": numbers}))
            journal.add(self._key, "billed")
        elif step == "end":
            await self._event("[DONE]")
            await self._send({"type": "http.response.body", "body": b""})
        else:
            for _ in range(int(step)):
                self._tokens += 1
                await self._choose({"role": "assistant", "content": f"token {self._tokens} "}, None)

    async def _choose(self, delta: dict[str, Any], finish_reason: str | None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        await self._event(json.dumps({**HEAD, "choices": [choice], "usage": None}))

    async def _event(self, data: str) -> None:
        await self._send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope.get("path") == "/v1/chat/completions":
        await complete(scope, receive, send)
    else:
        await recipes_upstream.app(scope, receive, send)
