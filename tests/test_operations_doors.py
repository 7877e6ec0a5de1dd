"""Requests as operations, under every door: known, stopped by id, and counted by how they end."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from cancelable_deps import (
    CancelableRoute,
    CancelationReason,
    ManualCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    cancelable_streaming_response,
    configure,
    wait_for_disconnect,
    with_cancelation,
)
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.operations import Operation, Operations, OperationState, RequestOperation, RequestOperations
from cancelable_deps.testing import CancelableClient
from tests.calls import CEILING
from tests.operations import nothing_is_kept, until

pytestmark = [pytest.mark.anyio]

DOORS = (
    "middleware",
    "decorator",
    "route class",
    "RequestCancelable",
    "RequestTaskGroup",
    "RequestOperation",
    "starlette",
)


@pytest.fixture
def late() -> Iterator[None]:
    """No request grows old, however busy the machine is."""
    configure(listen_after=60)
    yield
    configure(listen_after=0.005)


async def ann() -> str:
    return "ann"


class Site:
    """An application of one route behind one door, whose handler waits until it is told to go on."""

    def __init__(self, door: str, **options: Any) -> None:
        self.operations = Operations(**options)
        self.go_on = anyio.Event()
        self.is_swallowing = False
        self.app: Any = self._app(door)

    async def work(self) -> str:
        try:
            await self.go_on.wait()
        except BaseException:
            if not self.is_swallowing:
                raise
        return "done"

    def _app(self, door: str) -> Any:
        if door == "starlette":

            async def plain(request: Request) -> PlainTextResponse:
                return PlainTextResponse(await self.work())

            starlette = Starlette(routes=[Route("/work", plain)], lifespan=self.operations.lifespan())
            starlette.add_middleware(RequestCancelationMiddleware, operations=self.operations)
            return starlette
        app = FastAPI(lifespan=self.operations.lifespan())
        if door == "middleware":
            app.add_middleware(RequestCancelationMiddleware, operations=self.operations)
        if door == "route class":
            app.router.route_class = CancelableRoute
        app.get("/work")(self._handler(door))
        return app

    def _handler(self, door: str) -> Any:
        async def handler() -> str:
            return await self.work()

        async def with_block(cancel: RequestCancelable) -> str:
            async with cancel:
                return await self.work()

        async def with_group(get_group: RequestTaskGroup) -> str:
            async with get_group():
                return await self.work()

        async def with_operation(operation: RequestOperation) -> str:
            return await self.work()

        known = {
            "decorator": with_cancelation(handler),
            "RequestCancelable": with_block,
            "RequestTaskGroup": with_group,
            "RequestOperation": with_operation,
        }
        return known.get(door, handler)


async def the_only_one(operations: Operations, **conditions: Any) -> Operation:
    """Wait until one operation is listed."""
    with anyio.fail_after(CEILING):
        while True:
            found = (await operations.list(**conditions)).items
            if found:
                assert len(found) == 1
                return found[0]
            await anyio.sleep(0.001)


def client_of(app: Any) -> CancelableClient:
    return CancelableClient(app, ceiling=CEILING)


@pytest.mark.parametrize("door", DOORS)
async def test_a_request_is_listed_and_stopped_by_its_id(door: str) -> None:
    site = Site(door)
    operations = site.operations
    async with client_of(site.app) as client:
        async with client.start("GET", "/work") as call:
            found = await the_only_one(operations)
            assert (found.kind, found.method, found.state) == ("request", "GET", "running")
            # Older versions of Starlette do not say which of their own routes they have found.
            assert found.route == "/work" or (door == "starlette" and found.route is None)
            assert found.worker == operations.worker.local.worker
            stopped = await operations.cancel(found.id, message="enough")
            assert stopped.outcome == "cancelled"
            assert stopped.operation is not None
            assert (stopped.operation.reason, stopped.operation.message) == (CancelationReason.MANUAL, "enough")
        assert (call.status, call.json()) == (499, {"detail": "enough"})
        assert (await operations.cancel(found.id)).outcome == "cancelled"
        assert operations.worker.local.ends == {"manual": 1}
        nothing_is_kept(operations)


@pytest.mark.parametrize("door", DOORS)
async def test_a_request_that_ends_by_itself_has_finished(door: str) -> None:
    site = Site(door)
    operations = site.operations
    async with client_of(site.app) as client:
        async with client.start("GET", "/work") as call:
            found = await the_only_one(operations)
            site.go_on.set()
        assert call.status == 200
        assert (await operations.cancel(found.id)).outcome == "finished"
        assert operations.worker.local.ends == {"finished": 1}
        ended = await operations.get(found.id)
        assert ended is not None
        assert (ended.state, ended.reason, ended.message) == (OperationState.FINISHED, None, None)
        nothing_is_kept(operations)


@pytest.mark.parametrize("door", DOORS)
async def test_a_handler_that_finishes_anyway_has_finished(door: str) -> None:
    site = Site(door)
    site.is_swallowing = True
    operations = site.operations
    async with client_of(site.app) as client:
        async with client.start("GET", "/work") as call:
            found = await the_only_one(operations)
            stopped = await operations.cancel(found.id, message="enough")
        assert call.status in (200, 499)
        assert stopped.outcome == ("finished" if call.status == 200 else "cancelled")
        assert operations.worker.local.ends == {"finished" if call.status == 200 else "manual": 1}
        nothing_is_kept(operations)


@pytest.mark.parametrize("door", DOORS)
async def test_a_client_that_leaves_is_counted_as_that(door: str) -> None:
    site = Site(door)
    async with client_of(site.app) as client:
        async with client.start("GET", "/work") as call:
            await call.listened_to()
            if door == "RequestOperation":
                await the_only_one(site.operations)
            await call.hang_up()
        assert call.status == 499
        assert site.operations.worker.local.ends == {"disconnect": 1}
        nothing_is_kept(site.operations)


async def test_a_timeout_is_counted_as_that() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())

    @app.get("/work")
    @with_cancelation(timeout=0.02)
    async def work() -> None:
        await anyio.sleep_forever()

    async with client_of(app) as client:
        assert (await client.get("/work")).status_code == 504
        assert operations.worker.local.ends == {"timeout": 1}


async def test_a_request_that_is_young_is_not_there(late: None) -> None:
    site = Site("middleware")
    site.go_on.set()
    async with client_of(site.app) as client:
        assert (await client.get("/work")).status_code == 200
        assert site.operations.worker.local.ends == {}
        assert (await site.operations.list()).total == 0


async def test_streams_of_ours_are_stopped() -> None:
    await _stops_a_stream(cancelable_streaming_response)


@pytest.mark.parametrize("door", ["middleware", "route class"])
async def test_plain_streams_are_stopped(door: str) -> None:
    await _stops_a_stream(StreamingResponse, door=door)


async def _stops_a_stream(response: Callable[..., Any], *, door: str = "") -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, operations=operations)
    if door == "route class":
        app.router.route_class = CancelableRoute
    is_cleaned = anyio.Event()

    @app.get("/stream")
    async def stream() -> Any:
        async def parts() -> AsyncIterator[str]:
            try:
                yield "one"
                await anyio.sleep_forever()
            finally:
                is_cleaned.set()

        return response(parts())

    # Without a door around, only the server can cut the stream, which it does for an error.
    async with CancelableClient(app, ceiling=CEILING, raise_app_exceptions=bool(door)) as client:
        async with client.start("GET", "/stream") as call:
            await call.response_started()
            found = await the_only_one(operations)
            assert found.route == "/stream"
            assert (await operations.cancel(found.id)).outcome == "cancelled"
        assert is_cleaned.is_set()
        assert (call.status, call.is_complete) == (200, False)
        assert operations.worker.local.ends == {"manual": 1}
        nothing_is_kept(operations)


@pytest.mark.parametrize("door", ["middleware", "decorator", "RequestOperation"])
async def test_websockets_are_stopped(door: str) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, operations=operations)

    async def plain(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep_forever()

    async def with_operation(websocket: WebSocket, operation: RequestOperation) -> None:
        operation.claim("ann")
        await plain(websocket)

    chosen: Any = {"decorator": with_cancelation(plain), "RequestOperation": with_operation}.get(door, plain)
    app.websocket("/chat/{room}")(chosen)
    async with client_of(app) as client:
        async with client.websocket("/chat/7") as socket:
            await socket.accepted()
            found = await the_only_one(operations, kind="websocket")
            assert (found.kind, found.route, found.method) == ("websocket", "/chat/{room}", None)
            assert (await operations.cancel(found.id, message="closing time")).outcome == "cancelled"
            await socket.ended()
        assert (socket.close_code, socket.close_reason) == (4499, "closing time")
        assert operations.worker.local.ends == {"manual": 1}
        nothing_is_kept(operations)


@pytest.mark.parametrize("door", ["middleware", "route class"])
async def test_background_tasks_of_a_response_are_stopped(door: str) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, operations=operations)
    else:
        app.router.route_class = CancelableRoute
    began, cleaned = anyio.Event(), anyio.Event()

    async def later() -> None:
        began.set()
        try:
            await anyio.sleep_forever()
        finally:
            cleaned.set()

    @app.get("/work")
    async def work(background: BackgroundTasks) -> str:
        background.add_task(later)
        return "done"

    async with client_of(app) as client:
        async with client.start("GET", "/work") as call:
            await began.wait()
            found = await the_only_one(operations)
            assert found.state is OperationState.RUNNING
            assert (await operations.cancel(found.id)).outcome == "cancelled"
        assert cleaned.is_set()
        assert call.status == 200
        assert operations.worker.local.ends == {"manual": 1}
        nothing_is_kept(operations)


async def test_background_tasks_that_finish_anyway_have_finished() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware, operations=operations)
    began = anyio.Event()

    async def later() -> None:
        began.set()
        with anyio.CancelScope(shield=True):
            await go_on.wait()

    @app.get("/work")
    async def work(background: BackgroundTasks) -> str:
        background.add_task(later)
        return "done"

    go_on = anyio.Event()
    async with client_of(app) as client:
        async with client.start("GET", "/work"):
            await began.wait()
            found = await the_only_one(operations)
            assert (await operations.cancel(found.id, wait=0)).outcome == "stopping"
            go_on.set()
        nothing_is_kept(operations)


class SlowServer:
    """A server that does something else once it has sent the last part of a response, as hypercorn does."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.is_sending, self.go_on = anyio.Event(), anyio.Event()
        self.was_interrupted = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_slowly(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                self.is_sending.set()
                try:
                    await self.go_on.wait()
                except BaseException:
                    self.was_interrupted = True
                    raise

        await self.app(scope, receive, send if scope["type"] == "lifespan" else send_slowly)


def with_background(later: Callable[[], Any]) -> tuple[Operations, SlowServer]:
    """An application whose response is followed by background work."""
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware, operations=operations)

    @app.get("/result")
    async def result(background: BackgroundTasks) -> str:
        background.add_task(later)
        return "done"

    @app.get("/known")
    async def known(background: BackgroundTasks, operation: RequestOperation) -> str:
        background.add_task(later)
        return operation.id

    @app.get("/stream")
    async def stream(background: BackgroundTasks) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "done"

        background.add_task(later)
        # Starlette's own stops what sends it as soon as the response is complete.
        return cancelable_streaming_response(parts(), background=background)

    return operations, SlowServer(app)


