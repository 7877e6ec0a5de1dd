# ruff: noqa: PT012 - what leaves a block is tested by leaving it, inside of `raises`
"""Where a hook into anyio or trio is not the one that we know, cancellations are polite by public API."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio
from anyio._backends import _asyncio as anyio_asyncio
from fastapi import FastAPI, Request, Response
from starlette.middleware.base import RequestResponseEndpoint
from trio._core import _run as trio_run

from cancelable_deps import (
    Cancelable,
    ManualCancelation,
    RequestCancelationMiddleware,
)
from cancelable_deps.kernel.cancelable import block_of
from cancelable_deps.kernel.loops import known
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.kernel.loops.public_asyncio import AsyncioWatch
from cancelable_deps.kernel.loops.public_scopes import PublicMemberScope, PublicScope
from cancelable_deps.kernel.task_group import CancelableTaskGroup

from . import HIDDEN
from .calls import hang_up
from .leftovers import nothing_left
from .machine import scaled

pytestmark = pytest.mark.anyio
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])
on_trio = pytest.mark.parametrize("anyio_backend", ["trio"])

SOON = 0.02
LONG = 100

Patch = pytest.MonkeyPatch


def one_more_slot(patch: Patch) -> None:
    class Scope(anyio_asyncio.CancelScope):
        __slots__ = ("_more",)

    patch.setattr(anyio_asyncio, "CancelScope", Scope)


def delivery_under_another_name(patch: Patch) -> None:
    patch.delattr(anyio_asyncio.CancelScope, "_deliver_cancellation")


def delivery_that_takes_more(patch: Patch) -> None:
    def deliver(self: Any, origin: Any, more: Any) -> bool:
        return False

    patch.setattr(anyio_asyncio.CancelScope, "_deliver_cancellation", deliver)


def cancel_that_delivers_in_another_way(patch: Patch) -> None:
    def cancel(self: Any, reason: str | None = None) -> None: ...

    patch.setattr(anyio_asyncio.CancelScope, "cancel", cancel)


def leaving_that_does_not_count(patch: Patch) -> None:
    def leave(self: Any, exc_type: Any, exc_val: Any, exc_tb: Any) -> None: ...

    patch.setattr(anyio_asyncio.CancelScope, "__exit__", leave)


def visibility_under_another_name(patch: Patch) -> None:
    patch.delattr(anyio_asyncio.CancelScope, "_parent_cancellation_is_visible_to_us")


def shield_that_is_not_asked(patch: Patch) -> None:
    patch.setattr(anyio_asyncio.CancelScope, "_effectively_cancelled", property(lambda self: self._cancel_called))


def scope_that_has_no_heirs(patch: Patch) -> None:
    def refuse(cls: type[Any]) -> None:
        raise TypeError("final")

    patch.setattr(anyio_asyncio.CancelScope, "__init_subclass__", classmethod(refuse))


def no_states(patch: Patch) -> None:
    patch.delattr(anyio_asyncio, "_task_states")


def states_in_another_kind_of_mapping(patch: Patch) -> None:
    patch.setattr(anyio_asyncio, "_task_states", {})


def state_with_more_to_it(patch: Patch) -> None:
    class State(anyio_asyncio.TaskState):
        __slots__ = ("more",)

    patch.setattr(anyio_asyncio, "TaskState", State)


def other_words(patch: Patch) -> None:
    patch.setattr(anyio_asyncio, "is_anyio_cancellation", lambda exc: False)


def backend_elsewhere(patch: Patch) -> None:
    patch.setitem(sys.modules, "anyio._backends._asyncio", None)


def coroutine_that_cannot_be_replaced(patch: Patch) -> None:
    patch.setattr(trio.lowlevel.Task, "coro", property(lambda self: None))


def tasks_that_are_stepped_in_another_way(patch: Patch) -> None:
    def reschedule(self: Any, task: Any, next_send: Any = None) -> None: ...

    patch.setattr("trio._core._run.Runner.reschedule", reschedule)


def status_without_recalculating(patch: Patch) -> None:
    patch.delattr(trio_run.CancelStatus, "recalculate")


def status_that_does_not_ask_its_scope(patch: Patch) -> None:
    patch.setattr(trio_run.CancelStatus, "parent_cancellation_is_visible_to_us", property(lambda self: False))


def status_whose_parent_stays(patch: Patch) -> None:
    patch.setattr(trio_run.CancelStatus, "parent", property(lambda self: None))


def status_that_keeps_its_class(patch: Patch) -> None:
    status: Any = trio_run.CancelStatus

    class Status(trio_run.CancelStatus):
        """It has a dictionary."""

        __slots__ = (*status.__slots__[:-1], "__dict__")

    patch.setattr(trio_run, "CancelStatus", Status)


def scope_that_closes_in_another_way(patch: Patch) -> None:
    patch.setattr(trio_run.CancelScope, "_close", lambda self, exc: exc)


def nursery_without_a_list_of_errors(patch: Patch) -> None:
    def init(self: Any, parent: Any, scope: Any, strict: Any) -> None: ...

    patch.setattr(trio_run.Nursery, "__init__", init)


ASYNCIO = [
    one_more_slot,
    delivery_under_another_name,
    delivery_that_takes_more,
    cancel_that_delivers_in_another_way,
    leaving_that_does_not_count,
    visibility_under_another_name,
    shield_that_is_not_asked,
    scope_that_has_no_heirs,
    no_states,
    states_in_another_kind_of_mapping,
    state_with_more_to_it,
    other_words,
    backend_elsewhere,
]
TRIO = [
    coroutine_that_cannot_be_replaced,
    tasks_that_are_stepped_in_another_way,
    status_without_recalculating,
    status_that_does_not_ask_its_scope,
    status_whose_parent_stays,
    status_that_keeps_its_class,
    scope_that_closes_in_another_way,
    nursery_without_a_list_of_errors,
]


@pytest.mark.parametrize(
    ("backend", "change"), [*(("asyncio", change) for change in ASYNCIO), *(("trio", change) for change in TRIO)]
)
def test_a_hook_that_has_changed_is_noticed_and_said_once(
    backend: str, change: Callable[[Patch], None], monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    package = "anyio" if backend == "asyncio" else "trio"
    known._report.cache_clear()
    try:
        with monkeypatch.context() as patch:
            change(patch)
            is_known = known.asyncio_is_known if backend == "asyncio" else known.trio_is_known
            assert [is_known(), is_known()] == [False, False]
    finally:
        known._report.cache_clear()
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("cancelable_deps", logging.WARNING)
    assert record.message.startswith(
        f"{package} {version(package)} has other private parts than cancelable_deps expects ("
    )
    assert record.message.endswith(f"Tested: {package} {known.KNOWN_VERSIONS[package]}.")


def test_the_versions_that_are_installed_are_known() -> None:
    assert known.what_is_strange("asyncio") is None
    assert known.what_is_strange("trio") is None


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != HIDDEN}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=scaled(50), env=environment
    )


def test_importing_looks_at_anyio_and_loads_no_trio() -> None:
    code = """
