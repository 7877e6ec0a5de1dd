"""Functions that find or make the state of a request or WebSocket, and its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from starlette.requests import HTTPConnection, Request
from starlette.websockets import WebSocket, WebSocketState

from ..hosts.starlette import RECEIVE, receive_of
from ..kernel.token import CancelationToken
from .blocks import DoorBlock, RequestBlock
from .first_door import FirstDoorBlock, Inlet
from .lifetime import Lifetime
from .state import SCOPE_KEY, RequestState
from .websocket import Outlet, SocketBlock, SocketDoorBlock, SocketState
from .websocket_reader import SocketReader

if TYPE_CHECKING:
    from starlette.types import Receive, Scope


PREDECESSORS: Final = (RequestState, FirstDoorBlock, Inlet)
"""The classes whose `receive` a ``Request`` has if an earlier state of the request has replaced the server's."""


def known_state(scope: Scope) -> RequestState | None:
    """Return the state of the request or WebSocket with this scope; ``None`` if it has none, or a closed one."""
    found: RequestState | FirstDoorBlock | None = scope.get(SCOPE_KEY)
    return None if found is None else found.state


def connection_state(
    connection: HTTPConnection, *, lifetime: Lifetime = Lifetime.BLOCKS, with_handler: bool = False
) -> RequestState:
    """Return the state of a request or WebSocket, which is made if there is none.

    :param lifetime: the lifetime of a state that is made; a caller that asks for more than ``BLOCKS`` has to close it.
    :param with_handler: whether a state that is made is closed with the handler. The caller runs before it or in it.
    """
    # One function and not several, because every request under a handle calls it, some more than once.
    scope = connection.scope
    found: RequestState | FirstDoorBlock | None = scope.get(SCOPE_KEY)
    made = found is None
    state = None if found is None else found.state
    if not isinstance(connection, Request):
        state = _socket_state(connection)
        if made:
            state.last_until(lifetime)
    else:
        receive = receive_of(connection)
        if state is None:
            earlier = getattr(receive, "__self__", None)
            if isinstance(earlier, PREDECESSORS):
                state = _state_after(earlier, scope, receive, lifetime)
            else:
                state = RequestState(scope, receive, lifetime=lifetime)
        if receive is state.raw:
            setattr(connection, RECEIVE, state.receive)
    if made and with_handler:
        state.close_with_handler()
    return state


def _state_after(
    earlier: RequestState | FirstDoorBlock | Inlet, scope: Scope, receive: Receive, lifetime: Lifetime
) -> RequestState:
    """Return the state of a request whose earlier state was removed from the scope when its last block was left."""
    owner = earlier.owner if isinstance(earlier, Inlet) else earlier
    if owner is not None and not owner.is_closed:
        state = scope[SCOPE_KEY] = owner.state
        state.last_until(lifetime)
        return state
    state = RequestState(scope, receive, lifetime=lifetime)
    # The caller is a background task: the client has its response. A shutdown must not refuse it as a new request.
    state.root_token = CancelationToken()
    state.close()
    return state


def _socket_state(websocket: HTTPConnection) -> SocketState:
    if not isinstance(websocket, WebSocket):
        raise TypeError(f"cancelable_deps needs the Request or WebSocket that the framework made, not {websocket!r}")
    state: SocketState | None = websocket.scope.get(SCOPE_KEY)
    raw = receive_of(websocket)
    if state is None:
        state = _earlier_state(websocket, raw) or SocketState(
            websocket.scope, raw, is_connected=websocket.client_state is not WebSocketState.CONNECTING
        )
    if raw is state.reader.raw:
        setattr(websocket, RECEIVE, state.reader.receive)
    if "send" not in vars(websocket):
        state.is_accepted = state.is_accepted or websocket.application_state is WebSocketState.CONNECTED
        state.is_over = state.is_over or websocket.application_state is WebSocketState.DISCONNECTED
        websocket.send = Outlet(websocket, state)  # type: ignore[method-assign]
    return state


def _earlier_state(websocket: WebSocket, receive: Receive) -> SocketState | None:
    reader = getattr(receive, "__self__", None)
    if not isinstance(reader, SocketReader):
        return None
    state = reader.owner
    if not isinstance(state, SocketState):
        # The earlier state is closed, because its handler has returned.
        state = SocketState(websocket.scope, reader.raw)
        vars(websocket).pop("send", None)
        state.take_over(reader)
    websocket.scope[SCOPE_KEY] = state
    return state


def new_block(state: RequestState, *, timeout: float | None = None, cleanup_grace: float | None = None) -> RequestBlock:
    """Return a new block that is stopped with the request or WebSocket of ``state``."""
    kind = SocketBlock if isinstance(state, SocketState) else RequestBlock
    return kind(state, timeout=timeout, cleanup_grace=cleanup_grace)


def new_door(state: RequestState, *, timeout: float | None = None, cleanup_grace: float | None = None) -> DoorBlock:
    """Return a new block for a whole handler. A cancellation of the block cancels the request or WebSocket."""
    kind = SocketDoorBlock if isinstance(state, SocketState) else DoorBlock
    return kind(state, timeout=timeout, cleanup_grace=cleanup_grace)
