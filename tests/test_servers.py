"""Hang-ups, timeouts and ordinary traffic on real servers, through every door and under common middleware."""

import gzip
import hashlib
from contextlib import closing

import pytest

from tests.servers import DOORS, Server, new_key, request

pytest_plugins = ["tests.servers"]
pytestmark = pytest.mark.one_server("shared_server", others=True)

CANCELLING = tuple(door for door in DOORS if door != "event")
BODY = b'{"numbers": [1, 2, 3]}'
COVERED = ("mounted", "inside")
STACKS = (*COVERED, "outside", "web")
TIMED = ("timed-deco", "timed-dep", "timed-route", "timed/bare", *(f"timed/{door}" for door in CANCELLING))


def status_of_a_hang_up(door: str) -> str:
    """A handler that waits for the event answers as it likes; every other door answers 499."""
    return "status:200" if door == "event" else "status:499"


def hang_up_during_work(server: Server, target: str, leave: str = "reset") -> list[str]:
    key = new_key()
    connection = server.connect()
    connection.send(request(f"{target}/work", key, x_before="forever"))
    server.journal(key, "started")
    getattr(connection, leave)()
    return server.journal(key, "ended")


@pytest.mark.parametrize("leave", ["reset", "close"])
@pytest.mark.parametrize("door", DOORS)
def test_a_hang_up_stops_the_handler_and_metrics_see_it(server: Server, door: str, leave: str) -> None:
    events = hang_up_during_work(server, f"/{door}", leave)
    assert events == ["started", "cancelled:DISCONNECT", status_of_a_hang_up(door), "ended"]


@pytest.mark.parametrize(
    ("stack", "door"),
    # Where a middleware stops the handler and the event tells it to stop, either may come first.
    [(stack, door) for stack in STACKS for door in DOORS if stack not in COVERED or door != "event"],
)
def test_a_hang_up_stops_the_handler_under_other_middleware(server: Server, stack: str, door: str) -> None:
    events = hang_up_during_work(server, f"/{stack}/{door}")
    assert events == ["started", "cancelled:DISCONNECT", status_of_a_hang_up(door), "ended"]


@pytest.mark.parametrize("target", TIMED)
def test_a_timeout_is_answered_504(server: Server, target: str) -> None:
    key = new_key()
    response = server.ask(f"/{target}/work", key, x_before="forever")
    assert response.status == 504
    assert list(response.json()) == ["detail"]
    assert server.journal(key, "ended") == ["started", "cancelled:TIMEOUT", "status:504", "ended"]


@pytest.mark.parametrize("door", DOORS)
def test_gzip_and_cors_do_their_work(server: Server, door: str) -> None:
    response = server.ask(f"/web/{door}/download", x_before="0.03", origin="http://elsewhere", accept_encoding="gzip")
    assert response.headers["access-control-allow-origin"] == "*"
    assert hashlib.sha256(gzip.decompress(response.body)).hexdigest() == response.headers["x-sha256"]


@pytest.mark.parametrize("door", ["timed-deco", "timed-dep", "timed-route"])
def test_a_timeout_has_cors_headers(server: Server, door: str) -> None:
    response = server.ask(f"/web/{door}/work", x_before="forever", origin="http://elsewhere")
    assert (response.status, response.headers["access-control-allow-origin"]) == (504, "*")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("stack", STACKS)
def test_an_ordinary_request_passes_under_other_middleware(server: Server, stack: str, door: str) -> None:
    response = server.ask(f"/{stack}/{door}/json", "", BODY, x_before="0.03", content_type="application/json")
    assert response.json() == {"total": 6}


def test_200_requests_on_one_connection(server: Server) -> None:
    key = new_key()
    with closing(server.connect()) as connection:
        for number in range(200):
            work = "0.02" if number % 2 else "0"
            connection.send(request(f"/{DOORS[number // 2 % len(DOORS)]}/work", key, x_before=work))
            assert connection.response().json() == {"ok": True}, f"request {number}"
    assert set(server.journal(key, "ended", 200)) == {"started", "finished", "status:200", "ended"}


@pytest.mark.parametrize("work", ["0", "0.03"])
@pytest.mark.parametrize("door", DOORS)
def test_a_handler_that_polls_is_told_the_truth(server: Server, door: str, work: str) -> None:
    assert server.ask(f"/{door}/poll", x_before=work).json() == {"left": [False, False, False]}


@pytest.mark.parametrize("door", DOORS)
def test_pipelined_requests(server: Server, door: str) -> None:
    first, second = new_key(), new_key()
    with closing(server.connect()) as connection:
        connection.send(request(f"/{door}/work", first, x_before="0.03") + request(f"/{door}/work", second))
        assert [connection.response().status for _ in range(2)] == [200, 200]
    assert "finished" in server.journal(first, "ended")
    assert "finished" in server.journal(second, "ended")


@pytest.mark.parametrize("stack", ["", "/inside", "/mounted"])
@pytest.mark.parametrize("door", DOORS)
def test_background_tasks_outlive_a_client_that_leaves_with_its_response(server: Server, stack: str, door: str) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(request(f"{stack}/{door}/background", key, x_before="0.03"))
    assert connection.response().status == 200
    server.journal(key, "background")
    connection.reset()
    server.ask("/bare/work", x_before="0.03")
    server.open_gate(key)
    events = server.journal(key, "ended")
    assert sorted(events) == ["background", "background_done", "ended", "finished", "started", "status:200"]


def test_300_hang_ups_at_once(server: Server) -> None:
    key = new_key()
    connections = [server.connect() for _ in range(300)]
    for number, connection in enumerate(connections):
        connection.send(request(f"/{CANCELLING[number % len(CANCELLING)]}/work", key, x_before="forever"))
    server.journal(key, "started", 300)
    for connection in connections:
        connection.reset()
    events = server.journal(key, "ended", 300)
    assert events.count("cancelled:DISCONNECT") == events.count("status:499") == 300


def test_20_hang_ups_leave_one_line_each_and_no_complaint(server: Server) -> None:
    before = server.log()
    for _ in range(20 // len(CANCELLING)):
        for door in CANCELLING:
            hang_up_during_work(server, f"/{door}")
    new = server.log().removeprefix(before).splitlines()
    assert [line.split(":")[0] for line in new] == ["INFO cancelable_deps"] * 20


@pytest.mark.parametrize("door", CANCELLING)
def test_a_half_closed_client_has_left_because_the_server_says_so(server: Server, door: str) -> None:
    answered = server.variant.answers_half_closed
    heard, plain, covered = new_key(), new_key(), new_key()
    assert half_closed(server, "/listen", heard, "heard") == (200 if answered else None)
    assert half_closed(server, "/bare/work", plain, "ended", x_before="gate") == (200 if answered else None)
    assert half_closed(server, f"/{door}/work", covered, "ended", x_before="forever") == (499 if answered else None)
    assert server.journal(covered, "ended") == ["started", "cancelled:DISCONNECT", "status:499", "ended"]


def half_closed(server: Server, target: str, key: str, event: str, **headers: str) -> int | None:
    """The status that a client gets which shut down its sending side while the handler worked."""
    with closing(server.connect()) as connection:
        connection.send(request(target, key, **headers))
        server.journal(key, "started")
        connection.half_close()
        server.open_gate(key)
        server.journal(key, event)
        line = connection.line()
    return int(line.split()[1]) if line else None
