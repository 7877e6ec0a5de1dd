from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cancelable_deps import configure

from . import HIDDEN, hide_hooks

# A shell that starts the tests in the background ignores it for them, and every server would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What `--public-api` runs: the kernel, the doors, and the drivers for whose sake a cleanup is not to be disturbed.
ON_PUBLIC_API = {
    "test_cancelable.py",
    "test_decorator.py",
    "test_dependencies.py",
    "test_middleware.py",
    "test_polite.py",
    "test_polite_public.py",
    "test_postgres.py",
    "test_route.py",
    "test_task_group.py",
    "test_token.py",
}

NOT_ON_PUBLIC_API = {
    "test_after_the_block_the_task_has_its_own_coroutine_back": "it is about the hook itself",
    "test_after_our_own_cancellation_the_task_counts_none": "asyncio counts two during the cleanup, and none after it",
    "test_a_loop_that_is_blocked_for_long_changes_nothing[trio": "trio's own deadline overtakes our timer, which tells",
}
"""By the beginning of their names, with the reason. What is not exact without the hooks is said in `_polite_public.py`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--public-api", action="store_true", help="hide the hooks into anyio and trio, and run what depends on them"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--public-api"):
        os.environ[HIDDEN] = "1"
        hide_hooks()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--public-api") and collection_path.name.startswith("test_"):
        return collection_path.name not in ON_PUBLIC_API
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--public-api"):
        for item in items:
            for name, reason in NOT_ON_PUBLIC_API.items():
                if item.name.startswith(name):
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def at_once() -> Iterator[None]:
    """Listen from the handler's first moment, so that a race can be driven without waiting."""
    configure(listen_after=0)
    yield
    configure(listen_after=0.005)
