from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Annotated, Any

import anyio
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from cancelable_deps import (
    Cancelable,
    CancelationReason,
    CancellationEvent,
    DisconnectCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    TimeoutCancelation,
    cancelable_dependency,
    cancelable_with_timeout,
    cancellation,
    create_request_task_group,
    current_cancelable,
    request_task_group,
    wait_for_disconnect,
    with_cancelation,
)
from cancelable_deps.testing import advance
from tests.calls import get, hang_up, movable_clock, running
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio


async def test_cancelable_is_stopped_by_the_client() -> None:
    app = FastAPI()
    seen: list[Any] = []

    @app.get("/")
    async def endpoint(cancel: RequestCancelable) -> None:
        async with cancel as entered:
            assert entered is cancel is current_cancelable()
            try:
                await anyio.sleep_forever()
            finally:
                await anyio.sleep(0.01)
                seen.append(cancel.reason)

    call = await hang_up(app)
    assert (call.status, call.json()) == (499, {"detail": "Client closed the request"})
    assert seen == [CancelationReason.DISCONNECT]


async def test_leaving_raises_inside_the_handler_which_may_answer_otherwise() -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(cancel: RequestCancelable) -> str:
        try:
            async with cancel:
                await anyio.sleep_forever()
        except DisconnectCancelation as exc:
            return f"partial: {exc.reason}"
        raise AssertionError

    call = await hang_up(app)
    assert (call.status, call.json()) == (200, "partial: disconnect")


@pytest.mark.parametrize("timeout", [0.02, timedelta(milliseconds=20), 0])
async def test_timeout_of_a_handle(timeout: Any) -> None:
    app = FastAPI()
    limited = cancelable_with_timeout(timeout)

    @app.get("/")
    async def endpoint(cancel: Cancelable = Depends(limited)) -> None:
        async with cancel:
            await anyio.sleep_forever()

    assert (await get(app)).status == 504


async def test_older_style_of_all_dependencies() -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(
        cancel: Cancelable = Depends(cancelable_dependency),
        get_task_group: Any = Depends(request_task_group),
        event: Any = Depends(cancellation),
    ) -> bool:
        async with cancel, get_task_group() as tasks:
            tasks.start_soon(anyio.sleep, 0.01)
        return bool(event.is_set())

    call = await get(app)
    assert (call.status, call.json()) == (200, False)


@pytest.mark.parametrize("bad", [-1, float("nan"), "3", None, True])
def test_wrong_timeouts_fail_where_the_route_is_written(bad: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="timeout"):
        cancelable_with_timeout(bad)


async def test_task_group_is_cancelled_with_the_request_and_its_children_clean_up() -> None:
    app = FastAPI()
    cleaned: list[int] = []

    async def child(number: int) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.01)
            await anyio.sleep(0.01)
            cleaned.append(number)

    @app.get("/")
    async def endpoint(get_task_group: RequestTaskGroup) -> None:
        async with get_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(child, number)

    call = await hang_up(app)
    assert call.status == 499
    assert sorted(cleaned) == [0, 1, 2]


async def test_a_childs_http_exception_is_the_response() -> None:
    app = FastAPI()
    siblings: list[str] = []

    async def conflict() -> None:
        await anyio.sleep(0.01)
        raise HTTPException(409, "taken")

    async def sibling() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.01)
            siblings.append("cleaned")

    @app.get("/")
    async def endpoint(get_task_group: RequestTaskGroup) -> None:
        async with get_task_group() as tasks:
            tasks.start_soon(sibling)
            tasks.start_soon(conflict)

    call = await get(app)
    assert (call.status, call.json(), siblings) == (409, {"detail": "taken"}, ["cleaned"])


async def test_task_group_can_be_made_more_than_once() -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(get_task_group: RequestTaskGroup) -> int:
        done: list[int] = []

        async def child(number: int) -> None:
            done.append(number)

        for number in range(3):
            async with get_task_group() as tasks:
                tasks.start_soon(child, number)
        return len(done)

    assert (await get(app)).json() == 3


async def test_event_lets_the_handler_choose_its_stopping_point() -> None:
    app = FastAPI()
    rows: list[int] = []

    @app.get("/")
    async def endpoint(event: CancellationEvent) -> dict[str, Any]:
        while not event.is_set():
            rows.append(len(rows))
            await anyio.sleep(0.001)
        return {"rows": bool(rows), "reason": event.reason, "message": event.message}

    call = await hang_up(app)
    assert call.json() == {"rows": True, "reason": "disconnect", "message": None}


@pytest.mark.parametrize("disconnect", ["repeats", "once"])
async def test_event_can_be_awaited(disconnect: str) -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(event: CancellationEvent) -> str:
        return await event.wait()

    assert (await hang_up(app, disconnect=disconnect)).json() == "disconnect"


