"""The run of a request or WebSocket under a middleware or route class, which see all of its messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..hosts.fastapi import tells_that_it_was_swallowed
from ..hosts.starlette import let_streams_listen, streams_listen
from ..kernel.errors import CancelationError
from ..kernel.loops.current import current_loop
from ..kernel.reasons import CancelationReason
from ..kernel.unwrap import raise_as_it_is
from .admission import admit
from .blocks import DoorBlock
from .first_door import WholeDoorBlock
from .lifetime import Lifetime
from .response import ResponseWatch
from .state import SCOPE_KEY, RequestState
from .websocket import SocketDoorBlock, SocketState

if TYPE_CHECKING:
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ..kernel.loops.base import EventLoop
    from ..kernel.token import Cause
    from .limits import Limits


async def run_through(
    block: DoorBlock, loop: EventLoop | None, app: ASGIApp, scope: Scope, receive: Receive, send: Send
) -> BaseException | None:
    """Enter ``block``, run ``app`` in it, and leave it; return the exception that leaves the block.

    :param loop: the running event loop; ``None`` if the block is open already.

    The decorator does the same in its own frame: each coroutine around a handler costs something at every ``await``.
    """
    outcome: BaseException | None = None
    try:
        if loop is not None:
            block.enter(loop)
        await app(scope, receive, send)
    except BaseException as exc:
        outcome = exc
    try:
        return await _leave(block, outcome)
    finally:
        del outcome  # Its traceback refers to this frame: a reference cycle otherwise.


async def _leave(block: DoorBlock, outcome: BaseException | None) -> BaseException | None:
    """Leave ``block``, or its successor, and return the exception that leaves it."""
    still_open = block if not block.is_left else block.successor
    if still_open is not None:
        outcome = still_open.leave(outcome)
        if still_open.is_unsettled:
            await still_open.settle()
    try:
        return outcome
    finally:
        del outcome  # Its traceback refers to this frame: a reference cycle otherwise.


def first_door(scope: Scope, receive: Receive, send: Send, limits: Limits) -> WholeDoorBlock | None:
    """Return the block of the first door of a request; ``None`` if it is to be run by `run_in_another_door`.

    That is if the request has come by another door before, or if its client may give a time for it.

    The middleware and the route class run the application in it in their own frames, as `run_through` does: each
    coroutine around an application costs every request something, and `end_first_door` most requests do not need.
    """
    if SCOPE_KEY in scope or limits.client_timeout is not None:
        return None
    if not streams_listen(scope):
        let_streams_listen(scope)
    return WholeDoorBlock(scope, receive, send, current_loop(), limits)


async def run_request(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, limits: Limits, cause: Cause | None
) -> HTTPException | None:
    """Run ``app`` in its own coroutine, and return the error of ours that the request is still to be answered with.

    :param cause: the cause of a cancellation that has come before the request.
    """
    if limits.client_timeout is not None:
        refusal, app, send, limits = admit(app, scope, send, limits)
        if refusal is not None:
            return refusal
    block = first_door(scope, receive, send, limits)
    if block is None:
        if cause is not None:
            scope[SCOPE_KEY].state.stop(cause)
        return await run_in_another_door(app, scope, receive, send, limits)
    if cause is not None:
        block.token.cancel_because(cause)
    outcome: BaseException | None = None
    try:
        block.enter()
        await app(scope, block.receive, block.send)
    except BaseException as exc:
        outcome = exc
    if outcome is None and block.has_ended_undisturbed():
        return None
    try:
        return await end_first_door(block, outcome)
    finally:
        del outcome, block  # Its traceback refers to this frame: a reference cycle otherwise.


async def end_first_door(block: WholeDoorBlock, outcome: BaseException | None) -> CancelationError | None:
    """Leave the block, end the request, and return the error of ours that it is still to be answered with, if any.

    An error of the application is raised. If an error of ours comes after the response has started, the response is
    aborted.
    """
    outcome = await _leave(block, outcome)
    if block.policy is not None:
        block.policy.judge(block.asgi_scope, block.elapsed)
    try:
        left = block.end_request()
        if left is not None:
            await left.join()
        if outcome is None and block.is_undisturbed:
            return None
        try:
            return await _settle(outcome, block.response, block.state)
        finally:
            del outcome  # Its traceback refers to this frame: a reference cycle otherwise.
    finally:
        block.forget()


async def run_in_another_door(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, limits: Limits
) -> HTTPException | None:
    """Run ``app`` in a block of its own inside of another door; return and raise as `end_first_door`."""
    if limits.client_timeout is not None:
        # Perhaps the first one: the limits of this request have to be found out first.
        return await run_request(app, scope, receive, send, limits, None)
    state: RequestState = scope[SCOPE_KEY].state
    block = _make_block(state, limits)
    watch = ResponseWatch(send, state, is_outermost=False)
    outcome = await run_through(block, state.loop, app, scope, receive, watch.send)
    if block.policy is not None:
        block.policy.judge(scope, block.elapsed)
    if outcome is None and state.cause is None and state.aborted_by is None:
        return None
    try:
        return await _settle(outcome, watch, state)
    finally:
        del outcome  # Its traceback refers to this frame: a reference cycle otherwise.


def _make_block(state: RequestState, limits: Limits) -> DoorBlock:
    block = DoorBlock(state, timeout=limits.timeout, cleanup_grace=limits.cleanup_grace)
    block.takes_groups_apart = False
    if state.default is None:
        state.default = block
    elif limits.replaces_default:
        state.set_default(block)
    if limits.budget is not None:
        block.budget = limits.budget
    if limits.policies:
        state.add_policies(limits.policies)
    if limits.policy is not None:
        block.policy = limits.policy
    return block


async def _settle(outcome: BaseException | None, watch: ResponseWatch, state: RequestState) -> CancelationError | None:
    """Abort the response, return the error to answer the request with, or raise an error of the application."""
    outcome = lost_stream(outcome, watch, state)
    error = error_of(outcome, state)
    try:
        if error is None:
            if outcome is not None:
                raise_as_it_is(outcome)
            return None
        if not watch.started:
            return error
        if state.cannot_be_aborted:
            raise_as_it_is(error)
        was_aborted = state.is_aborted and state.aborted_by is None
        if not (watch.is_complete or was_aborted or error.reason is CancelationReason.DISCONNECT):
            await watch.abort(error)
        return None
    finally:
        del outcome, error  # Their tracebacks refer to this frame: reference cycles otherwise.


def lost_stream(outcome: BaseException | None, watch: ResponseWatch, state: RequestState) -> BaseException | None:
    """Return ``outcome``, or an error if something that the sending task awaited was cancelled by other code.

    Such a ``CancelledError`` is an error as any other, but the task group around the task swallows it.
    """
    if outcome is None and not watch.is_complete and state.stream_was_cancelled:
        return RuntimeError("the task that sent the response was cancelled before its end")
    return outcome


def error_of(outcome: BaseException | None, state: RequestState) -> CancelationError | None:
    """Return our error, if that has ended the application."""
    if isinstance(outcome, CancelationError):
        return outcome
    if outcome is None and state.aborted_by is not None:
        return state.aborted_by
    cause = state.cause
    if cause is None or state.is_finished:
        return None
    if outcome is None:
        # The work has ended by itself, as a stream does after a disconnect, or has swallowed our cancellation.
        return cause.error()
    if tells_that_it_was_swallowed(outcome):
        state.log(cause.reason, cause, cause.struck_at)
        return cause.error()
    return None


async def run_socket(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, limits: Limits, cause: Cause | None = None
) -> None:
    """Run ``app`` for one WebSocket, stop it when the client drops, and close the WebSocket if ``app`` has not.

    :param cause: the cause of a cancellation that has come before the WebSocket.
    """
    state: Any = scope.get(SCOPE_KEY)
    made = state is None
    if state is None:
        state = SocketState(scope, receive, lifetime=Lifetime.DOOR)
        state.cleanup_grace = limits.cleanup_grace
        receive = state.reader.receive
    if cause is not None:
        state.stop(cause)
    if limits.policies:
        state.add_policies(limits.policies)

    async def send_through(message: Message) -> None:
        await state.send(send, message)

    block = SocketDoorBlock(state, cleanup_grace=state.cleanup_grace)
    try:
        outcome = await run_through(block, state.loop, app, scope, receive, send_through)
        if outcome is None and state.cause is not None:
            # A middleware further in has swallowed our cancellation, and sent nothing.
            outcome = state.cause.error()
        try:
            if isinstance(outcome, CancelationError):
                await state.answer(outcome, send)
            elif outcome is not None:
                raise_as_it_is(outcome)
        finally:
            del outcome  # Its traceback refers to this frame: a reference cycle otherwise.
    finally:
        if made:
            await state.aclose()
