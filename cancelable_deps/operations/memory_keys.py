"""The keys of the store in memory: who holds one, and who waits for it."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from .backend import Entered, Holder, Waiter

if TYPE_CHECKING:
    from collections.abc import Callable


class _Key:
    def __init__(self) -> None:
        self.limit = 1
        self.holders: dict[str, Holder] = {}
        self.waiting: dict[str, Holder] = {}

    @property
    def is_free(self) -> bool:
        return not self.holders and not self.waiting

    def drop(self, is_gone: Callable[[Holder], bool]) -> None:
        for places in (self.holders, self.waiting):
            for id in [id for id, holder in places.items() if is_gone(holder)]:
                del places[id]

    def grant(self) -> list[Waiter]:
        """Give free places to those that wait, in their order."""
        granted: list[Waiter] = []
        while self.waiting and len(self.holders) < self.limit:
            id = next(iter(self.waiting))
            holder = self.holders[id] = self.waiting.pop(id)
            granted.append(Waiter(holder.worker, id))
        return granted


class Keys:
    """The keys that are held, or waited for. A key that is neither takes no memory."""

    def __init__(self, is_alive: Callable[[str], bool]) -> None:
        self._is_alive = is_alive
        self._keys: dict[str, _Key] = {}
        self._generations = count(1)

    def __len__(self) -> int:
        return len(self._keys)

    def enter(
        self, name: str, holder: Holder, *, limit: int, queue: int, latest: bool, waits: bool, again: bool = False
    ) -> Entered:
        """Take a place of a key; see `OperationsBackend.enter`."""
        key = self._keys.setdefault(name, _Key())
        key.limit = limit
        key.drop(lambda other: not self._is_alive(other.worker))
        generation = next(self._generations)
        if again:
            key.holders.setdefault(holder.id, holder)
        if holder.id in key.waiting and len(key.holders) < limit and next(iter(key.waiting)) == holder.id:
            # Those before it have been dropped just now.
            key.holders[holder.id] = key.waiting.pop(holder.id)
        if holder.id in key.holders:
            # A call that is repeated because its answer was lost.
            return Entered("admitted", generation, ())
        if holder.id in key.waiting:
            return Entered("waiting", generation, ())
        earlier: list[Holder] = []
        if latest:
            earlier = [*key.holders.values(), *key.waiting.values()]
            key.waiting.clear()
            if waits and key.holders:
                key.waiting[holder.id] = holder
                return Entered("waiting", generation, earlier)
            key.holders[holder.id] = holder
            return Entered("admitted", generation, earlier)
        if len(key.holders) < limit and not key.waiting:
            key.holders[holder.id] = holder
            return Entered("admitted", generation, ())
        if len(key.waiting) < queue:
            key.waiting[holder.id] = holder
            return Entered("waiting", generation, ())
        return Entered("refused", generation, ())

    def leave(self, name: str, id: str) -> list[Waiter]:
        """Give a place back, and return who has got it."""
        key = self._keys.get(name)
        if key is None:
            return []
        key.holders.pop(id, None)
        key.waiting.pop(id, None)
        granted = key.grant()
        if key.is_free:
            del self._keys[name]
        return granted

    def drop_worker(self, worker: str) -> list[Waiter]:
        """Give all places of a worker back, and return who has got them."""
        granted: list[Waiter] = []
        for name, key in list(self._keys.items()):
            key.drop(lambda holder: holder.worker == worker)
            granted += key.grant()
            if key.is_free:
                del self._keys[name]
        return granted