@pytest.mark.parametrize("seconds", [0, 0.03])
@pytest.mark.parametrize("style", ["annotated", "default"])
async def test_event_is_not_set_by_a_response_that_ended(seconds: float, style: str) -> None:
    app = FastAPI()
    seen: list[bool] = []

    async def afterwards(event: Any) -> None:
        await anyio.sleep(0.05)
        seen.append(event.is_set())

    async def work(tasks: BackgroundTasks, event: Any) -> str:
        await anyio.sleep(seconds)
        tasks.add_task(afterwards, event)
        return "ok"

    @app.get("/annotated")
    async def annotated(tasks: BackgroundTasks, event: CancellationEvent) -> str:
        return await work(tasks, event)

    @app.get("/default")
    async def default(tasks: BackgroundTasks, event: Any = Depends(cancellation)) -> str:
        return await work(tasks, event)

    assert (await get(app, f"/{style}")).json() == "ok"
    assert seen == [False]


@pytest.mark.parametrize("seconds", [0, 0.03])
async def test_task_group_of_a_background_task_does_not_take_the_end_for_a_disconnect(seconds: float) -> None:
    app = FastAPI()
    done: list[str] = []

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks, get_task_group: RequestTaskGroup, request: Request) -> str:
        async def afterwards() -> None:
            for factory in (get_task_group, lambda: create_request_task_group(request)):
                async with factory() as group:
                    group.start_soon(anyio.sleep, 0.03)
                done.append("whole")

        await anyio.sleep(seconds)
        tasks.add_task(afterwards)
        return "ok"

    call = await get(app)
    assert (call.status, done) == (200, ["whole", "whole"])


@pytest.mark.parametrize("then", ["decorator", "cancelable", "another step"])
async def test_a_decorated_step_of_a_handler_does_not_end_the_listening(then: str) -> None:
    @with_cancelation
    async def step(request: Request) -> None:
        await anyio.sleep(0.02)

    @with_cancelation
    async def last(request: Request) -> None:
        started.set()
        await anyio.sleep_forever()

    async def cancelable(request: Request, cancel: RequestCancelable) -> None:
        async with cancel:
            started.set()
            await anyio.sleep_forever()

    async def in_steps(request: Request) -> None:
        await last(request)

    started = anyio.Event()
    app = FastAPI()
    endpoints: dict[str, Any] = {"decorator": last, "cancelable": cancelable, "another step": in_steps}
    app.get("/", dependencies=[Depends(step)])(endpoints[then])
    async with nothing_left(), running(app) as call:
        await started.wait()
        await call.hang_up()
    assert call.status == 499


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_shared_handle_that_is_entered_twice_says_how_to_have_two(is_async: bool) -> None:
    async def rows(cancel: RequestCancelable) -> None:
        async with cancel:
            ...

    async def in_the_loop(cancel: Cancelable = Depends(cancelable_dependency)) -> None:
        async with cancel:
            ...

    def in_a_thread(cancel: Cancelable = Depends(cancelable_dependency)) -> None:
        with cancel:
            ...

    app = FastAPI()
    app.get("/", dependencies=[Depends(rows)])(in_the_loop if is_async else in_a_thread)
    with pytest.raises(RuntimeError, match=r"entered before.* by `Depends\(\.\.\., use_cache=False\)`"):
        await get(app)


async def test_handles_of_one_request_share_reader_and_reason() -> None:
    app = FastAPI()
    started = anyio.Event()
    seen: list[Any] = []

    async def rows(cancel: RequestCancelable) -> int:
        async with cancel:
            await anyio.sleep(0.01)
        return 3

    @app.get("/")
    async def endpoint(
        cancel: RequestCancelable,
        other: RequestCancelable,
        get_task_group: RequestTaskGroup,
        event: CancellationEvent,
        rows: int = Depends(rows),
    ) -> None:
        assert cancel is not other
        try:
            async with cancel, get_task_group(), other:
                started.set()
                await anyio.sleep_forever()
        finally:
            seen.extend([cancel.reason, other.reason, event.reason])

    async with running(app) as call:
        await started.wait()
        await call.hang_up()
    assert (call.status, call.most_readers) == (499, 1)
    assert seen == [CancelationReason.DISCONNECT] * 3


async def test_a_sub_dependency_that_is_stopped_answers_the_request() -> None:
    app = FastAPI()
    ran: list[str] = []

    async def slow(cancel: RequestCancelable) -> None:
        async with cancel:
            await anyio.sleep_forever()

    @app.get("/", dependencies=[Depends(slow)])
    async def endpoint() -> None:
        ran.append("handler")

    assert (await hang_up(app)).status == 499
    assert ran == []


