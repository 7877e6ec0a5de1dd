"""The interface of a store that the workers of an application share: a log, mail, leases, records and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

Position = str
"""The place of an entry in the log or among the mail of a worker. Positions of one source increase."""

Fields = dict[str, Any]
"""The fields of a record: strings, numbers, booleans, ``None``, and lists and dictionaries of these, as JSON has them."""


class Unavailable(Exception):
    """The store cannot be reached. It is not known whether the call has taken effect, or will."""


class Gap(Exception):
    """Entries may be missing: the worker has not read for longer than the log remembers. `receive` goes on after it."""


class Identity(NamedTuple):
    """A worker, as others see it."""

    name: str
    host: str
    pid: int
    version: str
    started: float


class Waiter(NamedTuple):
    """An operation whose turn has come, and the worker that is to be told."""

    worker: str
    id: str


class Beat(NamedTuple):
    """The answer to a sign of life."""

    alive: Sequence[Identity]
    """The workers whose leases have not run out, the caller included."""

    lost: Sequence[str]
    """The ids of records that this call has marked as lost, because the leases of their workers had run out."""

    granted: Sequence[Waiter]
    """The operations whose turn has come because the holders before them are gone."""

    is_fenced: bool
    """Whether the lease of the caller had run out, so that others take it for dead: it needs a new name."""

    has_forgotten: bool = False
    """Whether the store has lost what it had without any call having failed: it does not know the caller any more
    without having given it up, or its log ends before what the caller has read."""


class Holder(NamedTuple):
    """An operation that holds a key, or waits for it."""

    worker: str
    id: str


class Entered(NamedTuple):
    """The answer to `OperationsBackend.enter`."""

    status: Literal["admitted", "waiting", "refused"]
    generation: int
    """A number that is higher than those of all entries before, of every key."""

    earlier: Sequence[Holder]
    """With ``latest``: all that have entered before and have not left, who are to be superseded."""


class Record(NamedTuple):
    """The record of a background operation."""

    id: str
    fields: Fields
    is_new: bool = False
    """Whether the call that returned this has created it."""


class OperationsBackend(Protocol):
    """A store for one worker. Every ``await`` may raise `Unavailable`: then it is unknown whether it has happened.

    Entries, fields and names are made above this interface, which only keeps and passes them on.
    """

    shares: bool
    """Whether other processes may share the store, so that a warning for several workers is not needed."""

    def connect(self, worker: Identity, *, memory: float, lease: float) -> AbstractAsyncContextManager[None]:
        """Use the store as ``worker`` inside the ``async with``.

        Does not fail when the store cannot be reached; the calls do, until it can. Reading begins with the entries of
        the last ``memory`` seconds.
        """
        ...

    def rename(self, worker: Identity) -> None:
        """Go on under a new name, because the lease of the former has run out."""

    async def beat(self, *, may_reap: bool) -> Beat:
        """Renew the lease of this worker, and return who is alive.

        :param may_reap: whether to mark the records of workers whose leases have run out as lost, and to free their
            keys. Only a worker that has beaten without a break for a whole lease may: after an outage, the leases of
            all have run out.
        """
        ...

    async def broadcast(self, entry: bytes, id: str) -> Position:
        """Append an entry to the log, which every worker reads; for ``memory`` seconds also those that come later."""
        ...

    async def send(self, worker: str, entry: bytes, id: str) -> bool:
        """Append an entry to the mail of one worker. Return ``False`` if no living worker has that name."""
        ...

    async def receive(self) -> list[tuple[Position, bytes]]:
        """Wait for entries of the log and of the own mail, and return them in order, none skipped, perhaps some twice.

        May return an empty list. :raises Gap: if entries may have been lost.
        """
        ...

    async def missing(self, ids: Sequence[str]) -> set[str]:
        """Return which of these entries of the log the store does not hold. Called after a break."""
        ...

    async def create(self, id: str, fields: Fields, *, ttl: float) -> Record:
        """Create a record of this worker, or return the one that has the id.

        A call that is repeated because its answer was lost, by the same ``worker`` and ``created``, has created it.

        Fields that are looked at here: ``worker``, ``owner``, ``created`` (seconds), ``ended``.
        """
        ...

    async def change(self, id: str, fields: Mapping[str, Any], *, end_ttl: float | None = None) -> bool:
        """Change fields of a record of this worker that has not ended. Return whether it was there and could be.

        A call that ends a record, and is repeated with the same ``ended``, returns true again.

        :param end_ttl: the operation has ended, and its record is kept for so many seconds.
        """
        ...

    async def mark(self, id: str, fields: Mapping[str, Any]) -> Record | None:
        """Set fields of a record that has not ended, by any worker. Return the record as it is then, if there is one.

        A field that is set already keeps its value: the first cancel counts.
        """
        ...

    async def load(self, ids: Sequence[str], *, with_result: bool = False) -> list[Record | None]:
        """Return records, without their field ``result`` unless that is asked for."""
        ...

    async def history(self, owner: str | None, *, before: float, limit: int) -> list[Record]:
        """Return the records of an owner (``None``: of all) that were created before a time, the newest first."""
        ...

    async def enter(
        self, key: str, id: str, *, limit: int, queue: int, latest: bool, waits: bool, again: bool = False
    ) -> Entered:
        """Take one of ``limit`` places of a key, or one of ``queue`` places to wait for it, or neither; atomically.

        Holders whose worker is dead are dropped first. An id that holds a place, or waits for one, keeps that, and the
        answer says so: a call may be repeated.

        :param latest: supersede all that have entered before; those that wait are removed, those that hold stay until
            they leave.
        :param waits: with ``latest``, whether to wait until those that hold have left.
        :param again: the id had been admitted before the store lost its data: take a place whatever the limit is.
        """
        ...

    async def leave(self, key: str, id: str) -> Sequence[Waiter]:
        """Give a place back, and return who has got it."""
        ...
