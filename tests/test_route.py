from __future__ import annotations

from typing import Any

import anyio
import pytest
from fastapi import APIRouter, FastAPI, HTTPException, Request
from starlette.responses import JSONResponse, Response

from cancelable_deps import CancelableRoute, CancelationError, RequestCancelationMiddleware, with_cancelation
from cancelable_deps.testing import advance
from tests.calls import get, hang_up, movable_clock

pytestmark = pytest.mark.anyio


def app_with(router: APIRouter) -> FastAPI:
    app = FastAPI()
    app.include_router(router, prefix="/r")
    return app


async def test_every_route_of_the_router_is_covered() -> None:
    router = APIRouter(route_class=CancelableRoute)
    cleaned = anyio.Event()

    @router.get("/wait")
    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.01)
            cleaned.set()

    @router.post("/body")
    async def body(item: dict[str, int]) -> dict[str, int]:
        await anyio.sleep(0.02)
        return item

    app = app_with(router)
    call = await hang_up(app, "/r/wait")
    assert (call.status, call.most_readers, cleaned.is_set()) == (499, 1, True)
    call = await get(app, "/r/body", "POST", json={"a": 1})
    assert call.json() == {"a": 1}


@movable_clock
@pytest.mark.parametrize("how", ["with_timeout", "subclass"])
async def test_timeout_of_a_router(how: str) -> None:
    class Limited(CancelableRoute):
        default_timeout = 20

    router = APIRouter(route_class=Limited if how == "subclass" else CancelableRoute.with_timeout(20))

    @router.get("/")
    async def wait() -> None:
        await advance(20)
        await anyio.sleep_forever()

    @router.get("/longer")
    @with_cancelation(timeout=100)
    async def longer() -> str:
        await advance(60)
        return "finished"

    app = app_with(router)
    assert (await get(app, "/r/")).status == 504
    assert (await get(app, "/r/longer")).json() == "finished"


async def test_the_applications_exception_handler_answers() -> None:
    router = APIRouter(route_class=CancelableRoute.with_timeout(0.02))

    @router.get("/")
    async def wait() -> None:
        await anyio.sleep_forever()

    app = app_with(router)

    @app.exception_handler(CancelationError)
    async def problem(request: Request, exc: CancelationError) -> Response:
        return JSONResponse({"reason": exc.reason}, exc.status_code)

    call = await get(app, "/r/")
    assert (call.status, call.json()) == (504, {"reason": "timeout"})


@pytest.mark.parametrize("bad", [-1, float("nan"), "3"])
def test_wrong_timeouts_fail_when_the_class_is_made(bad: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="default_timeout"):
        CancelableRoute.with_timeout(bad)
    with pytest.raises((TypeError, ValueError), match="default_timeout"):
        type("Limited", (CancelableRoute,), {"default_timeout": bad})


async def test_under_the_middleware_it_is_one_request() -> None:
    router = APIRouter(route_class=CancelableRoute)

    @router.get("/")
    @with_cancelation
    async def wait() -> None:
        await anyio.sleep_forever()

    app = app_with(router)
    app.add_middleware(RequestCancelationMiddleware)
    call = await hang_up(app, "/r/")
    assert (call.status, call.most_readers) == (499, 1)


async def test_what_the_router_answers_itself_stays() -> None:
    router = APIRouter(route_class=CancelableRoute)

    @router.get("/{item}")
    async def endpoint(item: int) -> None:
        raise HTTPException(418, "teapot")

    app = app_with(router)
    assert (await get(app, "/r/1")).status == 418
    assert (await get(app, "/r/x")).status == 422
    assert (await get(app, "/r/1", "DELETE")).status == 405
    plain = APIRouter()
    plain.get("/{item}")(endpoint)
    assert app.openapi() == app_with(plain).openapi()