@pytest.mark.parametrize("kind", ["result", "known", "stream"])
async def test_a_server_is_not_interrupted_while_it_sends_the_end_of_a_response(kind: str) -> None:
    ended: list[str] = []

    async def later() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("later")

    operations, server = with_background(later)
    async with client_of(server) as client:
        async with client.start("GET", f"/{kind}") as call:
            await server.is_sending.wait()
            found = await the_only_one(operations)
            assert (await operations.cancel(found.id, wait=0)).outcome == "stopping"
            await operations.cancel(found.id, wait=0)
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert not call.has_ended
            server.go_on.set()
            await call.ended()
        assert (server.was_interrupted, ended, call.status) == (False, ["later"], 200)
        assert operations.worker.local.ends == {"manual": 1}
        nothing_is_kept(operations)


@pytest.mark.parametrize("kind", ["result", "known", "stream"])
async def test_a_server_that_sends_for_longer_than_a_cleanup_takes_is_interrupted(kind: str) -> None:
    operations, server = with_background(anyio.sleep_forever)
    async with client_of(server) as client:
        async with client.start("GET", f"/{kind}") as call:
            await server.is_sending.wait()
            found = await the_only_one(operations)
            assert (await operations.cancel(found.id, grace=0)).outcome == "cancelled"
            await call.ended()
        assert server.was_interrupted
        nothing_is_kept(operations)


