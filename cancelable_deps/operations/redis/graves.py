"""What is done for workers that are dead: their records are lost, and their places of keys go to others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import anyio

from ..backend import Waiter
from ..memory import REMEMBERED
from . import scripts
from .client import text
from .layout import KEY, MOST_OF_ALL, MOST_OF_OWNER, Names, encoded, fields_of, held_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MOST_AT_ONCE: Final = 100
_SECONDS: Final = 0.5
"""The time that one sign of life takes for it, which may last a second in all. The next one goes on."""

_LOST_KEPT: Final = 900.0


class Graves:
    """The reaping of one sign of life. It may stop anywhere, and be repeated by anybody.

    :ivar lost: the ids of the records that were marked as lost.
    :ivar granted: those whose turn has come.
    """

    def __init__(self, run: Callable[..., Awaitable[Any]], names: Names, me: str, lease_ms: int) -> None:
        self._run = run
        self._names = names
        self._me = me
        self._lease_ms = lease_ms
        self._left = MOST_AT_ONCE
        self._until = anyio.current_time() + _SECONDS
        self.lost: list[str] = []
        self.granted: list[Waiter] = []

    async def reap(self, worker: str) -> None:
        """Mark the records of a worker as lost, and free its places; forget it when nothing is left."""
        names = self._names
        if self._left <= 0:
            return
        held = names.held(worker)
        members = await self._run(
            scripts.BURY,
            [names.workers, names.since, names.tombstone(worker), held],
            [worker, self._me, self._lease_ms, REMEMBERED * 1000, self._left],
        )
        for member in map(text, members):
            if anyio.current_time() > self._until:
                self._left = 0
                return
            self._left -= 1
            kind, *named = held_of(member)
            if kind == KEY:
                await self._free(worker, named[0], named[1], member)
            else:
                await self._lose(worker, named[0], member)
        keys = [names.workers, names.identities, names.since, names.inbox(worker), held]
        await self._run(scripts.FORGET, keys, [worker])

    async def _free(self, worker: str, key: str, id: str, member: str) -> None:
        names = self._names
        keys = [*names.places(key), names.held(worker), names.workers, names.since]
        granted = await self._run(scripts.LEAVE, keys, [id, worker, member, self._me, self._lease_ms])
        self.granted += waiters_of(granted)

    async def _lose(self, worker: str, id: str, member: str) -> None:
        names = self._names
        [pairs] = await self._run(scripts.LOAD, [names.record(id)], [1])
        fields = fields_of(list(map(text, pairs)))
        keys = [names.record(id), names.held(worker), *names.indexes(fields.get("owner"))]
        ttl = int(max(1.0, float(fields.get("result_ttl", _LOST_KEPT)) * 1000))
        args = [encoded(worker), id, member, ttl, MOST_OF_ALL, MOST_OF_OWNER]
        if await self._run(scripts.LOSE, keys, args):
            self.lost.append(id)


def waiters_of(pairs: list[Any]) -> list[Waiter]:
    """Return the operations whose turn has come, from names of workers and ids."""
    names = list(map(text, pairs))
    return [Waiter(*pair) for pair in zip(names[::2], names[1::2], strict=True)]
