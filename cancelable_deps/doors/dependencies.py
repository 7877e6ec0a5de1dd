"""Handles: the objects that a route receives by ``Annotated`` dependencies, and functions for use without ``Depends``."""

import math
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from functools import partial
from typing import Annotated

import anyio
from anyio.abc import TaskGroup
from fastapi import Depends
from starlette.requests import HTTPConnection, Request

from ..kernel.cancelable import Cancelable, cancelable_of
from ..kernel.options import not_a_dependency, seconds
from ..kernel.task_group import CancelableTaskGroup
from ..request.connection import connection_state, new_block
from ..request.policies import POLICY_ATTRIBUTE, TimeoutPolicy, found
from ..request.state import RequestState
from ..request.watchers import WAITERS, Listening
from .event import RequestCancellationEvent
from .marks import TIMEOUT


async def cancelable_dependency(request: HTTPConnection) -> Cancelable:
    """Provide a `Cancelable` that is cancelled when the client leaves. Enter it: ``async with cancel:``.

    Leaving a cancelled block raises the `CancelationError`. By way of `RequestCancelable` each use in a signature gets a
    `Cancelable` of its own; all are cancelled with the same request.
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
    """Return a dependency like `cancelable_dependency` whose block has a timeout.

    Use it as ``Annotated[Cancelable, Depends(cancelable_with_timeout(30))]``. The timeout counts from entering the block,
    and replaces the default timeout of the middleware or route class.

    :param timeout: the limit in seconds, or a ``timedelta``.
    :param cleanup_grace: the seconds that cleanup may await undisturbed; the default is that of `configure`.
    :raises TypeError: if ``timeout`` or ``cleanup_grace`` is not a number.
    :raises ValueError: if one of them is negative or NaN.
    """
    limit = seconds(timeout, "timeout")
    grace = None if cleanup_grace is None else seconds(cleanup_grace, "cleanup_grace")

    async def cancelable_with_timeout_dependency(request: HTTPConnection) -> Cancelable:
        state = connection_state(request, with_handler=True)
        state.lift_default()
        return cancelable_of(new_block(state, timeout=limit, cleanup_grace=grace))

    setattr(cancelable_with_timeout_dependency, TIMEOUT, limit)
    return cancelable_with_timeout_dependency


@not_a_dependency(
    "Depends(timeout_policy) would let the client choose the policy. Call it, with a name or a TimeoutPolicy: "
    'Depends(timeout_policy("report")).'
)
def timeout_policy(policy: str | TimeoutPolicy) -> Callable[[HTTPConnection], Awaitable[None]]:
    """Return a dependency that chooses a policy: ``dependencies=[Depends(timeout_policy("report"))]`` of a route or router.

    The policy replaces the default timeout of the middleware or route class, and counts from the request's arrival there.
    A WebSocket has no default, so this dependency does nothing for it; use ``with_cancelation(policy=...)`` there.

    :param policy: a `TimeoutPolicy`, or the name of a policy of the middleware.
        An application with the middleware fails to start if a name is unknown.
    :raises TypeError: if ``policy`` is neither.
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
    """Switch the default timeout of the middleware or route class off: ``dependencies=[Depends(no_timeout)]``."""
    connection_state(request, with_handler=True).lift_default()


async def request_task_group(request: HTTPConnection) -> Callable[[], AbstractAsyncContextManager[TaskGroup]]:
    """Provide a function that makes a task group of this request: ``async with get_task_group() as tg:``.

    `create_request_task_group` says how such a group is cancelled.
    """
    return partial(_task_group, connection_state(request, with_handler=True))


async def cancellation(request: HTTPConnection) -> RequestCancellationEvent:
    """Provide an event that is set when the request should stop; listening ends when the handler returns.

    The event cancels nothing itself. A decorator, route class or middleware around the handler still does.
    """
    return _listening_event(connection_state(request, with_handler=True), 0)


