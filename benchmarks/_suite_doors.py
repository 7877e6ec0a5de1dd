"""A pytest plugin that puts one of our doors around every application of another project's test suite.

`benchmarks.public_suites` copies it to where that suite can import it; ``SUITE_DOOR`` names the door and
``SUITE_OUTCOMES`` the file for the outcomes.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastapi.routing
import pytest
import starlette.routing
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from cancelable_deps import CancelableRoute, RequestCancelationMiddleware, with_cancelation

JOURNAL = Path(os.environ["SUITE_OUTCOMES"])
outcomes: dict[str, dict[str, str]] = {}


def cover_clients() -> None:
    """Put the middleware around the application of each `TestClient`, be it an app, a mount or a bare ASGI function."""
    make = TestClient.__init__

    def cover(self: TestClient, app: Any, *args: Any, **options: Any) -> None:
        make(self, app, *args, **options)
        transport: Any = self._transport
        transport.app = RequestCancelationMiddleware(transport.app)

    TestClient.__init__ = functools.wraps(make)(cover)  # type: ignore[method-assign]


def cover_stacks() -> None:
    """Put the middleware as the outermost one into every application, and around every mount."""
    for kind in (Starlette, FastAPI):
        kind.build_middleware_stack = _with_ours(kind.build_middleware_stack)  # type: ignore[method-assign,assignment]
    starlette.routing.Mount.handle = _handle_covered  # type: ignore[method-assign]


async def _handle_covered(self: Any, scope: Any, receive: Any, send: Any) -> None:
    """Replace ``Mount.handle``, and not the mounted application, because mounts are equal if their applications are."""
    covered = vars(self).get("_covered")
    if covered is None or covered.app is not self.app:
        covered = self._covered = RequestCancelationMiddleware(self.app)
    await covered(scope, receive, send)


def _with_ours(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(build)
    def covered(self: Starlette) -> Any:
        own = self.user_middleware
        self.user_middleware = [Middleware(RequestCancelationMiddleware), *own]
        try:
            return build(self)
        finally:
            self.user_middleware = own

    return covered


def cover_routes() -> None:
    """Make `CancelableRoute` the class of routes in every router that does not choose one."""
    make = fastapi.routing.APIRouter.__init__

    def cover(self: Any, *args: Any, **options: Any) -> None:
        if options.get("route_class", fastapi.routing.APIRoute) is fastapi.routing.APIRoute:
            options["route_class"] = CancelableRoute
        make(self, *args, **options)

    fastapi.routing.APIRouter.__init__ = functools.wraps(make)(cover)  # type: ignore[method-assign]


def cover_endpoints() -> None:
    """Put the decorator around every endpoint when a route is made of it."""
    for kind in (
        starlette.routing.Route,
        starlette.routing.WebSocketRoute,
        fastapi.routing.APIRoute,
        fastapi.routing.APIWebSocketRoute,
    ):
        make = kind.__init__
        kind.__init__ = _with_decorated(make)  # type: ignore[method-assign]


def _with_decorated(make: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(make)
    def covered(self: Any, path: str, endpoint: Any, *args: Any, **options: Any) -> None:
        make(self, path, _decorated(endpoint), *args, **options)

    return covered


@functools.cache
def _decorated_once(endpoint: Any) -> Any:
    """Return the same function for the same endpoint, because routes are equal if their endpoints are."""
    try:
        covered = with_cancelation(endpoint)
    except TypeError:
        return endpoint
    covered._is_covered = True
    return covered


def _decorated(endpoint: Any) -> Any:
    """Return ``endpoint`` under the decorator; return a class, or another object that the decorator refuses, unchanged."""
    if not inspect.isroutine(endpoint) or getattr(endpoint, "_is_covered", False):
        return endpoint
    return _decorated_once(endpoint)


DOORS: dict[str, Callable[[], None]] = {
    "bare": lambda: None,
    "client": cover_clients,
    "stack": cover_stacks,
    "route": cover_routes,
    "endpoint": cover_endpoints,
}


def cover_all() -> None:
    for door in (cover_clients, cover_stacks, cover_routes, cover_endpoints):
        door()


DOORS["all"] = cover_all
DOORS[os.environ.get("SUITE_DOOR", "bare")]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that an earlier process has run, also the one that hung and ended it."""
    if JOURNAL.exists():
        done = {json.loads(line)["test"] for line in JOURNAL.read_text().splitlines()}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logstart(nodeid: str) -> None:
    """Record the test as hung, until it has an outcome."""
    outcomes[nodeid] = {"outcome": "passed", "why": ""}
    note(nodeid, {"outcome": "failed", "why": "hung"})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the worst outcome of a test's phases, with the last line of its explanation."""
    known = outcomes[report.nodeid]
    if report.failed:
        known.update(outcome="failed", why=_reason(report))
    elif report.skipped and known["outcome"] == "passed":
        known["outcome"] = "skipped"


def pytest_runtest_logfinish(nodeid: str) -> None:
    note(nodeid, outcomes[nodeid])


def pytest_sessionfinish() -> None:
    """Record that the session has ended by itself, because the exit of a hanging test has the code of a failure as well."""
    JOURNAL.with_suffix(".complete").touch()


def note(nodeid: str, outcome: dict[str, str]) -> None:
    with JOURNAL.open("a") as journal:
        journal.write(json.dumps({"test": nodeid} | outcome) + "\n")


def _reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else f"{Path(crash.path).name}:{crash.lineno}: {crash.message}"
    return " / ".join(line.strip() for line in text.splitlines()[:3])[:300]
