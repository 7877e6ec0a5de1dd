"""The id of the operation that the caller runs in, for each line of a log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from ..kernel.block import current
from ..operations.local import STATE_KEY, only_one_in
from ..request.blocks import RequestBlock
from ..request.first_door import FirstDoorBlock
from ..request.naming import OPERATION_ID_KEY

if TYPE_CHECKING:
    from starlette.types import Scope

    from ..kernel.block import Block
    from ..kernel.loops.base import EventLoop
    from ..operations.operations import Operations


def current_operation_id() -> str | None:
    """Return the id of the request, WebSocket, background or tracked work that the caller runs in.

    The id is the one by which `Operations.cancel` stops it. If neither its client nor anybody else has given it one, it
    is made now: a request costs nothing for it until this is called. It is found in any task or thread that the work has
    started, and in a request under any door. Never raises.

    :return: ``None`` outside of all of them, when the request is over, and, if its client has not chosen an id, in an
        application without `Operations`.
    """
    block: Block | None = current.get()
    try:
        while block is not None:
            id = _id_of(block)
            if id is not None:
                return id
            block = block.parent
    except Exception:
        # Who logs must not be disturbed, nor may a failure be logged here: that would ask for the id again.
        return None
    return None


def _id_of(block: Block) -> str | None:
    running = block.operation
    if running is not None:
        return cast("str", running.id)
    if not isinstance(block, RequestBlock):
        return None
    request = block.known_request
    if request is None:
        if not isinstance(block, FirstDoorBlock) or not block.is_open:
            return None
        # A request that is too young to have a state, which is made only if it has to get an id.
        chosen: str | None = block.asgi_scope.get(OPERATION_ID_KEY)
        if chosen is not None or _operations_of(block.asgi_scope, block.loop_of_request) is None:
            return chosen
        request = block.state
    operations = _operations_of(request.scope, request.loop)
    made = None if operations is None else operations.worker.local.id_of(request)
    return request.scope.get(OPERATION_ID_KEY) if made is None else made


def _operations_of(scope: Scope, loop: EventLoop) -> Operations | None:
    found: Any = (scope.get("state") or {}).get(STATE_KEY) or only_one_in(loop)
    return found if found is not None and found.is_open else None


class _OperationIdFilter(logging.Filter):
    def __init__(self, default: str | None) -> None:
        super().__init__()
        self._default = default

    def filter(self, record: logging.LogRecord) -> bool:
        # The line about a cancellation has it already: it is written when the block has been left.
        if getattr(record, "operation_id", None) is None:
            id = current_operation_id()
            record.operation_id = self._default if id is None else id
        return True


def operation_id_filter(*, default: str | None = "-") -> logging.Filter:
    """Return a filter for the handlers of ``logging``, by which each record has an ``operation_id``; it drops none.

    Add it to handlers, because the filter of a logger does not see what other loggers pass on:
    ``handler.addFilter(operation_id_filter())``, and ``%(operation_id)s`` in the format. In a ``dictConfig`` it is
    ``{"()": "cancelable_deps.observability.operation_id_filter"}``. The id is that of `current_operation_id`, found at
    the moment of logging.

    :param default: what a record has that is written outside of all operations.
    """
    return _OperationIdFilter(default)
