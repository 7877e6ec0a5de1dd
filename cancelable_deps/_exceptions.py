"""Exceptions on their way out of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from starlette.exceptions import HTTPException
from starlette.websockets import WebSocketDisconnect

from ._backend import logger

if TYPE_CHECKING:
    from collections.abc import Iterator


def collapse(exc: BaseException) -> BaseException:
    """The one exception of a group that has one, or its ``HTTPException``, which is the answer to the request.

    What an ``HTTPException`` pushes aside is logged with its traceback, so that no bug hides behind a 409.
    """
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    leaves = list(_leaves(exc))
    if len(leaves) == 1:
        return leaves[0]
    answer = next((leaf for leaf in leaves if isinstance(leaf, HTTPException)), None)
    if all(isinstance(leaf, WebSocketDisconnect) for leaf in leaves):
        # One task receives and another sends: each is told of it.
        return answer or leaves[0]
    if answer is None or not all(isinstance(leaf, Exception) for leaf in leaves):
        return exc
    for leaf in leaves:
        if not isinstance(leaf, HTTPException):
            logger.error("%r was raised beside %r", leaf, answer, exc_info=leaf)
    return answer


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc


def raise_as_it_is(exc: BaseException) -> NoReturn:
    """Raise with the context that ``exc`` has, not the group or cancellation that it was taken out of."""
    context = exc.__context__
    try:
        raise exc
    finally:
        exc.__context__ = context
        del exc, context
