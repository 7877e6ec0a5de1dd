"""Races, driven message by message, and what is left after them."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import copy_context
from typing import Annotated, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelableStreamingResponse,
    CancelationError,
    CancelationReason,
    CancellationEvent,
    DisconnectCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    cancelable_dependency,
    cancelable_with_timeout,
    configure,
    create_request_task_group,
    current_cancelable,
    wait_for_disconnect,
    with_cancelation,
)
from cancelable_deps.hosts.fastapi import HANDLER_STACK_KEY as _HANDLER_STACK_KEY
from cancelable_deps.hosts.fastapi import REQUEST_STACK_KEY as _REQUEST_STACK_KEY
from cancelable_deps.kernel.block import Block
from cancelable_deps.kernel.loops.base import Worker
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.kernel.settings import settings
from cancelable_deps.request.http_reader import Reader
from cancelable_deps.request.in_flight import in_flight_of
from cancelable_deps.request.state import PROBE_KEY, SCOPE_KEY, RequestState
from cancelable_deps.request.watchers import WAITERS
from cancelable_deps.testing import Call, CancelableClient, advance
from tests import asgi
from tests.calls import get, hang_up, movable_clock, running
from tests.doors import endpoint
from tests.leftovers import nothing_left

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("small_heap")]

DOORS = ["decorator", "cancelable", "task_group", "event", "middleware", "route", "all"]
STOPPING_DOORS = [door for door in DOORS if door != "event"]


def application(door: str, work: Any, **options: Any) -> FastAPI:
    """An app whose ``GET /`` does ``await work()`` under the named door."""
    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute) if door in {"route", "all"} else APIRouter()

    router.get("/", **options)(endpoint(door, work))
    app.include_router(router)
    if door in {"middleware", "all"}:
        app.add_middleware(RequestCancelationMiddleware)
    return app


@asynccontextmanager
async def checked(app: ASGIApp, **options: Any) -> AsyncGenerator[Call]:
    """A request that runs beside the test, and leaves nothing of ours."""
    async with nothing_left(), running(app, **options) as call:
        yield call
    assert SCOPE_KEY not in call.scope


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("disconnect", ["repeats", "once"])
async def test_disconnect_in_the_tick_of_the_handlers_return(door: str, disconnect: str) -> None:
    async def work() -> str:
        await anyio.lowlevel.checkpoint()
        call.hang_up_nowait()
        return "finished"

    async with checked(application(door, work), disconnect=disconnect) as call:
        pass
    assert (call.status, call.json()) == (200, "finished")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", STOPPING_DOORS)
@pytest.mark.parametrize("disconnect", ["repeats", "once"])
async def test_disconnect_while_the_handler_waits(door: str, disconnect: str) -> None:
    async def work() -> None:
        await anyio.lowlevel.checkpoint()
        call.hang_up_nowait()
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.001)
            await anyio.sleep(0.001)
            cleaned.append(True)

    cleaned: list[bool] = []
    async with checked(application(door, work), disconnect=disconnect) as call:
        pass
    assert (call.status, cleaned) == (499, [True])
    assert call.most_readers == 1


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_disconnect_in_a_shielded_section_is_acted_on_after_it(door: str) -> None:
    order: list[str] = []

    async def work() -> None:
        with anyio.CancelScope(shield=True):
            call.hang_up_nowait()
            await anyio.wait_all_tasks_blocked()
            order.append("section")
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.001)
            order.append("cleaned")

    async with checked(application(door, work)) as call:
        pass
    assert (call.status, order) == (499, ["section", "cleaned"])


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_handler_that_swallows_the_cancellation_has_finished(door: str) -> None:
    async def work() -> str:
        call.hang_up_nowait()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            return "finished anyway"
        raise AssertionError

    async with checked(application(door, work)) as call:
        pass
    assert (call.status, call.json()) == (200, "finished anyway")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", STOPPING_DOORS)
@pytest.mark.parametrize("error", [ValueError("a bug"), HTTPException(418)])
async def test_what_the_cleanup_raises_is_not_replaced(door: str, error: Exception) -> None:
    async def work() -> None:
        call.hang_up_nowait()
        try:
            await anyio.sleep_forever()
        finally:
            raise error

    async with checked(application(door, work), raise_app_exceptions=False) as call:
        pass
    assert call.status == (418 if isinstance(error, HTTPException) else 500)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", DOORS)
async def test_cancelled_from_outside_is_not_ours(door: str) -> None:
    async def work() -> None:
        waiting.set()
        await anyio.sleep_forever()

    waiting = anyio.Event()
    async with checked(application(door, work)) as call:
        await waiting.wait()
        await anyio.wait_all_tasks_blocked()
        call.give_up()
    assert (call.outcome, call.sent) == ("cancelled", [])


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", ["cancelable", "task_group", "all"])
async def test_disconnect_before_the_block_is_entered(door: str) -> None:
    async def work() -> None:
        await anyio.sleep_forever()

    async def slow() -> None:
        call.hang_up_nowait()
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()

    async with checked(application(door, work, dependencies=[Depends(slow)])) as call:
        pass
    assert call.status == 499


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("disconnect", ["repeats", "once"])
async def test_disconnect_between_two_blocks(disconnect: str) -> None:
    app = FastAPI()
    order: list[str] = []

    @app.get("/")
    async def endpoint(first: RequestCancelable, second: RequestCancelable) -> None:
        async with first:
            await anyio.wait_all_tasks_blocked()
        call.hang_up_nowait()
        await anyio.wait_all_tasks_blocked()
        order.append("between")
        async with second:
            order.append("second")

    async with checked(app, disconnect=disconnect) as call:
        pass
    assert (call.status, order, call.most_readers) == (499, ["between"], 1)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", DOORS)
async def test_disconnect_while_dependencies_are_torn_down(door: str) -> None:
    closed: list[str] = []

    async def session() -> AsyncIterator[None]:
        yield
        call.hang_up_nowait()
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()
        closed.append("function")

    async def work() -> str:
        await anyio.wait_all_tasks_blocked()
        return "finished"

    async with checked(application(door, work, dependencies=[Depends(session, scope="function")])) as call:
        pass
    assert closed == ["function"]
    # A door around the response may still stop it before it is sent; the handler is over, so it need not.
    assert call.status in ({200, 499} if door in {"middleware", "route", "all"} else {200})


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", ["middleware", "route", "decorator"])
async def test_timeout_in_the_tick_of_the_result(door: str) -> None:
    """The loop is blocked past the deadline in the handler's last step: the result stands."""

    async def work() -> str:
        await anyio.lowlevel.checkpoint()
        cancel = current_cancelable()
        assert cancel is not None
        while cancel.remaining():
            pass
        return "finished"

    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute.with_timeout(0.15)) if door == "route" else APIRouter()
    router.get("/")(with_cancelation(timeout=0.15)(work) if door == "decorator" else work)
    app.include_router(router)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, default_timeout=0.15)
    async with checked(app) as call:
        pass
    assert (call.status, call.body, call.is_complete) == (200, b'"finished"', True)


