"""What a worker remembers for a while: cancels of ids that nobody has used yet, and operations that have ended."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ..kernel.loops.base import EventLoop
    from ..kernel.token import Cause
    from .names import Owner
    from .running import Running

MOST_OF_OWNER: Final = 1000
MOST_OWNERS: Final = 10_000
MOST_ENDED: Final = 10_000


class EarlyCancels:
    """Cancels of ids that were unknown: an operation that gets such an id within ``memory`` seconds is stopped.

    Each owner has 1,000 places, and operators as many: the oldest is forgotten for one more.
    """

    def __init__(self, memory: float, loop: EventLoop) -> None:
        self._memory = memory
        self._loop = loop
        self._of_owners: OrderedDict[Owner, OrderedDict[str, tuple[float, Cause]]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._of_owners)

    def __len__(self) -> int:
        return sum(map(len, self._of_owners.values()))

    def add(self, owner: Owner, id: str, cause: Cause) -> None:
        """Remember a cancel; the first one of an id counts."""
        self.forget()
        known = self._of_owners.setdefault(owner, OrderedDict())
        self._of_owners.move_to_end(owner)
        first = known.pop(id, (0.0, cause))[1]
        known[id] = (self._loop.time() + self._memory, first)
        if len(known) > MOST_OF_OWNER:
            known.popitem(last=False)
        if len(self._of_owners) > MOST_OWNERS:
            self._of_owners.popitem(last=False)

    def find(self, owner: Owner, id: str) -> Cause | None:
        """Return the cause of a cancel by this owner that is remembered."""
        of_owner = self._of_owners.get(owner)
        known = None if of_owner is None else of_owner.get(id)
        return known[1] if known is not None and known[0] > self._loop.time() else None

    def forget(self) -> None:
        """Forget what is too old. The owner whose last cancel is the oldest comes first, and so do its own."""
        now = self._loop.time()
        while self._of_owners:
            owner, known = next(iter(self._of_owners.items()))
            while known and next(iter(known.values()))[0] <= now:
                known.popitem(last=False)
            if known:
                return
            del self._of_owners[owner]


class EndedOperations:
    """The operations of this worker that have ended, for ``memory`` seconds, if their ids are known to somebody."""

    def __init__(self, memory: float, loop: EventLoop) -> None:
        self._memory = memory
        self._loop = loop
        self._order: deque[tuple[float, Running]] = deque()
        self._by_id: dict[str, list[Running]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def add(self, running: Running, id: str) -> None:
        """Remember an operation that has ended."""
        self.forget()
        self._order.append((self._loop.time() + self._memory, running))
        self._by_id.setdefault(id, []).append(running)

    def find(self, id: str, owner: Owner) -> Running | None:
        """Return the last one of that id, if it belongs to ``owner``."""
        self.forget()
        return next((each for each in reversed(self._by_id.get(id, ())) if each.belongs_to(owner)), None)

    def forget(self) -> None:
        """Forget what is too old."""
        now = self._loop.time()
        while self._order and (self._order[0][0] <= now or len(self._order) > MOST_ENDED):
            _, running = self._order.popleft()
            same = self._by_id.get(running.id, [])
            if running in same:
                same.remove(running)
            if not same:
                self._by_id.pop(running.id, None)
