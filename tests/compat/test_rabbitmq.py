"""aio-pika with a real broker: what a cancelled handler had taken is delivered again, and its connection stays whole."""

from __future__ import annotations

import pytest

from tests.compat.doors import KINDS, TIMED
from tests.compat.served import Served
from tests.servers import new_key

pytestmark = pytest.mark.usefixtures("rabbitmq")


@pytest.fixture(scope="module")
def served(rabbitmq: str, served: Served) -> Served:
    return served


def publish(served: Served, door: str, queue: str) -> None:
    assert served.ask(f"/{door}/publish/{queue}?text=hello", "", b"").status == 200


@pytest.mark.parametrize("door", KINDS)
def test_a_message_of_a_handler_whose_client_left_is_delivered_again(served: Served, door: str) -> None:
    queue = f"compat-{new_key()}"
    publish(served, door, queue)
    key = served.hang_up(f"/{door}/consume/{queue}", after="started")
    served.wait_for(key, "cleaned up")
    assert served.ask(f"/{door}/consume/{queue}").json() == "hello"


@pytest.mark.parametrize("door", TIMED)
def test_a_timeout_is_answered_504_and_the_message_delivered_again(served: Served, door: str) -> None:
    key, queue = new_key(), f"compat-{new_key()}"
    publish(served, door, queue)
    assert served.ask(f"/{door}/consume/{queue}", key).status == 504
    assert "cleaned up" in served.events(key)
    assert served.ask(f"/{door}/consume/{queue}").json() == "hello"


@pytest.mark.parametrize("door", KINDS)
def test_a_handler_that_waits_for_a_message_is_stopped(served: Served, door: str) -> None:
    queue = f"compat-{new_key()}"
    served.hang_up(f"/{door}/consume/{queue}", after="waits")
    publish(served, door, queue)
    # Nobody who has left takes it.
    again = served.hang_up(f"/{door}/consume/{queue}", after="started")
    served.wait_for(again, "cleaned up")


@pytest.mark.parametrize("door", KINDS)
def test_a_connection_whose_short_calls_are_shielded_stays_whole(served: Served, door: str) -> None:
    queue = f"compat-{new_key()}"
    for _ in range(20):
        served.hang_up(f"/{door}/storm/{queue}", after="waits")
    publish(served, door, f"{queue}-after")
