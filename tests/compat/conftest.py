"""The tier that runs the doors with other people's packages: ``uv run --group compat pytest -m compat tests/compat``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat import brokers
from tests.compat.served import Served

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.compat)


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The application of the same name as the test module, on a server that all of its tests share."""
    running = Served(name_of(request), tmp_path_factory.mktemp("served") / "log")
    yield running
    running.stop()
    assert not running.complaints(), "".join(running.complaints())


@pytest.fixture
def doomed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """The same application on a server of the test's own, to be shut down."""
    running = Served(name_of(request), tmp_path / "log")
    yield running
    running.stop()
    assert not running.complaints(), "".join(running.complaints())


def name_of(request: pytest.FixtureRequest) -> str:
    return str(request.module.__name__.rpartition(".test_")[2])


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a broker that is started here."""
    yield from brokers.rabbitmq(tmp_path_factory.mktemp("rabbitmq"))


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The socket of a server that is started here."""
    yield from brokers.mariadb(tmp_path_factory.mktemp("mariadb"))