@pytest.mark.parametrize("door", ["middleware", "decorator", "RequestOperation"])
async def test_a_def_handler_is_told(door: str) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, operations=operations)

    def with_block(cancel: RequestCancelable) -> None:
        with cancel:
            while True:
                cancel.check()
                time.sleep(0.001)

    def with_operation(cancel: RequestCancelable, operation: RequestOperation) -> None:
        operation.claim("ann")
        operation.label(stage="one")
        operation.progress("half", {"done": 1, "total": 2})
        with_block(cancel)

    doors: dict[str, Any] = {"decorator": with_cancelation(with_block), "RequestOperation": with_operation}
    app.get("/work")(doors.get(door, with_block))
    async with client_of(app) as client:
        async with client.start("GET", "/work") as call:
            found = await the_only_one(operations)
            if door == "RequestOperation":
                while not (found := await the_only_one(operations)).progress:
                    pass
                assert (found.owner, dict(found.labels)) == ("ann", {"stage": "one"})
                assert found.progress is not None
                assert found.progress.metadata == {"done": 1, "total": 2}
            assert (await operations.cancel(found.id)).outcome == "cancelled"
        assert call.status == 499
        nothing_is_kept(operations)


@pytest.mark.usefixtures("late")
async def test_an_operation_whose_handler_waits_for_the_disconnect_runs_on() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())

    @app.get("/work")
    async def work(operation: RequestOperation, request: Request) -> str | None:
        id, found = operation.id, None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_for_disconnect, request)
            # It has begun to listen, before the request is old.
            await anyio.wait_all_tasks_blocked()
            found = await operations.get(id)
            tasks.cancel_scope.cancel()
        return None if found is None else found.state

    async with client_of(app) as client:
        assert (await client.get("/work")).json() == "running"
        nothing_is_kept(operations)


