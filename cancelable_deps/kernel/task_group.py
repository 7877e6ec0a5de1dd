"""An anyio task group that is open as long as a block, and whose child tasks are cancelled politely."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel

from .block import Block
from .cancelable import Cancelable, block_of, cancelable_of
from .foreign import ThisTask, as_failure, is_anothers
from .loops.current import current_loop
from .loops.public_scopes import stop_telling
from .unwrap import raise_as_it_is

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context
    from types import TracebackType

    from anyio import CancelScope, TaskHandle

    from .loops.base import MemberScope

T = TypeVar("T")


class CancelableTaskGroup(anyio.abc.TaskGroup):
    """A task group inside ``block``. Entering it enters the block; leaving it waits for all child tasks.

    A child task that fails cancels the others, as in any anyio task group. Its exception is raised itself, and not in
    an exception group, if it is the only one or an ``HTTPException``. When the block is cancelled, so are all child
    tasks, and leaving the group raises the `CancelationError` of the reason.

    Each child task has ``cleanup_grace`` seconds of its own for its cleanup, whether the block, the group, the failure
    of another child or an enclosing group has cancelled it. Child tasks of a plain anyio task group inside this one
    have no such time, unless they open a block of their own: anyio repeats their cancellation at every ``await``.
    """

    _is_open = False
    _outer_cancellation: BaseException | None = None
    """A cancellation from further out that the body or a child has received, and that the group must pass on."""

    def __init__(self, block: Cancelable | Block) -> None:
        self._block = block if isinstance(block, Block) else block_of(block)

    @property
    def cancel_scope(self) -> CancelScope:  # type: ignore[override]
        """The cancel scope of the group. Cancelling it cancels the child tasks and the body, and not the block."""
        return self._scope

    @property
    def cancelable(self) -> Cancelable:
        """The `Cancelable` of the block, for its ``reason``, ``remaining()`` and ``shield()``."""
        return cancelable_of(self._block)

    async def __aenter__(self) -> Self:
        self._group = anyio.create_task_group()
        self._loop = current_loop()
        self._block.enter(self._loop)
        try:
            await self._group.__aenter__()
        except BaseException as exc:
            self._block.leave(exc)
            raise
        self._body_scope = self._new_member_scope()
        self._body_scope.begin()
        self._is_open = True
        self._block.has_task_group = True
        self._block.member_scopes = self._member_scopes = {self._block.task: self._body_scope}
        self._scope = self._loop.scopes.told_scope(self._loop, self._group.cancel_scope, self._member_scopes)
        self._block.group_scope = getattr(self._scope, "late", self._scope)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        # The body has a member scope too: a child that has ended makes the group cancel the body, and so its cleanup,
        # once more.
        scope = self._body_scope
        raised = exc = scope.end(exc) or exc
        is_told = scope.is_delivered
        self._note_outer_cancellation(scope, exc)
        del self._body_scope, self._member_scopes[self._block.task]  # It refers to this group: a cycle.
        # The group cancels itself when its body fails, and swallows every cancellation that has anyio's message then.
        is_failure = exc is not None and is_anothers(exc, self._loop)
        if exc is not None:
            # The group is about to cancel its child tasks.
            for other in self._member_scopes.values():
                other.fire()
        try:
            if await self._group.__aexit__(exc_type, exc, traceback) and not is_failure:
                raised = None
        except BaseException as group_exc:
            raised = group_exc
        if raised is None and self._outer_cancellation is not None:
            # The group has swallowed it, as if only its own scope had been cancelled.
            raised = self._outer_cancellation
            scope.pass_on()
        self._outer_cancellation = None
        self._is_open = False
        stop_telling(self._scope)
        self._block.group_scope = self._block.member_scopes = None
        outcome = self._block.leave(raised)
        if is_told and outcome is not None:
            self._loop.scopes.tell(self._loop, outcome)
        if self._block.is_unsettled:
            await self._block.settle()
        try:
            if outcome is not None and outcome is not exc:
                raise_as_it_is(outcome)
            return outcome is None
        finally:
            del outcome, raised, exc  # Their tracebacks refer to this frame: cycles while the frame refers to them.

    def create_task(
        self, coro: Coroutine[Any, Any, T], *, name: object = None, context: Context | None = None
    ) -> TaskHandle[T]:
        """Start ``coro`` as a child task, and return its handle.

        :raises RuntimeError: if the group is not open; ``coro`` is closed then.
        :raises TypeError: if ``coro`` is not a coroutine.
        """
        if not isinstance(coro, Coroutine):
            raise TypeError(f"a task is created from a coroutine, not from {coro!r}")
        if not self._is_open:
            coro.close()
            raise RuntimeError("this task group is not open: start tasks inside its `async with` block")
        name = name or getattr(coro, "__qualname__", None)
        return self._group.create_task(self._run(coro), name=name, context=context)

    async def start(
        self,
        func: Callable[..., Coroutine[Any, Any, T]],
        *args: object,
        name: object = None,
        return_handle: Any = False,
    ) -> Any:
        """Start ``func(*args, task_status=...)`` as a child task, and wait until it calls ``task_status.started()``.

        :return: the value that was given to ``started()``; with ``return_handle``, the handle of the task instead.
        :raises RuntimeError: if the group is not open, or the task ends without calling ``started()``.
        """
        if not self._is_open:
            raise RuntimeError("this task group is not open: start tasks inside its `async with` block")

        async def run(*, task_status: Any) -> T:
            return await self._run(func(*args, task_status=task_status))

        name = name or getattr(func, "__qualname__", repr(func))
        try:
            return await self._group.start(run, name=name, return_handle=return_handle)
        except RuntimeError:
            # trio raises this for a child that is cancelled before it has started. If this task is cancelled as well,
            # the cancellation takes precedence.
            await anyio.lowlevel.checkpoint()
            raise

    async def _run(self, coro: Coroutine[Any, Any, T]) -> T:
        task = self._loop.current_task()
        scope = self._member_scopes[task] = self._new_member_scope()
        scope.begin()
        this_task = ThisTask()
        try:
            result: T = await scope.watch(coro)
        except BaseException as exc:
            # The group may be about to cancel its body and the other child tasks.
            for other in self._member_scopes.values():
                other.expect(self._is_cancelled)
            self._note_outer_cancellation(scope, exc)
            if this_task.is_anothers(exc) and not self._is_ours(None):
                # The group would regard the child as cancelled, and not as failed.
                exc = as_failure(exc, f"the task {getattr(coro, '__qualname__', coro)}")
            # The scope swallows the cancellation that ends a grace, but to the group the child was cancelled.
            raise scope.end(exc) or exc  # noqa: B904
        finally:
            del self._member_scopes[task]
        scope.end(None)
        if scope.is_lost:
            await anyio.lowlevel.checkpoint()
        return result

    def _note_outer_cancellation(self, scope: MemberScope, exc: BaseException | None) -> None:
        if scope.is_passed_by and isinstance(exc, anyio.get_cancelled_exc_class()):
            self._outer_cancellation = exc

    def _new_member_scope(self) -> MemberScope:
        return self._loop.scopes.member_scope(self._loop, self._block.cleanup_grace, self._is_ours)

    def _is_ours(self, origin: object) -> bool:
        return self._block.cause is not None or self._is_cancelled()

    def _is_cancelled(self) -> bool:
        return self._group.cancel_scope.cancel_called
