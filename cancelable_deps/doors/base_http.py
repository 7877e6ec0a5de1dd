"""The inner doors of the middleware: a cancelled request is answered there, so that other middleware sees the answer.

A metrics, tracing or header middleware may stand inside of ours. It would see a cancellation pass by, and no response.
So a cancelled request is answered as far in as the cancellation strikes: at the application's router, if a middleware
stands before it that could see the answer, and at the inner side of a ``BaseHTTPMiddleware``, which runs the rest of
the application in a task of its own.
"""

from __future__ import annotations

from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute

from ..hosts.fastapi import included_routes
from ..kernel.block import current
from ..kernel.foreign import told
from ..kernel.settings import settings
from ..kernel.unwrap import raise_as_it_is
from ..request.blocks import DoorBlock
from ..request.connection import known_state
from ..request.response import ResponseWatch, answer
from ..request.run import error_of, lost_stream, run_through
from .wsgi import Bridge, is_wsgi_bridge

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Receive, Scope, Send

    from ..request.state import RequestState


# Every application has these around its router. They do not look at responses, and need no answer inside of them.
_SEE_NO_ANSWER = {ServerErrorMiddleware, ExceptionMiddleware, AsyncExitStackMiddleware}
# Neither do these, around routes with a `max_body_size`. By name, because older versions have none.
_LIMIT_BODIES = {"RequestBodyLimitMiddleware", "_BodyLimitExceptionMiddleware"}


under_ours: Final[WeakSet[Starlette]] = WeakSet()
"""The applications that a middleware of ours stands around: outside of all of their own, which they cannot know."""


def put_inner_doors(app: Any, routers: set[int] | None = None) -> Any:
    """Put an `InnerDoor` at each such place of the stack of ``app``, and of the applications that its routes lead to.

    Return what has to be called in place of ``app``: another application around it, if it bridges to WSGI.

    :param routers: the ids of those that have been looked through: a router may be mounted in itself.
    """
    if is_wsgi_bridge(app):
        return Bridge(app)
    routers = set() if routers is None else routers
    outer, innermost = _put_into_chain(app)
    if isinstance(innermost, Starlette):
        _put_into_application(innermost, routers)
    elif isinstance(innermost, Router):
        if outer is not None:
            _put_inside(outer)
        if id(innermost) not in routers:
            routers.add(id(innermost))
            _put_into_its_end(innermost.middleware_stack)
            _look_through(innermost.routes, routers)
    return app


def _put_into_chain(app: Any) -> tuple[Any, Any]:
    """Put inner doors between ``app`` and the end of the chain of middleware that it begins.

    Return the last middleware, or ``None`` if no middleware of the chain could see an answer, and what it leads to.
    """
    seen: set[int] = set()
    outer: Any = None
    is_observed = False
    # A router is excluded because its `app` is a method.
    while hasattr(app, "app") and not isinstance(app, Router | Bridge) and id(app) not in seen:
        seen.add(id(app))
        if isinstance(app, BaseHTTPMiddleware):
            _put_inside(app)
        is_observed = is_observed or _may_see_an_answer(app)
        if is_wsgi_bridge(app.app):
            app.app = Bridge(app.app)
        outer, app = app, app.app
    return outer if is_observed else None, app


def _may_see_an_answer(app: Any) -> bool:
    return type(app) not in _SEE_NO_ANSWER and type(app).__name__ not in _LIMIT_BODIES


def _put_into_its_end(app: Any) -> None:
    """Put inner doors into a chain of middleware that leads to an endpoint, or to the routes of a router."""
    outer, _ = _put_into_chain(app)
    if outer is not None:
        _put_inside(outer)


def _put_inside(outer: Any) -> None:
    if not isinstance(outer, InnerDoor) and not isinstance(outer.app, InnerDoor | Bridge):
        outer.app = InnerDoor(outer.app)


