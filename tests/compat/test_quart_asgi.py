"""Quart, mounted behind the middleware: it hears of the client itself, and cancels its own work."""

from __future__ import annotations

import pytest

from tests.compat.served import Served
from tests.servers import new_key, request

STACKS = ("bare", "mw")
UPLOAD = bytes(700_000)


@pytest.mark.parametrize("path", ["work", "stream"])
@pytest.mark.parametrize("stack", STACKS)
def test_a_hang_up_cancels_the_work_once(served: Served, stack: str, path: str) -> None:
    key = served.hang_up(f"/{stack}/q/{path}", after="started")
    assert served.wait_for(key, "cleaned up") == ["started", "cancelled", "cleaned up"]


def test_a_timeout_is_answered_504(served: Served) -> None:
    key = new_key()
    assert served.ask("/timed-mw/q/work", key).status == 504
    assert served.wait_for(key, "cleaned up") == ["started", "cancelled", "cleaned up"]


@pytest.mark.parametrize("stack", [*STACKS, "timed-mw"])
def test_ordinary_requests_are_answered(served: Served, stack: str) -> None:
    assert served.ask(f"/{stack}/q/ping").body == b"pong"
    assert served.ask(f"/{stack}/q/upload", "", UPLOAD).body == str(len(UPLOAD)).encode()


def test_a_shutdown_is_answered_503(doomed: Served) -> None:
    key = new_key()
    assert doomed.answer_of_its_end(key, request("/mw/q/work", key)).status == 503
    assert doomed.events(key) == ["started", "cancelled", "cleaned up"]