async def test_changes_in_a_thread_are_told_in_the_event_loop() -> None:
    heard: list[tuple[str, bool]] = []
    here = anyio.from_thread
    operations = Operations(on_event=lambda event: heard.append((event.kind, _is_in_loop())))
    app = FastAPI(lifespan=operations.lifespan())

    @app.get("/work")
    def work(operation: RequestOperation) -> None:
        operation.progress("half")
        operation.claim("ann")
        # Each of them has arrived in the loop before the handler returns.
        here.run_sync(lambda: None)

    async with client_of(app) as client:
        assert (await client.get("/work")).status_code == 200
        await until(lambda: len(heard) >= 3)
    assert [kind for kind, _ in heard] == ["progress", "state", "end"]
    assert all(is_in_loop for _, is_in_loop in heard)


def _is_in_loop() -> bool:
    try:
        return current_loop().is_running_here()
    except RuntimeError:
        return False


async def test_track_makes_a_block_an_operation() -> None:
    async with Operations() as operations:
        with pytest.raises(ManualCancelation, match="enough") as raised:  # noqa: PT012
            async with operations.track(
                id="job-7", name="thumbnails", owner=7, key="k", labels={"size": "big"}, timeout=100
            ) as cancel:
                found = await the_only_one(operations)
                assert (found.id, found.kind, found.name, found.owner, found.key) == (
                    "job-7",
                    "tracked",
                    "thumbnails",
                    "7",
                    "k",
                )
                assert found.deadline is not None
                await cancel.report_progress("half")
                assert (await the_only_one(operations)).progress is not None
                assert (await operations.cancel("job-7", message="enough", wait=0)).outcome == "stopping"
                await anyio.sleep_forever()
        assert raised.value.reason is CancelationReason.MANUAL
        ended = await operations.get("job-7", owner="7")
        assert ended is not None
        assert ended.state is OperationState.CANCELLED
        nothing_is_kept(operations)


