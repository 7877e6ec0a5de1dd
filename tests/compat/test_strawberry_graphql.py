"""Strawberry behind the middleware: resolvers and subscriptions stop with their client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from websockets.sync.client import connect

from tests.compat.served import Served
from tests.servers import new_key, request

STACKS = ("bare", "mw")


def query(text: str) -> bytes:
    return json.dumps({"query": text}).encode()


def work(key: str) -> bytes:
    return query(f'{{ work(key: "{key}") }}')


def test_a_hang_up_cancels_the_resolver_once(served: Served) -> None:
    key = new_key()
    with served.connect() as connection:
        connection.send(request("/mw/graphql", key, work(key), content_type="application/json"))
        served.wait_for(key, "started")
        connection.reset()
        assert served.wait_for(key, "cleaned up") == ["started", "cancelled", "cleaned up"]


def test_a_timeout_is_answered_504(served: Served) -> None:
    key = new_key()
    assert served.ask("/timed-mw/graphql", key, work(key), content_type="application/json").status == 504
    assert served.wait_for(key, "cleaned up") == ["started", "cancelled", "cleaned up"]


@pytest.mark.parametrize("stack", [*STACKS, "timed-mw"])
def test_an_ordinary_query_is_answered(served: Served, stack: str) -> None:
    response = served.ask(f"/{stack}/graphql", "", query("{ ping }"), content_type="application/json")
    assert response.json() == {"data": {"ping": "pong"}}


@pytest.mark.parametrize("leave", ["complete", "close", "drop"])
@pytest.mark.parametrize("stack", STACKS)
def test_a_subscription_ends_with_its_client(served: Served, stack: str, leave: str) -> None:
    key = new_key()
    url = f"ws://127.0.0.1:{served.port}/{stack}/graphql"
    with connect(url, subprotocols=["graphql-transport-ws"]) as socket:  # type: ignore[list-item]

        def send(**message: Any) -> None:
            socket.send(json.dumps(message))

        send(type="connection_init")
        assert json.loads(socket.recv())["type"] == "connection_ack"
        send(id="1", type="subscribe", payload={"query": f'subscription {{ ticks(key: "{key}") }}'})
        assert json.loads(socket.recv())["payload"]["data"] == {"ticks": 0}
        if leave == "complete":
            send(id="1", type="complete")
            served.wait_for(key, "cleaned up")
        elif leave == "drop":
            # Strawberry's own, also without us: it logs what it could not send to a client that has gone.
            served.expected.add("strawberry.ws.task: Exception in worker task")
            socket.socket.close()
    # Cancelled where it waits, or closed where it yields.
    assert "finished" not in served.wait_for(key, "cleaned up")


def test_a_shutdown_is_answered_503(doomed: Served) -> None:
    key = new_key()
    assert (
        doomed.answer_of_its_end(key, request("/mw/graphql", key, work(key), content_type="application/json")).status
        == 503
    )
    assert doomed.events(key) == ["started", "cancelled", "cleaned up"]
