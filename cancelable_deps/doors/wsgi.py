"""Mounted WSGI applications: their work runs in a thread, which is not safe to cancel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio.lowlevel

from ..request.connection import known_state

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# By name, because a2wsgi is not a dependency of ours, and importing Starlette's own bridge emits a warning.
_BRIDGES = {("a2wsgi.wsgi", "WSGIMiddleware"), ("starlette.middleware.wsgi", "WSGIMiddleware")}


def is_wsgi_bridge(app: object) -> bool:
    """Return whether ``app`` is an instance of a class that makes a WSGI application an ASGI one."""
    return any((cls.__module__, cls.__qualname__) in _BRIDGES for cls in type(app).__mro__)


class Bridge:
    """An ASGI application around the bridge ``app``, which waits for the bridge's thread as for any worker thread.

    If a bridge is cancelled, its thread waits for ever for a reader that is gone, and one of its few worker threads is
    lost. So nothing of ours interrupts it. A response that begins before the request is stopped is sent. A response that
    would begin later is dropped, and the request is answered with the status of the reason when the thread has ended.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = known_state(scope) if scope["type"] == "http" else None
        if state is None:
            await self.app(scope, receive, send)
            return
        started = False

        async def send_in_time(message: Message) -> None:
            nonlocal started
            if not started and state.cause is not None:
                return
            started = True
            await send(message)

        with state.uninterrupted():
            await self.app(scope, receive, send_in_time)
        if not started:
            await anyio.lowlevel.checkpoint()
