"""Listing and counting what runs, here and in the other workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import anyio.lowlevel

from .conditions import Conditions, matcher
from .model import Operation, OperationList
from .running import Running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..request.state import RequestState
    from .entries import Entry
    from .exchange import Exchange
    from .local import Local
    from .running import RunningBlock

CHUNK: Final = 1000
"""So many are looked at before the event loop does something else."""

_VIEWS: Final = 100
"""So many are shown before the event loop does something else."""

MOST: Final = 1000


async def everything_that(local: Local, conditions: Conditions) -> AsyncIterator[list[RequestState | RunningBlock]]:
    """Yield what runs here and fulfils the conditions, the oldest first, in parts; others get their turn in between."""
    fulfils = matcher(conditions, local.loop.time(), local.clock.now())
    found = local.everything()
    found.reverse()
    while found:
        # Some may have ended since the last part.
        part = [each for each in reversed(found[-CHUNK:]) if runs(each)]
        # Let go of part by part: to free all that have ended meanwhile takes as long as to look at them.
        del found[-CHUNK:]
        yield part if fulfils is None else list(filter(fulfils, part))
        await anyio.lowlevel.checkpoint()


def as_running(local: Local, each: RequestState | RunningBlock) -> Running:
    """Return the operation of something that runs here."""
    return each if isinstance(each, Running) else local.of_request(each)


class Listing:
    """The lists of what runs."""

    def __init__(self, local: Local, exchange: Exchange) -> None:
        self._local = local
        self._exchange = exchange

    async def all(self, conditions: Conditions, limit: int, timeout: float) -> OperationList:
        """Return what runs in all workers, the oldest first."""
        items, total = await self._here(conditions, limit)
        unreachable: list[str] = []
        if not self._exchange.is_alone:
            data = {"conditions": conditions.as_data(), "limit": limit}
            answers = await self._exchange.ask("list", data, to=None, timeout=timeout)
            unreachable = answers.silent
            for answer in answers.of.values():
                items += [Operation.model_validate(item) for item in answer.get("items", ())]
                total += answer.get("total", 0)
            items.sort(key=lambda operation: operation.started)
        return OperationList(items=items[:limit], total=total, unreachable=unreachable)

    async def _here(self, conditions: Conditions, limit: int) -> tuple[list[Operation], int]:
        found: list[Operation] = []
        total = 0
        async for part in everything_that(self._local, conditions):
            total += len(part)
            wanted = part[: limit - len(found)]
            for begin in range(0, len(wanted), _VIEWS):
                views = wanted[begin : begin + _VIEWS]
                found += [as_running(self._local, each).view() for each in views if runs(each)]
                await anyio.lowlevel.checkpoint()
        return found, total

    async def answer(self, entry: Entry) -> dict[str, Any]:
        """Answer another worker that makes a list."""
        try:
            conditions = Conditions.of_data(entry.data["conditions"])
        except (ValueError, TypeError):
            return {"items": [], "total": 0}
        items, total = await self._here(conditions, min(int(entry.data["limit"]), MOST))
        return {"items": [item.model_dump(mode="json") for item in items], "total": total}


def runs(each: RequestState | RunningBlock) -> bool:
    """Return whether it has not ended."""
    if isinstance(each, Running):
        return not each.has_ended
    # A young one is known by its operation alone.
    return each.is_old or (each.operation is not None and not each.operation.has_ended)
