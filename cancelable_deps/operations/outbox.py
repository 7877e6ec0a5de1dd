"""The answers of a worker that wait for some milliseconds, so that many of them go out together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_PATIENCE: Final = 0.02


class Outbox:
    """Answers by the worker that they are for. Those that are not urgent wait for others, 20 ms at most."""

    def __init__(self, send: Callable[[str, list[dict[str, Any]]], Awaitable[None]]) -> None:
        self._send = send
        self._waiting: dict[str, list[dict[str, Any]]] = {}
        self._has_some = anyio.Event()
        self._has_urgent = anyio.Event()

    def put(self, worker: str, answer: dict[str, Any], *, is_urgent: bool) -> None:
        """Have an answer sent."""
        self._waiting.setdefault(worker, []).append(answer)
        self._has_some.set()
        if is_urgent:
            self._has_urgent.set()

    async def run(self) -> None:
        """Send the answers, until this is cancelled."""
        while True:
            await self._has_some.wait()
            with anyio.move_on_after(_PATIENCE):
                await self._has_urgent.wait()
            waiting, self._waiting = self._waiting, {}
            self._has_some, self._has_urgent = anyio.Event(), anyio.Event()
            for worker, answers in waiting.items():
                await self._send(worker, answers)
