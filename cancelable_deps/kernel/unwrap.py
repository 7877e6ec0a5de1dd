"""Exceptions on their way out of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from starlette.exceptions import HTTPException
from starlette.websockets import WebSocketDisconnect

from .errors import CancelationError
from .log import logger

if TYPE_CHECKING:
    from collections.abc import Iterator


def collapse(exc: BaseException) -> BaseException:
    """Return the one exception that a group of ours stands for.

    That is its only one, or its ``HTTPException``, which is the answer to the request. What an ``HTTPException`` pushes
    aside is logged with its traceback, so that no bug hides behind a 409.
    """
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    leaves = list(_leaves(exc))
    return leaves[0] if len(leaves) == 1 else _answer_of(leaves) or exc


def answer_of_group(exc: BaseException) -> BaseException:
    """Return the ``HTTPException`` of somebody else's group, or the group as it is."""
    return (_answer_of(list(_leaves(exc))) or exc) if isinstance(exc, BaseExceptionGroup) else exc


def carries_cancelation(exc: BaseException) -> bool:
    """Return whether a group has an error of ours in it."""
    return isinstance(exc, BaseExceptionGroup) and any(isinstance(leaf, CancelationError) for leaf in _leaves(exc))


def taken_apart(exc: BaseException, *, is_ours: bool, is_to_be: bool) -> BaseException:
    """Return the exception that a group on its way out of a block stands for; anything else as it is.

    A group that is ours, or carries an error of ours, is collapsed; somebody else's gives its ``HTTPException``, where
    such groups are to be taken apart.
    """
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    if is_ours or carries_cancelation(exc):
        return collapse(exc)
    return answer_of_group(exc) if is_to_be else exc


def _answer_of(leaves: list[BaseException]) -> BaseException | None:
    answer = next((leaf for leaf in leaves if isinstance(leaf, HTTPException)), None)
    if all(isinstance(leaf, WebSocketDisconnect) for leaf in leaves):
        # One task receives and another sends: each is told of it.
        return answer or leaves[0]
    if answer is None or not all(isinstance(leaf, Exception) for leaf in leaves):
        return None
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
