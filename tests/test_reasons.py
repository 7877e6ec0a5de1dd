from __future__ import annotations

import pytest

from cancelable_deps import CancelationReason as Reason

TABLE = [
    (Reason.DISCONNECT, 499, None, False),
    (Reason.MANUAL, 499, 4499, False),
    (Reason.TIMEOUT, 504, 4504, True),
    (Reason.SIGNAL, 503, 1012, True),
    (Reason.CONDITION, 500, 1011, True),
    (Reason.PARENT, 500, 1011, True),
    (Reason.ERROR, 500, 1011, True),
]


@pytest.mark.parametrize(("reason", "status", "close", "is_error"), TABLE)
def test_every_reason_has_its_status_and_close_code(
    reason: Reason, status: int, close: int | None, is_error: bool
) -> None:
    assert (reason.status_code, reason.close_code, reason.is_error) == (status, close, is_error)


def test_the_set_is_closed() -> None:
    assert [row[0] for row in TABLE] == list(Reason)


@pytest.mark.parametrize("reason", Reason)
def test_no_client_is_told_to_repeat(reason: Reason) -> None:
    assert reason.status_code != 408


def test_every_reason_has_a_sentence_of_its_own() -> None:
    texts = [reason.text for reason in Reason]
    assert all(texts)
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_is_its_own_word(reason: Reason) -> None:
    assert str(reason) == reason.value == reason.name.lower()
    assert Reason(reason.value) is reason
