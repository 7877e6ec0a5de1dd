"""Whoever watches the answers sees the same ones, inside of our middleware and outside, and behind the other doors."""

from __future__ import annotations

import re
from uuid import uuid4

import pytest

from tests.compat.served import Served
from tests.servers import new_key, request

PLACES = ("inside", "outside", "route", "deco")


def hang_up(served: Served, app: str) -> str:
    """Leave a request of which the last part of the path is its key."""
    key = new_key()
    with served.connect() as connection:
        connection.send(request(f"/{app}/work/{key}", key))
        served.wait_for(key, "started")
        connection.reset()
    served.wait_for(key, "cleaned up")
    return key


def time_out(served: Served, app: str) -> str:
    key = new_key()
    assert served.ask(f"/{app}/work/{key}", key).status == 504
    return key


def counted(served: Served, app: str, status: int) -> bool:
    text = served.ask(f"/{app}/metrics").body.decode()
    found = re.search(rf'^http_requests_total{{.*status="{status}".*}} (\S+)$', text, re.MULTILINE)
    return found is not None and float(found[1]) >= 1


@pytest.mark.parametrize("place", PLACES)
def test_prometheus_counts_a_hang_up_as_499(served: Served, place: str) -> None:
    app = f"prometheus-{place}"
    hang_up(served, app)
    # The line about the request comes before its answer; the next request of the loop after it.
    for _ in range(200):
        if counted(served, app, 499):
            break
    assert counted(served, app, 499)


@pytest.mark.parametrize("place", PLACES)
def test_prometheus_counts_a_timeout_as_504(served: Served, place: str) -> None:
    time_out(served, f"prometheus-timed-{place}")
    assert counted(served, f"prometheus-timed-{place}", 504)


def span_of(served: Served, key: str, words: str) -> list[str]:
    """The spans of a request, as soon as the one with ``words`` is among them."""
    return [event for event in served.wait_for("otel", f"{key} {words}") if event.startswith(f"{key} ")]


@pytest.mark.parametrize("place", PLACES)
def test_the_span_of_a_hang_up_is_no_error(served: Served, place: str) -> None:
    key = hang_up(served, f"opentelemetry-{place}")
    assert len(span_of(served, key, "GET /work/{name} 499 UNSET")) == 1


@pytest.mark.parametrize("place", PLACES)
def test_the_span_of_a_timeout_is_an_error(served: Served, place: str) -> None:
    key = time_out(served, f"opentelemetry-timed-{place}")
    assert len(span_of(served, key, "GET /work/{name} 504 ERROR")) == 1


@pytest.mark.parametrize("place", PLACES)
def test_sentry_is_told_of_no_error_by_a_hang_up(served: Served, place: str) -> None:
    key = hang_up(served, f"sentry-{place}")
    events = served.wait_for("sentry", f"transaction {key} invalid_argument 499")
    assert [event for event in events if key in event] == [f"transaction {key} invalid_argument 499"]


@pytest.mark.parametrize("place", PLACES)
def test_sentry_sees_a_timeout_as_504(served: Served, place: str) -> None:
    key = time_out(served, f"sentry-timed-{place}")
    transaction = f"transaction {key} deadline_exceeded 504"
    events = served.wait_for("sentry", transaction)
    # These raise it through the application, as `raise HTTPException(504)` would be.
    reported = [f"event {key} error TimeoutCancelation"] if place in ("deco", "route") else []
    assert [event for event in events if key in event] == [*reported, transaction]


@pytest.mark.parametrize("place", PLACES)
def test_a_504_has_the_id_of_its_request_and_so_has_our_line(served: Served, place: str) -> None:
    key = new_key()
    ours = uuid4().hex
    response = served.ask(f"/correlation-timed-{place}/work/{key}", key, x_request_id=ours)
    assert response.status == 504
    assert response.headers["x-request-id"] == ours
    lines = [line for line in served.log().splitlines() if "cancelled after" in line and ours in line]
    assert len(lines) == 1


@pytest.mark.parametrize("place", PLACES)
def test_our_line_of_a_hang_up_has_the_id_of_its_request(served: Served, place: str) -> None:
    key = new_key()
    ours = uuid4().hex
    with served.connect() as connection:
        connection.send(request(f"/correlation-{place}/work/{key}", key, x_request_id=ours))
        served.wait_for(key, "started")
        connection.reset()
    served.wait_for(key, "cleaned up")
    served.ask(f"/correlation-{place}/ping")
    assert re.search(rf"^INFO cancelable_deps: .*disconnect.*\[id {ours}\]$", served.log(), re.MULTILINE)


@pytest.mark.parametrize("place", PLACES)
def test_a_503_of_a_shutdown_has_the_id_of_its_request(doomed: Served, place: str) -> None:
    key = new_key()
    ours = "a" * 32
    with doomed.connect() as connection:
        connection.send(request(f"/correlation-{place}/work/{key}", key, x_request_id=ours))
        doomed.wait_for(key, "started")
        doomed.begin_to_stop()
        response = connection.response()
        assert (response.status, response.headers["x-request-id"]) == (503, ours)
    doomed.wait()
