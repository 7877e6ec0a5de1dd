"""What holds behind each door that stops a handler as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI, Request

from cancelable_deps import CancelableRoute, RequestCancelationMiddleware, current_cancelable, with_cancelation
from cancelable_deps.kernel.settings import settings
from cancelable_deps.testing import advance
from tests import asgi
from tests.calls import CEILING, movable_clock, running

pytestmark = pytest.mark.anyio

LIMIT = 2
PASSES = 10


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


@pytest.mark.parametrize("asked", ["nothing", "body", "token"])
@pytest.mark.parametrize("behind", [covered, routed])
async def test_a_block_that_is_cancelled_after_the_response_spares_the_background(
    behind: Callable[[Any], FastAPI], asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "cleanup_grace", 0)
    done: list[str] = []

    async def afterwards() -> None:
        block = current_cancelable()
        assert block is not None
        assert block.cancel_nowait()
        # A stop of a handler that has returned waits for one grace, which is over in the next pass of the loop.
        for _ in range(PASSES):
            await anyio.lowlevel.checkpoint()
        done.append("background")

    async def endpoint(request: Request, tasks: BackgroundTasks) -> str:
        if asked == "body":
            await request.body()
        elif asked == "token":
            block = current_cancelable()
            assert block is not None
            assert not block.token.is_cancelled
        tasks.add_task(afterwards)
        return "ok"

    call = asgi.Call(behind(endpoint))
    with anyio.fail_after(CEILING):
        await asgi.as_by_a_server(call)
    assert (call.status, call.error, done) == (200, None, ["background"])
