"""A client of coredis that is held open in a task of its own, and whose calls nobody interrupts.

coredis (6.9) has to be let finish what it has begun. A call that is cancelled while it connects takes a place of its pool
along for ever, logs a traceback, and on trio raises another error than the cancellation; and an error in a task of its pool
would cancel the application around it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import anyio
from coredis import exceptions

from ...kernel.loops.current import current_loop
from .client import Pending

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextvars import Context

    from anyio.abc import TaskGroup

    Work = Callable[[Any], Awaitable[Any]]

_LONGEST_CALL: Final = 5.0
"""Seconds after which a call is given up whose caller has long gone: a client may repeat its commands without end."""

_CLOSE_SECONDS: Final = 1.0


class _Call(Pending):
    def __init__(self, work: Work) -> None:
        super().__init__(anyio.Event())
        self.work = work


class HeldClient:
    """A client, from `hold` to `close`.

    :param context: the context of its tasks, and of the connections that they make.
    :ivar is_connected: whether the last call was answered.
    """

    def __init__(self, client: Any, context: Context) -> None:
        self.client = client
        self._context = context
        self._tasks: TaskGroup | None = None
        self._calls: set[_Call] = set()
        self._failure: Exception | None = None
        self.is_connected = False
        self._connecting = anyio.Lock()
        self._is_open = anyio.Event()
        self._is_dropped = anyio.Event()
        self._has_ended = anyio.Event()
        current_loop().spawn(self._hold, context.copy())

    @property
    def is_usable(self) -> bool:
        """Whether it may be called still."""
        return not self._is_dropped.is_set() and not self._has_ended.is_set()

    async def _hold(self) -> None:
        try:
            async with self.client, anyio.create_task_group() as self._tasks:
                self._is_open.set()
                await self._is_dropped.wait()
                self._tasks.cancel_scope.cancel()
        except Exception as exc:
            self._failure = exc
        finally:
            self._tasks = None
            self._is_open.set()
            self._has_ended.set()

    def drop(self) -> None:
        """Close it soon."""
        self._is_dropped.set()

    async def close(self) -> None:
        """Wait for the calls that have begun, for a second at most, and close it. Is not cancelled."""
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(_CLOSE_SECONDS):
                while self._calls:
                    await next(iter(self._calls)).has_ended.wait()
            self.drop()
            await self._has_ended.wait()

    async def call(self, name: str, *args: Any) -> Any:
        """Call a method of the client, and return its result; as `run` does."""
        return await self.run(lambda client: getattr(client, name)(*args))

    async def run(self, work: Work) -> Any:
        """Call a function with the client, and return its result. If the caller is cancelled, the call goes on."""
        await self._is_open.wait()
        if self._tasks is None:
            raise exceptions.ConnectionError("the client is closed") from self._failure
        call = _Call(work)
        self._calls.add(call)
        # In this context, because a connection that it makes keeps it: that of a request would be kept alive.
        self._context.copy().run(self._tasks.start_soon, self._run, call)
        return await call.outcome()

    async def _run(self, call: _Call) -> None:
        call.error = exceptions.ConnectionError("the client was closed")
        try:
            with anyio.move_on_after(_LONGEST_CALL):
                if self.is_connected:
                    await self._finish(call)
                else:
                    # One after the other, or each of them would make a connection.
                    async with self._connecting:
                        if not call.is_abandoned:
                            await self._finish(call)
        finally:
            self._calls.discard(call)
            call.has_ended.set()

    async def _finish(self, call: _Call) -> None:
        try:
            call.result = await call.work(self.client)
            call.error = None
            self.is_connected = True
        except Exception as exc:
            call.error = exc
            self.is_connected = isinstance(exc, exceptions.ResponseError)
