"""The chat of `examples/recipes`, on real servers, by the real client of OpenAI from a service that is started here."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

# The short run collects this file as well, and does not have it.
pytest.importorskip("openai")

from tests.compat.fake_openai import COMPLETION_TOKENS, PROMPT_TOKENS
from tests.machine import scaled
from tests.servers import (
    HYPERCORN,
    PATIENCE,
    UVICORN,
    Connection,
    Server,
    Variant,
    new_key,
    request,
    started,
    without_complaints,
)

APP = "examples.recipes.llm_usage:app"
SERVICE = Variant("service", UVICORN, app="tests.compat.fake_openai:app")
SERVERS = [
    Variant("uvicorn", f"{UVICORN}0", app=APP, ready="/usage/nobody"),
    Variant("hypercorn-trio", f"{HYPERCORN} -k trio --graceful-timeout 50", app=APP, ready="/usage/nobody"),
]
ENDLESS = "3 gate"
"""Three tokens, and then nothing: its gate stays closed."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(SERVICE, tmp_path_factory.mktemp("service")) as server, without_complaints(server):
        yield server


@pytest.fixture(scope="module")
def environment(service: Server) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{service.port}/v1")
        environment.setenv("OPENAI_API_KEY", "none")
        yield environment


@pytest.fixture(scope="module", params=SERVERS, ids=lambda variant: variant.name)
def server(
    request: pytest.FixtureRequest, environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("chat")
    environment.setenv("LEDGER", str(folder / "usage.jsonl"))
    with started(request.param, folder) as server, without_complaints(server):
        yield server


def asked(key: str, steps: str) -> bytes:
    body = json.dumps({"text": f"{key} {steps}"}).encode()
    return request(f"/chat/{key}", "", body, content_type="application/json")


def events(connection: Connection, count: int) -> list[str]:
    """The next ones, as they come."""
    found: list[str] = []
    while len(found) < count:
        line = connection.line()
        assert line, f"the stream ends after {found}"
        if line.startswith((b"data: ", b"event: ")):
            found.append(line.decode().strip())
    return found


def rows(ledger: Path) -> list[Any]:
    return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []


def row_of(server: Server, key: str) -> Any:
    """The row of a chat, as soon as it is there; there is no other."""
    end = time.monotonic() + PATIENCE
    while not (found := server.ask(f"/usage/{key}").json()):
        assert time.monotonic() < end, "it is not accounted for"
        time.sleep(0.01)
    (row,) = found
    return row


def counted(key: str, ended: str, tokens: int) -> dict[str, Any]:
    return {
        "user": key,
        "ended": ended,
        "completion_tokens": tokens,
        "prompt_tokens": None,
        "is_counted_by_us": True,
    }


def billed(key: str, ended: str) -> dict[str, Any]:
    return {
        "user": key,
        "ended": ended,
        "completion_tokens": COMPLETION_TOKENS,
        "prompt_tokens": PROMPT_TOKENS,
        "is_counted_by_us": False,
    }


def test_a_complete_answer_has_the_numbers_of_the_service(server: Server) -> None:
    key = new_key()
    with closing(server.connect()) as connection:
        connection.send(asked(key, "2 finish usage end"))
        text = connection.response().body.decode()
    assert text == 'data: "token 1 "\n\ndata: "token 2 "\n\ndata: [DONE]\n\n'
    assert row_of(server, key) == billed(key, "complete")


def test_a_client_that_leaves_stops_the_service_and_its_tokens_are_counted(server: Server, service: Server) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(asked(key, ENDLESS))
    assert events(connection, 3)[-1] == 'data: "token 3 "'
    connection.reset()
    assert service.journal(key, "left") == ["at-gate-0", "left"]
    assert row_of(server, key) == counted(key, "disconnect", 3)


def test_a_client_that_reads_nothing_and_leaves_stops_the_service_too(server: Server, service: Server) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(asked(key, "flood"))
    service.journal(key, "stalled")
    connection.reset()
    service.journal(key, "left")
    row = row_of(server, key)
    assert row == counted(key, "disconnect", row["completion_tokens"])
    assert row["completion_tokens"] > 0


def test_a_client_that_leaves_before_the_first_token_is_in_the_ledger_too(server: Server, service: Server) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(asked(key, "gate"))
    service.journal(key, "at-gate-0")
    connection.reset()
    service.journal(key, "left")
    assert row_of(server, key) == counted(key, "disconnect", 0)


def test_a_client_that_leaves_before_the_bill_does_not_stop_it(server: Server, service: Server) -> None:
    key = new_key()
    connection = server.connect()
    connection.send(asked(key, "3 finish gate usage end"))
    assert events(connection, 4)[-1] == "data: [DONE]"
    connection.reset()
    # The server has noticed the hang-up when it has answered what came after it.
    for _ in range(2):
        assert server.ask(f"/usage/{key}").json() == []
    service.open_gate(f"{key}-0")
    assert service.journal(key, "billed")[:2] == ["at-gate-0", "billed"]
    assert row_of(server, key) == billed(key, "complete")


def test_a_refusal_is_in_the_ledger_and_in_the_stream(server: Server) -> None:
    key = new_key()
    with closing(server.connect()) as connection:
        connection.send(asked(key, "429"))
        assert connection.response().body.decode().startswith("event: error\n")
    assert row_of(server, key) == counted(key, "RateLimitError", 0)


@pytest.mark.parametrize("why", ["timeout", "signal"])
@pytest.mark.parametrize("variant", SERVERS, ids=lambda variant: variant.name)
def test_what_the_server_stops_is_in_the_ledger(
    variant: Variant, why: str, service: Server, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, ledger = new_key(), tmp_path / "usage.jsonl"
    with ExitStack() as stack, environment.context() as limits:
        limits.setenv("LEDGER", str(ledger))
        limits.setenv("GRACE", "0.1")
        if why == "timeout":
            limits.setenv("TIMEOUT", str(scaled(1)))
        server = stack.enter_context(started(variant, tmp_path))
        stack.enter_context(without_complaints(server, "shutdown-unheard (hypercorn)"))
        connection = stack.enter_context(closing(server.connect()))
        connection.send(asked(key, ENDLESS))
        events(connection, 3)
        if why == "signal":
            # hypercorn on trio is killed by a SIGTERM.
            os.kill(server.pid, signal.SIGINT)
        assert events(connection, 2)[0] == "event: cancelled"
    service.journal(key, "left")
    assert rows(ledger) == [counted(key, why, 3)]
