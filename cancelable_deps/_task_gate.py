"""A grace for the cleanup of a task that is not ours, and is cancelled by its own task group.

Starlette and others send a stream from a child task, and cancel that when they hear that the client has left. anyio
repeats a cancellation at every ``await``, also in the cleanup of the stream's generator.
"""

from __future__ import annotations

from contextvars import Context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._backend import EventLoop
    from ._polite import IsOurs


def guard_running_task(loop: EventLoop, grace: float, is_ours: IsOurs, ended: Callable[[bool], object]) -> None:
    """Put a gate around all that is left of the calling task, and call ``ended(was_cancelled)`` when it has ended."""
    if loop.is_trio:
        return
    from asyncio import current_task

    task: Any = current_task()
    gate = _AsyncioTaskGate(loop, grace, is_ours)
    gate.put_around(task)

    def task_ended(_: object) -> None:
        gate.take_away()
        ended(task.cancelled())

    task.add_done_callback(task_ended, context=Context())


def _asyncio_task_gate() -> Any:
    from ._polite_asyncio import AsyncioGate, _states

    class AsyncioTaskGate(AsyncioGate):
        __slots__ = ()

        def put_around(self, task: Any) -> None:
            """Enter belatedly: around every scope that the task has entered itself, inside of those it was started in."""
            state = _states.get(task)
            if state is None:
                # No task of anyio's: it is cancelled once.
                return
            inner, outer = None, state.cancel_scope
            while outer is not None and outer._host_task is task:
                inner, outer = outer, outer._parent_scope
            self._host_task = task
            self._cancelling_at_enter = task.cancelling()
            self._active = True
            self._parent_scope = outer
            if outer is not None:
                outer._child_scopes.add(self)
            if inner is None:
                state.cancel_scope = self
                self._tasks.add(task)
                if outer is not None:
                    outer._tasks.discard(task)
            else:
                inner._parent_scope = self
                self._child_scopes.add(inner)
                if outer is not None:
                    outer._child_scopes.discard(inner)

        def take_away(self) -> None:
            """Leave no trace; the task has ended."""
            self._active = False
            for handle in (self._timeout_handle, self._cancel_handle):
                if handle is not None:
                    handle.cancel()
            if self._parent_scope is not None:
                self._parent_scope._child_scopes.discard(self)
            self._host_task = self._parent_scope = None

    return AsyncioTaskGate


_AsyncioTaskGate: Any = _asyncio_task_gate()
