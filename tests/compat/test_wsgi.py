"""WSGI applications behind the middleware are treated as a worker thread: nothing interrupts them, and they are waited for."""

from __future__ import annotations

import pytest

from tests.compat.served import Served
from tests.servers import new_key, request

KINDS = ("flask", "django", "own")
BARE = tuple(f"bare-{kind}" for kind in KINDS)
COVERED = tuple(f"mw-{kind}" for kind in KINDS)
WORKERS = 2
UPLOAD = bytes(700_000)


def open_gate(served: Served, key: str) -> None:
    assert served.ask(f"/bare-flask/gate/{key}", "", b"").status == 200


@pytest.mark.parametrize("stack", [*BARE, *COVERED])
def test_after_as_many_hang_ups_as_it_has_workers_the_mount_answers(served: Served, stack: str) -> None:
    keys = [served.hang_up(f"/{stack}/w/work", after="started") for _ in range(WORKERS)]
    for key in keys:
        open_gate(served, key)
        served.wait_for(key, "finished")
    assert served.ask(f"/{stack}/w/ping").body == b"pong"


@pytest.mark.parametrize("stack", ["bare-flask", "mw-flask", "bare-own", "mw-own"])
def test_after_as_many_dropped_streams_as_it_has_workers_the_mount_answers(served: Served, stack: str) -> None:
    keys = [served.hang_up(f"/{stack}/w/stream", after="started") for _ in range(WORKERS)]
    if stack.endswith("flask"):
        for key in keys:
            served.wait_for(key, "closed")
    assert served.ask(f"/{stack}/w/ping").body == b"pong"


@pytest.mark.parametrize("kind", KINDS)
def test_a_timeout_before_anything_was_sent_is_answered_504(served: Served, kind: str) -> None:
    key = new_key()
    with served.connect() as connection:
        connection.send(request(f"/timed-{kind}/w/work", key))
        served.wait_for(key, "started")
        # It began later, so the time of the other is up as well.
        assert served.ask(f"/timed-{kind}/forever").status == 504
        assert served.events(key) == ["started"]
        open_gate(served, key)
        assert connection.response().status == 504
    served.wait_for(key, "finished")


def test_a_shutdown_waits_for_the_thread_and_is_answered_503(doomed: Served) -> None:
    key = new_key()
    connection, other = doomed.open(request("/mw-flask/w/work", key)), doomed.open(request("/mw-flask/forever"))
    doomed.wait_for(key, "started")
    doomed.begin_to_stop()
    assert other.response().status == 503
    assert doomed.events(key) == ["started"]
    doomed.tell("open")
    assert connection.response().status == 503
    connection.close()
    other.close()
    doomed.wait()
    assert doomed.events(key) == ["started", "finished"]


@pytest.mark.parametrize("stack", ["bare-flask", "mw-flask", "timed-flask", "mw-own"])
def test_an_upload_arrives_whole(served: Served, stack: str) -> None:
    assert served.ask(f"/{stack}/w/upload", "", UPLOAD).body == str(len(UPLOAD)).encode()