import logging, sys
from anyio._backends import _asyncio as module
del module.TaskState
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
import cancelable_deps
assert "trio" not in sys.modules
"""
    done = run(code)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"WARNING cancelable_deps anyio {version('anyio')} ")
    assert done.stdout == ""


WORK = """
import anyio, sys
backend, use_hooks = {backend!r}, {use_hooks}
if backend == "trio":
    import trio
else:
    from anyio._backends import _asyncio as module
    scope = module.CancelScope
{change}
import cancelable_deps.kernel.loops.known as known
from cancelable_deps import Cancelable, ManualCancelation
from cancelable_deps.kernel.task_group import CancelableTaskGroup
if use_hooks:
    # As before there was a look: whatever is installed is taken for what we know.
    known.hooks_are_known = lambda is_trio: True

async def child():
    try:
        await anyio.sleep_forever()
    finally:
        await anyio.sleep(0.02)
        await anyio.sleep(0.02)
        print("cleaned up")

async def main():
    try:
        async with CancelableTaskGroup(Cancelable()) as group:
            group.start_soon(child)
            await anyio.wait_all_tasks_blocked()
            await group.cancelable.cancel()
    except ManualCancelation:
        print("stopped")

anyio.run(main, backend=backend)
"""

# All that anyio calls is still called, under another name: the hook would be there, and never be called.
RENAMED = """
def rename(function):
    code = function.__code__
    names = tuple("_deliver" if name == "_deliver_cancellation" else name for name in code.co_names)
    function.__code__ = code.replace(co_names=names)

for name in ("__enter__", "_deliver_cancellation", "_restart_cancellation_in_parent", "cancel"):
    rename(getattr(scope, name))
scope._deliver = scope._deliver_cancellation
"""

# A trio that does not ask the task for its coroutine at each step.
ASKED_ONCE = """
runner = trio._core._run.Runner
old, first = runner.reschedule, {}

def reschedule(self, task, *next_send):
    old(self, task, *next_send)
    task._next_send_fn = first.setdefault(task, task._next_send_fn)

runner.reschedule = reschedule
"""


@pytest.mark.parametrize(("backend", "change"), [("asyncio", RENAMED), ("trio", ASKED_ONCE)], ids=["asyncio", "trio"])
@pytest.mark.parametrize("use_hooks", [False, True])
def test_a_cleanup_is_disturbed_where_the_hook_is_never_called_and_not_on_the_public_path(
    backend: str, change: str, use_hooks: bool
) -> None:
    done = run(WORK.format(backend=backend, change=change, use_hooks=use_hooks))
    assert done.stdout.splitlines() == (["stopped"] if use_hooks else ["cleaned up", "stopped"])


@pytest.fixture
def hooks_hidden(monkeypatch: pytest.MonkeyPatch, anyio_backend: str) -> None:
    """As with an anyio and a trio that we do not know."""
    monkeypatch.setattr(known, "hooks_are_known", lambda is_trio: False)


@pytest.fixture
async def watches(hooks_hidden: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been watched; and nothing is placed later, in the loop of this test."""
    monkeypatch.setattr(current_loop(), "task_without_scope", None)
    seen: list[str] = []
    start = AsyncioWatch.start

    def note(self: AsyncioWatch) -> None:
        seen.append("watched")
        start(self)

    monkeypatch.setattr(AsyncioWatch, "start", note)
    return seen