async def test_tracked_blocks_fail_and_finish() -> None:
    async with Operations() as operations:
        with pytest.raises(ValueError, match="broken"):
            async with operations.track(id="a"):
                raise ValueError("broken")
        async with operations.track(id="b"):
            pass
        with pytest.raises(TimeoutError):
            async with operations.track(id="c"):
                raise TimeoutError
        found = [await operations.get(id) for id in "abc"]
        assert [each and each.state for each in found] == ["failed", "finished", "failed"]
        assert operations.worker.local.ends == {"failed": 2, "finished": 1}
        nothing_is_kept(operations)


async def test_a_tracked_block_that_was_cancelled_before_does_not_start() -> None:
    async with Operations() as operations:
        assert (await operations.cancel("job", message="no")).outcome == "unknown"
        started = False
        with pytest.raises(ManualCancelation, match="no"):  # noqa: PT012
            async with operations.track(id="job"):
                started = True
                await anyio.lowlevel.checkpoint()
        assert (await operations.cancel("job")).outcome == "cancelled"
        nothing_is_kept(operations)
        assert not started


async def test_the_operation_of_a_request() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    ids: list[str] = []

    async def claimed(operation: RequestOperation, owner: Annotated[str, Depends(ann)]) -> None:
        operation.claim(owner)

    router = APIRouter(dependencies=[Depends(claimed)])

    @router.get("/work")
    async def work(operation: RequestOperation, found: RequestOperations) -> None:
        assert found is operations
        ids.append(operation.id)
        operation.label(stage="render", page="7")
        with pytest.raises(RuntimeError, match="another owner"):
            operation.claim("bob")
        with pytest.raises(TypeError):
            operation.claim(None)
        with pytest.raises(ValueError, match="owner"):
            operation.claim("")
        with pytest.raises(ValueError, match="owner"):
            operation.claim("a\nb")
        with pytest.raises(ValueError, match="label"):
            operation.label(**{f"n{n}": "" for n in range(17)})
        with pytest.raises(TypeError):
            operation.label(a=[])  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            operation.progress("x", {"what": object()})
        with pytest.raises(ValueError, match="JSON"):
            operation.progress("x", {"what": float("nan")})
        operation.progress("half", {"done": 1})
        await anyio.sleep_forever()

    app.include_router(router)
    async with client_of(app) as client:
        async with client.start("GET", "/work") as call:
            await until(lambda: ids)
            found = await operations.get(ids[0], owner="ann")
            assert found is not None
            assert (found.owner, dict(found.labels), found.name) == ("ann", {"stage": "render", "page": "7"}, "work")
            assert await operations.get(ids[0], owner="bob") is None
            assert (await operations.cancel(ids[0], owner="bob")).outcome == "unknown"
            assert (await operations.cancel(ids[0], owner="ann")).outcome == "cancelled"
        assert call.status == 499
        nothing_is_kept(operations)


