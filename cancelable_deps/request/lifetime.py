"""How long a request is listened to: who ends it."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Self
from weakref import ref

from ..hosts.fastapi import HANDLER_STACK_KEY, REQUEST_STACK_KEY

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from starlette.types import Scope


class Lifetime(IntEnum):
    """When the state of a request is closed, if not before by the end of the response. It only rises."""

    BLOCKS = 0
    """With the last block: nothing tells us of the end of the handler."""

    HANDLER = 1
    """When the handler has returned, as FastAPI's exit stack or the decorator tell."""

    RESPONSE = 2
    """When a response of ours, or the response of a generator, has ended."""

    DOOR = 3
    """With the middleware or route class that has made the state."""


class Mortal:
    """The part of a request that knows its `Lifetime`. Its owner closes it."""

    scope: Scope
    is_closed: bool
    lifetime = Lifetime.BLOCKS
    handler_stack: AsyncExitStack | None = None
    """FastAPI's exit stack around the handler, if that closes us."""

    _response: ref[object] | None = None
    """The response that ends the request, if the handler may throw it away."""

    def close(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    @property
    def is_reading(self) -> bool:
        """Whether a task of ours is left to be joined."""
        raise NotImplementedError

    def last_until(self, lifetime: Lifetime) -> None:
        """Last at least so long."""
        self.lifetime = max(self.lifetime, lifetime)

    def close_with_handler(self) -> bool:
        """Close when the handler has returned, if FastAPI tells us; otherwise listening ends with the last block."""
        stack: AsyncExitStack | None = self.scope.get(HANDLER_STACK_KEY)
        if stack is None or self.is_closed:
            return False
        self.handler_stack = stack
        stack.push(self)
        if self.lifetime is Lifetime.BLOCKS:
            self.lifetime = Lifetime.HANDLER
        return True

    def keep_through_response(self, response: object = None) -> None:
        """Have something listen until the response has ended, and close us then: the handler's return does not.

        :param response: what does, if the handler may throw it away.
        """
        if response is not None:
            self._response = ref(response)
        if self.lifetime >= Lifetime.RESPONSE:
            return
        self.lifetime = Lifetime.RESPONSE
        # Unless an error on the way means that this response is never sent.
        if self.request_stack is not None:
            self.request_stack.push_async_callback(self.aclose)

    @property
    def request_stack(self) -> AsyncExitStack | None:
        """FastAPI's, which is closed when the response and its background tasks are over; ``None`` without it."""
        stack: AsyncExitStack | None = self.scope.get(REQUEST_STACK_KEY)
        return stack

    # FastAPI's stack of exits takes any context manager, and this is its cheapest form.
    def __enter__(self) -> None: ...

    def __exit__(self, *exc_info: object) -> None:
        if self.lifetime is Lifetime.HANDLER or not self.outlives_handler:
            self.close()

    async def handler_returned(self) -> None:
        if not self.outlives_handler:
            await self.aclose()

    @property
    def outlives_handler(self) -> bool:
        """Whether something listens on after the handler's return, and closes us later."""
        if self.lifetime is Lifetime.RESPONSE:
            return self._response is None or self._response() is not None
        return self.lifetime is Lifetime.DOOR

    def end_request(self) -> Self | None:
        """Close, if nothing listens on after the handler's return; return this, if something is left to be joined."""
        if self.outlives_handler:
            return None
        self.close()
        return self if self.is_reading else None

    @property
    def ends_with_handler(self) -> bool:
        """Whether the handler's return closes us, unless a response of ours that is still there listens on."""
        if self.is_closed:
            return False
        is_to_be_thrown_away = self.lifetime is Lifetime.RESPONSE and self._response is not None
        return self.lifetime is Lifetime.HANDLER or is_to_be_thrown_away
