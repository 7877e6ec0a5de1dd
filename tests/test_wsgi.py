"""A WSGI application that is mounted is a worker thread: it is waited for, and its result counts.

With a2wsgi and real frameworks: `tests/compat/test_wsgi.py`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import anyio
import fastapi.routing
import pytest
from fastapi import APIRouter, FastAPI
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Host
from starlette.types import ASGIApp

from cancelable_deps import RequestCancelationMiddleware
from cancelable_deps.doors.wsgi import is_wsgi_bridge
from cancelable_deps.testing import advance
from tests.calls import CEILING, movable_clock, running

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from starlette.middleware.wsgi import WSGIMiddleware

pytestmark = pytest.mark.anyio


class View:
    """A WSGI application that works until it may go on."""

    def __init__(self) -> None:
        self.has_started = threading.Event()
        self.may_go_on = threading.Event()
        self.events: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.has_started.set()
        self.may_go_on.wait(CEILING)
        self.events.append("done")
        start_response("200 OK", [("content-length", "6")])
        return [b"result"]


def application(view: View, **options: Any) -> FastAPI:
    app = FastAPI()
    app.mount("/", WSGIMiddleware(view))
    app.add_middleware(RequestCancelationMiddleware, **options)
    return app


async def started(view: View) -> None:
    assert await anyio.to_thread.run_sync(view.has_started.wait, 10)


async def test_it_is_waited_for_when_its_client_leaves() -> None:
    view = View()
    async with running(application(view)) as call:
        await started(view)
        await call.listened_to()
        await call.hang_up()
        view.may_go_on.set()
    assert (view.events, call.status, call.exception) == (["done"], 499, None)


@movable_clock
async def test_a_timeout_is_answered_when_the_thread_is_done() -> None:
    view = View()
    async with running(application(view, default_timeout=5)) as call:
        await started(view)
        await advance(20)
        assert call.sent == []
        view.may_go_on.set()
    assert (view.events, call.status, call.exception) == (["done"], 504, None)


async def test_a_result_in_time_is_the_response() -> None:
    view = View()
    view.may_go_on.set()
    async with running(application(view, default_timeout=30)) as call:
        pass
    assert (call.status, call.body) == (200, b"result")


def under_gzip(bridge: Any) -> FastAPI:
    app = FastAPI()
    app.mount("/", GZipMiddleware(bridge))
    app.add_middleware(RequestCancelationMiddleware)
    return app


def of_a_host(bridge: Any) -> FastAPI:
    app = FastAPI()
    app.router.routes.append(Host("{name:path}", bridge))
    app.add_middleware(RequestCancelationMiddleware)
    return app


def of_an_included_router(bridge: Any) -> FastAPI:
    app, router = FastAPI(), APIRouter()
    router.mount("/x", bridge)
    app.include_router(router)
    app.add_middleware(RequestCancelationMiddleware)
    return app


def alone(bridge: Any) -> RequestCancelationMiddleware:
    return RequestCancelationMiddleware(RequestCancelationMiddleware(bridge))


MAKERS: list[Callable[[Any], ASGIApp]] = [under_gzip, of_a_host, alone]
if hasattr(fastapi.routing, "_IncludedRouter"):  # Before 0.137 FastAPI had no mounts in included routers.
    MAKERS.append(of_an_included_router)


@pytest.mark.parametrize("make", MAKERS)
async def test_it_is_waited_for_wherever_it_stands(make: Callable[[Any], ASGIApp]) -> None:
    view = View()
    async with running(make(WSGIMiddleware(view)), "/x/") as call:
        await started(view)
        await call.listened_to()
        await call.hang_up()
        view.may_go_on.set()
    assert (view.events, call.status, call.exception) == (["done"], 499, None)


async def test_bridges_are_known_by_their_classes() -> None:
    class Derived(WSGIMiddleware): ...

    assert is_wsgi_bridge(Derived(View()))
    assert not is_wsgi_bridge(FastAPI())
