"""Reading the records of background operations, of this worker and of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .conditions import Conditions, has_been
from .model import Operation, OperationList
from .names import ANYONE, owner_as_data
from .records import is_of, operation_of

if TYPE_CHECKING:
    from .backend import Record
    from .exchange import Exchange
    from .local import Local
    from .names import Owner

MOST_AGE: Final = 7 * 24 * 3600.0
"""Seconds that the record of unended work is kept."""

MOST_READ: Final = 1000


class Archive:
    """The records of background operations."""

    def __init__(self, local: Local, exchange: Exchange) -> None:
        self._local = local
        self._exchange = exchange

    def seen(self, id: str, fields: dict[str, Any]) -> Operation:
        """Return the operation of a record, as its worker sees it if it runs here."""
        for running in self._local.find(id, ANYONE):
            if running.has_record:
                # Not one that is about to find out that another is faster.
                return running.view()
        return operation_of(id, fields, self._local.clock.now())

    async def recorded(self, id: str, owner: Owner) -> Operation | None:
        """Return the operation of a record that belongs to ``owner``.

        :raises Unavailable: if the store cannot be reached.
        """
        [record] = await self._exchange.calling(self._exchange.backend.load([id]))
        return None if record is None or not is_of(record.fields, owner) else self._as_read(record)

    def _as_read(self, record: Record) -> Operation:
        return operation_of(record.id, record.fields, self._local.clock.now())

    async def fields(self, id: str, owner: Owner) -> dict[str, Any] | None:
        """Return the record of an operation of ``owner`` with its result.

        :raises Unavailable: if the store cannot be reached.
        """
        [record] = await self._exchange.calling(self._exchange.backend.load([id], with_result=True))
        return None if record is None or not is_of(record.fields, owner) else record.fields

    async def mark_cancelled(self, id: str, owner: Owner, message: str | None) -> Operation | None:
        """Note in the record that it is to stop, and return the operation; ``None`` if there is none of ``owner``.

        :raises Unavailable: if the store cannot be reached.
        """
        known = await self.recorded(id, owner)
        if known is None or known.state.is_final:
            return known
        mark = {"cancel": {"message": message, "at": self._local.clock.now()}}
        record = await self._exchange.calling(self._exchange.backend.mark(id, mark))
        return None if record is None else self._as_read(record)

    async def history(self, owner: str | None, *, limit: int) -> list[Operation]:
        """Return the operations that there are records of, the newest first.

        :raises Unavailable: if the store cannot be reached.
        """
        records = await self._exchange.calling(
            self._exchange.backend.history(owner, before=self._local.clock.now() + MOST_AGE, limit=limit)
        )
        return [self.seen(record.id, record.fields) for record in records]

    async def ended(self, conditions: Conditions, limit: int) -> OperationList:
        """Return the operations that there are records of and that fulfil the conditions, the newest first.

        :raises Unavailable: if the store cannot be reached.
        """
        owner = owner_as_data(conditions.owner)
        now = self._local.clock.now()
        found = [each for each in await self.history(owner, limit=MOST_READ) if has_been(conditions, each, now)]
        return OperationList(items=found[:limit], total=len(found), unreachable=[])
