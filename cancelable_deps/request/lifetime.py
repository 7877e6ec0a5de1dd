"""The lifetime of a request: how long it is listened to, and the owner that ends it."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Self
from weakref import ref

from ..hosts.fastapi import HANDLER_STACK_KEY, REQUEST_STACK_KEY
from ..kernel.errors import CancelationError

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from starlette.types import Scope


class Lifetime(IntEnum):
    """The moment at which the state of a request is closed, if the response has not ended before. It only rises."""

    BLOCKS = 0
    """With the last block, because nothing reports the end of the handler."""

    HANDLER = 1
    """When the handler has returned, which FastAPI's exit stack or the decorator reports."""

    RESPONSE = 2
    """When a response of ours, or the response of a generator, has ended."""

    DOOR = 3
    """With the middleware or route class that has made the state."""


class Mortal:
    """The part of a request that has a `Lifetime`. Its owner closes it."""

    scope: Scope
    is_closed: bool
    is_finished: bool
    response_is_complete: bool
    status: int
    was_stopped: bool
    lifetime = Lifetime.BLOCKS
    handler_stack: AsyncExitStack | None = None
    """FastAPI's exit stack around the handler, if that closes the request."""

    _response: ref[object] | None = None
    """The response that ends the request, if the handler may throw it away."""

    def close(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    @property
    def is_reading(self) -> bool:
        """Whether the task of the reader still runs, so that it is to be joined."""
        raise NotImplementedError

    def last_until(self, lifetime: Lifetime) -> None:
        """Raise the lifetime to ``lifetime``, unless it is longer already."""
        self.lifetime = max(self.lifetime, lifetime)

    def close_with_handler(self) -> bool:
        """Close the request when the handler has returned, and return whether FastAPI will report that."""
        stack: AsyncExitStack | None = self.scope.get(HANDLER_STACK_KEY)
        if stack is None or self.is_closed:
            return False
        self.handler_stack = stack
        stack.push(self)
        if self.lifetime is Lifetime.BLOCKS:
            self.lifetime = Lifetime.HANDLER
        return True

    def keep_through_response(self, response: object = None) -> None:
        """Listen until the response has ended; its owner closes the request then, and not the handler's return.

        :param response: the response, if the handler may throw it away.
        """
        if response is not None:
            self._response = ref(response)
        if self.lifetime >= Lifetime.RESPONSE:
            return
        self.lifetime = Lifetime.RESPONSE
        # An error may keep the response from being sent: then nothing else would close the request.
        if self.request_stack is not None:
            self.request_stack.push_async_callback(self.aclose)

    @property
    def request_stack(self) -> AsyncExitStack | None:
        """FastAPI's exit stack that is closed after the response and its background tasks; ``None`` without FastAPI."""
        stack: AsyncExitStack | None = self.scope.get(REQUEST_STACK_KEY)
        return stack

    @property
    def has_ended_by_its_cause(self) -> bool:
        """Whether a request that was cancelled, and is over, has ended because of that."""
        if self.is_finished:
            # The answer is that of the error, or of a handler that has finished all the same.
            return self.was_stopped and self.status >= 400
        if self.was_stopped or self.lifetime is Lifetime.BLOCKS:
            # Where only blocks are known, and not the handler's end, this is asked before the last block raises its error.
            return True
        return self.lifetime is Lifetime.DOOR and not self.response_is_complete

    # An exit stack takes any context manager, and this is the cheapest.
    def __enter__(self) -> None: ...

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        self._note_exit(exc)
        if self.lifetime is Lifetime.HANDLER or not self.outlives_handler:
            self.close()

    async def handler_returned(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        """Close the request, unless something listens on. Called by FastAPI's exit stack around the handler."""
        self._note_exit(exc)
        if not self.outlives_handler:
            await self.aclose()

    def _note_exit(self, exc: BaseException | None) -> None:
        if exc is not None and (not isinstance(exc, Exception) or isinstance(exc, CancelationError)):
            self.was_stopped = True

    @property
    def outlives_handler(self) -> bool:
        """Whether the request is listened to after the handler's return, and is closed later."""
        if self.lifetime is Lifetime.RESPONSE:
            return self._response is None or self._response() is not None
        return self.lifetime is Lifetime.DOOR

    def end_request(self) -> Self | None:
        """Close the request, unless it outlives the handler; return the request if its reader is to be joined."""
        if self.outlives_handler:
            return None
        self.close()
        return self if self.is_reading else None

    @property
    def ends_with_handler(self) -> bool:
        """Whether the handler's return closes the request, unless a response of ours exists by then."""
        if self.is_closed:
            return False
        is_to_be_thrown_away = self.lifetime is Lifetime.RESPONSE and self._response is not None
        return self.lifetime is Lifetime.HANDLER or is_to_be_thrown_away