@movable_clock
@pytest.mark.parametrize("door", ["middleware", "route"])
async def test_timeout_while_the_result_is_on_its_way(door: str) -> None:
    router = APIRouter(route_class=CancelableRoute.with_timeout(2)) if door == "route" else APIRouter()

    @router.get("/")
    async def endpoint() -> str:
        return "finished"

    app = FastAPI()
    app.include_router(router)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, default_timeout=2)
    async with checked(app) as call:
        call.stop_reading()
        await advance(3)
        call.resume_reading()
    assert (call.status, call.body, call.is_complete) == (200, b'"finished"', True)


@pytest.mark.parametrize("door", ["middleware", "route"])
@pytest.mark.parametrize("ending", ["hang up", "time out"])
async def test_stream_that_has_told_its_length_and_makes_no_chunk(door: str, ending: str) -> None:
    limits: dict[str, Any] = {"default_timeout": 0.03 if ending == "time out" else None, "cleanup_grace": 0.03}
    router = APIRouter(route_class=CancelableRoute.with_timeout(**limits)) if door == "route" else APIRouter()

    async def chunks() -> AsyncIterator[bytes]:
        await anyio.sleep_forever()
        yield b"never"

    @router.get("/")
    async def endpoint() -> StreamingResponse:
        return StreamingResponse(chunks(), headers={"content-length": "5"})

    app = FastAPI()
    app.include_router(router)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, **limits)
    async with checked(app) as call:
        await call.response_started()
        if ending == "hang up":
            await call.hang_up()
    assert (call.status, call.body, call.is_complete) == (200, b"", False)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", ["middleware", "decorator", "route", "cancelable"])
