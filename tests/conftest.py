from __future__ import annotations

import gc
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

from cancelable_deps import configure

from . import HIDDEN, hide_hooks
from .machine import scaled
from .servers import VARIANTS

# A shell that starts the tests in the background ignores it for them, and every server would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Above every ceiling of a test's own, so that the test can say what it waited for.
os.environ.setdefault("PYTEST_TIMEOUT", str(scaled(60)))

# What `--public-api` runs: the kernel, the doors, and the drivers for whose sake a cleanup is not to be disturbed.
ON_PUBLIC_API = {
    "test_cancelable.py",
    "test_cancellation_event.py",
    "test_client_timeout.py",
    "test_deadlines.py",
    "test_decorator.py",
    "test_decorator_stack.py",
    "test_dependencies.py",
    "test_detached.py",
    "test_every_door.py",
    "test_foreign.py",
    "test_forward_deadline.py",
    "test_middleware.py",
    "test_nests.py",
    "test_on_event.py",
    "test_polite.py",
    "test_polite_public.py",
    "test_postgres.py",
    "test_request_block.py",
    "test_route.py",
    "test_shorten_grace.py",
    "test_task_group.py",
    "test_token.py",
}

SHARED = [variant.name for variant in VARIANTS]

_NO_DEADLINE = "a deadline of anyio's strikes, also what we let finish: none is told"
_CHECKPOINT = "trio's checkpoint() needs one more step, after which the first await of a cleanup may be disturbed"
_OFFERED = "check_cancelled() of anyio in a thread is true only in the moments in which a cancellation is offered"
_SHIELDED = "a cancellation that has begun cannot be taken back, only be shielded, and the shield holds for all"

NOT_ON_PUBLIC_API = {
    "test_after_the_block_the_task_has_its_own_coroutine_back": "it is about the hook itself",
    "test_after_our_own_cancellation_the_task_counts_none": "asyncio counts two during the cleanup, and none after it",
    "test_anyio_knows_the_deadline": _NO_DEADLINE,
    "test_the_effective_deadline_is_that_of_the_block": _NO_DEADLINE,
    "test_work_that_is_told_cleans_up_undisturbed[trio": _CHECKPOINT,
    "test_a_scope_or_block_that_is_opened_in_the_cleanup_has_its_own_deadline[scope-trio": _CHECKPOINT,
    "test_a_scope_or_block_that_is_opened_in_the_cleanup_has_its_own_deadline[block-trio": _CHECKPOINT,
    "test_a_scope_of_the_users_that_strikes_in_the_cleanup_does_not_let_the_work_go_on[trio": (
        "a scope of trio's with our shield above it takes what passes for its own"
    ),
    "test_a_scope_that_lets_its_cancellation_pass_for_ours": "whose cancellation passes a scope is not to be seen",
    "test_deadline_of_a_block_in_a_child_leaves_a_cleanup_alone_that_the_group_has_begun[False": (
        "a plain group repeats its cancellation in its tasks"
    ),
    "test_a_scope_that_is_held_or_released_lets_the_cancellations_of_others_through[asyncio-cancel_and": _SHIELDED,
    "test_a_scope_that_is_held_or_released_lets_the_cancellations_of_others_through[trio-cancel_and": _SHIELDED,
    "test_a_scope_that_is_released_in_its_cleanup_lets_the_cancellations_of_others_through": _SHIELDED,
    "test_the_callback_of_the_decorator_does_not_cost_the_response[asyncio-thread": _OFFERED,
    "test_a_thread_that_asks_whether_it_is_cancelled_has_not_failed[asyncio": _OFFERED,
    "test_nests_of_all_kinds": "it finds every combination of these",
    "test_the_benchmark_says_which_nests": "as the nests themselves",
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


def pytest_report_header() -> str:
    return f"deadlines: {scaled(1):g} times as long as on an idle, usual machine"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--public-api") and collection_path.name.startswith("test_"):
        return collection_path.name not in ON_PUBLIC_API
    return None


def asks_for_compat(expression: str) -> bool:
    """Whether a `-m` wants the tier whose packages are not installed with the others."""
    return "compat" in re.sub(r"not\s+compat", "", expression)


def beyond_one_server(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield the cases of `one_server` that are not on the first server, but the first of a test on each, if it asks."""
    seen: set[object] = set()
    for item in items:
        mark, parameters = item.get_closest_marker("one_server"), getattr(item, "callspec", None)
        if mark is None or parameters is None or not parameters.indices.get(*mark.args, 0):
            continue
        key = item.nodeid.partition("[")[0], parameters.indices[mark.args[0]]
        if key in seen or not mark.kwargs.get("others"):
            yield item
        seen.add(key)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in beyond_one_server(items):
        item.add_marker(pytest.mark.real)
    if not asks_for_compat(config.option.markexpr):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("compat")])
        items[:] = [item for item in items if not item.get_closest_marker("compat")]
    if config.getoption("--public-api"):
        for item in items:
            for name, reason in NOT_ON_PUBLIC_API.items():
                if item.name.startswith(name):
                    item.add_marker(pytest.mark.skip(reason=reason))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return ByServer(config, log)


class ByServer(LoadFileScheduling):  # type: ignore[misc]
    """Give a file to one worker, as its fixtures want it; but all cases of a shared server, so that it starts once."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, case = nodeid.partition("::")
        if "test_servers" not in file:
            return file
        return next((name for name in SHARED if f"[{name}" in case), file)


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


@pytest.fixture
def small_heap() -> Iterator[None]:
    """Let the garbage collector look only at what the test makes: all modules and applications take it 50 times as long."""
    gc.freeze()
    yield
    gc.unfreeze()
