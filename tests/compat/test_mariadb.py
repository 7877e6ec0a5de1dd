"""aiomysql with a real server: the pool of a cancelled handler stays whole."""

from __future__ import annotations

import pytest

from tests.compat.doors import KINDS, TIMED
from tests.compat.served import Served
from tests.servers import new_key

pytestmark = pytest.mark.usefixtures("mariadb")


@pytest.fixture(scope="module")
def served(mariadb: str, served: Served) -> Served:
    return served


def begin_and_leave(served: Served, door: str) -> str:
    key = new_key()
    with served.connect() as connection:
        connection.send(f"GET /{door}/sleep HTTP/1.1\r\nhost: test\r\nx-id: {key}\r\n\r\n".encode())
        while served.ask(f"/bare/runs/{key}").json() < 1:
            assert "ended" not in served.events(key)
        connection.reset()
    served.wait_for(key, "ended")
    return key


@pytest.mark.parametrize("door", KINDS)
def test_the_pool_is_whole_after_more_hang_ups_than_it_has_places(served: Served, door: str) -> None:
    for _ in range(4):
        begin_and_leave(served, door)
    assert served.ask(f"/{door}/one").json() == [1]


@pytest.mark.parametrize("door", TIMED)
def test_a_timeout_is_answered_504_and_the_pool_is_whole(served: Served, door: str) -> None:
    for _ in range(3):
        assert served.ask(f"/{door}/sleep", new_key()).status == 504
    assert served.ask(f"/{door}/one").json() == [1]
