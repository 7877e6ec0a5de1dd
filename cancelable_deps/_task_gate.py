"""A grace for the cleanup of a task that is not ours, and is cancelled by its own task group.

Starlette and others send a stream from a child task, and cancel that when they hear that the client has left. anyio and
trio repeat a cancellation at every ``await``, also in the cleanup of the stream's generator.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from . import _polite

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._backend import EventLoop
    from ._polite import IsOurs


def guard_running_task(loop: EventLoop, grace: float, is_ours: IsOurs, ended: Callable[[bool], object]) -> None:
    """Put a gate around all that is left of the calling task.

    ``ended(was_cancelled)`` is called when the task has ended. On trio it is never told of a cancellation: there one
    comes only from the scopes around it. Where no hook is known there is no gate, and the task is told its end alone.
    """
    _gate(loop.is_trio)(loop, grace, is_ours).put_around(ended)


@cache
def _gate(is_trio: bool) -> Any:
    # Each loads only where its backend runs.
    if not _polite.hooks_are_known(is_trio):
        from ._polite_public import NoTaskGate

        return NoTaskGate
    if is_trio:
        from ._polite_trio import TrioTaskGate

        return TrioTaskGate
    from ._polite_asyncio import AsyncioTaskGate

    return AsyncioTaskGate
