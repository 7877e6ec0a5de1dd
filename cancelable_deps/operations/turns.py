"""Turns: the places of a key that operations take, wait for, and give back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import anyio

from ..kernel.log import logger
from .backend import Holder, Unavailable
from .local import superseded
from .memory_keys import Keys
from .names import new_id

if TYPE_CHECKING:
    from .backend import Entered, Waiter
    from .entries import Entry
    from .exchange import Exchange
    from .running import Running

ENDLESS: Final = 1 << 30
"""So many places to wait that there is always one."""


class Turn:
    """The place of one operation under a key, from entering to leaving.

    :ivar id: names the turn, as several operations may have the id that their client has chosen.
    :ivar status: ``"admitted"``, ``"waiting"`` or ``"refused"`` at the entry.
    """

    def __init__(self, id: str, key: str, running: Running) -> None:
        self.id = id
        self.key = key
        self.running = running
        self.status = "refused"
        self.is_local = False
        """Whether only this worker knows of it, because the store could not be reached."""

        self.limit = 1
        self._admitted = anyio.Event()

    def admit(self) -> None:
        """Note that the turn has come."""
        self.status = "admitted"
        self._admitted.set()

    async def wait(self) -> None:
        """Wait until the turn has come."""
        await self._admitted.wait()


class Turns:
    """The turns of this worker's operations."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._turns: dict[str, Turn] = {}
        self._fallback = Keys(lambda worker: True)

    def __len__(self) -> int:
        return len(self._turns)

    async def enter(
        self,
        key: str,
        running: Running,
        *,
        limit: int = 1,
        queue: int = 0,
        latest: bool = False,
        waits: bool = False,
        runs_alone: bool = False,
    ) -> Turn:
        """Take a place, or one to wait; supersede those that have entered before, if that is asked for.

        :param runs_alone: keep the order of this worker's operations if the store cannot be reached.
        :raises Unavailable: if it cannot, and ``runs_alone`` is false.
        """
        turn = Turn(new_id(self._exchange.identity.name), key, running)
        turn.limit = limit
        self._turns[turn.id] = turn
        try:
            entered = await self._enter(turn, queue=queue, latest=latest, waits=waits, runs_alone=runs_alone)
        except BaseException:
            # Also if this is cancelled: the place may have been taken.
            await self.leave(turn)
            raise
        turn.status = entered.status
        if entered.status == "admitted":
            turn.admit()
        elif entered.status == "refused":
            del self._turns[turn.id]
        for holder in entered.earlier:
            await self._supersede(holder)
        return turn

    async def _enter(self, turn: Turn, *, queue: int, latest: bool, waits: bool, runs_alone: bool) -> Entered:
        options: dict[str, Any] = {"limit": turn.limit, "queue": queue, "latest": latest, "waits": waits}
        try:
            entered: Entered = await self._exchange.calling(self._exchange.backend.enter(turn.key, turn.id, **options))
            return entered
        except Unavailable:
            if not runs_alone:
                raise
            turn.is_local = True
            return self._fallback.enter(turn.key, Holder(self._exchange.identity.name, turn.id), **options)

    async def _supersede(self, holder: Holder) -> None:
        turn = self._turns.get(holder.id)
        if turn is not None:
            turn.running.stop(superseded())
            return
        try:
            await self._exchange.send(holder.worker, "supersede", {"turn": holder.id})
        except Unavailable:
            logger.warning("an operation could not be told that a newer one has taken its key: the store is away")

    def superseded_elsewhere(self, entry: Entry) -> None:
        """Stop the operation whose key a newer one of another worker has taken."""
        turn = self._turns.get(entry.data["turn"])
        if turn is not None:
            turn.running.stop(superseded())

    async def leave(self, turn: Turn) -> None:
        """Give the place back, and tell who has got it. Is not cancelled. May be called more than once."""
        if self._turns.pop(turn.id, None) is None:
            return
        with anyio.CancelScope(shield=True):
            if turn.is_local:
                await self.tell(self._fallback.leave(turn.key, turn.id))
                return
            try:
                backend = self._exchange.backend
                await self.tell(await self._exchange.calling(backend.leave(turn.key, turn.id)))
            except Unavailable:
                logger.info("a key could not be given back, and is kept until its store or this worker forgets it")

    async def tell(self, granted: list[Waiter] | tuple[Waiter, ...] | Any) -> None:
        """Tell those whose turn has come."""
        for waiter in granted:
            turn = self._turns.get(waiter.id)
            if turn is not None:
                turn.admit()
                continue
            try:
                if waiter.worker != self._exchange.identity.name:
                    await self._exchange.send(waiter.worker, "granted", {"turn": waiter.id})
            except Unavailable:
                logger.warning("an operation could not be told that its turn has come: the store is away")

    def granted(self, entry: Entry) -> None:
        """Admit the operation whose turn has come, as the worker says that has left."""
        turn = self._turns.get(entry.data["turn"])
        if turn is not None:
            turn.admit()

    async def enter_again(self) -> None:
        """Enter the turns once more that the store may have lost. A limit may be exceeded for a moment."""
        for turn in list(self._turns.values()):
            if turn.status == "admitted" and not turn.is_local:
                backend = self._exchange.backend
                await self._exchange.calling(
                    backend.enter(turn.key, turn.id, limit=turn.limit, queue=0, latest=False, waits=False)
                )


def key_name(scope: str, key: str) -> str:
    """Return the name of a key in a namespace; no two pairs have the same."""
    return f"{len(scope)}:{scope}:{key}"
