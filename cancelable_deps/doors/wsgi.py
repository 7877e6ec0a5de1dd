"""WSGI applications that are mounted: their work is done by a thread, which is not safe to cancel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio.lowlevel

from ..request.connection import known_state

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# By name: a2wsgi is no dependency of ours, and Starlette warns of its own when that is imported.
_BRIDGES = {("a2wsgi.wsgi", "WSGIMiddleware"), ("starlette.middleware.wsgi", "WSGIMiddleware")}


def is_wsgi_bridge(app: object) -> bool:
    """Return whether ``app`` is a class by which a WSGI application is mounted, or one derived from it."""
    return any((cls.__module__, cls.__qualname__) in _BRIDGES for cls in type(app).__mro__)


class Bridge:
    """Waits for the thread behind ``app`` as for any worker thread.

    A bridge that is cancelled leaves its thread waiting for a reader that is gone, and with it a place among the few
    that there are. So nothing of ours interrupts it. A response that it begins before the request is stopped is the
    response; one that it would begin later is dropped, and the request answered for the reason when the thread is done.
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
