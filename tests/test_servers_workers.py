"""Threads and processes on real servers: hang-ups, timeouts, and the end of the server itself."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.server_workers import LIMIT
from tests.servers import VARIANTS, Server, new_key, request
from tests.test_processes import has_ended, wait_until

pytest_plugins = ["tests.servers"]
pytestmark = pytest.mark.one_server("shared_server")

DOORS = ("deco", "route", "mw", "dep")
TIMED = ("timed-deco", "timed-route", "timed-mw")


@pytest.fixture
def told(tmp_path: Path) -> Path:
    return tmp_path / "told"


def worker_in(told: Path) -> int:
    wait_until(told.exists)
    return int(told.read_text())


@pytest.mark.parametrize("door", DOORS)
def test_a_hang_up_stops_a_thread_that_checks(server: Server, door: str) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(request(f"/workers/{door}/thread", key))
    server.journal(key, "started")
    connection.reset()
    assert server.journal(key, "ended") == ["started", "stopped:disconnect", "status:499", "ended"]


def test_a_hang_up_is_seen_by_a_thread_that_asks(server: Server) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(request("/workers/event/thread", key))
    server.journal(key, "started")
    connection.reset()
    assert server.journal(key, "ended") == ["started", "finished", "stopped:disconnect", "status:200", "ended"]


@pytest.mark.parametrize("door", TIMED)
def test_a_timeout_stops_a_thread_that_checks(server: Server, door: str) -> None:
    key = new_key()
    response = server.ask(f"/workers/{door}/thread", key)
    assert (response.status, response.json()) == (504, {"detail": f"Timed out after {LIMIT:g} seconds"})
    assert server.journal(key, "ended") == ["started", "stopped:timeout", "status:504", "ended"]


def test_an_abandoned_thread_is_answered_for_at_once(server: Server, told: Path) -> None:
    key = new_key()
    assert server.ask(f"/workers/abandoned?told={told}", key).status == 504
    assert server.journal(key, "ended") == ["started", "status:504", "ended"]
    told.touch()
    assert server.journal(key, "finished")[-1] == "finished"


@pytest.mark.parametrize("door", DOORS)
def test_a_hang_up_kills_the_process(server: Server, door: str, told: Path) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(request(f"/workers/{door}/process?told={told}", key))
    worker = worker_in(told)
    server.ask("/bare/work", x_before="0.03")
    connection.reset()
    assert server.journal(key, "ended") == ["status:499", "ended"]
    assert not psutil.pid_exists(worker)


@pytest.mark.parametrize("door", TIMED)
def test_a_timeout_kills_the_process(server: Server, door: str, told: Path) -> None:
    # One that is idle is taken at once, so that the job gets to its work before the time is up.
    server.ask("/workers/dep/process-id")
    assert server.ask(f"/workers/{door}/process?told={told}").status == 504
    assert not told.exists() or not psutil.pid_exists(int(told.read_text()))


def test_a_process_is_used_again(server: Server) -> None:
    assert len({server.ask("/workers/dep/process-id").json() for _ in range(5)}) == 1


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.name)
def own_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    server = Server(request.param, tmp_path / "log")
    yield server
    for process in all_of(server):
        process.kill()
    server.wait()


def all_of(server: Server) -> list[psutil.Process]:
    if not psutil.pid_exists(server.pid):
        return []
    main = psutil.Process(server.pid)
    return [process for process in (main, *main.children(recursive=True)) if process.status() != "zombie"]


@pytest.mark.real
def test_no_process_is_left_when_the_server_is_stopped(own_server: Server) -> None:
    idle = own_server.ask("/workers/dep/process-id").json()
    assert not has_ended(idle)
    own_server.stop()
    wait_until(lambda: has_ended(idle))


@pytest.mark.real
def test_no_process_is_left_when_the_server_is_killed(own_server: Server, told: Path) -> None:
    with closing(own_server.connect()) as connection:
        connection.send(request(f"/workers/dep/process?told={told}"))
        busy = worker_in(told)
        idle = own_server.ask("/workers/dep/process-id").json()
        for process in all_of(own_server):
            if process.pid not in (busy, idle):
                process.kill()
    wait_until(lambda: has_ended(busy) and has_ended(idle))