def _put_into_application(app: Starlette, routers: set[int]) -> None:
    """Put inner doors into an application, whose stack may be built only when it is first called."""
    under_ours.add(app)
    if app.middleware_stack is not None:
        put_inner_doors(app.middleware_stack, routers)
        return
    build = app.build_middleware_stack

    def build_with_inner_doors() -> ASGIApp:
        stack = build()
        put_inner_doors(stack)
        return stack

    app.build_middleware_stack = build_with_inner_doors  # type: ignore[method-assign]


def _look_through(routes: Iterable[Any], routers: set[int]) -> None:
    for route in routes:
        if isinstance(route, Mount | Host):
            route.app = put_inner_doors(route.app, routers)
        elif isinstance(route, Route | WebSocketRoute):
            _put_into_its_end(route.app)
        else:
            _look_through(included_routes(route), routers)


class InnerDoor:
    """An ASGI application that runs ``app``, and answers the request if it is stopped inside."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and settings.hooks:
            await self._run_for_socket(scope, receive, send)
            return
        state = known_state(scope) if scope["type"] == "http" else None
        if state is None or state.is_closed:
            await self.app(scope, receive, send)
            return
        if settings.hooks:
            # A middleware further out may have set some for the request, such as the span that traces it.
            state.inner_contexts += (copy_context(),)
        block = current.get()
        if not isinstance(block, DoorBlock) or not block.move_in(state):
            await self._run_in_task(state, scope, receive, send)
            return
        # The block of the middleware has no scope yet, and is moved to this place.
        watch = ResponseWatch(send, state, is_outermost=False)
        outcome = await run_through(block, None, self.app, scope, receive, watch.send)
        try:
            if outcome is not None or state.cause is not None or state.stream_was_cancelled:
                await _settle(outcome, watch, state, scope, receive, send)
        finally:
            del outcome  # Its traceback refers to this frame: a reference cycle otherwise.
            if state.inner_contexts:
                state.inner_contexts = ()  # They refer to our block, and that to the state.
            block.move_out(state)

    async def _run_for_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for a WebSocket, which the middleware stops and closes, and note the context for hooks."""
        state = known_state(scope)
        if state is not None:
            state.inner_contexts += (copy_context(),)
        try:
            await self.app(scope, receive, send)
        finally:
            if state is not None:
                state.inner_contexts = ()

    async def _run_in_task(self, state: RequestState, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application in a block of its own, in a task that may be another one than that of the middleware."""
        task = state.loop.current_task()
        state.main_tasks += (task,)
        block = DoorBlock(state, cleanup_grace=state.cleanup_grace)
        block.takes_groups_apart = False
        watch = ResponseWatch(send, state, is_outermost=False)
        outcome = None
        try:
            outcome = await run_through(block, state.loop, self.app, scope, receive, watch.send)
            if outcome is not None and state.cause is None:
                # A task group around this task would take a bare ``CancelledError`` for the end of a cancelled task.
                outcome = told(outcome, state.loop, "the application")
            if outcome is not None or state.cause is not None or state.stream_was_cancelled:
                await _settle(outcome, watch, state, scope, receive, send)
        finally:
            del outcome  # Its traceback refers to this frame: a reference cycle otherwise.
            # The task refers to its context, that to our block, and that to the state: a reference cycle otherwise.
            state.main_tasks = tuple(other for other in state.main_tasks if other is not task)
            if state.inner_contexts:
                state.inner_contexts = ()


async def _settle(
    outcome: BaseException | None,
    watch: ResponseWatch,
    state: RequestState,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Answer the request, mark a response that has started as aborted, or raise an error of the application."""
    state.note_disconnect()
    outcome = lost_stream(outcome, watch, state)
    error = error_of(outcome, state)
    try:
        if error is None:
            if outcome is not None:
                raise_as_it_is(outcome)
        elif not watch.started:
            state.drops_response = False
            await answer(error, scope, receive, send)
        elif not watch.is_complete:
            # A ``BaseHTTPMiddleware`` would send a last chunk, as if the response were complete.
            state.is_aborted = True
            state.aborted_by = error
    finally:
        del outcome, error  # Their tracebacks refer to this frame: reference cycles otherwise.
