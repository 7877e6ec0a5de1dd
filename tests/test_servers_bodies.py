"""Request and response bodies on real servers: whole, in order, bounded, and read only when the application asks."""

import functools
import hashlib
import itertools
from contextlib import closing

import pytest

from tests.servers import DOORS, WORKING, Connection, Response, Server, let_it_listen, new_key, request

pytest_plugins = ["tests.servers"]
pytestmark = pytest.mark.one_server("shared_server")

MIB = 2**20
CANCELLING = tuple(door for door in DOORS if door != "event")
BODY = b'{"numbers": [1, 2, 3]}'
JSON: dict[str, str | int] = {"content_type": "application/json", "content_length": len(BODY)}
every_door = pytest.mark.parametrize("door", DOORS)


def random_like(size: int) -> bytes:
    """Bytes in which no two blocks are alike, so that a lost or repeated chunk changes the hash."""
    blocks = (hashlib.sha512(str(number).encode()).digest() for number in itertools.count())
    return b"".join(itertools.islice(blocks, size // 64))


RAW = random_like(MIB)


@functools.cache
def digest_of(data: bytes | memoryview) -> dict[str, object]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("gap", [None, 0, 1, 30], ids=["one-packet", "two-packets", "a-ms-later", "while-listening"])
@every_door
def test_a_json_body_arrives(server: Server, door: str, gap: int | None) -> None:
    head = request(f"/{door}/json", x_before=WORKING, **JSON)
    with closing(server.connect()) as connection:
        if gap is None:
            connection.send(head + BODY)
        else:
            connection.send(head)
            for _ in range(gap):
                server.ask("/bare/work")
            connection.send(BODY)
        assert connection.response().json() == {"total": 6}


@every_door
def test_a_hang_up_after_a_json_body(server: Server, door: str) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(request(f"/{door}/json", key, x_before="forever", **JSON), BODY)
    server.journal(key, "started")
    connection.reset()
    events = server.journal(key, "ended")
    status = "status:200" if door == "event" else "status:499"
    assert events == ["started", "cancelled:DISCONNECT", status, "ended"]


@every_door
def test_a_handler_never_sees_half_a_json_body(server: Server, door: str) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(request(f"/{door}/json", key, **JSON), BODY[:10])
    server.ask("/bare/work", x_before=WORKING)
    connection.reset()
    events = server.journal(key, "ended")
    # Before the handler runs it is FastAPI that reads, and answers 400, unless a door around it all says why.
    assert events == ["status:499" if door in ("mw", "route") else "status:400", "ended"]


@pytest.mark.parametrize("work", ["0", WORKING])
@every_door
def test_a_raw_body_in_pieces(server: Server, door: str, work: str) -> None:
    with closing(server.connect()) as connection:
        connection.send(request(f"/{door}/raw", content_length=len(RAW), x_before=work), *pieces(RAW, 10_000))
        assert connection.response().json() == digest_of(RAW)


@every_door
def test_a_streamed_upload(server: Server, door: str) -> None:
    data = RAW * 8
    with closing(server.connect()) as connection:
        connection.send(request(f"/{door}/upload", content_length=len(data), x_before=WORKING), data)
        assert connection.response().json() == digest_of(data)


@pytest.mark.parametrize("door", CANCELLING)
def test_a_hang_up_in_the_middle_of_an_upload(server: Server, door: str) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(request(f"/{door}/upload", key, content_length=len(RAW)), RAW[: MIB // 2])
    server.journal(key, "started")
    server.ask("/bare/work", x_before=WORKING)
    connection.reset()
    events = server.journal(key, "ended")
    # It waits for its body, and hears of the disconnect as without us.
    assert events == ["started", "told:DISCONNECT", "status:499", "ended"]


@every_door
def test_a_streamed_download_without_work(server: Server, door: str) -> None:
    key = new_key()
    with closing(server.connect()) as connection:
        connection.send(request(f"/{door}/download", key, x_after="gate"))
        check_download(server, connection, key)


@every_door
def test_a_streamed_download_after_work(server: Server, door: str) -> None:
    key = new_key()
    with closing(server.connect()) as connection:
        connection.send(request(f"/{door}/download", key, x_before="gate", x_after="gate"))
        server.journal(key, "started")
        let_it_listen(server)
        server.open_gate(key)
        check_download(server, connection, key)


def check_download(server: Server, connection: Connection, key: str) -> None:
    """The stream goes on after a pause, in which whoever mistakes something for a disconnect has time to cut it."""
    response = connection.head()
    let_it_listen(server)
    server.open_gate(f"{key}-after")
    connection.finish(response)
    assert len(response.body) == 8 * MIB
    assert hashlib.sha256(response.body).hexdigest() == response.headers["x-sha256"]


@functools.cache
def big() -> bytes:
    return RAW * 64


@every_door
def test_a_slow_upload_is_held_back_in_bounded_memory(server: Server, door: str) -> None:
    key, data = new_key(), memoryview(big())
    with closing(server.connect()) as connection:
        connection.send(request(f"/{door}/upload", key, content_length=len(data), x_before="gate"))
        server.journal(key, "started")
        before = server.rss()
        sent = send_until_it_stalls(server, connection, data)
        assert sent < 32 * MIB
        assert server.rss() - before < 16 * MIB
        server.open_gate(key)
        assert peak_while_sending(server, connection, data[sent:]) - before < 16 * MIB
        assert connection.response().json() == digest_of(data)


def send_until_it_stalls(server: Server, connection: Connection, data: memoryview) -> int:
    """How much the server takes: it takes no more when it answered others twenty times and still took nothing."""
    sent, stalled = 0, 0
    connection.socket.setblocking(False)
    while sent < len(data) and stalled < 20:
        if connection.can_send():
            sent += connection.socket.send(data[sent : sent + MIB])
            stalled = 0
        else:
            server.ask("/bare/work")
            stalled += 1
    connection.socket.setblocking(True)
    return sent


def peak_while_sending(server: Server, connection: Connection, data: memoryview) -> int:
    peak = 0
    for start in range(0, len(data), MIB):
        connection.send(data[start : start + MIB])
        peak = max(peak, server.rss())
    return peak


def expect_continue(server: Server, connection: Connection, target: str) -> Response:
    connection.send(request(target, x_before=WORKING, content_length=MIB, expect="100-continue"))
    return connection.head()


@every_door
def test_a_refused_body_is_not_asked_for(server: Server, door: str) -> None:
    with closing(server.connect()) as connection:
        response = expect_continue(server, connection, f"/{door}/refuse")
        if not server.variant.asks_for_bodies:
            assert response.status == 100
            response = connection.head()
        assert response.status == 413
        assert connection.finish(response).json() == {"detail": "too large"}


@every_door
def test_a_body_that_is_wanted_is_asked_for(server: Server, door: str) -> None:
    with closing(server.connect()) as connection:
        assert expect_continue(server, connection, f"/{door}/upload").status == 100
        connection.send(RAW)
        assert connection.response().json() == digest_of(RAW)
