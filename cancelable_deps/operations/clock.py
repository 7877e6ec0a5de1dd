"""The time of day in one event loop, which moves with the loop's clock if a test moves that."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ..kernel.loops.base import EventLoop

_KEY: Final = "cancelable_deps.operations.clock"


class Clock:
    """The time of day. Of a loop whose clock nobody moves, it is that of the system."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._offset = loop.time() - time.monotonic()

    def now(self) -> float:
        """Return the seconds since the epoch."""
        return time.time() + self._loop.time() - time.monotonic() - self._offset

    def today(self) -> datetime:
        """Return the same in UTC."""
        return datetime.fromtimestamp(self.now(), UTC)


def clock_of(loop: EventLoop) -> Clock:
    """Return the clock of ``loop``; all workers in it have the same."""
    clock: Clock | None = loop.extras.get(_KEY)
    if clock is None:
        clock = loop.extras[_KEY] = Clock(loop)
    return clock
