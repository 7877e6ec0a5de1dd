"""The plugin, in a pytest of its own, beside the plugins that a project may have."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.real

APP = """
import asyncio
import anyio
import pytest
from fastapi import FastAPI
from cancelable_deps import with_cancelation

app = FastAPI()

@app.get("/never")
@with_cancelation
async def never():
    await anyio.sleep_forever()

kept = []

async def leave_a_task():
    kept.append(asyncio.create_task(asyncio.sleep(100), name="forgotten"))
"""

TESTS = """
async def test_hang_up(cancelable_client, no_tasks_left):
    async with cancelable_client(app) as client:
        async with client.start("GET", "/never") as call:
            await call.listened_to()
            await call.hang_up()
        assert call.status == 499

async def test_leaves(no_tasks_left):
    await leave_a_task()

async def test_leaves_unwatched():
    await leave_a_task()
"""
MESSAGE = "*AssertionError: tasks are left behind: forgotten at *"


def test_with_anyios_plugin(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(APP + "pytestmark = pytest.mark.anyio\n" + TESTS)
    result = pytester.runpytest_subprocess("-p", "no:asyncio", "-k", "hang_up or asyncio")
    # asyncio and trio, and the tasks of asyncio alone.
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines([MESSAGE])


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_with_pytest_asyncio(pytester: pytest.Pytester, mode: str) -> None:
    mark = "pytestmark = pytest.mark.asyncio\n" if mode == "strict" else ""
    pytester.makepyfile(APP + mark + TESTS)
    result = pytester.runpytest_subprocess(
        "-p", "no:anyio", "-o", f"asyncio_mode={mode}", "-o", "asyncio_default_fixture_loop_scope=function"
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines([MESSAGE])


def test_a_client_in_a_fixture_of_pytest_asyncio(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        APP
        + """
from cancelable_deps.testing import CancelableClient

@pytest.fixture
async def client():
    async with CancelableClient(app) as client:
        yield client

async def test_hang_up(client, no_tasks_left):
    async with client.start("GET", "/never") as call:
        await call.listened_to()
        await call.hang_up()
    assert call.status == 499
"""
    )
    result = pytester.runpytest_subprocess(
        "-p", "no:anyio", "-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"
    )
    result.assert_outcomes(passed=1)


def test_with_pytest_cov(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(APP + "pytestmark = pytest.mark.anyio\n" + TESTS)
    result = pytester.runpytest_subprocess("-p", "no:asyncio", "--cov=.", "-k", "hang_up")
    result.assert_outcomes(passed=2, deselected=4)
    result.stdout.fnmatch_lines(["test_with_pytest_cov.py * 3 * 88%"])


def test_a_test_that_is_not_async_is_told(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_plain(no_tasks_left): pass")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no_tasks_left is for `async` tests, and test_plain is not `async`*"])


def test_a_test_case_of_unittest_is_told(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import unittest
        import pytest

        @pytest.mark.usefixtures("no_tasks_left")
        class TestIt(unittest.IsolatedAsyncioTestCase):
            async def test_it(self):
                pass
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no_tasks_left does not work in a unittest.TestCase: write `async with *"])


def test_it_costs_nothing_to_those_who_do_not_use_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_modules():
            assert "cancelable_deps_pytest" in sys.modules
            assert not {"cancelable_deps", "fastapi", "starlette", "httpx"} & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess("-p", "no:anyio", "-p", "no:asyncio").assert_outcomes(passed=1)
