"""The exceptions that leave a block: exception groups are reduced to the one exception that they stand for."""

from __future__ import annotations

from contextlib import suppress
from copy import copy
from typing import TYPE_CHECKING, NoReturn

from starlette.exceptions import HTTPException
from starlette.websockets import WebSocketDisconnect

from .errors import CancelationError
from .log import logger

if TYPE_CHECKING:
    from collections.abc import Iterator


def collapse(exc: BaseException) -> BaseException:
    """Return the one exception that a group of this package stands for; the group itself if there is no such one.

    That is its only exception, or its ``HTTPException``, which is the response to the request. The other exceptions of
    the group are logged with their tracebacks, so that a 409, for example, does not hide a bug.
    """
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    leaves = list(_leaves(exc))
    return leaves[0] if len(leaves) == 1 else _answer_of(leaves) or exc


def answer_of_group(exc: BaseException) -> BaseException:
    """Return the ``HTTPException`` of another library's group, or the group itself."""
    return (_answer_of(list(_leaves(exc))) or exc) if isinstance(exc, BaseExceptionGroup) else exc


def carries_cancelation(exc: BaseException) -> bool:
    """Return whether ``exc`` is a group that contains a `CancelationError`."""
    return isinstance(exc, BaseExceptionGroup) and any(isinstance(leaf, CancelationError) for leaf in _leaves(exc))


def taken_apart(exc: BaseException, *, is_ours: bool, is_to_be: bool) -> BaseException:
    """Return the exception that a group leaving a block stands for; another exception is returned unchanged.

    :param is_ours: whether a task group of this package may have raised the group. Such a group is collapsed, and so is
        a group that contains a `CancelationError`.
    :param is_to_be: whether another library's group is replaced by its ``HTTPException``.
    """
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    if is_ours or carries_cancelation(exc):
        return collapse(exc)
    return answer_of_group(exc) if is_to_be else exc


def _answer_of(leaves: list[BaseException]) -> BaseException | None:
    answer = next((leaf for leaf in leaves if isinstance(leaf, HTTPException)), None)
    if all(isinstance(leaf, WebSocketDisconnect) for leaf in leaves):
        # If one task receives and another sends, both get the disconnect.
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
    """Raise ``exc`` with its own context, and not with the group or cancellation that it was taken from."""
    context = exc.__context__
    try:
        raise exc
    finally:
        exc.__context__ = context
        del exc, context


def without_frames(exc: BaseException) -> BaseException:
    """Return an exception without its frames, which would keep alive all that the work had."""
    if isinstance(exc, BaseExceptionGroup):
        for part in exc.exceptions:
            without_frames(part)
    exc.__context__ = exc.__cause__ = None
    return exc.with_traceback(None)


def copied(exc: BaseException) -> BaseException:
    """Return a copy of an exception, or itself if it cannot be copied."""
    with suppress(Exception):
        other: BaseException = copy(exc)
        return other
    # `copy` calls the class with `args`, which not every class takes.
    try:
        other = type(exc).__new__(type(exc), *exc.args)
        other.__dict__.update(vars(exc))
    except Exception:
        return exc
    return other