async def test_rest_of_the_handler_is_stopped_when_the_inner_block_ends_in_that_tick(door: str) -> None:
    order: list[str] = []
    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute) if door == "route" else APIRouter()

    async def work(cancel: Any) -> None:
        async with cancel:
            await anyio.lowlevel.checkpoint()
            state: RequestState = call.scope[SCOPE_KEY]
            state.client_left()
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.001)
            order.append("cleaned")

    async def nested(around: RequestCancelable, cancel: RequestCancelable) -> None:
        async with around:
            await work(cancel)

    async def plain(cancel: RequestCancelable) -> None:
        await work(cancel)

    chosen: Any = {"decorator": with_cancelation(plain), "cancelable": nested}.get(door, plain)
    router.get("/")(chosen)
    app.include_router(router)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    async with checked(app) as call:
        pass
    assert (call.status, order) == (499, ["cleaned"])


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", ["middleware", "route"])
async def test_background_task_of_a_cancelled_request_is_spared(door: str) -> None:
    """The handler answers its departed client itself, and leaves work for afterwards."""
    done: list[str] = []
    router = APIRouter(route_class=CancelableRoute) if door == "route" else APIRouter()

    async def afterwards() -> None:
        await anyio.sleep(0.1)
        done.append("done")

    @router.get("/")
    async def endpoint(tasks: BackgroundTasks, cancel: RequestCancelable) -> str:
        tasks.add_task(afterwards)
        try:
            async with cancel:
                call.hang_up_nowait()
                await anyio.sleep_forever()
        except CancelationError:
            return "partial"
        raise AssertionError

    app = FastAPI()
    app.include_router(router)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    configure(cleanup_grace=0.03)
    try:
        async with checked(app) as call:
            pass
    finally:
        configure(cleanup_grace=5)
    assert (call.status, call.json(), done) == (200, "partial", ["done"])


@pytest.mark.usefixtures("at_once")
async def test_reading_that_was_given_up_does_not_end_the_listening() -> None:
    app = FastAPI()

    @app.post("/")
    @with_cancelation
    async def endpoint(request: Request) -> None:
        with anyio.move_on_after(0.02):
            await request.body()
        call.hang_up_nowait()
        await anyio.sleep_forever()

    async with checked(app, method="POST", body_by_hand=True) as call:
        await call.send_body(b"x")
    assert call.status == 499