async def test_an_owners_early_cancel_strikes_when_the_owner_is_known() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")
    started: list[str] = []

    @app.get("/work/{user}")
    async def work(user: str, operation: RequestOperation) -> str:
        operation.claim(user)
        await anyio.lowlevel.checkpoint()
        started.append(user)
        return user

    async with client_of(app) as client:
        assert (await operations.cancel("mine", owner="ann")).outcome == "unknown"
        assert (await client.get("/work/bob", headers={"operation-id": "mine"})).status_code == 200
        assert (await client.get("/work/ann", headers={"operation-id": "mine"})).status_code == 499
        assert started == ["bob"]
        nothing_is_kept(operations)


async def test_an_operators_early_cancel_keeps_a_request_from_starting() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="Operation-Id")
    started: list[str] = []

    @app.get("/work")
    async def work() -> None:
        started.append("request")

    @app.websocket("/chat")
    async def chat(websocket: WebSocket) -> None:
        started.append("websocket")
        await websocket.accept()
        await websocket.close()

    async with client_of(app) as client:
        await operations.cancel("mine", message="not now")
        refused = await client.get("/work", headers={"operation-id": "mine"})
        assert (refused.status_code, refused.json()) == (499, {"detail": "not now"})
        assert refused.headers["operation-id"] == "mine"
        async with client.websocket("/chat", headers={"operation-id": "mine"}) as socket:
            await socket.ended()
        assert started == []
        assert (await operations.cancel("mine")).outcome == "cancelled"
        assert operations.worker.local.ends == {"manual": 2}
        nothing_is_kept(operations)


@pytest.mark.parametrize("value", ["a" * 129, "a b", "", "a*", "ä", "a{b}", "a/b", "a,b"])
async def test_a_wrong_id_is_refused(value: str) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")

    @app.get("/work")
    async def work() -> None: ...

    @app.websocket("/chat")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()

    headers = {"operation-id": value.encode()}
    async with client_of(app) as client:
        refused = await client.get("/work", headers=headers)
        assert refused.status_code == 422
        assert refused.json()["detail"][0]["loc"] == ["header", "operation-id"]
        async with client.websocket("/chat", headers=headers) as socket:
            await socket.ended()
        assert not socket.is_accepted


async def test_ids_come_back_and_are_known_from_the_first_moment() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")

    @app.get("/work")
    async def work() -> str:
        return (await operations.get("a:b~c.d_e-1")).state  # type: ignore[union-attr]

    @app.websocket("/chat")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep_forever()

    async with client_of(app) as client:
        answer = await client.get("/work", headers={"operation-id": "a:b~c.d_e-1"})
        assert (answer.json(), answer.headers["operation-id"]) == ("running", "a:b~c.d_e-1")
        nothing_is_kept(operations)
        async with client.websocket("/chat", headers={"operation-id": "socket"}) as socket:
            await socket.accepted()
            assert (await operations.cancel("socket")).outcome == "cancelled"
            await socket.ended()
        accepted = next(message for message in socket.sent if message["type"] == "websocket.accept")
        assert (b"operation-id", b"socket") in accepted["headers"]
        nothing_is_kept(operations)


async def test_two_requests_of_one_id_are_both_stopped() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")

    @app.get("/work")
    async def work() -> None:
        await anyio.sleep_forever()

    headers = {"operation-id": "same"}
    async with client_of(app) as client:
        async with (
            client.start("GET", "/work", headers=headers) as one,
            client.start("GET", "/work", headers=headers) as two,
        ):
            await one.running()
            await two.running()
            assert (await operations.cancel("sam")).outcome == "unknown"
            assert (await operations.cancel("same")).outcome == "cancelled"
        assert (one.status, two.status) == (499, 499)
        # An id names one operation: a third one does not start.
        assert (await client.get("/work", headers=headers)).status_code == 499
        nothing_is_kept(operations)
