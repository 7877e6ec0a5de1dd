"""Records that may have been created although the call has failed: nobody works on them, so they are deleted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .model import OperationState
from .together import together

if TYPE_CHECKING:
    from .exchange import Exchange
    from .local import Local

_DOUBT_SECONDS: Final = 60.0
"""A call that has failed does not arrive after so long a time."""


class DoubtfulRecords:
    """The ids of such records."""

    def __init__(self, local: Local, exchange: Exchange) -> None:
        self._local = local
        self._exchange = exchange
        self._since: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, id: str | None) -> bool:
        return id in self._since

    def add(self, id: str) -> None:
        """Note that the record may be there, or come yet."""
        self._since[id] = self._local.loop.time()

    def discard(self, id: str) -> None:
        """Note that the record is there, and worked on."""
        self._since.pop(id, None)

    async def delete(self, id: str) -> bool:
        """Delete the record if it is there, and return whether it was.

        :raises Unavailable: if the store cannot be reached.
        """
        fields = {"state": str(OperationState.FAILED), "ended": self._local.clock.now()}
        done: bool = await self._exchange.calling(self._exchange.backend.change(id, fields, end_ttl=0.0))
        return done

    async def delete_all(self) -> None:
        """Delete those that are there, and look again later for the others.

        :raises Unavailable: if the store cannot be reached.
        """
        await together(self._delete_or_forget, list(self._since.items()))

    async def _delete_or_forget(self, doubtful: tuple[str, float]) -> None:
        id, since = doubtful
        if id not in self._since:
            # A later call with this id has created it, and works on it.
            return
        if await self.delete(id) or since < self._local.loop.time() - _DOUBT_SECONDS:
            self.discard(id)
