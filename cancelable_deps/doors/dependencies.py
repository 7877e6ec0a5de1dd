"""Handles: what a route receives by ``Annotated`` dependency, and the same for use without ``Depends``."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from functools import partial
from typing import Annotated, final

import anyio
from anyio.abc import TaskGroup
from fastapi import Depends
from starlette.requests import HTTPConnection, Request

from ..kernel.cancelable import Cancelable, cancelable_of
from ..kernel.options import not_a_dependency, seconds
from ..kernel.reasons import CancelationReason
from ..kernel.task_group import CancelableTaskGroup
from ..request.connection import connection_state, new_block
from ..request.policies import POLICY_ATTRIBUTE, TimeoutPolicy, found
from ..request.state import Listening, RequestState


@final
class RequestCancellationEvent:
    """Whether, and why, the request should stop, for a handler that chooses its own stopping point.

    It is set by the client's leaving and by whatever stops the whole request (the timeout of the decorator, route class
    or middleware), never by a response that simply ended. Nothing is cancelled through it.
    """

    def __init__(self, state: RequestState) -> None:
        self._state = state

    def is_set(self) -> bool:
        """Ask as often as you like: it reads one attribute. The event loop must have had a turn to notice anything."""
        return self._state.cause is not None

    async def wait(self) -> CancelationReason:
        """Wait until it is set, and return the reason. When the handler returns, listening ends."""
        return await self._state.token.wait()

    @property
    def reason(self) -> CancelationReason | None:
        """Why; ``None`` while it is not set."""
        cause = self._state.cause
        return None if cause is None else cause.reason

    @property
    def message(self) -> str | None:
        """What was given to ``cancel()``, or says which limit was passed."""
        cause = self._state.cause
        return None if cause is None else cause.message


async def cancelable_dependency(request: HTTPConnection) -> Cancelable:
    """A `Cancelable` that the client's leaving stops. Enter it: ``async with cancel:``; leaving a stopped block raises.

    Each use in a signature gets its own through `RequestCancelable`; all stop with the same request.
    """
    state = connection_state(request, with_handler=True)
    return cancelable_of(new_block(state))


@not_a_dependency(
    "Depends(cancelable_with_timeout) would let the client choose the timeout. Call it, with the seconds: "
    "Annotated[Cancelable, Depends(cancelable_with_timeout(30))]."
)
def cancelable_with_timeout(
    timeout: float | timedelta, *, cleanup_grace: float | None = None
) -> Callable[[HTTPConnection], Awaitable[Cancelable]]:
    """A dependency for ``Annotated[Cancelable, Depends(cancelable_with_timeout(30))]``: as `cancelable_dependency`,
    stopped ``timeout`` seconds after it is entered as well. It replaces the default timeout of the middleware.

    :raises ValueError: for a timeout that is negative or NaN, :exc:`TypeError` for one that is no number.
    """
    limit = seconds(timeout, "timeout")
    grace = None if cleanup_grace is None else seconds(cleanup_grace, "cleanup_grace")

    async def cancelable_with_timeout_dependency(request: HTTPConnection) -> Cancelable:
        state = connection_state(request, with_handler=True)
        state.lift_default()
        return cancelable_of(new_block(state, timeout=limit, cleanup_grace=grace))

    return cancelable_with_timeout_dependency


@not_a_dependency(
    "Depends(timeout_policy) would let the client choose the policy. Call it, with a name or a TimeoutPolicy: "
    'Depends(timeout_policy("report")).'
)
def timeout_policy(policy: str | TimeoutPolicy) -> Callable[[HTTPConnection], Awaitable[None]]:
    """A dependency that chooses a policy: ``dependencies=[Depends(timeout_policy("report"))]`` of a route or router.

    It replaces the default of the middleware or route class, and counts from the request's arrival there. A WebSocket
    has no default, and is left alone; give it a policy by `with_cancelation`.
    """
    if not isinstance(policy, str | TimeoutPolicy):
        raise TypeError(f"timeout_policy takes the name of a policy or a TimeoutPolicy, not {policy!r}")

    async def chosen_timeout_policy(request: HTTPConnection) -> None:
        if not isinstance(request, Request):
            return
        state = connection_state(request, with_handler=True)
        state.replace_default(found(policy, state.policies))

    setattr(chosen_timeout_policy, POLICY_ATTRIBUTE, policy)
    return chosen_timeout_policy


async def no_timeout(request: HTTPConnection) -> None:
    """A dependency that switches the default timeout off: ``dependencies=[Depends(no_timeout)]``."""
    connection_state(request, with_handler=True).lift_default()


async def request_task_group(request: HTTPConnection) -> Callable[[], AbstractAsyncContextManager[TaskGroup]]:
    """A function that makes a task group of this request: ``async with get_task_group() as tg:``."""
    return partial(_task_group, connection_state(request, with_handler=True))


async def cancellation(request: HTTPConnection) -> RequestCancellationEvent:
    """An event that is set when the request should stop. Listening starts now and ends when the handler returns.

    It stops nothing itself; a decorator, route class or middleware around the handler does all the same.
    """
    state = connection_state(request, with_handler=True)
    event = RequestCancellationEvent(state)
    state.watch(Listening())
    return event


RequestCancelable = Annotated[Cancelable, Depends(cancelable_dependency, use_cache=False)]
"""``async with cancel:`` in the handler: a block that the client's leaving stops."""

RequestTaskGroup = Annotated[
    Callable[[], AbstractAsyncContextManager[TaskGroup]], Depends(request_task_group, use_cache=False)
]
"""``async with get_task_group() as tg:`` in the handler: an anyio task group that is cancelled with the request."""

CancellationEvent = Annotated[RequestCancellationEvent, Depends(cancellation)]
"""``event.is_set()`` and ``await event.wait()`` in the handler, which stops where it likes."""


def create_request_task_group(request: HTTPConnection) -> AbstractAsyncContextManager[TaskGroup]:
    """A task group whose tasks are cancelled when the client leaves; for use without ``Depends``, Starlette included.

    Listening ends with the group. The children are cancelled politely, each with its own grace for its cleanup. A
    child's ``HTTPException`` arrives as itself; leaving a group that we cancelled raises the `CancelationError`.
    """
    return _task_group(connection_state(request, with_handler=True))


async def wait_for_disconnect(request: HTTPConnection) -> None:
    """Return when the client has left; for use without ``Depends``, Starlette included.

    Listening starts at once, and ends when this returns or is cancelled. What is read meanwhile is replayed to
    ``request.body()``. Call it while the handler runs: a server also reports a client as gone when it has its response.

    :raises RuntimeError: after the handler has returned.
    """
    state = connection_state(request, with_handler=True)
    if state.is_closed:
        raise RuntimeError(
            "wait_for_disconnect() was called after the handler had returned: by now the server reports every client "
            "as gone. Call it inside the handler."
        )
    waiting = Listening()
    state.watch(waiting)
    state.arm_now()
    try:
        await state.wait_disconnected()
    finally:
        state.unwatch(waiting)
        with anyio.CancelScope(shield=True):
            await state.settle()


def _task_group(state: RequestState) -> AbstractAsyncContextManager[TaskGroup]:
    return CancelableTaskGroup(new_block(state))
