"""Three services in a row, on real servers: the client's time reaches the last one, and so does its hang-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from tests.chain_app import HEADER, MARGIN
from tests.machine import scaled
from tests.servers import UVICORN, Server, Variant, request, started, without_complaints
from tests.test_processes import wait_until

pytestmark = pytest.mark.real

PLENTY = 1000


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """The services, from the first to the last."""
    chain: list[Server] = []
    with ExitStack() as stack, pytest.MonkeyPatch.context() as environment:
        for place in ("last", "middle", "first"):
            environment.setenv("NEXT_SERVICE", f"http://127.0.0.1:{chain[0].port}" if chain else "")
            variant = Variant(f"{place} uvicorn", UVICORN, app="tests.chain_app:app")
            server = stack.enter_context(started(variant, tmp_path_factory.mktemp(place)))
            stack.enter_context(without_complaints(server))
            chain.insert(0, server)
        yield chain


def state_of(server: Server) -> Any:
    return server.ask("/state").json()


def nothing_runs_in(services: list[Server]) -> bool:
    return all(state_of(server)["running"] == state_of(server)["requests"] == 0 for server in services)


def test_the_last_one_has_what_the_client_gave_less_the_margins(services: list[Server]) -> None:
    response = services[0].ask("/work", **{HEADER: PLENTY * 1000})
    given, left = zip(*response.json(), strict=True)
    assert given[0] == PLENTY
    for place in (1, 2):
        # What the one before had left, less the margin and the time of the call.
        assert left[place - 1] - MARGIN - scaled(5) < given[place] <= left[place - 1] - MARGIN
    assert PLENTY - 2 * MARGIN - scaled(5) < left[2] <= PLENTY - 2 * MARGIN
    assert nothing_runs_in(services)


def test_the_last_one_gives_up_first_and_its_answer_travels_back(services: list[Server]) -> None:
    seconds = 2 * MARGIN + scaled(1)
    response = services[0].ask("/work?wait=true", **{HEADER: round(seconds * 1000)})
    assert (response.status, response.headers["x-deadline-expired"]) == (504, "1")
    assert state_of(services[2])["reasons"][-1] == "timeout"
    wait_until(lambda: nothing_runs_in(services))


def test_too_little_for_the_whole_way_stops_where_it_is_noticed(services: list[Server]) -> None:
    before = state_of(services[1])
    response = services[0].ask("/work", **{HEADER: round(MARGIN * 1000)})
    assert (response.status, response.headers["x-deadline-expired"]) == (504, "1")
    assert state_of(services[1]) == before


def test_a_client_that_gives_up_leaves_nothing_running(services: list[Server]) -> None:
    with closing(services[0].connect()) as connection:
        connection.send(request("/work?wait=true", "", **{HEADER: PLENTY * 1000}))
        wait_until(lambda: state_of(services[2])["running"] == 1)
        assert [state_of(server)["running"] for server in services] == [1, 1, 1]
        connection.reset()
    wait_until(lambda: nothing_runs_in(services))
    assert [state_of(server)["reasons"][-1] for server in services] == ["disconnect"] * 3