async def test_handles_timeout_stops_its_block_only() -> None:
    app = FastAPI()

    @app.get("/")
    @with_cancelation(timeout=10)
    async def endpoint(
        cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(0.02))], event: CancellationEvent
    ) -> list[Any]:
        try:
            async with cancel:
                await anyio.sleep_forever()
        except TimeoutCancelation:
            await anyio.sleep(0.01)
        return ["fallback", event.is_set()]

    assert (await get(app)).json() == ["fallback", False]


@movable_clock
async def test_handles_timeout_replaces_the_default_of_the_middleware() -> None:
    app = FastAPI()
    limited = cancelable_with_timeout(10)

    @app.get("/")
    async def endpoint(cancel: Cancelable = Depends(limited)) -> str:
        async with cancel:
            await advance(3)
        return "finished"

    app.add_middleware(RequestCancelationMiddleware, default_timeout=2)
    assert (await get(app)).json() == "finished"


async def test_remaining_counts_the_limit_of_the_door_around() -> None:
    app = FastAPI()

    @app.get("/")
    @with_cancelation(timeout=10)
    async def endpoint(cancel: RequestCancelable) -> float:
        async with cancel:
            return min(cancel.remaining(), anyio.current_effective_deadline() - anyio.current_time())

    assert 5 < (await get(app)).json() < 10.1


async def test_nothing_shows_up_in_openapi() -> None:
    app = FastAPI()
    limited = cancelable_with_timeout(3)

    @app.get("/", name="endpoint")
    async def endpoint(
        item: int,
        cancel: RequestCancelable,
        get_task_group: RequestTaskGroup,
        event: CancellationEvent,
        other: Cancelable = Depends(limited),
    ) -> int:
        return item

    plain = FastAPI()

    @plain.get("/", name="endpoint")
    async def plain_endpoint(item: int) -> int:
        return item

    assert app.openapi() == plain.openapi()
    assert (await get(app, params={"item": 1, "timeout": 0, "cancel": 1})).json() == 1


async def test_plain_functions_in_starlette() -> None:
    seen: list[str] = []

    async def group(request: Request) -> Response:
        async with create_request_task_group(request):
            await anyio.sleep_forever()
        raise AssertionError

    async def race(request: Request) -> Response:
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                await wait_for_disconnect(request)
                seen.append("left")
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            await anyio.sleep_forever()
        return JSONResponse(len(await request.body()), 200)

    app = Starlette(routes=[Route("/group", group), Route("/race", race, methods=["POST"])])
    assert (await hang_up(app, "/group")).status == 499
    call = await hang_up(app, "/race", "POST", content=b"12345")
    assert (call.json(), seen, call.most_readers) == (5, ["left"], 1)


async def test_waiting_for_the_disconnect_of_a_finished_request_is_refused() -> None:
    app = FastAPI()
    errors: list[str] = []

    @app.get("/")
    async def endpoint(request: Request, tasks: BackgroundTasks, cancel: RequestCancelable) -> None:
        async def afterwards() -> None:
            try:
                await wait_for_disconnect(request)
            except RuntimeError as exc:
                errors.append(str(exc))

        tasks.add_task(afterwards)

    await get(app)
    assert "after the handler had returned" in errors[0]


@pytest.mark.parametrize("seconds", [0, 0.03])
async def test_streaming_response_after_a_handle_is_whole(seconds: float) -> None:
    app = FastAPI()

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            await anyio.sleep(0.005)
            yield b"x" * 10

    @app.get("/")
    async def endpoint(cancel: RequestCancelable, event: CancellationEvent) -> Response:
        async with cancel:
            await anyio.sleep(seconds)
        return StreamingResponse(chunks())

    call = await get(app)
    assert (call.body, call.is_complete, call.most_readers) == (b"x" * 50, True, 1)


async def test_overridden_dependency() -> None:
    """As in a user's own tests: a handle without a request behind it."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(cancel: RequestCancelable) -> None:
        async with cancel:
            await anyio.sleep_forever()

    app.dependency_overrides[cancelable_dependency] = lambda: Cancelable(timeout=0.01)
    assert (await get(app)).status == 504


@pytest.mark.parametrize("wrong", [cancelable_with_timeout, Cancelable])
def test_what_is_no_dependency_is_refused_when_the_app_is_built(wrong: Callable[..., object]) -> None:
    app = FastAPI()

    async def endpoint(cancel: object = Depends(wrong)) -> None: ...

    with pytest.raises(TypeError, match=r"Depends\(cancelable_with_timeout\(30\)\)"):
        app.get("/")(endpoint)


def test_a_subclass_of_cancelable_has_its_own_signature() -> None:
    class Job(Cancelable):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

    assert list(inspect.signature(Job).parameters) == ["number"]
    assert list(inspect.signature(Cancelable).parameters) == ["timeout", "token", "name", "cleanup_grace"]
