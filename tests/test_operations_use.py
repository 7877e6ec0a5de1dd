"""Opening operations, in one application and in several, and a firmer cancel."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fastapi import FastAPI

from cancelable_deps import Cancelable, RequestCancelationMiddleware
from cancelable_deps.operations import Operations, RequestOperation, RequestOperations
from cancelable_deps.testing import CancelableClient, advance
from tests.calls import CEILING, movable_clock
from tests.operations import endless, until

pytestmark = pytest.mark.anyio


async def test_operations_are_opened_once_at_a_time_and_again_afterwards() -> None:
    operations = Operations()
    with pytest.raises(RuntimeError, match="not open"):
        await operations.list()
    for _ in range(2):
        async with operations:
            with pytest.raises(RuntimeError, match="open already"):
                await operations.__aenter__()
            assert (await operations.start(endless)).state == "running"
            await operations.cancel_all(older_than=0)
        assert not operations.is_open


def test_a_lifespan_that_is_none_is_refused_when_the_application_is_built() -> None:
    with pytest.raises(TypeError, match="asynccontextmanager"):
        Operations().lifespan("lifespan")  # type: ignore[arg-type]


async def test_an_application_whose_operations_are_not_opened_does_not_start() -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, operations=Operations())
    with pytest.raises(RuntimeError, match=r"lifespan=operations\.lifespan"):
        async with CancelableClient(app, ceiling=CEILING):
            pass


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"operation_id": "operation-id"}, TypeError),
        ({"operations": "operations"}, TypeError),
        ({"operations": Operations(), "operation_id": 7}, TypeError),
        ({"operations": Operations(), "operation_id": "operation id"}, ValueError),
    ],
)
def test_wrong_options_of_the_middleware_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="operation"):
        RequestCancelationMiddleware(FastAPI(), **options)


async def test_a_mounted_application_has_the_operations_of_the_one_around_it() -> None:
    operations = Operations()
    app, inner = FastAPI(lifespan=operations.lifespan()), FastAPI()
    app.mount("/inner", inner)

    @inner.get("/work")
    async def work(operation: RequestOperation) -> None:
        operation.claim("ann")
        await anyio.sleep_forever()

    @inner.post("/stop")
    async def stop(operations: RequestOperations) -> int:
        return len(await operations.cancel_all(owner="ann"))

    async with CancelableClient(app, ceiling=CEILING) as client, client.start("GET", "/inner/work") as call:
        with anyio.fail_after(CEILING):
            while (await client.post("/inner/stop")).json() != 1:
                pass
        assert (await call.response()).status_code == 499


async def test_a_request_that_is_asked_for_is_listed_before_it_is_old() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())

    @app.get("/own")
    async def own(operation: RequestOperation, operations: RequestOperations) -> bool:
        return [each.id for each in (await operations.list()).items] == [operation.id]

    @app.get("/other")
    async def other(operations: RequestOperations) -> int:
        return (await operations.list()).total

    async with CancelableClient(app, ceiling=CEILING) as client:
        assert (await client.get("/own")).json() is True
        assert (await client.get("/other")).json() == 0


async def test_two_applications_of_one_loop_do_not_see_each_others_requests() -> None:
    both = [Operations(), Operations()]
    apps = [FastAPI(lifespan=operations.lifespan()) for operations in both]
    for app in apps:
        app.add_middleware(RequestCancelationMiddleware)
        app.get("/work")(anyio.sleep_forever)
    async with CancelableClient(apps[0], ceiling=CEILING) as one, CancelableClient(apps[1], ceiling=CEILING) as other:
        async with one.start("GET", "/work") as first, other.start("GET", "/work") as second:
            for operations in both:
                with anyio.fail_after(CEILING):
                    while (await operations.list()).total != 1:
                        await anyio.lowlevel.checkpoint()
            await both[0].cancel_all(route="/work")
            await first.ended()
            assert (await both[1].list()).total == 1
            await both[1].cancel_all(route="/work")
        assert (first.status, second.status) == (499, 499)


@movable_clock
async def test_a_second_cancel_is_firmer() -> None:
    cleaned_up: list[str] = []
    begun = anyio.Event()

    async def work(cancel: Cancelable) -> None:
        try:
            begun.set()
            await anyio.sleep_forever()
        finally:
            cleaned_up.append("began")
            await anyio.sleep(4)
            cleaned_up.append("ended")

    async with Operations() as operations:
        operation = await operations.start(work)
        await begun.wait()
        assert (await operations.cancel(operation.id, wait=0)).outcome == "stopping"
        await until(lambda: cleaned_up)
        assert (await operations.cancel(operation.id, wait=0, grace=1)).outcome == "stopping"
        await advance(1.1)
        assert (await operations.cancel(operation.id)).outcome == "cancelled"
    assert cleaned_up == ["began"]
