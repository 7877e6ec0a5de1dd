"""What the time that a client gives does to its request before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from starlette.exceptions import HTTPException

from ..hosts.starlette import route_of
from ..kernel.log import logger
from ..kernel.loops.current import current_loop
from .client_timeout import EXPIRED
from .report import tell_refused

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .client_timeout import Budget, ClientTimeout
    from .limits import Limits

_APPLIED = b"preference-applied"
_MARKER = next((name.encode(), value.encode()) for name, value in EXPIRED.items())


class Admission(NamedTuple):
    """What a request is to run with, or the error that it is refused with."""

    refusal: HTTPException | None
    app: ASGIApp
    send: Send
    limits: Limits


def admit(app: ASGIApp, scope: Scope, send: Send, limits: Limits) -> Admission:
    """Return what a request is to run with under a door with a `ClientTimeout`."""
    client = limits.client_timeout
    assert client is not None
    try:
        budget = client.budget(scope)
    except HTTPException as exc:
        return Admission(exc.with_traceback(None), app, send, limits)
    if budget is None:
        return Admission(None, app, send, limits.admitted(None))
    if client.advisory:
        return Admission(None, _judged(app, client, budget), send, limits.admitted(None))
    refusal = client.refusal(budget)
    if refusal is not None:
        logger.info("%s %s refused: %s", scope.get("method", ""), route_of(scope), refusal.message)
        tell_refused(scope, refusal.reason, refusal.message)
    elif budget.wait is not None:
        send = _telling_that_it_waits(send, budget.wait)
    return Admission(refusal, app, send, limits.admitted(budget))


def _judged(app: ASGIApp, client: ClientTimeout, budget: Budget) -> ASGIApp:
    async def judged(scope: Scope, receive: Receive, send: Send) -> None:
        loop = current_loop()
        started = loop.time()
        try:
            await app(scope, receive, send)
        finally:
            client.judge(scope, budget, loop.time() - started)

    return judged


def _telling_that_it_waits(send: Send, wait: float) -> Send:
    """Return a ``send()`` that adds ``Preference-Applied`` (RFC 7240) to a response in time."""
    applied = f"wait={wait:.0f}".encode()

    # Not `async`: a response pays for each coroutine between the application and its server.
    def send_with_preference(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            told = any(name == _APPLIED and b"wait" in value for name, value in headers)
            if not told and _MARKER not in headers:
                message = {**message, "headers": [*headers, (_APPLIED, applied)]}
        return send(message)

    return send_with_preference
