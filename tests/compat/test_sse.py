"""sse-starlette behind the doors: it hears of the client first, and ends in its own way."""

from __future__ import annotations

import pytest

from tests.compat.doors import ALL
from tests.compat.served import Served, is_whole
from tests.servers import new_key, request


@pytest.mark.parametrize("door", ALL)
def test_a_hang_up_ends_the_stream_in_its_own_way(served: Served, door: str) -> None:
    key = served.hang_up(f"/{door}/ticks", after="started")
    events = served.wait_for(key, "billed")
    assert sorted(events) == ["billed", "cancelled", "cleaned up", "closed by http.disconnect", "started"]


@pytest.mark.parametrize("door", ALL)
def test_a_stream_that_ends_is_whole(served: Served, door: str) -> None:
    key = new_key()
    raw = served.read_until_closed(f"/{door}/three", key)
    assert raw.count(b"data: ") == 3
    assert is_whole(raw)
    served.wait_for(key, "billed")


@pytest.mark.parametrize("door", ["timed-mw", "timed-route"])
def test_a_timeout_says_so_in_the_last_event(served: Served, door: str) -> None:
    key = new_key()
    last = served.read_until_closed(f"/{door}/ticks", key).split(b"data: ")[-2:]
    assert last[0].endswith(b"event: cancelled\n")
    assert b'"reason": "timeout"' in last[1]
    assert served.wait_for(key, "cleaned up", "billed").count("cancelled") == 1


@pytest.mark.parametrize("door", ALL)
def test_a_shutdown_ends_the_stream(doomed: Served, door: str) -> None:
    # sse-starlette's own: it ends its response without a last chunk.
    doomed.expected.add("ASGI callable returned without completing response")
    key = new_key()
    with doomed.connect() as connection:
        connection.send(request(f"/{door}/ticks", key))
        doomed.wait_for(key, "started")
        doomed.begin_to_stop()
        doomed.wait()
    assert {"billed", "cleaned up"} <= set(doomed.events(key))
