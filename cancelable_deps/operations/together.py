"""Many calls of the store at the same time, which it may send together."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

import anyio

from .backend import Unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

T = TypeVar("T")

_MOST: Final = 100


async def together(call: Callable[[T], Awaitable[object]], items: Iterable[T]) -> None:
    """Call ``call(item)`` for each of the items, a hundred at the same time.

    :raises Unavailable: if a call has raised it; those of its hundred are made, and no more.
    """
    rest = iter(items)
    while part := list(islice(rest, _MOST)):
        failures: list[Unavailable] = []
        async with anyio.create_task_group() as tasks:
            for item in part:
                tasks.start_soon(_call, call, item, failures)
        if failures:
            raise failures[0]


async def _call(call: Callable[[T], Awaitable[object]], item: T, failures: list[Unavailable]) -> None:
    try:
        await call(item)
    except Unavailable as exc:
        # Not in the group, which would cancel the others, and make groups of exceptions.
        failures.append(exc)