@pytest.mark.usefixtures("at_once")
async def test_finished_stream_is_no_disconnect(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    app = FastAPI()
    seen: list[bool] = []

    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"

    @app.get("/")
    @with_cancelation
    async def endpoint(event: CancellationEvent, tasks: BackgroundTasks) -> Response:
        async def afterwards() -> None:
            await anyio.wait_all_tasks_blocked()
            seen.append(event.is_set())

        tasks.add_task(afterwards)
        await anyio.wait_all_tasks_blocked()
        return StreamingResponse(chunks())

    async with checked(app) as call:
        pass
    assert (call.body, seen, caplog.records) == (b"onetwo", [False], [])


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", ["decorator", "cancelable"])
async def test_body_can_be_read_after_listening_that_ended_before_it_began(door: str) -> None:
    async def work() -> StreamingResponse:
        await anyio.lowlevel.checkpoint()
        return StreamingResponse(echo())

    async def echo() -> AsyncIterator[bytes]:
        yield await requests[0].body()

    async def keep(request: Request) -> None:
        requests.append(request)

    requests: list[Request] = []
    app = application(door, work, dependencies=[Depends(keep)])
    call = await get(app, content=b"body", spec_version="2.4")
    assert (call.status, call.body) == (200, b"body")


# trio may let the reader begin before the handler ends: it runs what is due in any order.
async def at_once_done() -> None: ...


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", ["decorator", "cancelable"])
async def test_server_is_not_asked_by_listening_that_ended_before_it_began(door: str) -> None:
    call = await asgi.get(application(door, at_once_done))
    assert (call.status, call.most_readers) == (200, 0)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("disconnect", ["repeats", "once"])
async def test_stream_that_is_never_sent_leaves_nothing(disconnect: str) -> None:
    app = FastAPI()

    async def refusing() -> AsyncIterator[None]:
        yield
        raise HTTPException(409)

    async def chunks() -> AsyncIterator[bytes]:
        yield b"never"

    @app.get("/")
    @with_cancelation
    async def endpoint(refused: None = Depends(refusing, scope="function")) -> Response:
        await anyio.wait_all_tasks_blocked()
        return StreamingResponse(chunks())

    async with checked(app, disconnect=disconnect) as call:
        pass
    assert call.status == 409


class Buffering:
    """A middleware that keeps the response back and works on it."""

    def __init__(self, app: ASGIApp, started: anyio.Event) -> None:
        self.app = app
        self.started = started

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive, keep)
        self.started.set()
        await anyio.sleep_forever()


@pytest.mark.parametrize("inner", ["none", "route", "middleware"])
async def test_end_of_an_inner_response_does_not_blind_the_outer_door(inner: str) -> None:
    started = anyio.Event()
    router = APIRouter(route_class=CancelableRoute) if inner == "route" else APIRouter()

    @router.get("/")
    async def endpoint() -> int:
        return 1

    app = FastAPI()
    app.include_router(router)
    if inner == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    app.add_middleware(Buffering, started=started)
    app.add_middleware(RequestCancelationMiddleware, cleanup_grace=0.03)
    async with running(app) as call:
        await started.wait()
        await call.hang_up()
    assert call.status == 499


async def test_block_that_is_entered_while_another_stops_the_listening() -> None:
    """Without FastAPI's stack nobody holds the reader between two blocks."""

    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        from cancelable_deps import create_request_task_group

        request = Request(scope, receive)
        async with create_request_task_group(request):
            await call.listened_to()
        with pytest.raises(DisconnectCancelation):  # noqa: PT012 - the block is what raises
            async with create_request_task_group(request):
                call.hang_up_nowait()
                await anyio.sleep_forever()
        await Response("stopped")(scope, receive, send)

    async with checked(bare) as call:
        pass
    assert call.body == b"stopped"


async def test_log_line_of_a_block_opened_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    from cancelable_deps import Cancelable

    caplog.set_level(logging.INFO, "cancelable_deps")

    async def work() -> None:
        async with Cancelable.with_timeout(0.01):
            await anyio.sleep_forever()

    assert (await get(application("decorator", work))).status == 504
    assert [record.__dict__["reason"] for record in caplog.records] == [CancelationReason.TIMEOUT]