@not_a_dependency(
    "Depends(cancellation_event) would let the client choose the time. Call it, with the seconds: "
    "Annotated[RequestCancellationEvent, Depends(cancellation_event(soft=5))]."
)
def cancellation_event(*, soft: float | timedelta) -> Callable[[HTTPConnection], Awaitable[RequestCancellationEvent]]:
    """Return a dependency like `cancellation` whose event is set ``soft`` seconds before the request times out, too.

    For work that hands back what it has: ``Annotated[RequestCancellationEvent, Depends(cancellation_event(soft=5))]``
    under a timeout of 30 seconds is set after 25. The work stops at a safe point and returns; if it does not, the
    request is stopped when the timeout is over. The reason is ``TIMEOUT`` both times.

    In ``with event.guard():`` the client's leaving is announced in the same way: the event is set at once, and the request
    is stopped ``soft`` seconds later.

    The timeout is the least of all that count around the handler: that of the decorator, route class, middleware or policy,
    and the time that the client gives. Without a timeout this is `cancellation`.

    :param soft: seconds. An event whose timeout is shorter than that is set from the start.
    :raises TypeError: if ``soft`` is not a number.
    :raises ValueError: if it is negative, NaN or infinite.
    """
    left = seconds(soft, "soft")
    if left == math.inf:
        raise ValueError("soft must be a finite number of seconds")

    async def cancellation_with_time(request: HTTPConnection) -> RequestCancellationEvent:
        return _listening_event(connection_state(request, with_handler=True), left)

    return cancellation_with_time


def _listening_event(state: RequestState, soft: float) -> RequestCancellationEvent:
    event = RequestCancellationEvent(state, soft)
    state.watch(Listening())
    return event


RequestCancelable = Annotated[Cancelable, Depends(cancelable_dependency, use_cache=False)]
"""A parameter's type that gives a handler a `Cancelable`: ``async with cancel:`` stops when the client leaves."""

RequestTaskGroup = Annotated[
    Callable[[], AbstractAsyncContextManager[TaskGroup]], Depends(request_task_group, use_cache=False)
]
"""A parameter's type that gives a handler a function for task groups: ``async with get_task_group() as tg:``.

The anyio task group is cancelled with the request.
"""

CancellationEvent = Annotated[RequestCancellationEvent, Depends(cancellation)]
"""A parameter's type that gives a handler an event, to stop where it likes: ``event.is_set()``, ``await event.wait()``."""


def create_request_task_group(request: HTTPConnection) -> AbstractAsyncContextManager[TaskGroup]:
    """Return a task group whose tasks are cancelled when the client leaves; for use without ``Depends``, as in Starlette.

    Listening ends with the group. Each child has its own grace in which its cleanup may await undisturbed. A child's
    ``HTTPException`` is raised as itself, and not in an ``ExceptionGroup``. Leaving a group that was cancelled with the
    request raises the `CancelationError`.
    """
    return _task_group(connection_state(request, with_handler=True))


async def wait_for_disconnect(request: HTTPConnection) -> None:
    """Wait until the client has left; for use without ``Depends``, as in Starlette.

    Listening starts at once, and ends when this returns or is cancelled. A body that is read meanwhile is replayed to
    ``request.body()``. Call this while the handler runs, because servers also report a disconnect after a response.

    :raises RuntimeError: if the handler has returned.
    """
    state = connection_state(request, with_handler=True)
    if state.is_closed:
        raise RuntimeError(
            "wait_for_disconnect() was called after the handler had returned: servers then report a disconnect for every "
            "client. Call it inside the handler."
        )
    # All who wait share what is needed for it: a handler may fan out to thousands.
    event = state.join_waiters()
    try:
        state.watch_for_waiters()
        await event.wait()
    finally:
        if state.leave_waiters(event):
            state.unwatch(WAITERS)
        if state.has_stopped_listening:
            with anyio.CancelScope(shield=True):
                await state.settle()


def _task_group(state: RequestState) -> AbstractAsyncContextManager[TaskGroup]:
    return CancelableTaskGroup(new_block(state))
