"""The reverse proxy of `examples/recipes`, on real servers in front of a real service."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.machine import scaled
from tests.servers import HYPERCORN, UVICORN, Server, Variant, new_key, request, started, without_complaints

pytestmark = pytest.mark.real

PROXY = "examples.recipes.reverse_proxy:app"
SERVICE = Variant("service", UVICORN, app="tests.recipes_upstream:app")
PROXIES = [
    Variant("uvicorn", UVICORN, app=PROXY),
    Variant("hypercorn-trio", f"{HYPERCORN} -k trio", app=PROXY),
]
TIMEOUT = scaled(20)
CONNECTIONS = 3


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(SERVICE, tmp_path_factory.mktemp("service")) as server, without_complaints(server):
        yield server


@pytest.fixture(scope="module", params=PROXIES, ids=lambda variant: variant.name)
def proxy(
    request: pytest.FixtureRequest, service: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with ExitStack() as stack, pytest.MonkeyPatch.context() as environment:
        environment.setenv("UPSTREAM", f"http://127.0.0.1:{service.port}")
        environment.setenv("TIMEOUT", str(TIMEOUT))
        environment.setenv("CONNECTIONS", str(CONNECTIONS))
        server = stack.enter_context(started(request.param, tmp_path_factory.mktemp("proxy")))
        stack.enter_context(without_complaints(server))
        yield server


def values(headers: list[list[str]], name: str) -> list[str]:
    return [value for known, value in headers if known == name]


def test_a_request_goes_on_without_what_concerns_this_hop_alone(proxy: Server) -> None:
    response = proxy.ask(
        "/echo/a%2Fb?x=1&x=%20",
        new_key(),
        b"the body",
        connection="x-secret, keep-alive",
        x_secret="of this hop",
        keep_alive="timeout=5",
        te="trailers",
        proxy_authorization="Basic x",
        x_kept="1",
        accept_encoding="br",
    )
    seen: Any = response.json()
    assert (response.status, seen["method"], seen["target"]) == (201, "POST", "/echo/a%2Fb?x=1&x=%20")
    assert seen["body"] == "the body"
    assert values(seen["headers"], "host") == [str(proxy.ask("/echo").json()["headers"][0][1])]
    names = {name for name, _ in seen["headers"]}
    assert {"x-secret", "keep-alive", "te", "proxy-authorization", "transfer-encoding", "user-agent"}.isdisjoint(names)
    assert values(seen["headers"], "x-kept") == ["1"]
    assert values(seen["headers"], "accept-encoding") == ["br"]
    assert values(seen["headers"], "content-length") == ["8"]
    assert values(seen["headers"], "via") == ["1.1 recipes"]


def test_a_response_comes_back_without_what_concerns_that_hop_alone(proxy: Server) -> None:
    headers = proxy.ask("/echo").headers
    assert headers.get_all("set-cookie") == ["one=1", "two=2"]
    assert headers["x-of-the-service"] == "kept"
    assert headers["via"] == "1.1 recipes"
    assert "x-of-this-hop" not in headers
    assert "keep-alive" not in headers
    assert not values(proxy.ask("/echo").json()["headers"], "cookie"), "it keeps no cookies of others"


def test_a_body_goes_up_as_it_comes(proxy: Server, service: Server) -> None:
    key = new_key()
    with closing(proxy.connect()) as connection:
        connection.send(request("/upload", key, b"one", content_length=6))
        service.journal(key, "read:one")
        connection.send(b"two")
        assert connection.response().json() == "onetwo"


def test_an_answer_comes_back_as_it_comes(proxy: Server, service: Server) -> None:
    key = new_key()
    with closing(proxy.connect()) as connection:
        connection.send(request("/stream", key))
        response = connection.head()
        assert (response.headers["transfer-encoding"], connection.line(), connection.line()) == (
            "chunked",
            b"6\r\n",
            b"first\n",
        )
        service.open_gate(key)
        assert connection.line() == b"\r\n"
        assert connection.finish(response).body == b"second\n"


def hang_up(proxy: Server, service: Server, path: str) -> None:
    """Leave when the service works, and wait until it has noticed."""
    key = new_key()
    connection = proxy.connect()
    connection.send(request(path, key))
    service.journal(key, "stalled" if path == "/endless" else "started")
    if path == "/stream":
        assert connection.head().status == 200
    connection.reset()
    service.journal(key, "left")


@pytest.mark.parametrize("path", ["/wait", "/stream", "/endless"])
def test_the_service_stops_with_the_client_and_the_pool_stays_whole(proxy: Server, service: Server, path: str) -> None:
    # A connection that was lost would be missing for the next: `httpx.PoolTimeout`, which is answered with 504.
    for _ in range(2 * CONNECTIONS + 1):
        hang_up(proxy, service, path)
    with ExitStack() as stack:
        keys = [new_key() for _ in range(CONNECTIONS)]
        connections = [stack.enter_context(closing(proxy.connect())) for _ in keys]
        for key, connection in zip(keys, connections, strict=True):
            connection.send(request("/wait", key))
        for key in keys:
            service.journal(key, "started")
            service.open_gate(key)
        assert [connection.response().json() for connection in connections] == ["at last"] * CONNECTIONS


def test_the_service_is_not_left_with_half_of_a_body(proxy: Server, service: Server) -> None:
    key = new_key()
    connection = proxy.connect()
    connection.send(request("/upload", key, b"one", content_length=6))
    service.journal(key, "read:one")
    connection.reset()
    service.journal(key, "left")


def test_the_service_stops_when_the_time_of_the_client_is_up(proxy: Server, service: Server) -> None:
    key = new_key()
    response = proxy.ask("/wait", key, **{"x-time-left": str(scaled(0.5))})
    assert (response.status, response.headers["x-deadline-expired"]) == (504, "1")
    service.journal(key, "left")


def test_the_service_is_told_how_much_time_is_left(proxy: Server) -> None:
    for given, most in ((None, TIMEOUT), (TIMEOUT / 2, TIMEOUT / 2)):
        headers = {} if given is None else {"x-time-left": str(given)}
        (left,) = values(proxy.ask("/echo", **headers).json()["headers"], "x-time-left")
        assert most / 2 < float(left) <= most - 0.05


def test_nothing_is_sent_when_no_time_is_left(proxy: Server, service: Server) -> None:
    key = new_key()
    assert proxy.ask("/upload", key, b"", **{"x-time-left": "0.04"}).status == 504
    assert service.ask(f"/journal/{key}?event=none&count=0").json() == []


def test_a_head_without_a_body(proxy: Server) -> None:
    with closing(proxy.connect()) as connection:
        connection.send(b"HEAD /echo HTTP/1.1\r\nhost: test\r\n\r\n")
        response = connection.head()
        assert (response.status, int(response.headers["content-length"]) > 0) == (201, True)
        connection.send(request("/bare/work"))
        assert connection.response().json() == "ready", "the next response begins where a body would"


def test_a_service_that_breaks_off_is_seen_to(proxy: Server, service: Server) -> None:
    service.expected.add("ASGI callable returned without completing response")
    proxy.expected.add("RemoteProtocolError: peer closed connection without sending complete message body")
    with closing(proxy.connect()) as connection:
        connection.send(request("/break-off"))
        response = connection.head()
        with pytest.raises(AssertionError, match="incomplete: 4 bytes instead of 100"):
            connection.finish(response)


@pytest.mark.parametrize("variant", PROXIES, ids=lambda variant: variant.name)
def test_the_timeout_of_the_proxy(
    variant: Variant, service: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPSTREAM", f"http://127.0.0.1:{service.port}")
    monkeypatch.setenv("TIMEOUT", str(scaled(0.5)))
    key, other = new_key(), new_key()
    with started(variant, tmp_path) as proxy, without_complaints(proxy):
        response = proxy.ask("/wait", key)
        assert (response.status, response.json()) == (504, {"detail": f"Timed out after {scaled(0.5):g} seconds"})
        assert "x-deadline-expired" not in response.headers
        with closing(proxy.connect()) as connection:
            connection.send(request("/stream", other))
            response = connection.head()
            while line := connection.line():
                assert line != b"0\r\n", "a stream that is cut does not come to its regular end"
    for each in (key, other):
        service.journal(each, "left")


@pytest.mark.parametrize("variant", PROXIES, ids=lambda variant: variant.name)
def test_a_service_that_fails(variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / name for name in ("service", "proxy")]
    for folder in folders:
        folder.mkdir()
    with started(SERVICE, folders[0]) as service:
        monkeypatch.setenv("UPSTREAM", f"http://127.0.0.1:{service.port}")
        proxy = Server(variant, folders[1] / "log")
    try:
        with without_complaints(proxy):
            assert proxy.ask("/wait").status == 502, "nobody listens"
            with socket.create_server(("127.0.0.1", service.port)) as listener:
                for reply in (b"no HTTP\r\n\r\n", b""):
                    with closing(proxy.connect()) as connection:
                        connection.send(request("/wait"))
                        with closing(listener.accept()[0]) as accepted:
                            accepted.recv(65536)
                            accepted.sendall(reply)
                        assert connection.response().status == 502
    finally:
        proxy.stop()
