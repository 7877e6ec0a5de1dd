"""`RedisBackend`: the store in Redis or Valkey."""

from __future__ import annotations

import math
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import anyio

from ...kernel.log import logger
from ...kernel.options import seconds
from ..backend import Beat, Entered, Gap, Holder, Identity, Record, Unavailable, Waiter
from . import scripts
from .batches import Batches
from .choice import checked_client, client_for
from .client import Call, text
from .graves import Graves, waiters_of
from .layout import (
    MOST_OF_ALL,
    MOST_OF_OWNER,
    Names,
    as_pairs,
    checked_prefix,
    encoded,
    fields_of,
    held_place,
    held_record,
    identities_of,
    identity_text,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from datetime import timedelta

    from ..backend import Fields, Position
    from .client import Client, Script

_PAGE: Final = 200
_SLACK: Final = 2.0
"""Seconds that an answer may be late before the connection is given up."""

_REWIND: Final = 5000
"""Milliseconds of entries that are read once more after a break, as another server with another clock may answer."""

_RENEW_AFTER: Final = 1200.0
_MOST_RENEWED: Final = 100
_GOODBYE_SECONDS: Final = 1.0


class RedisBackend:
    """A store in Redis 6.2 or newer, or in Valkey, for all workers with the same ``prefix``.

    It needs redis-py (asyncio: ``pip install "cancelable-deps[redis]"``) or coredis (asyncio and trio:
    ``"cancelable-deps[coredis]"``). Without ``client``, redis-py is used on asyncio if it is installed.

    An application starts, and answers, also while Redis cannot be reached: see `Operations`. A Redis that evicts keys may
    forget operations; a warning says so once.

    :param url: such as ``redis://localhost:6379/0``, ``rediss://...`` or ``unix://...``.
    :param client: instead of ``url``, the application's own ``redis.asyncio`` or ``coredis`` client: ``Redis``, one of a
        Sentinel, or ``RedisCluster``. It is not closed. Of redis-py's, the read that waits gets a connection of its own.
        Of coredis' only the options are used, for two connections of its own.
    :param prefix: the beginning of all keys. Applications with different prefixes know nothing of each other.
    :param lease: seconds after which a worker that gives no sign of life is taken for dead. All workers need the same.
    :raises ImportError: if neither library is installed.
    :raises TypeError: if an argument has the wrong type, or both or none of ``url`` and ``client`` are given.
    :raises ValueError: if ``prefix`` has other characters than letters, digits and ``._~:/-``, or ``lease`` is too short.
    """

    shares = True

    def __init__(
        self, url: str | None = None, *, client: Any = None, prefix: str = "app", lease: float | timedelta = 15
    ) -> None:
        checked_client(url, client)
        self.lease = seconds(lease, "lease")
        if self.lease < 1:
            raise ValueError(f"lease must be 1 second or more, not {self.lease:g}")
        self._url = url
        self._own = client
        self._names = Names(checked_prefix(prefix))
        self._client: Client | None = None
        self._batches: Batches | None = None
        self._worker = Identity("", "", 0, "", 0.0)
        self._memory_ms = 60_000
        self._read_to = ""
        self._mail_read_to = "0-0"
        self._last_read = 0.0
        self._has_gap = self._has_joined = False
        self._reading: anyio.CancelScope | None = None
        self._is_turned_back = False
        self._owners: dict[str, str | None] = {}
        self._places: dict[tuple[str, str], float] = {}

    @property
    def _lease_ms(self) -> int:
        return int(self.lease * 1000)

    @asynccontextmanager
    async def connect(self, worker: Identity, *, memory: float, lease: float) -> AsyncIterator[None]:
        """Use the store as ``worker`` inside the ``async with``; see `OperationsBackend.connect`."""
        self._memory_ms = int(memory * 1000)
        self._read_to, self._has_gap = "", False
        self._owners.clear()
        self._places.clear()
        self.rename(worker)
        client = client_for(self._url, self._own, self.lease / 3 + _SLACK)
        batches = Batches(client)
        async with client.opened(), batches.opened():
            self._client, self._batches = client, batches
            try:
                yield
            finally:
                await self._part()
                self._client = self._batches = None

    def rename(self, worker: Identity) -> None:
        """Go on under a new name, with the mail of that one."""
        self._worker = worker
        self._has_joined = False
        self._turn_back(self._read_to)

    async def _part(self) -> None:
        names, me = self._names, self._worker.name
        keys = [names.workers, names.identities, names.since, names.inbox(me), names.held(me)]
        with anyio.move_on_after(_GOODBYE_SECONDS, shield=True):
            try:
                await self._run(scripts.PART, keys, [me])
            except Unavailable:
                logger.info("the store of operations cannot be told that this worker ends")

    async def _run(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        if self._batches is None:
            raise Unavailable("the store is not open")
        return await self._batches.run(Call(script, keys, args))

    # Signs of life.

    async def beat(self, *, may_reap: bool) -> Beat:
        """Renew the lease of this worker, and reap the dead; see `OperationsBackend.beat`."""
        names, me = self._names, self._worker.name
        fenced, known, lost, oldest, gap, alive, dead = await self._run(
            scripts.BEAT,
            [
                names.workers,
                names.identities,
                names.since,
                names.tombstone(me),
                names.inbox(me),
                names.held(me),
                names.log,
            ],
            [me, self._lease_ms, identity_text(self._worker), self._read_to, self._mail_read_to, self._memory_ms],
        )
        has_forgotten = bool(lost) or (self._has_joined and not known)
        self._has_joined = not fenced
        if has_forgotten and self._read_to:
            self._turn_back(text(oldest))
        self._has_gap = self._has_gap or bool(gap)
        await self._renew_places()
        graves = Graves(self._run, names, me, self._lease_ms)
        if may_reap and not fenced:
            for worker in dead:
                await graves.reap(text(worker))
        return Beat(identities_of(map(text, alive)), graves.lost, graves.granted, bool(fenced), has_forgotten)

    async def _renew_places(self) -> None:
        """Keep the keys that are held for long. The dictionary is in the order of the renewals."""
        now, keys = time.monotonic(), []
        for place, at in list(self._places.items())[:_MOST_RENEWED]:
            if at > now - _RENEW_AFTER:
                break
            keys += self._names.places(place[0])
            del self._places[place]
            self._places[place] = now
        if keys:
            await self._run(scripts.RENEW, keys, [])

    # The log and the mail.

    async def broadcast(self, entry: bytes, id: str) -> Position:
        """Append an entry to the log."""
        return text(await self._run(scripts.BROADCAST, [self._names.log], [entry, id, self._memory_ms]))

    async def send(self, worker: str, entry: bytes, id: str) -> bool:
        """Append an entry to the mail of one worker; ``False`` if it is dead."""
        names = self._names
        args: list[str | bytes | int] = [entry, id, worker, self._worker.name, self._lease_ms]
        return bool(await self._run(scripts.SEND, [names.inbox(worker), names.workers, names.since], args))

    async def receive(self) -> list[tuple[Position, bytes]]:
        """Wait for entries, for a third of the lease at most, and return them; see `OperationsBackend.receive`."""
        if not self._read_to:
            await self._begin()
        if self._has_gap:
            self._has_gap = False
            raise Gap
        inbox, block = self._names.inbox(self._worker.name), self._block()
        self._is_turned_back = False
        with anyio.move_on_after(block + _SLACK) as self._reading:
            try:
                assert self._client is not None
                found = await self._client.xread(
                    {self._names.log: self._read_to, inbox: self._mail_read_to}, int(block * 1000)
                )
            except Unavailable:
                self._rewind()
                raise
            finally:
                self._reading = None
            # Otherwise these are read again, from the new place on.
            return [] if self._is_turned_back else self._taken(found, inbox)
        if self._is_turned_back:
            return []
        self._rewind()
        raise Unavailable("reading has taken too long")

    def _turn_back(self, read_to: str) -> None:
        """Read from a former place in the log on, and all the mail.

        After a loss, what comes may have a place before what was read, if a server with another clock answers.
        """
        self._read_to, self._mail_read_to = read_to, "0-0"
        self._is_turned_back = True
        if self._reading is not None:
            self._reading.cancel()

    def _block(self) -> float:
        longest = None if self._client is None else self._client.longest_block
        return self.lease / 3 if longest is None else max(0.01, min(self.lease / 3, longest))

    async def _begin(self) -> None:
        """Find the place in the log to begin at, and look whether this Redis keeps what it is given."""
        with anyio.move_on_after(_SLACK):
            now, policy = await self._time_and_policy(self._run)
            if policy is not None:
                logger.warning(
                    "this Redis deletes keys when its memory is full (maxmemory-policy %s): it may forget operations; "
                    "use one with noeviction",
                    policy,
                )
            self._read_to = f"{int(now) - self._memory_ms}-0"
            self._last_read = time.monotonic()
            return
        raise Unavailable("the store does not answer")

    async def _time_and_policy(self, run: Callable[..., Awaitable[Any]]) -> tuple[str, str | None]:
        """Return the time of this Redis, and the policy by which it deletes keys; ``None`` if it keeps them."""
        now, policy, most = map(text, await run(scripts.BEGIN, [self._names.log], []))
        return now, policy if policy not in ("", "noeviction") and most != "0" else None

    async def evicting_policy(self) -> str | None:
        """Return the policy by which this Redis deletes keys when its memory is full; ``None`` if it keeps them.

        Uses a connection of its own if the store is not open.

        :raises Unavailable: if it does not answer within 2 seconds.
        """
        # Importing a client library may take long, and is not the store's time.
        client = client_for(self._url, self._own, _SLACK) if self._client is None else None
        with anyio.move_on_after(_SLACK):
            if client is None:
                return (await self._time_and_policy(self._run))[1]
            async with client.opened():
                return (await self._time_and_policy(client.script))[1]
        raise Unavailable("the store does not answer")

    def _taken(self, found: list[tuple[str, str, bytes]], inbox: str) -> list[tuple[Position, bytes]]:
        now = time.monotonic()
        was_away = now - self._last_read > max(self._memory_ms / 1000, self.lease)
        self._last_read = now
        if was_away:
            raise Gap
        for stream, position, _ in found:
            if stream == inbox:
                self._mail_read_to = position
            elif stream == self._names.log:
                self._read_to = position
        return [(position, data) for _, position, data in sorted(found, key=_by_position)]

    def _rewind(self) -> None:
        if not self._is_turned_back:
            self._read_to, self._mail_read_to = map(_rewound, (self._read_to, self._mail_read_to))

    async def missing(self, ids: Sequence[str]) -> set[str]:
        """Return which of these entries the log does not hold."""
        found = await self._run(scripts.MISSING, [self._names.log], [self._memory_ms + _REWIND, *ids])
        return set(map(text, found))

    # Records.

    async def create(self, id: str, fields: Fields, *, ttl: float) -> Record:
        """Create a record, or return the one that has the id."""
        owner = fields.get("owner")
        names, me = self._names, self._worker.name
        is_new, known = await self._run(
            scripts.CREATE,
            [names.record(id), names.held(me), names.workers, names.tombstone(me), *names.indexes(owner)],
            [
                id,
                held_record(id),
                _milliseconds(ttl),
                encoded(fields["created"]),
                MOST_OF_ALL,
                MOST_OF_OWNER,
                me,
                self._lease_ms,
                _without_result(fields),
            ],
        )
        if is_new < 0:
            raise Unavailable(_GIVEN_UP)
        if is_new:
            self._owners[id] = owner
        return Record(id, fields_of(list(map(text, known))) if known else fields, is_new=bool(is_new))

    async def change(self, id: str, fields: Mapping[str, Any], *, end_ttl: float | None = None) -> bool:
        """Change fields of a record of this worker that has not ended, or end it."""
        names, me = self._names, self._worker.name
        result = fields.get("result")
        done = await self._run(
            scripts.CHANGE,
            [
                names.record(id),
                names.result(id),
                names.held(me),
                names.tombstone(me),
                *names.indexes(self._owners.get(id)),
            ],
            [
                encoded(me),
                id,
                held_record(id),
                "" if end_ttl is None else _milliseconds(end_ttl),
                "" if result is None else encoded(result),
                encoded(fields.get("ended")),
                MOST_OF_ALL,
                MOST_OF_OWNER,
                _without_result(fields),
            ],
        )
        if end_ttl is not None:
            self._owners.pop(id, None)
        return bool(done)

    async def mark(self, id: str, fields: Mapping[str, Any]) -> Record | None:
        """Set fields of a record that has not ended, unless they are set; return the record."""
        found = await self._run(scripts.MARK, [self._names.record(id)], as_pairs(fields))
        return Record(id, fields_of(list(map(text, found)))) if found else None

    async def load(self, ids: Sequence[str], *, with_result: bool = False) -> list[Record | None]:
        """Return records."""
        if not ids:
            return []
        keys = [self._names.record(id) for id in ids]
        if with_result:
            keys += [self._names.result(id) for id in ids]
        found = await self._run(scripts.LOAD, keys, [len(ids)])
        return [
            Record(id, fields_of(list(map(text, pairs)))) if pairs else None
            for id, pairs in zip(ids, found, strict=True)
        ]

    async def history(self, owner: str | None, *, before: float, limit: int) -> list[Record]:
        """Return the records of an owner, the newest first."""
        records: list[Record] = []
        skipped = 0
        while len(records) < limit:
            ids = await self._run(scripts.HISTORY, self._names.index(owner), [encoded(before), skipped, _PAGE])
            records += [record for record in await self.load(list(map(text, ids))) if record is not None]
            skipped += len(ids)
            if len(ids) < _PAGE:
                break
        return records[:limit]

    # Keys.

    async def enter(
        self, key: str, id: str, *, limit: int, queue: int, latest: bool, waits: bool, again: bool = False
    ) -> Entered:
        """Take a place of a key; see `OperationsBackend.enter`."""
        names, me = self._names, self._worker.name
        status, generation, earlier = await self._run(
            scripts.ENTER,
            [*names.places(key), names.generations, names.held(me), names.workers, names.since, names.tombstone(me)],
            [id, me, held_place(key, id), limit, queue, int(latest), int(waits), int(again), self._lease_ms],
        )
        found = text(status)
        if found not in _STATUS:
            raise Unavailable(_GIVEN_UP)
        if found != "refused":
            self._places[key, id] = time.monotonic()
        pairs = list(map(text, earlier))
        holders = [Holder(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
        return Entered(_STATUS[found], int(text(generation)), holders)

    async def leave(self, key: str, id: str) -> Sequence[Waiter]:
        """Give a place back."""
        names, me = self._names, self._worker.name
        granted = await self._run(
            scripts.LEAVE,
            [*names.places(key), names.held(me), names.workers, names.since],
            [id, me, held_place(key, id), me, self._lease_ms],
        )
        self._places.pop((key, id), None)
        return waiters_of(granted)


_GIVEN_UP: Final = "this worker was given up, and does not know it yet"
_STATUS: Final[dict[str, Any]] = {"admitted": "admitted", "waiting": "waiting", "refused": "refused"}


def _without_result(fields: Mapping[str, Any]) -> str:
    # One argument: most of the time of a call goes into packing its arguments.
    return encoded(as_pairs({name: value for name, value in fields.items() if name != "result"}))


def _rewound(position: str) -> str:
    return position and f"{max(0, int(position.partition('-')[0]) - _REWIND)}-0"


def _milliseconds(ttl: float) -> int:
    return max(1, math.ceil(ttl * 1000))


def _by_position(entry: tuple[str, str, bytes]) -> tuple[int, int]:
    at, _, number = entry[1].partition("-")
    return int(at), int(number)
