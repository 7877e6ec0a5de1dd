"""The name that a client gives its request, by which the request can be stopped from elsewhere."""

from __future__ import annotations

import re
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, Protocol

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Message, Receive, Scope, Send

    from ..kernel.token import Cause

    Serve = Callable[[Scope, Receive, Send, Cause | None], Awaitable[None]]

OPERATION_ID_KEY: Final = "cancelable_deps.operation_id"
"""The key in the ASGI scope of the id that a client has chosen for its request."""

# Neither "." nor "..", which are no segments of a path.
_ID: Final = re.compile(rb"(?!\.{1,2}\Z)[A-Za-z0-9._~:-]{1,128}")
_HEADER: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_STARTS: Final = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})
_NAME: Final = itemgetter(0)
_ADVICE: Final = (
    "An operation id has 1 to 128 of the characters A-Z a-z 0-9 . _ ~ : - (not . or .. alone) and is given once"
)
_NOT_OPEN: Final = (
    "the operations of RequestCancelationMiddleware are not open: pass their lifespan to the application, "
    "FastAPI(lifespan=operations.lifespan())"
)
_POLICY_VIOLATION: Final = 1008


class CancelsByName(Protocol):
    """The operations of an application, as far as a door uses them."""

    @property
    def is_open(self) -> bool:
        """Whether they can be used: their lifespan runs."""
        ...

    def request_arrived(self, id: str, scope: Scope) -> Cause | None:
        """Note a request with an id; return the cause of a cancel that has come before it."""
        ...

    def request_left(self, id: str, scope: Scope) -> None:
        """Note that a request with an id has ended."""


class Naming:
    """The header by which clients name their requests: its checking, and its echo in the response."""

    def __init__(self, header: str, operations: CancelsByName) -> None:
        self._name = header.lower()
        self._raw = self._name.encode()
        self._operations = operations

    def is_used_by(self, scope: Scope) -> bool:
        """Return whether a request has the header."""
        # Without a step of the interpreter for each header: every request pays for this.
        return self._raw in map(_NAME, scope["headers"])

    async def serve(self, serve: Serve, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request that has the header: note its id, and echo it. A value that is no id is refused.

        :param serve: called with the cause, too, if the id has been cancelled already.
        """
        values = [value for name, value in scope["headers"] if name == self._raw]
        if len(values) > 1 or not _ID.fullmatch(values[0]):
            await self._refuse(values[0], scope, receive, send)
            return
        id = values[0].decode("ascii")
        scope[OPERATION_ID_KEY] = id
        send = self._echoing(values[0], send)
        operations = self._operations
        if not operations.is_open:
            await serve(scope, receive, send, None)
            return
        cause = operations.request_arrived(id, scope)
        try:
            await serve(scope, receive, send, cause)
        finally:
            operations.request_left(id, scope)

    def _echoing(self, value: bytes, send: Send) -> Send:
        async def send_with_id(message: Message) -> None:
            if message["type"] in _STARTS:
                message = {**message, "headers": [*message.get("headers", ()), (self._raw, value)]}
            await send(message)

        return send_with_id

    async def _refuse(self, value: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as FastAPI answers other headers that are wrong; a WebSocket is refused before it is accepted."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": _ADVICE})
            return
        shown = value[:128].decode("latin-1")
        error = {"type": "operation_id", "loc": ["header", self._name], "msg": _ADVICE, "input": shown}
        await JSONResponse({"detail": [error]}, status_code=422)(scope, receive, send)


def checked_naming(operations: Any, header: Any) -> Naming | None:
    """Return the naming of a door with these options; ``None`` if clients cannot name their requests.

    :raises TypeError: if one has a wrong type, or the header is given without operations.
    :raises ValueError: if the header is not the name of one.
    """
    if operations is not None and not hasattr(operations, "request_arrived"):
        raise TypeError(f"operations must be the Operations of the application, not {operations!r}")
    if header is None:
        return None
    if not isinstance(header, str):
        raise TypeError(f'operation_id takes the name of a header, such as "operation-id", not {header!r}')
    if not _HEADER.fullmatch(header):
        raise ValueError(f"operation_id takes the name of a header, and {header!r} is none")
    if operations is None:
        raise TypeError("operation_id needs operations=, by which such a request is found")
    return Naming(header, operations)


def failing_without(operations: CancelsByName, send: Send) -> Send:
    """Return a ``send()`` of a lifespan that fails the start of an application if its operations are not open by then."""
    has_failed = False

    async def send_or_fail(message: Message) -> None:
        nonlocal has_failed
        if has_failed:
            return  # What a framework sends of the error below.
        if message["type"] == "lifespan.startup.complete" and not operations.is_open:
            has_failed = True
            await send({"type": "lifespan.startup.failed", "message": _NOT_OPEN})
            # The application would wait for its shutdown otherwise.
            raise RuntimeError(_NOT_OPEN)
        await send(message)

    return send_or_fail
