"""A plain stream behind the doors: what it was to release afterwards is released, however it ended."""

from __future__ import annotations

import pytest

from tests.compat.doors import ALL
from tests.compat.served import Served, is_whole
from tests.servers import new_key, request

PATHS = ("own", "injected")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("door", ALL)
def test_the_background_of_a_stream_runs_when_its_client_leaves(served: Served, door: str, path: str) -> None:
    key = served.hang_up(f"/{door}/{path}", after="started")
    events = served.wait_for(key, "billed")
    assert "cleaned up" in events
    assert "finished" not in events


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("door", ["timed-mw", "timed-route"])
def test_the_background_of_a_stream_runs_when_its_time_is_up(served: Served, door: str, path: str) -> None:
    key = new_key()
    assert not is_whole(served.read_until_closed(f"/{door}/{path}", key))
    assert "cleaned up" in served.wait_for(key, "billed")


def test_the_background_of_a_stream_runs_when_its_server_stops(doomed: Served) -> None:
    key = new_key()
    connection = doomed.open(request("/mw/own", key))
    doomed.wait_for(key, "started")
    doomed.begin_to_stop()
    doomed.wait()
    connection.close()
    assert {"cleaned up", "billed"} <= set(doomed.events(key))
