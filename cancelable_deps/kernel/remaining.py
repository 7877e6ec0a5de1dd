"""The time that is left around the caller, for calls to other services."""

from __future__ import annotations

import math
from contextlib import suppress
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Final, Self

from .block import current
from .reasons import CancelationReason

if TYPE_CHECKING:
    from .block import Block

_NOTHING: Final = object()
_hidden: ContextVar[object] = ContextVar("cancelable_deps.hidden", default=_NOTHING)
"""The innermost block whose deadline does not count, nor those of the blocks around it."""


def leave_hidden() -> None:
    """Leave all `Hidden` sections, in the context of work that has nothing around it."""
    _hidden.set(_NOTHING)


class Hidden:
    """A section in which the deadlines of the blocks around it do not count, for ``with`` and ``async with``."""

    _token: Token[object] | None = None

    def __enter__(self) -> Self:
        self._token = _hidden.set(current.get())
        return self

    def __exit__(self, *exc_info: object) -> None:
        token, self._token = self._token, None
        if token is not None:
            with suppress(ValueError):
                # FastAPI enters a generator dependency in one thread and leaves it in another, each with its own context.
                _hidden.reset(token)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        self.__exit__()


def seconds_left(block: Block) -> float:
    """Return the seconds until the deadline of ``block``; before it is entered, its timeout counts as a whole."""
    deadline, loop = block.deadline, block.loop or block.home()
    left = math.inf if loop is None or deadline == math.inf else max(0.0, deadline - loop.time())
    return left if block.loop is not None or block.timeout is None else min(left, block.timeout)


def next_deadline() -> tuple[Block, float] | None:
    """Return the block around the caller that times out next, with the seconds until then; ``None`` if none does.

    The blocks around a child task count as well, as long as they are open. A block that is being cancelled does not: the
    caller is its cleanup. It does count in a worker thread, which nothing has interrupted.
    """
    found: tuple[Block, float] | None = None
    hidden, block = _hidden.get(), current.get()
    while block is not None and block is not hidden:
        left = _time_of(block)
        if left < (math.inf if found is None else found[1]):
            found = block, left
        block = _around(block)
    return found


def _time_of(block: Block) -> float:
    loop = block.loop
    if loop is None or not block.is_open:
        return math.inf
    cause = block.cause
    if cause is None:
        return max(0.0, block.own_deadline - loop.time())
    is_interrupted = not loop.is_thread and loop.is_running_here()
    return math.inf if is_interrupted or cause.reason is not CancelationReason.TIMEOUT else 0.0


def _around(block: Block) -> Block | None:
    """Return the block around ``block``, also if that is open in another task."""
    outside: Token[Block | None] | None = getattr(block, "outside", None)
    if outside is None:
        # It has been left, and the caller is a task that outlives it.
        parent: Block | None = block.parent
        return parent
    return None if outside.old_value is Token.MISSING else outside.old_value