async def test_log_line_names_the_route(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    app = FastAPI()

    @app.get("/reports/{report_id}")
    @with_cancelation
    async def endpoint(report_id: int) -> None:
        await anyio.sleep_forever()

    await hang_up(app, "/reports/7")
    assert [record.__dict__["route"] for record in caplog.records] == ["/reports/{report_id}"]


async def test_log_line_stays_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        cancel = current_cancelable()
        assert cancel is not None
        await cancel.cancel(message="replaced\r\nINFO:root:by another")

    caplog.set_level(logging.INFO, "cancelable_deps")
    await get(RequestCancelationMiddleware(bare), "/a%0AINFO:root:b")
    (record,) = caplog.records
    method_and_path, _, reason = record.getMessage().partition(" cancelled after ")
    assert method_and_path == "GET /a%0AINFO%3Aroot%3Ab"
    assert reason.endswith(" s: manual: replaced INFO:root:by another")


def alive(kind: type) -> set[int]:
    return {id(thing) for thing in gc.get_objects() if isinstance(thing, kind)}


async def left_for_the_garbage_collector(app: FastAPI, kind: type = RequestState) -> int:
    """How many of ten requests. The last one may still be held by the loop; a cycle would hold all."""
    # Not by the test client, which keeps what its call knows of the request.
    await asgi.as_by_a_server(asgi.Call(app))
    gc.collect()
    gc.disable()
    try:
        before = alive(kind)
        for _ in range(10):
            await asgi.as_by_a_server(asgi.Call(app))
        return len(alive(kind) - before)
    finally:
        gc.enable()


@pytest.mark.parametrize("door", DOORS)
async def test_finished_requests_are_no_work_for_the_garbage_collector(door: str) -> None:
    async def work() -> str:
        return "done"

    app = application(door, work)
    if door in {"middleware", "all"}:
        app.add_middleware(RequestCancelationMiddleware, default_timeout=30)
    assert await left_for_the_garbage_collector(app) <= 1


@pytest.mark.parametrize("door", ["plain", "middleware"])
async def test_nor_are_streams_that_have_ended(door: str) -> None:
    async def chunks() -> AsyncIterator[str]:
        yield "all"

    async def work() -> Response:
        return CancelableStreamingResponse(chunks())

    assert await left_for_the_garbage_collector(application(door, work, response_model=None)) <= 1


async def stopped() -> None:
    cancel = current_cancelable()
    assert cancel is not None
    await cancel.cancel()


async def refused() -> None:
    raise HTTPException(409)


@pytest.mark.parametrize("work", [stopped, refused])
@pytest.mark.parametrize("door", ["decorator", "middleware", "route", "cancelable"])
async def test_stopped_requests_are_no_work_for_the_garbage_collector(door: str, work: Any) -> None:
    """The traceback of an error knows the frames that it has left, and these must not know the error."""
    assert await left_for_the_garbage_collector(application(door, work)) <= 1


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", DOORS)
async def test_nor_are_the_readers_of_those_that_were_listened_to(door: str) -> None:
    """A task that ends cancelled keeps its exception, whose traceback knows the frames that it has left."""

    async def work() -> None:
        await anyio.wait_all_tasks_blocked()

    assert await left_for_the_garbage_collector(application(door, work), Reader) <= 1


@pytest.mark.parametrize("door", ["decorator", "middleware", "route"])
async def test_nor_are_those_that_report_progress_to_who_knows_their_block(door: str) -> None:
    async def work() -> None:
        cancel = current_cancelable()
        assert cancel is not None
        cancel.on_progress(lambda message, metadata: cancel.name)

    assert await left_for_the_garbage_collector(application(door, work), Block) <= 1


async def test_nor_are_those_that_run_in_the_task_of_a_base_http_middleware() -> None:
    async def work() -> None: ...

    async def dispatch(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    app = application("plain", work)
    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    if await left_for_the_garbage_collector(app, Request) > 1:
        pytest.skip("an older Starlette leaves them itself")
    app.middleware_stack = None
    app.add_middleware(RequestCancelationMiddleware)
    assert await left_for_the_garbage_collector(app) <= 1


async def test_fastapi_still_keeps_its_stacks_where_we_look() -> None:
    app = FastAPI()
    seen: list[bool] = []

    @app.get("/")
    async def endpoint(request: Request) -> None:
        seen.extend(key in request.scope for key in (_HANDLER_STACK_KEY, _REQUEST_STACK_KEY))

    await get(app)
    assert seen == [True, True]


async def test_starlette_still_reads_through_the_receive_that_we_replace() -> None:
    app = FastAPI()

    @app.post("/")
    async def endpoint(request: Request, cancel: RequestCancelable) -> bool:
        own = request._receive
        return request.receive is own and own.__self__ is request.scope[SCOPE_KEY]  # type: ignore[attr-defined]

    assert (await get(app, "/", "POST")).json() is True


@pytest.mark.parametrize("count", [50])
async def test_many_at_once(count: int) -> None:
    async def work() -> None:
        await anyio.sleep_forever()

    app = application("all", work)
    async with nothing_left(), CancelableClient(app) as client, AsyncExitStack() as stack:
        calls = [await stack.enter_async_context(client.start("GET", "/")) for _ in range(count)]
        for call in calls:
            await call.listened_to()
        for call in calls:
            call.hang_up_nowait()
    assert {call.status for call in calls} == {499}


async def test_client_that_leaves_after_the_response_stops_nothing() -> None:
    async def work() -> str:
        await anyio.sleep(0.03)
        return "done"

    async with running(application("all", work)) as call:
        await call.response()
        await call.hang_up()
    assert call.status == 200


@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_a_message_that_no_response_can_hold_is_mended(door: str) -> None:
    async def work() -> None:
        cancel = current_cancelable()
        assert cancel is not None
        await cancel.cancel(message="half \ud800 of it, é")

    call = await get(application(door, work))
    assert (call.status, call.json()) == (499, {"detail": "half ? of it, é"})


async def test_many_who_wait_in_one_request_share_one_watcher() -> None:
    app = FastAPI()
    watchers: list[object] = []

    @app.get("/")
    async def fan_out(request: Request) -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(40):
                tasks.start_soon(wait_for_disconnect, request)
            await anyio.wait_all_tasks_blocked()
            watchers.append(request.scope[SCOPE_KEY]._watchers)
            tasks.cancel_scope.cancel()
        # Listening ends with the last.
        watchers.append(SCOPE_KEY in request.scope and request.scope[SCOPE_KEY]._watchers)

    async with checked(app) as call:
        pass
    assert (call.status, watchers) == (200, [(WAITERS,), ()])


async def test_many_blocks_in_one_request_are_not_copied_for_each_that_comes_or_goes() -> None:
    app = FastAPI()
    same: list[bool] = []

    async def wait(request: Request) -> None:
        async with create_request_task_group(request):
            await anyio.sleep_forever()

    @app.get("/")
    async def fan_out(request: Request) -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(wait, request)
            await anyio.wait_all_tasks_blocked()
            watchers = request.scope[SCOPE_KEY]._watchers
            async with anyio.create_task_group() as more:
                for _ in range(20):
                    more.start_soon(wait, request)
                await anyio.wait_all_tasks_blocked()
                same.append(len(watchers) == 40)
                more.cancel_scope.cancel()
            same.append(request.scope[SCOPE_KEY]._watchers is watchers)
            tasks.cancel_scope.cancel()

    async with checked(app) as call:
        pass
    assert (call.status, same) == (200, [True, True])


@pytest.mark.parametrize("swallows", [Exception, BaseException])
@pytest.mark.parametrize("scope", ["request", "function"])
@pytest.mark.parametrize("door", ["middleware", "route", "decorator under middleware"])
async def test_a_dependency_that_swallows_the_cancellation_does_not_cost_the_response(
    door: str, scope: Any, swallows: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def swallowing() -> AsyncIterator[None]:
        with suppress(swallows):
            yield

    async def work() -> None:
        await anyio.sleep_forever()

    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute.with_timeout(0.03)) if door == "route" else APIRouter()
    endpoint = with_cancelation(timeout=0.03)(work) if "decorator" in door else work
    router.get("/", dependencies=[Depends(swallowing, scope=scope)])(endpoint)
    app.include_router(router)
    if "middleware" in door:
        app.add_middleware(RequestCancelationMiddleware, default_timeout=0.03)
    async with checked(app) as call:
        pass
    assert (call.status, call.exception) == (504, None)
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.parametrize("scope", ["request", "function"])
@pytest.mark.parametrize("door", ["decorator", "handle"])
async def test_a_dependency_that_swallows_the_error_of_the_handler_is_a_bug_of_the_application(
    door: str, scope: Any
) -> None:
    """As with any error that a handler raises; nobody of ours stands outside of the dependency."""

    async def swallowing() -> AsyncIterator[None]:
        with suppress(BaseException):
            yield

    async def work() -> None:
        await anyio.sleep_forever()

    async def handle(cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(0.03))]) -> None:
        async with cancel:
            await work()

    app = FastAPI()
    endpoint: Any = handle if door == "handle" else with_cancelation(timeout=0.03)(work)
    app.get("/", dependencies=[Depends(swallowing, scope=scope)])(endpoint)
    async with checked(app, raise_app_exceptions=False) as call:
        pass
    assert call.status == 500