@on_asyncio
async def test_nothing_is_watched_before_something_is_cancelled(watches: list[str]) -> None:
    loop: Any = asyncio.get_running_loop()
    released = anyio.Event()

    async def wait(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        task_status.started()
        await released.wait()

    async with nothing_left(), CancelableTaskGroup(Cancelable()) as group:
        await group.start(wait)
        assert all(isinstance(scope, PublicMemberScope) for scope in group._member_scopes.values())
        assert isinstance(block_of(group.cancelable).scope, PublicScope)
        await anyio.wait_all_tasks_blocked()
        handles = [handle for handle in (*loop._ready, *loop._scheduled) if not handle.cancelled()]
        ours = [handle for handle in handles if "cancelable_deps" in repr(handle)]
        assert (watches, ours) == ([], [])
        released.set()


@on_asyncio
async def test_a_thread_that_is_waited_for_costs_no_pass_after_pass(
    watches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    offers: list[str] = []
    offer = AsyncioWatch._offer

    def count(self: AsyncioWatch) -> None:
        offers.append("offered")
        offer(self)

    async def work() -> None:
        with pytest.raises(ManualCancelation):
            async with block:
                await anyio.to_thread.run_sync(release.wait, 10)
                journal.append("the thread has ended")
                await anyio.lowlevel.checkpoint()
                journal.append("went on")

    monkeypatch.setattr(AsyncioWatch, "_offer", count)
    release, block, journal = threading.Event(), Cancelable(), list[str]()
    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        await anyio.wait_all_tasks_blocked()
        block.cancel_nowait()
        for _ in range(1000):
            await anyio.lowlevel.checkpoint()
        # As often as time has passed, and not as often as the loop has turned.
        assert len(offers) < 500
        release.set()
    assert journal == ["the thread has ended"]


@pytest.mark.usefixtures("hooks_hidden")
async def test_a_handler_inside_of_a_base_http_middleware_cleans_up_undisturbed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(current_loop(), "task_without_scope", None)
    journal: list[str] = []
    app = FastAPI()

    @app.middleware("http")
    async def between(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    app.add_middleware(RequestCancelationMiddleware)

    @app.get("/")
    async def endpoint() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(SOON)
            await anyio.sleep(SOON)
            journal.append("cleaned up")

    async with nothing_left():
        assert (await hang_up(app)).status == 499
    assert journal == ["cleaned up"]


@on_asyncio
async def test_a_count_that_is_somebody_elses_is_not_taken_for_ours(watches: list[str]) -> None:
    """A scope of the user's cancels the task, in the pass in which we wait for it to hear of ours."""
    journal: list[str] = []
    async with nothing_left():
        with anyio.fail_after(4), pytest.raises(ManualCancelation):
            async with Cancelable() as block:
                with anyio.CancelScope() as own:
                    own.cancel()
                    block.cancel_nowait()
                    await anyio.sleep_forever()
                journal.append("its own was caught" if own.cancelled_caught else "both")
                try:
                    await anyio.sleep_forever()
                finally:
                    await anyio.sleep(SOON)
                    journal.append("cleaned up")
    assert journal[-1] == "cleaned up"
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.usefixtures("hooks_hidden")
@pytest.mark.parametrize("is_reached", [True, False])
async def test_a_deadline_of_a_groups_own_scope_is_polite_and_leaves_nothing(is_reached: bool) -> None:
    journal: list[str] = []

    async def child() -> None:
        try:
            await anyio.sleep(LONG if is_reached else 0)
        finally:
            await anyio.sleep(SOON)
            await anyio.sleep(SOON)
            journal.append("cleaned up")

    async with nothing_left(), CancelableTaskGroup(Cancelable()) as group:
        group.start_soon(child)
        group.cancel_scope.deadline = anyio.current_time() + (SOON if is_reached else LONG)
        assert group.cancel_scope.deadline == pytest.approx(anyio.current_effective_deadline(), abs=0.1)
    assert journal == ["cleaned up"]
    assert group.cancel_scope.cancel_called is is_reached


@pytest.mark.usefixtures("hooks_hidden")
async def test_a_child_that_fails_leaves_the_body_its_cleanup() -> None:
    journal: list[str] = []

    async def fail() -> None:
        raise KeyError

    async with nothing_left():
        with pytest.raises(KeyError):
            async with CancelableTaskGroup(Cancelable()) as group:
                group.start_soon(fail)
                try:
                    await anyio.sleep_forever()
                finally:
                    await anyio.sleep(SOON)
                    await anyio.sleep(SOON)
                    journal.append("cleaned up")
    assert journal == ["cleaned up"]
