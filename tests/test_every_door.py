"""What holds behind each door that stops a handler as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI

from cancelable_deps import CancelableRoute, RequestCancelationMiddleware, with_cancelation
from cancelable_deps.testing import advance
from tests.calls import movable_clock, running

pytestmark = pytest.mark.anyio

LIMIT = 2


def decorated(endpoint: Any) -> FastAPI:
    app = FastAPI()
    app.get("/")(with_cancelation(timeout=LIMIT)(endpoint))
    return app


def covered(endpoint: Any) -> FastAPI:
    app = FastAPI()
    app.get("/")(endpoint)
    app.add_middleware(RequestCancelationMiddleware, default_timeout=LIMIT)
    return app


def routed(endpoint: Any) -> FastAPI:
    app, router = FastAPI(), APIRouter(route_class=CancelableRoute.with_timeout(LIMIT))
    router.get("/")(endpoint)
    app.include_router(router)
    return app


@movable_clock
@pytest.mark.parametrize("seconds", [0, 0.03])
@pytest.mark.parametrize("behind", [decorated, covered, routed])
async def test_background_tasks_are_spared(behind: Callable[[Any], FastAPI], seconds: float) -> None:
    done = anyio.Event()

    async def afterwards() -> None:
        await advance(LIMIT + 1)
        done.set()

    async def endpoint(tasks: BackgroundTasks) -> str:
        await anyio.sleep(seconds)
        tasks.add_task(afterwards)
        return "ok"

    async with running(behind(endpoint)) as call:
        await call.response()
        await call.hang_up()
    assert (call.status, done.is_set()) == (200, True)
