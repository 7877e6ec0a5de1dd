"""Django, mounted behind the middleware: its view is cancelled once, and its signals fire."""

from __future__ import annotations

import pytest

from tests.compat.served import Served
from tests.servers import new_key, request

STACKS = ("bare", "mw")


@pytest.mark.parametrize("stack", STACKS)
def test_a_hang_up_cancels_the_view_once(served: Served, stack: str) -> None:
    key = served.hang_up(f"/{stack}/d/work", after="started")
    events = served.wait_for(key, "cleaned up", "request finished")
    assert events == ["started", "cancelled", "cleaned up", "request finished"]


@pytest.mark.parametrize("stack", STACKS)
def test_a_hang_up_ends_a_stream(served: Served, stack: str) -> None:
    key = served.hang_up(f"/{stack}/d/stream", after="started")
    assert served.wait_for(key, "cleaned up") == ["started", "cancelled", "cleaned up"]


def test_a_timeout_is_answered_504(served: Served) -> None:
    key = new_key()
    assert served.ask("/timed-mw/d/work", key).status == 504
    events = served.wait_for(key, "cleaned up", "request finished")
    assert events == ["started", "cancelled", "cleaned up", "request finished"]


@pytest.mark.parametrize("stack", [*STACKS, "timed-mw"])
def test_an_ordinary_request_is_answered(served: Served, stack: str) -> None:
    assert served.ask(f"/{stack}/d/ping").body == b"pong"


def test_a_shutdown_is_answered_503(doomed: Served) -> None:
    key = new_key()
    assert doomed.answer_of_its_end(key, request("/mw/d/work", key)).status == 503
    assert doomed.events(key) == ["started", "cancelled", "cleaned up", "request finished"]
