"""Packages that decorate endpoints work in either order with our decorator, and behind the other doors."""

from __future__ import annotations

import pytest

from tests.compat.doors import ALL, KINDS, TIMED
from tests.compat.served import Served
from tests.servers import new_key, request

ORDERS = ("above", "below")
INJECTED = tuple(f"{package}/{order}" for package in ("wired", "dishka") for order in ORDERS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("door", ALL)
def test_slowapi_limits(served: Served, door: str, order: str) -> None:
    served.expected.add("WARNING slowapi: ratelimit")  # with and without us
    key = new_key()
    assert [served.ask(f"/{door}/limited/{order}", key).status for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize("kind", ["base", "asgi"])
def test_a_hang_up_stops_the_handler_behind_the_middleware_of_slowapi(served: Served, kind: str) -> None:
    key = served.hang_up(f"/slowapi-{kind}/work", after="started")
    assert served.wait_for(key, "cleaned up") == ["started", "cancelled", "cleaned up"]


@pytest.mark.parametrize("kind", ["base", "asgi"])
def test_a_timeout_is_answered_504_behind_the_middleware_of_slowapi(served: Served, kind: str) -> None:
    key = new_key()
    assert served.ask(f"/timed-slowapi-{kind}/work", key).status == 504
    assert served.wait_for(key, "cleaned up") == ["started", "cancelled", "cleaned up"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("door", ALL)
def test_what_is_cached_is_computed_once(served: Served, door: str, order: str) -> None:
    name = new_key()
    for _ in range(3):
        assert served.ask(f"/{door}/cached/{order}/{name}").json() == {"name": name}
    assert served.events(name) == ["computed"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("door", KINDS)
def test_a_hang_up_while_it_is_computed_leaves_nothing_in_the_cache(served: Served, door: str, order: str) -> None:
    name = new_key()
    with served.connect() as connection:
        connection.send(request(f"/{door}/cached/{order}/{name}?slowly=true"))
        served.wait_for(name, "started")
        connection.reset()
    served.wait_for(name, "cleaned up")
    assert served.ask(f"/{door}/cached/{order}/{name}?slowly=true").json() == {"name": name}
    assert served.events(name) == ["computed", "started", "cancelled", "cleaned up", "computed"]


@pytest.mark.parametrize("path", INJECTED)
@pytest.mark.parametrize("door", KINDS)
def test_a_hang_up_closes_what_was_injected(served: Served, door: str, path: str) -> None:
    key = served.hang_up(f"/{door}/{path}", after="started")
    assert served.wait_for(key, "session closed") == ["started", "cancelled", "cleaned up", "session closed"]


@pytest.mark.parametrize("path", INJECTED)
@pytest.mark.parametrize("door", TIMED)
def test_a_timeout_closes_what_was_injected(served: Served, door: str, path: str) -> None:
    key = new_key()
    assert served.ask(f"/{door}/{path}", key).status == 504
    assert served.wait_for(key, "session closed") == ["started", "cancelled", "cleaned up", "session closed"]


@pytest.mark.parametrize("path", ["retried/below", "retried/inside"])
@pytest.mark.parametrize("door", KINDS)
def test_a_cancellation_is_not_tried_again(served: Served, door: str, path: str) -> None:
    key = served.hang_up(f"/{door}/{path}", after="started")
    assert served.wait_for(key, "cleaned up") == ["attempt", "started", "cancelled", "cleaned up"]
    served.ask(f"/{door}/limited/above", key)
    assert served.events(key).count("attempt") == 1


@pytest.mark.parametrize("path", ["retried/below", "retried/inside"])
@pytest.mark.parametrize("door", TIMED)
def test_a_timeout_is_not_tried_again(served: Served, door: str, path: str) -> None:
    key = new_key()
    assert served.ask(f"/{door}/{path}", key).status == 504
    assert served.events(key) == ["attempt", "started", "cancelled", "cleaned up"]


@pytest.mark.parametrize("path", ["work", "dishka/above", "dishka/below", "retried/below"])
def test_a_shutdown_is_answered_503(doomed: Served, path: str) -> None:
    keys = {door: new_key() for door in KINDS}
    connections = []
    for door, key in keys.items():
        connections.append(doomed.open(request(f"/{door}/{path}", key)))
        doomed.wait_for(key, "started")
    doomed.begin_to_stop()
    assert [connection.response().status for connection in connections] == [503] * len(KINDS)
    doomed.wait()
    for connection in connections:
        connection.close()
    for key in keys.values():
        assert "cleaned up" in doomed.events(key)
