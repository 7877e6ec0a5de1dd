"""Several workers on one store without servers, in one event loop, and the faults that a test lets happen to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.lowlevel

from ..kernel.options import seconds as checked
from ..kernel.reasons import CancelationReason
from ..kernel.token import Cause
from ..operations.backend import Unavailable
from ..operations.memory import MemoryBackend, MemoryHub
from ..operations.operations import Operations

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from ..operations.backend import Beat, Entered, Fields, Position, Record, Waiter
    from ..operations.memory import Read

T = TypeVar("T")


class OperationsHub:
    """What several workers share, without servers and without Redis: ``hub = OperationsHub()``.

    Each ``hub.operations()`` is one worker. They run in one event loop, on asyncio or trio, and everything that waits
    between them (leases, memory, results, the grace of background work) passes by `advance`. The methods below let
    happen what happens to real workers; a ``worker`` is what ``hub.operations()`` has returned.

    :param lease: seconds without a sign of life after which a worker is taken for dead. Workers give one three times as
        often.
    :raises TypeError: if ``lease`` is not a number.
    :raises ValueError: if ``lease`` is negative or NaN.
    """

    def __init__(self, *, lease: float = 15) -> None:
        self._hub = MemoryHub()
        self._lease = checked(lease, "lease")
        self._delay = 0.0
        self._workers: dict[Operations, _Connection] = {}

    def operations(self, **options: Any) -> Operations:
        """Return the operations of one more worker, for the lifespan of its application or for ``async with``.

        :param options: those of `Operations`, without ``backend``.
        """
        connection = _Connection(self._hub, self._lease, lambda: self._delay)
        operations = Operations(connection, **options)
        self._workers[operations] = connection
        return operations

    def pause(self, worker: Operations) -> None:
        """Let a worker read nothing, as one that is busy, until `resume`. It stays alive, and may still call."""
        self._workers[worker].suffer(is_paused=True)

    def cut(self, worker: Operations) -> None:
        """Let every call of a worker fail, as with a store that cannot be reached, until `resume`."""
        self._workers[worker].suffer(is_cut=True)

    def resume(self, worker: Operations) -> None:
        """End `pause` and `cut`."""
        self._workers[worker].suffer(is_paused=False, is_cut=False)

    def kill(self, worker: Operations) -> None:
        """End a worker as ``kill -9`` does: without a goodbye, so that the others wait until its lease has run out.

        A task cannot be killed: the background work of the worker is cancelled, and nobody hears of its end. Leave the
        worker's ``async with`` as ever.
        """
        self._workers[worker].suffer(is_dead=True)
        if worker.is_open:
            background = worker.worker.background
            background.give_up()
            background.stop_everything(Cause(CancelationReason.ERROR, "its worker was killed"))

    def delay(self, seconds: float) -> None:
        """Let each call of the store take so many seconds from now on; 0 for none.

        With one second or more, every call fails.
        """
        self._delay = checked(seconds, "delay")

    def lose_last(self, seconds: float) -> None:
        """Lose the entries of the last ``seconds``, as a replica does that takes over too early: connections break."""
        self._hub.lose_last(checked(seconds, "lose_last"))
        self._break()

    def lose_everything(self) -> None:
        """Lose all that the store holds, as one does that is restarted without its data: connections break."""
        self._hub.lose_everything()
        self._break()

    def _break(self) -> None:
        for connection in self._workers.values():
            connection.is_broken = True
            connection.wake()


class _Connection(MemoryBackend):
    """The store of one worker, whose calls can fail."""

    shares = True

    def __init__(self, hub: MemoryHub, lease: float, delay: Callable[[], float]) -> None:
        super().__init__(hub)
        self.lease = lease
        self.is_broken = False
        self._delay = delay
        self._is_paused = self._is_cut = self._is_dead = False

    def suffer(self, **faults: bool) -> None:
        for name, value in faults.items():
            setattr(self, f"_{name}", value)
        self.wake()

    def part(self) -> None:
        if not self._is_dead:
            super().part()

    def read(self) -> list[Read]:
        self._check()
        if self.is_broken:
            self.is_broken = False
            raise Unavailable
        return [] if self._is_paused else super().read()

    def _check(self) -> None:
        if self._is_cut or self._is_dead:
            raise Unavailable

    async def _call(self, call: Coroutine[Any, Any, T]) -> T:
        try:
            self._check()
            delay = self._delay()
            if delay:
                await anyio.sleep(delay)
            else:
                # On trio a process that stands still for a second would fail here, as calls have a limit of that.
                await anyio.lowlevel.cancel_shielded_checkpoint()
            self._check()
        except BaseException:
            call.close()
            raise
        return await call

    async def beat(self, *, may_reap: bool) -> Beat:
        return await self._call(super().beat(may_reap=may_reap))

    async def broadcast(self, entry: bytes, id: str) -> Position:
        return await self._call(super().broadcast(entry, id))

    async def send(self, worker: str, entry: bytes, id: str) -> bool:
        return await self._call(super().send(worker, entry, id))

    async def missing(self, ids: Sequence[str]) -> set[str]:
        return await self._call(super().missing(ids))

    async def create(self, id: str, fields: Fields, *, ttl: float) -> Record:
        return await self._call(super().create(id, fields, ttl=ttl))

    async def change(self, id: str, fields: Mapping[str, Any], *, end_ttl: float | None = None) -> bool:
        return await self._call(super().change(id, fields, end_ttl=end_ttl))

    async def mark(self, id: str, fields: Mapping[str, Any]) -> Record | None:
        return await self._call(super().mark(id, fields))

    async def load(self, ids: Sequence[str], *, with_result: bool = False) -> list[Record | None]:
        return await self._call(super().load(ids, with_result=with_result))

    async def history(self, owner: str | None, *, before: float, limit: int) -> list[Record]:
        return await self._call(super().history(owner, before=before, limit=limit))

    async def enter(
        self, key: str, id: str, *, limit: int, queue: int, latest: bool, waits: bool, again: bool = False
    ) -> Entered:
        return await self._call(
            super().enter(key, id, limit=limit, queue=queue, latest=latest, waits=waits, again=again)
        )

    async def leave(self, key: str, id: str) -> Sequence[Waiter]:
        return await self._call(super().leave(key, id))
