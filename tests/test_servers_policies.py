"""Timeout policies on real servers."""

from __future__ import annotations

import pytest

from tests.server_policies import LONGER, SHORT
from tests.servers import Server, new_key, request

pytest_plugins = ["tests.servers"]
pytestmark = pytest.mark.one_server("shared_server")


def test_the_default_policy_is_answered_with_its_status(server: Server) -> None:
    key = new_key()
    assert server.ask("/policies/default", key).status == 504
    assert server.journal(key, "ended") == ["started", "cancelled", "status:504", "ended"]


@pytest.mark.parametrize("how", ["chosen", "decorated"])
def test_a_policy_with_a_status_and_a_writer_of_its_own(server: Server, how: str) -> None:
    key = new_key()
    response = server.ask(f"/policies/{how}", key)
    assert (response.status, response.json()) == (503, {"try": "again later", "why": "timeout"})
    assert server.journal(key, "ended") == ["started", "cancelled", "status:503", "ended"]


@pytest.mark.parametrize("how", ["none", "extended", "disabled"])
def test_a_timeout_that_is_switched_off_or_moved_while_it_runs(server: Server, how: str) -> None:
    response = server.ask(f"/policies/{how}?seconds={LONGER}")
    assert (response.status, response.json()) == (200, "done")


def test_an_advisory_policy_only_logs_and_counts(server: Server) -> None:
    before, key = server.log(), new_key()
    exceeded = server.ask("/policies/exceeded").json()
    assert server.ask(f"/policies/advisory?seconds={LONGER}", key).status == 200
    server.journal(key, "ended")
    assert server.ask("/policies/exceeded").json() == exceeded + 1
    assert f"longer than its advisory limit of {SHORT:g} s" in server.log().removeprefix(before)


@pytest.mark.parametrize("how", ["none", "advisory"])
def test_a_hang_up_stops_work_that_no_timeout_does(server: Server, how: str) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(request(f"/policies/{how}", key))
    server.journal(key, "started")
    connection.reset()
    assert server.journal(key, "ended") == ["started", "cancelled", "status:499", "ended"]
