"""With the recipe of docs/observability.md Sentry is told of no cancellation, and of everything else."""

from __future__ import annotations

import pytest

from tests.compat.doors import KINDS
from tests.compat.served import Served
from tests.compat.test_observers import hang_up, time_out
from tests.servers import new_key, request


def told(served: Served, key: str, transaction: str) -> list[str]:
    """What Sentry was told of a request, whose transaction comes last."""
    return [event for event in served.wait_for("sentry", f"transaction {key} {transaction}") if f" {key} " in event]


@pytest.mark.parametrize("door", KINDS)
def test_a_hang_up(served: Served, door: str) -> None:
    key = hang_up(served, door)
    assert told(served, key, "invalid_argument 499") == [f"transaction {key} invalid_argument 499"]


@pytest.mark.parametrize("door", KINDS)
def test_a_timeout(served: Served, door: str) -> None:
    key = time_out(served, f"timed-{door}")
    assert told(served, key, "deadline_exceeded 504") == [f"transaction {key} deadline_exceeded 504"]


@pytest.mark.parametrize("door", KINDS)
def test_a_shutdown(doomed: Served, door: str) -> None:
    key = new_key()
    assert doomed.answer_of_its_end(key, request(f"/{door}/work/{key}", key)).status == 503
    assert [event for event in doomed.events("sentry") if event.startswith(f"event {key} ")] == []


def test_an_error_of_the_application_is_told(served: Served) -> None:
    key = new_key()
    served.expected.add("ZeroDivisionError")
    assert served.ask(f"/broken/divide/{key}", key).status == 500
    assert told(served, key, "internal_error 500")[0] == f"event {key} error ZeroDivisionError"
