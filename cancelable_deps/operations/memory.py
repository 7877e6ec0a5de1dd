"""The store in the memory of one process. Several workers may share it in a test."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import anyio

from .backend import Beat, Entered, Gap, Holder, Identity, Record, Unavailable, Waiter
from .memory_keys import Keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
    from typing import Any

    from .backend import Fields, Position

MOST_ENTRIES = 100_000
REMEMBERED = 3600
"""Seconds for which a worker that was taken for dead is told so, should it come back."""

_OPEN = math.inf


class Read(NamedTuple):
    """An entry of the log or of the mail."""

    number: int
    at: float
    id: str
    data: bytes


class _Kept(NamedTuple):
    fields: Fields
    until: float


class MemoryHub:
    """What the workers of one store share: the log, the mail, the leases, the records and the keys.

    All of them run in one event loop. Times are those of its clock.
    """

    def __init__(self) -> None:
        self.workers: dict[str, Identity] = {}
        self.leases: dict[str, float] = {}
        self.log: deque[Read] = deque()
        self.mail: dict[str, deque[Read]] = {}
        self.keys = Keys(self.is_alive)
        self.reaped: dict[str, float] = {}
        """The workers that were taken for dead, and when."""

        self._records: OrderedDict[str, _Kept] = OrderedDict()
        self._ending: deque[tuple[float, str]] = deque()
        self.last_number = 0
        self.trimmed_to = 0
        self._lease = 0.0
        self._knows_after = -math.inf
        self._wake: dict[str, anyio.Event] = {}

    def is_alive(self, worker: str) -> bool:
        """Return whether the lease of a worker has not run out."""
        return self.leases.get(worker, -math.inf) > anyio.current_time()

    def join(self, worker: Identity, lease: float) -> None:
        """Add a worker, or renew its lease."""
        self._lease = lease
        self.workers[worker.name] = worker
        self.leases[worker.name] = anyio.current_time() + lease
        self.mail.setdefault(worker.name, deque())

    def let_hold(self, worker: str, lease: float) -> None:
        """Let a worker hold something: those who die are found by their leases, which it may have lost.

        :raises Unavailable: if it was given up, and does not know it yet.
        """
        if worker in self.reaped:
            raise Unavailable("this worker was given up, and does not know it yet")
        self.leases.setdefault(worker, anyio.current_time() + lease)

    def part(self, worker: str) -> None:
        """Remove a worker that has ended in good order, or has been reaped."""
        for each in (self.workers, self.leases, self.mail):
            each.pop(worker, None)
        self.wake(worker)
        self._wake.pop(worker, None)

    def wake(self, worker: str) -> None:
        """Let a worker look for entries."""
        event = self._wake.get(worker)
        if event is not None:
            event.set()

    async def wait(self, worker: str, longest: float) -> None:
        """Wait until there may be entries for a worker, for ``longest`` seconds at most."""
        event = self._wake[worker] = anyio.Event()
        with anyio.move_on_after(longest):
            await event.wait()

    def append(self, data: bytes, id: str, memory: float) -> Position:
        """Append an entry to the log."""
        entry = self._entry(data, id)
        self.log.append(entry)
        oldest = entry.at - memory
        while self.log and (self.log[0].at < oldest or len(self.log) > MOST_ENTRIES):
            self.trimmed_to = self.log.popleft().number
        for worker in list(self._wake):
            self.wake(worker)
        return str(entry.number)

    def post(self, worker: str, data: bytes, id: str) -> bool:
        """Append an entry to the mail of a worker that lives, or may live: after a loss, nobody knows yet who does."""
        if not self.is_alive(worker) and anyio.current_time() >= self._knows_after:
            return False
        self.mail.setdefault(worker, deque()).append(self._entry(data, id))
        self.wake(worker)
        return True

    def _entry(self, data: bytes, id: str) -> Read:
        self.last_number += 1
        return Read(self.last_number, anyio.current_time(), id, data)

    def first_position(self, memory: float) -> int:
        """Return the position before the entries of the last ``memory`` seconds."""
        oldest = anyio.current_time() - memory
        return next((entry.number - 1 for entry in self.log if entry.at >= oldest), self.last_number)

    def read(self, worker: str, after: int) -> list[Read]:
        """Return the entries of the log after a position, and the mail of a worker, which is removed.

        :raises Gap: if an entry after that position has been trimmed.
        """
        if after < self.trimmed_to:
            raise Gap
        entries: list[Read] = []
        for entry in reversed(self.log):
            if entry.number <= after:
                break
            entries.append(entry)
        mail = self.mail.get(worker)
        if mail:
            entries.extend(mail)
            mail.clear()
        return sorted(entries)

    def reap(self) -> tuple[list[str], list[Waiter]]:
        """Mark the records of dead workers as lost, free their keys, and return these records and who waited."""
        now = anyio.current_time()
        self.reaped = {name: at for name, at in self.reaped.items() if at > now - REMEMBERED}
        dead = [name for name in self.leases if not self.is_alive(name)]
        lost: list[str] = []
        granted: list[Waiter] = []
        for worker in dead:
            for id, record in self.unended(worker):
                record.update(state="lost", ended=record["created"])
                self.end(id, record.get("result_ttl", 0.0))
                lost.append(id)
            granted += self.keys.drop_worker(worker)
            self.part(worker)
            self.reaped[worker] = now
        return lost, granted

    def unended(self, worker: str) -> Iterator[tuple[str, Fields]]:
        """Yield the records of a worker that have not ended."""
        for id, kept in list(self._records.items()):
            if kept.fields["worker"] == worker and kept.fields.get("ended") is None:
                yield id, kept.fields

    def record(self, id: str) -> Fields | None:
        """Return the record with an id, which the caller may change."""
        self._forget_what_is_over()
        kept = self._records.get(id)
        return None if kept is None else kept.fields

    def records(self) -> Iterator[tuple[str, Fields]]:
        """Yield all records, the newest first."""
        self._forget_what_is_over()
        for id in reversed(self._records):
            yield id, self._records[id].fields

    def add_record(self, id: str, fields: Fields) -> None:
        """Add a record."""
        self._records[id] = _Kept(fields, _OPEN)

    def end(self, id: str, ttl: float) -> None:
        """Keep a record for so many seconds from now on."""
        until = anyio.current_time() + ttl
        self._records[id] = _Kept(self._records[id].fields, until)
        self._ending.append((until, id))

    def _forget_what_is_over(self) -> None:
        now = anyio.current_time()
        while self._ending and self._ending[0][0] <= now:
            _, id = self._ending.popleft()
            kept = self._records.get(id)
            if kept is not None and kept.until <= now:
                del self._records[id]

    def lose_everything(self) -> None:
        """Forget all that is kept, as a server does that is restarted without its data."""
        self.log.clear()
        self._records.clear()
        self._ending.clear()
        self.keys = Keys(self.is_alive)
        self.reaped.clear()
        for mail in self.mail.values():
            mail.clear()
        self.leases.clear()
        self.workers.clear()
        self._knows_after = anyio.current_time() + self._lease

    def lose_last(self, seconds: float) -> None:
        """Forget the entries of the last ``seconds``, as a replica does that takes over too early."""
        since = anyio.current_time() - seconds
        for entries in (self.log, *self.mail.values()):
            while entries and entries[-1].at >= since:
                entries.pop()


class MemoryBackend:
    """A store in the memory of this process: the default, for one worker.

    Operations of other processes are neither listed nor stopped. Use `RedisBackend` for several workers.

    :param hub: what several workers in one event loop share, for tests; see `cancelable_deps.testing.OperationsHub`.
    """

    shares = False

    def __init__(self, hub: MemoryHub | None = None) -> None:
        self._hub = MemoryHub() if hub is None else hub
        self._worker = ""
        self._read_to = 0
        self._memory = self._lease = 0.0

    @property
    def hub(self) -> MemoryHub:
        """What the workers of this store share."""
        return self._hub

    @asynccontextmanager
    async def connect(self, worker: Identity, *, memory: float, lease: float) -> AsyncIterator[None]:
        """Use the store as ``worker``; see `OperationsBackend.connect`."""
        self._memory, self._lease = memory, lease
        self._identity = worker
        self._worker = worker.name
        self._hub.join(worker, lease)
        self._read_to = self._hub.first_position(memory)
        try:
            yield
        finally:
            self.part()

    def part(self) -> None:
        """Leave the others in good order."""
        self._hub.keys.drop_worker(self._worker)
        self._hub.part(self._worker)

    def rename(self, worker: Identity) -> None:
        """Go on under a new name."""
        self._hub.part(self._worker)
        self._identity, self._worker = worker, worker.name
        self._hub.join(worker, self._lease)

    async def beat(self, *, may_reap: bool) -> Beat:
        """Renew the lease of this worker; see `OperationsBackend.beat`."""
        hub = self._hub
        # A lease that has run out is not enough: after an outage those of all have, and nobody was taken for dead.
        is_fenced = self._worker in hub.reaped
        has_forgotten = not is_fenced and self._worker not in hub.workers
        if not is_fenced:
            hub.join(self._identity, self._lease)
        lost, granted = hub.reap() if may_reap else ([], [])
        alive = [identity for name, identity in hub.workers.items() if hub.is_alive(name)]
        return Beat(alive, lost, granted, is_fenced, has_forgotten)

    async def broadcast(self, entry: bytes, id: str) -> Position:
        """Append an entry to the log."""
        return self._hub.append(entry, id, self._memory)

    async def send(self, worker: str, entry: bytes, id: str) -> bool:
        """Append an entry to the mail of one worker."""
        return self._hub.post(worker, entry, id)

    async def receive(self) -> list[tuple[Position, bytes]]:
        """Wait for entries, and return them; see `OperationsBackend.receive`."""
        entries = self.read()
        if not entries:
            await self._hub.wait(self._worker, self._lease / 3)
            entries = self.read()
        return [(str(entry.number), entry.data) for entry in entries]

    def read(self) -> list[Read]:
        """Return the entries that there are.

        :raises Gap: if the log has been trimmed beyond those that were read last.
        """
        after, self._read_to = self._read_to, self._hub.last_number
        try:
            return self._hub.read(self._worker, after)
        except Gap:
            # What the log still holds is read next.
            self._read_to = self._hub.trimmed_to
            raise

    def wake(self) -> None:
        """Let `receive` look for entries."""
        self._hub.wake(self._worker)

    async def missing(self, ids: Sequence[str]) -> set[str]:
        """Return which of these entries the log does not hold."""
        return set(ids) - {entry.id for entry in self._hub.log}

    async def create(self, id: str, fields: Fields, *, ttl: float) -> Record:
        """Create a record, or return the one that has the id."""
        known = self._hub.record(id)
        if known is not None:
            is_repeated = known.get("ended") is None and _same(known, fields, "worker", "created")
            return Record(id, dict(known), is_new=is_repeated)
        self._hub.let_hold(self._worker, self._lease)
        self._hub.add_record(id, dict(fields))
        return Record(id, fields, is_new=True)

    async def change(self, id: str, fields: Mapping[str, Any], *, end_ttl: float | None = None) -> bool:
        """Change fields of a record of this worker that has not ended."""
        known = self._hub.record(id)
        if known is None or known["worker"] != self._worker:
            return False
        if known.get("ended") is not None:
            return _same(known, fields, "ended")
        known.update(fields)
        if end_ttl is not None:
            self._hub.end(id, end_ttl)
        return True

    async def mark(self, id: str, fields: Mapping[str, Any]) -> Record | None:
        """Set fields of a record that has not ended, unless they are set; return the record."""
        known = self._hub.record(id)
        if known is None:
            return None
        if known.get("ended") is None:
            known.update({name: value for name, value in fields.items() if known.get(name) is None})
        return Record(id, _without_result(known))

    async def load(self, ids: Sequence[str], *, with_result: bool = False) -> list[Record | None]:
        """Return records."""
        found = [(id, self._hub.record(id)) for id in ids]
        return [
            None if known is None else Record(id, dict(known) if with_result else _without_result(known))
            for id, known in found
        ]

    async def history(self, owner: str | None, *, before: float, limit: int) -> list[Record]:
        """Return the records of an owner, the newest first."""
        found: list[Record] = []
        for id, known in self._hub.records():
            if known["created"] < before and (owner is None or known.get("owner") == owner):
                found.append(Record(id, _without_result(known)))
                if len(found) >= limit:
                    break
        return found

    async def enter(
        self, key: str, id: str, *, limit: int, queue: int, latest: bool, waits: bool, again: bool = False
    ) -> Entered:
        """Take a place of a key; see `OperationsBackend.enter`."""
        self._hub.let_hold(self._worker, self._lease)
        holder = Holder(self._worker, id)
        return self._hub.keys.enter(key, holder, limit=limit, queue=queue, latest=latest, waits=waits, again=again)

    async def leave(self, key: str, id: str) -> Sequence[Waiter]:
        """Give a place back."""
        return self._hub.keys.leave(key, id)


def _same(known: Fields, fields: Mapping[str, Any], *names: str) -> bool:
    return all(known.get(name) == fields.get(name) for name in names)


def _without_result(fields: Fields) -> Fields:
    return {name: value for name, value in fields.items() if name != "result"}