async def test_a_bug_of_the_application_in_a_cancelled_request_stays_one() -> None:
    """Not every variable without a value is FastAPI's."""
    app = FastAPI()

    async def fails() -> AsyncIterator[None]:
        try:
            yield
        finally:
            raise UnboundLocalError("response")

    app.get("/", dependencies=[Depends(fails)])(anyio.sleep_forever)
    app.add_middleware(RequestCancelationMiddleware, default_timeout=0.03)
    async with checked(app, raise_app_exceptions=False) as call:
        pass
    assert (call.status, type(call.exception)) == (500, UnboundLocalError)


async def test_a_request_that_has_ended_is_so_in_a_copy_of_its_scope() -> None:
    app = FastAPI()
    ended = anyio.Event()
    said: list[str] = []

    class Copying:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self.app(dict(scope), receive, send)

    app.add_middleware(Copying)
    app.add_middleware(RequestCancelationMiddleware)
    workers: list[Worker] = []

    @app.get("/")
    async def work(request: Request) -> None:
        async def later() -> None:
            await ended.wait()
            with pytest.raises(RuntimeError, match="after the handler had returned"):
                await wait_for_disconnect(request)
            async with await cancelable_dependency(request):
                said.append("entered")

        workers.append(current_loop().spawn(later, copy_context()))

    await asgi.get(app)
    ended.set()
    await workers[0].join()
    assert said == ["entered"]


