"""WebSockets on real servers, through every door: drops, close codes, replay, and a quiet log."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from tests.server_workers import LIMIT
from tests.servers import HYPERCORN, PATIENCE, UVICORN, Server, Variant, new_key, started, without_complaints
from tests.socket_client import SocketClient

pytestmark = pytest.mark.one_server("server", others=True)

APP = "tests.socket_app:app"
VARIANTS = [
    Variant("uvicorn-websockets-asyncio", f"{UVICORN} --ws auto --loop asyncio", app=APP),
    Variant("uvicorn-websockets-legacy", f"{UVICORN} --ws websockets --loop uvloop", app=APP),
    Variant("uvicorn-wsproto-uvloop", f"{UVICORN} --ws wsproto --loop uvloop", app=APP),
    Variant("hypercorn-asyncio", f"{HYPERCORN} -k asyncio", app=APP),
    Variant("hypercorn-trio", f"{HYPERCORN} -k trio", app=APP),
    Variant("granian", "granian --interface asgi --workers-kill-timeout 5 --port {port}", app=APP),
]
DOORS = ("deco", "dep", "tg", "mw")
CODES = {"MANUAL": (499, 4499), "TIMEOUT": (504, 4504), "SIGNAL": (503, 1012), "CONDITION": (500, 1011)}


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with (
        started(request.param, tmp_path_factory.mktemp("server")) as running,
        without_complaints(running, "UvicornDeprecationWarning"),
    ):
        yield running


def connect(server: Server, target: str, key: str = "") -> SocketClient:
    client = SocketClient(server.port, target, key)
    assert client.accepted(), client.refusal
    return client


@pytest.mark.parametrize("leave", ["reset", "close", "close_politely"])
@pytest.mark.parametrize("door", DOORS)
def test_a_drop_stops_the_busy_handler(server: Server, door: str, leave: str) -> None:
    key = new_key()
    client = connect(server, f"/{door}/busy", key)
    server.journal(key, "started")
    getattr(client, leave)()
    assert server.journal(key, "ended") == ["started", "cancelled:DISCONNECT", "ended"]
    client.close()


def test_a_drop_sets_the_event(server: Server) -> None:
    key = new_key()
    client = connect(server, "/event", key)
    server.journal(key, "started")
    client.reset()
    assert server.journal(key, "event:DISCONNECT") == ["started", "event:DISCONNECT"]


@pytest.mark.parametrize("leave", ["reset", "close", "close_politely"])
@pytest.mark.parametrize("door", DOORS)
def test_a_drop_while_receiving_is_a_disconnect_as_ever(server: Server, door: str, leave: str) -> None:
    key = new_key()
    client = connect(server, f"/{door}/wait", key)
    server.journal(key, "started")
    # The reader is at work, or about to be: either way the handler is told.
    server.ask("/bare/work", x_before="0.03")
    getattr(client, leave)()
    events = server.journal(key, "cleaned")
    assert events[0] == "started"
    assert events[1].startswith("disconnect:")
    assert events[2:] == ["ended", "cleaned"]
    client.close()


@pytest.mark.parametrize("reason", CODES)
@pytest.mark.parametrize("door", DOORS)
def test_a_stop_closes_for_its_reason(server: Server, door: str, reason: str) -> None:
    with closing(connect(server, f"/{door}/close?reason={reason}")) as client:
        assert client.closed() == (CODES[reason][1], "Enough of it")


@pytest.mark.parametrize("reason", CODES)
@pytest.mark.parametrize("door", DOORS)
def test_a_stop_before_accept_refuses_the_handshake(server: Server, door: str, reason: str) -> None:
    with closing(SocketClient(server.port, f"/{door}/refuse?reason={reason}")) as client:
        assert not client.accepted()
        assert client.refusal is not None
        if reason == "MANUAL" and server.variant.name.startswith("uvicorn-websockets") and client.refusal.status == 403:
            return  # The older implementation of the two knows no 499.
        assert client.refusal.status == CODES[reason][0]
        assert client.refusal.json() == {"detail": "Enough of it"}


@pytest.mark.parametrize(
    ("target", "text"),
    [("timed", f"Timed out after {LIMIT:g} seconds"), ("idle", f"No message for {LIMIT:g} seconds")],
    ids=["timed", "idle"],
)
def test_timeouts_close_with_4504(server: Server, target: str, text: str) -> None:
    with closing(connect(server, f"/{target}")) as client:
        assert client.closed() == (4504, text)


@pytest.mark.parametrize("door", DOORS)
def test_messages_sent_while_the_handler_is_busy_are_replayed(server: Server, door: str) -> None:
    key = new_key()
    texts = [f"message {number}" for number in range(150)]
    with closing(connect(server, f"/{door}/echo", key)) as client:
        client.say(*texts)
        server.ask("/bare/work", x_before="0.03")
        server.open_gate(key)
        assert [client.text() for _ in texts] == texts


@pytest.mark.parametrize("door", DOORS)
def test_a_conversation(server: Server, door: str) -> None:
    with closing(connect(server, f"/{door}/echo-after-work")) as client:
        for number in range(20):
            client.say(f"{number} é", f"{number} {'x' * 70_000}")
            assert client.text() == f"{number} é"
            assert client.text() == f"{number} {'x' * 70_000}"
        client.close_politely()


def test_a_flood_of_messages_is_held_back(server: Server) -> None:
    """What a server queues by itself is its own affair; ours is small, and the client has to wait."""
    key = new_key()
    server.ask("/bare/work")
    before = server.rss()
    with closing(connect(server, "/deco/drain", key)) as client:
        sent = client.flood("x" * 100_000, 2000)
        assert sent < 2000, "200 MB were taken"
        assert server.rss() - before < 60_000_000
    # Its leaving is behind all that it has sent, and seen when the handler gets there.
    server.open_gate(key)
    assert server.journal(key, "ended")[-1] == "ended"


def test_100_drops_at_once_leave_nothing(server: Server) -> None:
    key = new_key()
    with ExitStack() as clients:
        for number in range(100):
            clients.callback(connect(server, f"/{DOORS[number % len(DOORS)]}/busy", key).reset)
        server.journal(key, "started", 100)
        wait_for_readers(server, 100)
    assert server.journal(key, "ended", 100).count("cancelled:DISCONNECT") == 100
    wait_for_readers(server, 0)


def wait_for_readers(server: Server, expected: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while server.ask("/readers", x_before="0.01").json() != expected:
        assert time.monotonic() < deadline, f"there are never {expected} readers"


@pytest.mark.parametrize("door", DOORS)
def test_a_drop_before_accept_is_quiet(server: Server, door: str) -> None:
    key = new_key()
    client = SocketClient(server.port, f"/{door}/before-accept", key)
    server.journal(key, "started")
    client.reset()
    if server.variant.name != "granian":  # It does not say so before it has accepted.
        assert server.journal(key, "ended") == ["started", "cancelled:DISCONNECT", "ended"]


def test_20_drops_leave_one_line_each(server: Server) -> None:
    before = server.log()
    for number in range(20):
        key = new_key()
        client = connect(server, f"/{DOORS[number % len(DOORS)]}/busy", key)
        server.journal(key, "started")
        client.reset()
        server.journal(key, "ended")
    new = server.log().removeprefix(before).splitlines()
    ours = [line for line in new if line.startswith("INFO cancelable_deps: WEBSOCKET /")]
    assert len(ours) == 20
    assert not [line for line in new if "WARN" in line or "ERROR" in line]
