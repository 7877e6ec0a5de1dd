"""The pytest plugin of ``cancelable_deps``.

A module of its own beside the package, because pytest imports the plugins of every installed distribution, and importing
the package imports FastAPI. A project that does not use these fixtures should not pay for that.
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
    """The class `CancelableClient`, a client that can hang up: ``async with cancelable_client(app) as client:``.

    It takes the arguments of ``cancelable_deps.testing.CancelableClient``. Leaving the block ends the calls that the client
    has started.
    """
    from cancelable_deps.testing import CancelableClient

    return CancelableClient


@pytest.fixture
def no_tasks_left(request: pytest.FixtureRequest) -> None:
    """A check that fails an ``async`` test which leaves tasks behind in its event loop, and names each and its line."""
    if not inspect.iscoroutinefunction(getattr(request.function, "__wrapped__", request.function)):
        raise pytest.UsageError(f"no_tasks_left is for `async` tests, and {request.node.name} is not `async`")
    unittest: Any = sys.modules.get("unittest")
    if unittest and request.cls and issubclass(request.cls, unittest.TestCase):
        # It calls its own method, and not the wrapper that we put in place of the test.
        raise pytest.UsageError(
            "no_tasks_left does not work in a unittest.TestCase: write `async with cancelable_deps.testing.no_tasks_left():`"
        )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Run a test that uses `no_tasks_left` inside the check of the same name."""
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
