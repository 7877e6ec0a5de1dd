"""The callbacks of a block: on its cancellation, and on the progress of its work."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import anyio

from .foreign import EXITS, ThisTask
from .log import logger
from .members import Members, with_one_more, without
from .stoppable import Stoppable
from .token import Callback, call_logged, close_unawaited

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping


class Observed(Stoppable):
    """Work with callbacks, which are called when it is cancelled and when it reports its progress."""

    callbacks: Members[Callback] = ()
    to_await: list[Awaitable[object]] | None = None
    """The awaitables that callbacks have returned, and that are awaited when the block is left."""

    progress_callbacks: list[Callable[[str | None, Mapping[str, Any]], object]] | None = None

    def call_back(self, callback: Callback) -> None:
        """Call ``callback`` when the block is cancelled."""
        self.callbacks = with_one_more(self.callbacks, callback)
        self.token.listen(callback)

    def take_back(self, callback: Callable[..., object]) -> int:
        """Remove all registrations of a callback, and return how many of them had not been called yet."""
        count = 0
        for listener in [each for each in tuple(self.callbacks) if each.is_of(callback)]:
            self.token.unlisten(listener)
            self.callbacks = without(self.callbacks, listener)
            count += listener.take() is not None
        return count

    def await_at_the_end(self, result: object) -> None:
        """Await the result of a callback when the block is left; close the result if the block is not open."""
        if inspect.isawaitable(result):
            if not self.is_open:
                close_unawaited(result)
            else:
                self.to_await = [*(self.to_await or ()), result]

    async def await_callbacks(self) -> None:
        """Await the results of ``async`` callbacks, shielded and for one grace; close those that are left then."""
        left, self.to_await = self.to_await or [], None
        left.reverse()
        exits: list[BaseException] = []
        try:
            with anyio.move_on_after(self.cleanup_grace, shield=True):
                while left:
                    awaitable = left.pop()
                    try:
                        await await_logged(awaitable, awaitable)
                    except EXITS as exc:
                        exits.append(exc)
        finally:
            for awaitable in left:
                logger.warning("an async on_cancel callback of %r was not awaited: cleanup_grace is over", self)
                close_unawaited(awaitable)
        if exits:
            raise exits[0]

    async def report_progress(self, message: str | None, metadata: Mapping[str, Any] | None) -> None:
        """Call each progress callback, and await its result; failures are logged, and `EXITS` raised at the end."""
        exits: list[BaseException] = []
        for callback in self.progress_callbacks or ():
            try:
                result = call_logged(callback, message, metadata or {})
                if inspect.isawaitable(result):
                    await await_logged(result, callback)
            except EXITS as exc:
                exits.append(exc)
        if exits:
            raise exits[0]


async def await_logged(awaitable: Awaitable[object], callback: object) -> None:
    """Await the result of ``callback``; a failure is logged and not raised."""
    this_task = ThisTask()
    try:
        await awaitable
    except BaseException as exc:
        if this_task.is_ended_by(exc):
            raise
        logger.exception("a callback failed: %r", callback)
