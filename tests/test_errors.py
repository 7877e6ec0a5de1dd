from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
from starlette.exceptions import HTTPException

from cancelable_deps import (
    CancelationError,
    CancelationReason,
    ConditionCancelation,
    DisconnectCancelation,
    ManualCancelation,
    ParentCancelation,
    SignalCancelation,
    TimeoutCancelation,
)

CLASSES: list[tuple[CancelationReason, type[CancelationError]]] = [
    (CancelationReason.DISCONNECT, DisconnectCancelation),
    (CancelationReason.MANUAL, ManualCancelation),
    (CancelationReason.TIMEOUT, TimeoutCancelation),
    (CancelationReason.SIGNAL, SignalCancelation),
    (CancelationReason.CONDITION, ConditionCancelation),
    (CancelationReason.PARENT, ParentCancelation),
    (CancelationReason.ERROR, CancelationError),
]
every_class = pytest.mark.parametrize(("reason", "error_class"), CLASSES)


@pytest.fixture
def classes_restored() -> Iterator[None]:
    kept = dict(CancelationError._classes)
    yield
    CancelationError._classes.clear()
    CancelationError._classes.update(kept)


@every_class
def test_each_reason_has_its_class(reason: CancelationReason, error_class: type[CancelationError]) -> None:
    error = CancelationError.for_reason(reason, "why")
    assert type(error) is error_class
    assert error.reason is reason
    assert error.message == "why"
    assert error.status_code == reason.status_code


@every_class
def test_it_is_an_http_exception(reason: CancelationReason, error_class: type[CancelationError]) -> None:
    assert issubclass(error_class, HTTPException)
    assert issubclass(error_class, CancelationError)


@every_class
def test_only_a_timeout_is_a_timeout_error(reason: CancelationReason, error_class: type[CancelationError]) -> None:
    assert issubclass(error_class, TimeoutError) == (reason is CancelationReason.TIMEOUT)


def test_except_timeout_error_catches_it() -> None:
    with pytest.raises(TimeoutError) as caught:
        raise TimeoutCancelation
    assert isinstance(caught.value, HTTPException)


@every_class
def test_only_a_shutdown_says_when_to_come_back(reason: CancelationReason, error_class: type[CancelationError]) -> None:
    headers = dict(error_class().headers or {})
    assert headers == ({"retry-after": "5"} if reason is CancelationReason.SIGNAL else {})


@every_class
def test_without_a_message_the_detail_is_the_reasons_sentence(
    reason: CancelationReason, error_class: type[CancelationError]
) -> None:
    error = error_class()
    assert error.message is None
    assert error.detail == reason.text


@every_class
def test_the_message_is_the_detail_except_where_it_tells_of_the_inside(
    reason: CancelationReason, error_class: type[CancelationError]
) -> None:
    error = error_class("a secret")
    assert error.message == "a secret"
    tells_of_the_inside = reason in {CancelationReason.ERROR, CancelationReason.PARENT}
    assert error.detail == (reason.text if tells_of_the_inside else "a secret")
    assert ("a secret" in str(error)) == (not tells_of_the_inside)


def test_an_empty_message_is_a_message() -> None:
    assert ManualCancelation("").detail == ""


@every_class
@pytest.mark.parametrize("message", [None, "why"])
def test_it_survives_pickle_and_copy(
    reason: CancelationReason, error_class: type[CancelationError], message: str | None
) -> None:
    error = error_class(message)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is error_class
        assert (twin.reason, twin.message) == (reason, message)
        assert (twin.status_code, twin.detail, twin.headers) == (error.status_code, error.detail, error.headers)


@every_class
@pytest.mark.usefixtures("classes_restored")
def test_a_subclass_of_a_user_does_not_take_over(
    reason: CancelationReason, error_class: type[CancelationError]
) -> None:
    subclass = type("Subclass", (error_class,), {"reason": reason})
    assert type(CancelationError.for_reason(reason)) is error_class
    assert subclass is not error_class


@pytest.mark.usefixtures("classes_restored")
def test_a_subclass_without_a_reason_does_not_take_over_either() -> None:
    type("Subclass", (CancelationError,), {})
    assert type(CancelationError.for_reason(CancelationReason.ERROR)) is CancelationError
