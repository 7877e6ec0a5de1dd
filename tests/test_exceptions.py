from __future__ import annotations

import asyncio
import logging

import pytest
from starlette.exceptions import HTTPException
from starlette.websockets import WebSocketDisconnect

from cancelable_deps import Cancelable, ManualCancelation
from cancelable_deps.kernel.unwrap import collapse, raise_as_it_is

from .leftovers import nothing_left


def group(*leaves: BaseException) -> BaseExceptionGroup[BaseException]:
    return BaseExceptionGroup("several", leaves)


def test_what_is_no_group_stays() -> None:
    error = ValueError()
    assert collapse(error) is error


def test_the_only_leaf_arrives_as_itself() -> None:
    error = ValueError()
    assert collapse(group(error)) is error
    assert collapse(group(group(group(error)))) is error


def test_the_only_leaf_may_be_a_cancellation() -> None:
    cancelled = asyncio.CancelledError()
    assert collapse(group(cancelled)) is cancelled


def test_several_leaves_stay_a_group() -> None:
    several = group(ValueError(), group(KeyError()))
    assert collapse(several) is several


def test_several_that_tell_of_one_websocket_are_one(caplog: pytest.LogCaptureFixture) -> None:
    told, also_told = WebSocketDisconnect(1006), WebSocketDisconnect(1001)
    assert collapse(group(told, group(also_told))) is told
    assert not caplog.records


def test_an_http_exception_is_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    answer = HTTPException(409)
    bug = ValueError("a bug")
    assert collapse(group(bug, group(answer))) is answer
    (record,) = caplog.records
    assert record.name == "cancelable_deps"
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.exc_info[1] is bug
    assert "a bug" in record.getMessage()


def test_the_first_of_several_http_exceptions_is_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    first, second = HTTPException(409), HTTPException(404)
    assert collapse(group(first, second)) is first
    assert not caplog.records


def test_one_of_our_errors_is_an_answer_too() -> None:
    error = ManualCancelation()
    assert collapse(group(KeyError(), error)) is error


@pytest.mark.parametrize("other", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit()])
def test_an_answer_does_not_hide_what_is_no_exception(other: BaseException) -> None:
    both = group(HTTPException(409), other)
    assert collapse(both) is both


def test_it_is_raised_with_the_context_that_it_had() -> None:
    error = ValueError()
    error.__context__ = context = KeyError()
    try:
        raise group(error)
    except BaseExceptionGroup:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            raise_as_it_is(error)
    assert caught.value is error
    assert error.__context__ is context


@pytest.mark.anyio
async def test_a_group_that_leaves_a_block_is_collapsed() -> None:
    async with nothing_left():
        with pytest.raises(HTTPException) as caught:
            async with Cancelable():
                raise group(HTTPException(409))
    assert caught.value.status_code == 409
    assert caught.value.__context__ is None


@pytest.mark.anyio
async def test_a_group_that_cannot_be_one_exception_leaves_untouched() -> None:
    several = group(ValueError(), KeyError())
    with pytest.raises(BaseExceptionGroup) as caught:
        async with Cancelable():
            raise several
    assert caught.value is several