async def test_what_outlives_the_decorator_is_listened_for_although_all_was_young(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So long that the handler returns before.
    monkeypatch.setattr(settings, "listen_after", 0.05)
    app = FastAPI()
    stopped: list[str] = []
    entered = anyio.Event()

    @app.get("/")
    @with_cancelation
    async def work(request: Request) -> Response:
        async def beside() -> None:
            with suppress(DisconnectCancelation):
                async with await cancelable_dependency(request):
                    entered.set()
                    try:
                        await anyio.sleep_forever()
                    finally:
                        stopped.append("task")

        async def chunks() -> AsyncIterator[str]:
            try:
                yield "first"
                await anyio.sleep_forever()
            finally:
                stopped.append("stream")

        workers.append(current_loop().spawn(beside, copy_context()))
        await entered.wait()
        return CancelableStreamingResponse(chunks())

    workers: list[Worker] = []
    await hang_up(app)
    await workers[0].join()
    assert sorted(stopped) == ["stream", "task"]


async def test_a_thread_that_asks_for_the_client_makes_no_second_state(monkeypatch: pytest.MonkeyPatch) -> None:
    # So long that the thread comes first.
    monkeypatch.setattr(settings, "listen_after", 0.05)
    made: list[RequestState] = []
    is_second_made = threading.Event()

    def made_slowly(state: object) -> None:
        if isinstance(state, RequestState):
            made.append(state)
            if len(made) > 1:
                is_second_made.set()
            # Long enough for the request to grow old.
            is_second_made.wait(0.3)

    async def work() -> bool:
        cancel = current_cancelable()
        return await anyio.to_thread.run_sync(getattr, cancel, "client_has_left")

    call = asgi.Call(application("middleware", work))
    call.scope[PROBE_KEY] = made_slowly
    await asgi.as_by_a_server(call)
    assert (call.status, call.json, len(made)) == (200, False, 1)
    assert not in_flight_of(current_loop()).requests
