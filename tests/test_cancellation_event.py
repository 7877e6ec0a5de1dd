"""`cancellation_event(soft=...)`: told some seconds before the timeout, so that a handler hands back what it has."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any

import anyio
import anyio.to_thread
import pytest
from fastapi import APIRouter, Depends, FastAPI

from cancelable_deps import (
    CancelableRoute,
    CancelationReason,
    CancellationEvent,
    RequestCancelationMiddleware,
    RequestCancellationEvent,
    TimeoutPolicy,
    cancellation_event,
    current_cancelable,
    timeout_policy,
    with_cancelation,
)
from cancelable_deps.deadlines import ClientTimeout
from cancelable_deps.testing import advance
from tests.calls import CEILING, get, movable_clock, running

pytestmark = pytest.mark.anyio

Event = Annotated[RequestCancellationEvent, Depends(cancellation_event(soft=5))]
DOORS = ["decorator", "middleware", "route", "policy", "client"]
CLIENT = ClientTimeout(["x-budget"])


def application(door: str, handler: Callable[..., Any], timeout: float = 30) -> FastAPI:
    app = FastAPI()
    match door:
        case "decorator":
            app.get("/")(with_cancelation(timeout=timeout)(handler))
        case "route":
            router = APIRouter(route_class=CancelableRoute.with_timeout(timeout))
            router.get("/")(handler)
            app.include_router(router)
        case "policy":
            app.get("/", dependencies=[Depends(timeout_policy(TimeoutPolicy(timeout=timeout)))])(handler)
            app.add_middleware(RequestCancelationMiddleware, default_timeout=1)
        case "client":
            app.get("/")(handler)
            app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout * 2, client_timeout=CLIENT)
        case "middleware":
            app.get("/")(handler)
            app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)
        case _:
            app.get("/")(handler)
    return app


def headers(door: str) -> dict[str, str]:
    return {"x-budget": "30"} if door == "client" else {}


@movable_clock
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("how", ["waits", "asks"])
async def test_it_is_set_before_the_timeout_and_the_handler_hands_back_what_it_has(door: str, how: str) -> None:
    started = anyio.Event()

    async def handler(event: Event) -> dict[str, object]:
        assert not event.is_set()
        assert (event.reason, event.message) == (None, None)
        assert 25 < event.remaining() <= 30
        started.set()
        if how == "waits":
            assert await event.wait() is CancelationReason.TIMEOUT
        else:
            while not event.is_set():  # noqa: ASYNC110 - as users do
                await anyio.sleep(0.5)
        assert event.is_set()
        return {"reason": str(event.reason), "message": event.message, "left": 0 < event.remaining() <= 5}

    async with running(application(door, handler), headers=headers(door)) as call:
        await started.wait()
        await advance(24)
        assert call.status is None
        await advance(1.2)
    assert call.status == 200
    assert call.json() == {"reason": "timeout", "message": "less than 5 s are left", "left": True}


@movable_clock
@pytest.mark.parametrize("door", DOORS)
async def test_who_does_not_stop_is_stopped_by_the_timeout(door: str) -> None:
    reasons: list[CancelationReason] = []
    started = anyio.Event()

    async def handler(event: Event) -> None:
        started.set()
        reasons.append(await event.wait())
        await anyio.sleep_forever()

    async with running(application(door, handler), headers=headers(door)) as call:
        await started.wait()
        await advance(25.5)
        assert (reasons, call.status) == ([CancelationReason.TIMEOUT], None)
        await advance(5)
    assert call.status == 504


@pytest.mark.parametrize("door", [*DOORS, "none"])
async def test_it_is_set_when_the_client_leaves(door: str) -> None:
    reasons: list[CancelationReason] = []

    async def handler(event: Event) -> None:
        try:
            reasons.append(await event.wait())
        finally:
            reasons.append(event.reason or CancelationReason.MANUAL)

    async with running(application(door, handler), headers=headers(door)) as call:
        await call.listened_to()
        await call.hang_up()
    assert reasons[-1] is CancelationReason.DISCONNECT


@movable_clock
@pytest.mark.parametrize("door", [*DOORS, "none"])
@pytest.mark.parametrize("stops", [True, False])
async def test_a_guard_gives_the_work_time_when_the_client_leaves(door: str, stops: bool) -> None:
    told = anyio.Event()
    done: list[str] = []

    async def handler(event: Event) -> str:
        with event.guard():
            try:
                assert await event.wait() is CancelationReason.DISCONNECT
                told.set()
                await (anyio.sleep(4) if stops else anyio.sleep(6))
                done.append("safe")
            except BaseException:
                done.append("stopped")
                raise
        return "what there is"

    async with running(application(door, handler), headers=headers(door)) as call:
        await call.listened_to()
        await call.hang_up()
        await told.wait()
        await advance(4.2)
        assert done == (["safe"] if stops else [])
        await advance(2)
    stopped = not stops and door != "none"
    assert done == ["stopped" if stopped else "safe"]
    assert call.status == (499 if stopped else 200)


async def test_a_guard_may_be_made_when_the_client_has_left_and_in_a_thread() -> None:
    seen: list[object] = []

    async def handler(event: Event) -> None:
        cancel = current_cancelable()
        assert cancel is not None
        with cancel.defer_disconnect():
            while not cancel.client_has_left:  # noqa: ASYNC110 - nothing else tells it there
                await anyio.sleep(0.001)

            def work() -> None:
                with event.guard():
                    seen.append(event.reason)

            await anyio.to_thread.run_sync(work)
            async with event.guard():
                seen.append(event.is_set())

    async with running(application("middleware", handler)) as call:
        await call.listened_to()
        await call.hang_up()
    assert seen == [CancelationReason.DISCONNECT, True]


async def test_a_guard_is_entered_once() -> None:
    async def handler(event: Event) -> str:
        guard = event.guard()
        with guard, pytest.raises(RuntimeError, match="entered once"):
            guard.__enter__()
        return "ok"

    assert (await get(application("decorator", handler))).status == 200


async def test_a_plain_event_has_no_guard() -> None:
    async def handler(event: CancellationEvent) -> str:
        with pytest.raises(RuntimeError, match="cancellation_event"):
            event.guard()
        return "ok"

    assert (await get(application("decorator", handler))).status == 200


@movable_clock
async def test_a_timeout_that_is_moved_moves_it() -> None:
    started = anyio.Event()
    asked: list[bool] = []

    async def handler(event: Event) -> str:
        cancel = current_cancelable()
        assert cancel is not None

        async def extend() -> None:
            await anyio.sleep(20)
            assert cancel.extend(20)
            await anyio.sleep(10)
            asked.append(event.is_set())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(extend)
            started.set()
            await event.wait()
        cancel.disable_timeout()
        # What has been set stays set.
        return str(event.is_set())

    async with running(application("middleware", handler)) as call:
        await started.wait()
        await advance(31)
        assert (asked, call.status) == ([False], None)
        await advance(15)
    assert (call.status, call.json()) == (200, "True")


async def test_a_shorter_timeout_than_that_has_it_set_from_the_start() -> None:
    async def handler(event: Event) -> tuple[bool, str]:
        with anyio.fail_after(CEILING):
            return event.is_set(), str(await event.wait())

    assert (await get(application("decorator", handler, timeout=3))).json() == [True, "timeout"]


async def test_without_a_timeout_it_has_all_the_time() -> None:
    async def handler(event: Event, plain: CancellationEvent) -> list[bool]:
        return [event.is_set(), event.remaining() == math.inf, plain.remaining() == math.inf]

    assert (await get(application("none", handler))).json() == [False, True, True]


async def test_a_plain_event_knows_the_time_and_is_not_set_by_it() -> None:
    async def handler(event: CancellationEvent) -> list[bool]:
        return [event.is_set(), 0 < event.remaining() <= 3]

    assert (await get(application("decorator", handler, timeout=3))).json() == [False, True]


@movable_clock
async def test_a_def_endpoint_asks() -> None:
    def handler(event: Event) -> bool:
        return event.is_set() or event.remaining() > 25

    assert (await get(application("decorator", handler))).json() is True


@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf, "5", None, True])
def test_what_is_no_time_is_refused(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="soft"):
        cancellation_event(soft=wrong)
    cancellation_event(soft=timedelta(seconds=1))


def test_it_is_no_dependency_itself() -> None:
    app = FastAPI()
    with pytest.raises(TypeError, match="Call it, with the seconds"):

        @app.get("/")
        async def handler(event: Annotated[Any, Depends(cancellation_event)]) -> None: ...


def test_nothing_of_it_becomes_a_parameter() -> None:
    async def handler(event: Event) -> None: ...

    app = application("none", handler)
    assert "parameters" not in app.openapi()["paths"]["/"]["get"]
