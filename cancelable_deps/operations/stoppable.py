"""A block around a handler that no door is around, so that it can be stopped from elsewhere."""

from collections.abc import AsyncIterator

from starlette.requests import HTTPConnection

from ..doors.marks import STOPS_HANDLER
from ..kernel.cancelable import cancelable_of
from ..request.connection import connection_state, new_block


async def stoppable_handler(connection: HTTPConnection) -> AsyncIterator[None]:
    """Keep a block open around the handler, unless a door does. To be used with ``scope="function"``."""
    state = connection_state(connection, with_handler=True)
    if state.doors:
        yield
        return
    async with cancelable_of(new_block(state)):
        yield


setattr(stoppable_handler, STOPS_HANDLER, True)
