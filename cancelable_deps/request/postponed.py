"""Stops that are due, and are postponed until something else has happened."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..kernel.loops.base import EventLoop, Timer
    from ..kernel.token import Cause


class Stoppable(Protocol):
    """A block whose stop can be postponed."""

    def stop_now(self, cause: Cause) -> None:
        """Stop the block, if it is still open."""


class Postponed:
    """The blocks that are to be stopped, innermost first, when `end` is called or ``seconds`` have passed."""

    def __init__(self, loop: EventLoop, seconds: float) -> None:
        self._blocks: dict[Stoppable, Cause] = {}
        self._loop = loop
        self._timer: Timer | None = None
        self._until = math.inf
        self.is_over = False
        self.shorten(seconds)

    def add(self, block: Stoppable, cause: Cause) -> None:
        """Postpone the stop of ``block``."""
        self._blocks[block] = cause

    def hand_on(self, other: Postponed) -> None:
        """Hand the blocks on to ``other``, and stop none of them here."""
        for block, cause in self._blocks.items():
            other.add(block, cause)
        self.forget()

    def shorten(self, seconds: float) -> None:
        """Call `end` after ``seconds`` at the latest, if it is not over yet. Never lengthens the time."""
        until = self._loop.time() + seconds
        if self.is_over or until >= self._until:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._until = until
        self._timer = self._loop.call_at(until, self.end)

    def end(self) -> None:
        """Stop now all blocks that are left."""
        blocks = self._blocks
        self.forget()
        for block, cause in blocks.items():
            block.stop_now(cause)

    def forget(self) -> None:
        """Drop all blocks without stopping them."""
        self.is_over = True
        self._blocks = {}
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
