"""What is counted only when somebody looks, from any thread: what runs, and the age of the lease."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, get_args

from ..kernel.events import WorkKind
from ..operations.local import open_in
from ..request.in_flight import in_flight_everywhere
from ..request.websocket import SocketState

if TYPE_CHECKING:
    from ..operations.local import Local


def operations_by_kind() -> dict[str, int]:
    """Return how many operations run in this process, by kind: requests that have run for a moment, and other work."""
    counts: dict[str, int] = dict.fromkeys(get_args(WorkKind), 0)
    for in_flight in in_flight_everywhere():
        # A copy in one step, as the loop goes on in its own thread.
        requests = list(in_flight.requests)
        sockets = sum(isinstance(request, SocketState) for request in requests)
        counts["websocket"] += sockets
        counts["request"] += len(requests) - sockets
    for local in _open_everywhere():
        for running in local.blocks():
            counts[running.kind] += 1
    return counts


def age_of_lease() -> float | None:
    """Return the seconds since the store of the operations had the last sign of life of this process.

    The oldest counts, if several `Operations` are open; ``None`` if none are.
    """
    now = time.monotonic()
    ages: list[float] = []
    for local in _open_everywhere():
        operations: Any = local.operations
        if operations.is_open:
            ages.append(now - operations.worker.exchange.beaten_at)
    return max(ages, default=None)


def _open_everywhere() -> list[Local]:
    return [local for in_flight in in_flight_everywhere() for local in open_in(in_flight.loop)]
