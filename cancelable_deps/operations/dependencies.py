"""The dependencies by which a route gets the operations of its application, and its own operation."""

from typing import Annotated, Any

from fastapi import Depends
from starlette.requests import HTTPConnection
from starlette.types import Scope

from ..kernel.loops.current import current_loop
from ..request.connection import connection_state
from ..request.state import RequestState
from ..request.watchers import Listening
from .local import STATE_KEY, only_one_in
from .operations import Operations
from .running import RunningOperation, RunningRequest
from .stoppable import stoppable_handler


def operations_of(scope: Scope) -> Operations:
    """Return the operations of the application that a request has come to.

    :raises RuntimeError: if it has none, or they are not open.
    """
    found: Any = (scope.get("state") or {}).get(STATE_KEY) or only_one_in(current_loop())
    if found is None:
        raise RuntimeError(
            "this application has no operations, or they are not open: pass their lifespan to it, "
            "FastAPI(lifespan=operations.lifespan()), and check that your server or test client runs lifespans"
        )
    operations: Operations = found
    return operations


def operation_of(connection: HTTPConnection) -> tuple[RunningRequest, RequestState]:
    """Return the operation of a request, and the request's state, which is listened to until the handler returns."""
    state = connection_state(connection, with_handler=True)
    running: RunningRequest = operations_of(connection.scope).worker.local.of_request(state)
    if not running.is_listened_to:
        running.is_listened_to = True
        state.watch(_LISTENING)
    return running, state


async def request_operations(connection: HTTPConnection) -> Operations:
    """Provide the `Operations` of the application, also in one that is mounted in it.

    :raises RuntimeError: if the application has none, or they are not open.
    """
    return operations_of(connection.scope)


async def request_operation(
    connection: HTTPConnection, _: Annotated[None, Depends(stoppable_handler, scope="function")]
) -> RunningOperation:
    """Provide the request itself as an operation: its ``id``, ``claim(owner)``, ``label()`` and ``progress()``.

    Stopping the operation stops the handler, also if no door is around it.

    :raises RuntimeError: if the application has no operations, or they are not open.
    """
    return RunningOperation(operation_of(connection)[0])


_LISTENING = Listening()

RequestOperations = Annotated[Operations, Depends(request_operations)]
"""A parameter's type that gives a handler the `Operations` of its application."""

RequestOperation = Annotated[RunningOperation, Depends(request_operation)]
"""A parameter's type that gives a handler its own request as an operation."""
