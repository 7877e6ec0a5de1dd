"""Stops that are due, and wait for something else first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..kernel.loops.base import EventLoop, Timer
    from ..kernel.token import Cause


class Stoppable(Protocol):
    def stop_now(self, cause: Cause) -> None:
        """Do what was postponed, if the block is still open."""


class Postponed:
    """Keeps the blocks that are to be stopped, innermost first, until `end` or for so many seconds."""

    def __init__(self, loop: EventLoop, seconds: float) -> None:
        self._blocks: dict[Stoppable, Cause] = {}
        self._timer: Timer | None = None
        if seconds < math.inf:
            self._timer = loop.call_at(loop.time() + seconds, self.end)
        self.is_over = False

    def add(self, block: Stoppable, cause: Cause) -> None:
        self._blocks[block] = cause

    def hand_on(self, other: Postponed) -> None:
        """Leave it to ``other``."""
        for block, cause in self._blocks.items():
            other.add(block, cause)
        self.forget()

    def end(self) -> None:
        """Stop now what is still to be stopped."""
        blocks = self._blocks
        self.forget()
        for block, cause in blocks.items():
            block.stop_now(cause)

    def forget(self) -> None:
        """Stop nothing any more."""
        self.is_over = True
        self._blocks = {}
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
