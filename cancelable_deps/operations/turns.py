"""Turns: the places of a key that operations take, wait for, and give back."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import anyio

from ..kernel.log import logger
from .backend import Holder, Unavailable
from .local import superseded
from .memory_keys import Keys
from .names import new_id
from .together import together

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
        """Whether it has a place in the order of this worker, because the store could not be reached when it entered."""

        self.is_shared = False
        """Whether the store knows of it."""

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
        self._unleft: dict[str, str] = {}
        """The keys of turns that are to be given back once more, by the ids of the turns."""

        self._fallback = Keys(lambda worker: True)
        self._skips_waiting = False

    def __len__(self) -> int:
        return len(self._turns) + len(self._unleft)

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
            if turn.status != "admitted":
                # It may have been admitted while the answer was on its way.
                turn.status = entered.status
            if entered.status == "admitted":
                turn.admit()
            elif entered.status == "refused":
                del self._turns[turn.id]
            with anyio.CancelScope(shield=True):
                # Nobody else will tell them.
                for holder in entered.earlier:
                    await self._supersede(holder, running)
        except BaseException:
            # Also if this is cancelled: the place may have been taken, or the call may arrive after this one.
            await self.leave(turn)
            self._unleft[turn.id] = turn.key
            raise
        return turn

    async def _enter(self, turn: Turn, *, queue: int, latest: bool, waits: bool, runs_alone: bool) -> Entered:
        options: dict[str, Any] = {"limit": turn.limit, "queue": queue, "latest": latest, "waits": waits}
        try:
            entered: Entered = await self._exchange.calling(self._exchange.backend.enter(turn.key, turn.id, **options))
            turn.is_shared = True
            return entered
        except Unavailable:
            if not runs_alone:
                raise
            turn.is_local = True
            self._unleft[turn.id] = turn.key
            return self._fallback.enter(turn.key, Holder(self._exchange.identity.name, turn.id), **options)

    async def _supersede(self, holder: Holder, by: Running) -> None:
        turn = self._turns.get(holder.id)
        if turn is not None:
            if turn.running is not by:
                turn.running.supersede(superseded())
            return
        try:
            await self._exchange.send(holder.worker, "supersede", {"turn": holder.id})
        except Unavailable:
            logger.warning("an operation is told later that a newer one has taken its key: the store is away")

    def superseded_elsewhere(self, entry: Entry) -> None:
        """Stop the operation whose key a newer one of another worker has taken."""
        turn = self._turns.get(entry.data["turn"])
        if turn is not None:
            turn.running.supersede(superseded())

    async def leave(self, turn: Turn) -> None:
        """Give the place back, and tell who has got it. Is not cancelled. May be called more than once."""
        if self._turns.pop(turn.id, None) is None:
            return
        with anyio.CancelScope(shield=True):
            if turn.is_local:
                await self.tell(self._fallback.leave(turn.key, turn.id))
                if not turn.is_shared:
                    return
            try:
                backend = self._exchange.backend
                await self.tell(await self._exchange.calling(backend.leave(turn.key, turn.id)))
            except Unavailable:
                self._unleft[turn.id] = turn.key
                logger.info("a key could not be given back yet: the store is away")

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
                logger.warning("an operation is told later that its turn has come: the store is away")

    def granted(self, entry: Entry) -> None:
        """Admit the operation whose turn has come, as the worker says that has left."""
        turn = self._turns.get(entry.data["turn"])
        if turn is not None:
            turn.admit()

    async def enter_again(self, *, may_have_lost: bool) -> None:
        """Enter turns once more: those that hold a place if the store may have lost them or never had them, and those that
        wait.

        Those that wait are asked for at each sign of life, because who gave them their place may have failed to tell.
        But not at the first one after a loss, when those of all workers that hold a place have to be there first. A
        newcomer may come before them, so that a limit may be exceeded.

        :raises Unavailable: if the store cannot be reached.
        """
        self._skips_waiting = may_have_lost and not self._skips_waiting
        holding = [turn for turn in self._turns.values() if turn.status == "admitted"]
        await together(self._enter_again, [turn for turn in holding if may_have_lost or not turn.is_shared])
        if not self._skips_waiting:
            await together(self._enter_in_order, self._waiting_by_key())

    def _waiting_by_key(self) -> list[list[Turn]]:
        waiting: defaultdict[str, list[Turn]] = defaultdict(list)
        for turn in self._turns.values():
            if turn.status == "waiting" and not turn.is_local:
                waiting[turn.key].append(turn)
        return list(waiting.values())

    async def _enter_in_order(self, turns: list[Turn]) -> None:
        for turn in turns:
            await self._enter_again(turn)

    async def _enter_again(self, turn: Turn) -> None:
        if turn.id not in self._turns:
            return
        options: dict[str, Any] = {"limit": turn.limit, "queue": ENDLESS, "again": turn.status != "waiting"}
        call = self._exchange.backend.enter(turn.key, turn.id, latest=False, waits=False, **options)
        try:
            entered: Entered = await self._exchange.calling(call)
        finally:
            if turn.id not in self._turns:
                # It has left meanwhile, perhaps before it was entered again; also if that fails, and happens later.
                self._unleft[turn.id] = turn.key
        if entered.status == "admitted" and turn.id in self._turns:
            turn.is_shared = True
            # It is not to be given back any more because its first call may have arrived.
            self._unleft.pop(turn.id, None)
            turn.admit()

    async def leave_again(self) -> None:
        """Give the places back that could not be given back before.

        :raises Unavailable: if the store cannot be reached.
        """
        await together(self._leave_again, list(self._unleft.items()))

    async def _leave_again(self, unleft: tuple[str, str]) -> None:
        id, key = unleft
        await self.tell(await self._exchange.calling(self._exchange.backend.leave(key, id)))
        self._unleft.pop(id, None)


def key_name(scope: str, key: str) -> str:
    """Return the name of a key in a namespace; no two pairs have the same."""
    return f"{len(scope)}:{scope}:{key}"
