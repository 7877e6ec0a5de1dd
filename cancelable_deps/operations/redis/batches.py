"""Calls of scripts that are made at the same time, sent together.

A pipeline of fifty costs the client library a fifth of fifty single calls. And a call that has been sent is not interrupted
when its caller is cancelled: the connection would be lost with it.
"""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final

import anyio

from ...kernel.loops.current import current_loop
from ..backend import Unavailable
from .client import Pending

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from ...kernel.loops.base import Event, Worker
    from .client import Call, Client

_MOST_TOGETHER: Final = 100
_LARGE: Final = 1 << 16
_MOST_BYTES: Final = 1 << 20
"""More than that takes long to pack, and perhaps longer to send than a batch may; arguments below 64 KiB do not count."""

_MOST_BATCHES: Final = 4
"""So many are under way at the same time: fewer would wait for each other, more would be smaller."""

_MOST_SINGLES: Final = 32
"""The same for a client that cannot send calls together."""

_CLOSED: Final = "the store is not open"
_LONGEST: Final = 1.0
"""Seconds after which a batch is given up, as by then all of its callers have."""


class _Waiting(Pending):
    def __init__(self, call: Call, has_ended: Event) -> None:
        super().__init__(has_ended)
        self.call = call
        self.is_under_way = False

    def end(self, result: Any) -> None:
        self.is_under_way = False
        if isinstance(result, Exception):
            self.error = result
        else:
            self.result = result
        self.has_ended.set()


class Batches:
    """The calls that wait for a client, and those that are under way."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop = current_loop()
        # A connection keeps the context in which it is made, and that of a request would be kept alive.
        self._context = copy_context()
        self._most_together = _MOST_TOGETHER if client.can_pipeline else 1
        most = _MOST_BATCHES if client.can_pipeline else _MOST_SINGLES
        self._most_batches = most if client.most_connections is None else min(most, client.most_connections)
        self._waiting: deque[_Waiting] = deque()
        self._left: dict[str | None, _Waiting] = {}
        """The last call under way whose caller has left, by its first key."""

        self._workers: list[Worker] = []
        self._due: Worker | None = None
        """The worker that has not begun, if there is one."""

        self._is_open = False

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Send calls inside the ``async with``; at its end those that are under way are waited for, a second or two."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            while self._waiting:
                self._waiting.popleft().end(Unavailable(_CLOSED))
            # Each batch has its limit; a little more, so that none uses a client that is closed.
            with anyio.move_on_after(2 * _LONGEST, shield=True):
                for worker in self._workers:
                    await worker.join()

    async def run(self, call: Call) -> Any:
        """Run a script, and return what it returns.

        A caller that is cancelled does not stop a call that has been sent.

        :raises Unavailable: if it fails, or takes longer than a second; it may take effect all the same.
        """
        key = _first_key(call)
        left = self._left.get(key)
        if left is not None:
            # What takes something back that a cancelled caller has asked for must not come before it.
            await left.has_ended.wait()
        if not self._is_open:
            raise Unavailable(_CLOSED)
        waiting = _Waiting(call, self._loop.make_event())
        self._waiting.append(waiting)
        # A worker that has not begun takes along all that is there when it begins; on asyncio it may be cancelled before.
        if (self._due is None or self._due.done) and self._has_room():
            self._due = self._loop.spawn(self.send, self._context.copy())
            self._workers.append(self._due)
        try:
            return await waiting.outcome()
        finally:
            if waiting.is_under_way and waiting.is_abandoned and key is not None:
                self._left[key] = waiting

    def _has_room(self) -> bool:
        self._workers = [worker for worker in self._workers if not worker.done]
        return len(self._workers) < self._most_batches

    async def send(self) -> None:
        """Send what waits, until nothing does; a task of this class runs it."""
        self._due = None
        while batch := self._taken():
            await self._finish(batch)

    def _taken(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        while self._waiting and len(batch) < self._most_together:
            waiting = self._waiting[0]
            if not waiting.is_abandoned:
                size += _large_part(waiting.call)
                if batch and size > _MOST_BYTES:
                    break
                waiting.is_under_way = True
                batch.append(waiting)
            self._waiting.popleft()
        return batch

    async def _finish(self, batch: list[_Waiting]) -> None:
        results: Sequence[Any] = ()
        try:
            with anyio.move_on_after(_LONGEST):
                results = await self._results([each.call for each in batch])
        finally:
            for number, each in enumerate(batch):
                key = _first_key(each.call)
                if self._left.get(key) is each:
                    del self._left[key]
                each.end(results[number] if number < len(results) else Unavailable("the store does not answer"))

    async def _results(self, calls: list[Call]) -> list[Any]:
        try:
            return [await self._client.script(*calls[0])] if len(calls) == 1 else await self._client.scripts(calls)
        except Unavailable as exc:
            # One for each caller, who adds its own frames.
            return [Unavailable(*exc.args) for _ in calls]
        except Exception as exc:
            # Of one of them, such as what cannot be encoded; the others, and a sign of life, are to go their way.
            return [exc] if len(calls) == 1 else [(await self._results([call]))[0] for call in calls]


def _large_part(call: Call) -> int:
    return sum(len(each) for each in call.args if isinstance(each, str | bytes) and len(each) > _LARGE)


def _first_key(call: Call) -> str | None:
    return call.keys[0] if call.keys else None
