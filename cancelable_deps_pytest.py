"""The pytest plugin of ``cancelable_deps``.

A module of its own beside the package: pytest imports the plugins of all that is installed, and importing the package
imports FastAPI, which a project that does not use these fixtures should not pay for.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from cancelable_deps.testing import CancelableClient


@pytest.fixture
def cancelable_client() -> Callable[..., CancelableClient]:
    """Makes clients that can hang up: ``async with cancelable_client(app) as client:``.

    Takes what ``cancelable_deps.testing.CancelableClient`` takes. Leaving the block ends what the client has started.
    """
    from cancelable_deps.testing import CancelableClient

    return CancelableClient


@pytest.fixture
def no_tasks_left(request: pytest.FixtureRequest) -> None:
    """Fails an ``async`` test that leaves tasks behind in its event loop, and says where they stand."""
    if not inspect.iscoroutinefunction(getattr(request.function, "__wrapped__", request.function)):
        raise pytest.UsageError(f"no_tasks_left is for `async` tests, and {request.node.name} is none")
    unittest: Any = sys.modules.get("unittest")
    if unittest and request.cls and issubclass(request.cls, unittest.TestCase):
        # It calls its method itself, past the one that we put in the place of the test.
        raise pytest.UsageError(
            "no_tasks_left cannot look into a unittest.TestCase: write `async with cancelable_deps.testing.no_tasks_left():`"
        )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    if isinstance(item, pytest.Function) and "no_tasks_left" in item.fixturenames:
        test = item.obj
        item.obj = _watched(test)
        try:
            return (yield)
        finally:
            item.obj = test
    return (yield)


def _watched(test: Any) -> Any:
    @functools.wraps(test)
    async def watched(*args: Any, **kwargs: Any) -> None:
        from cancelable_deps.testing import no_tasks_left

        async with no_tasks_left():
            await test(*args, **kwargs)

    return watched
