"""Decorator and handles on WebSocket routes, driven message by message."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal
from weakref import ref

import anyio
import anyio.lowlevel
import pytest
from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketDisconnect
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.exceptions import WebSocketException
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelable_deps import (
    Cancelable,
    CancelationError,
    CancelationReason,
    CancellationEvent,
    DisconnectCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    TimeoutCancelation,
    cancelable_with_timeout,
    configure,
    create_request_task_group,
    current_cancelable,
    wait_for_disconnect,
    with_cancelation,
)
from cancelable_deps.request.state import SCOPE_KEY
from cancelable_deps.request.websocket import CLOSE_TEXT_BYTES, close_text
from tests.calls import checked_socket as checked
from tests.calls import closed, connected, say
from tests.doors import endpoint
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio

DOORS = ["decorator", "cancelable", "task_group", "event", "middleware", "all"]
STOPPING_DOORS = [door for door in DOORS if door != "event"]


@pytest.fixture(params=["read by the application", "read ahead"])
def who_reads(request: pytest.FixtureRequest) -> Iterator[None]:
    configure(listen_after=0 if request.param == "read ahead" else 60)
    yield
    configure(listen_after=0.005)


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def application(door: str, work: Callable[[WebSocket], Any], **options: Any) -> FastAPI:
    """An app whose WebSocket ``/`` does ``await work(websocket)`` under the named door."""
    app = FastAPI()
    app.websocket("/", **options)(endpoint(door, work, WebSocket))
    if door in {"middleware", "all"}:
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
        app.add_middleware(RequestCancelationMiddleware, default_timeout=0)
    return app


class Counted:
    """An application whose messages are counted as it takes them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.taken = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting() -> Message:
            message = await receive()
            self.taken += 1
            return message

        await self.app(scope, counting, send)


@pytest.mark.parametrize("door", STOPPING_DOORS)
@pytest.mark.parametrize("disconnect", ["repeats", "once"])
async def test_drop_while_the_handler_is_busy(door: str, disconnect: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cleaned: list[bool] = []

    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        socket.drop_nowait()
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.001)
            await anyio.sleep(0.001)
            cleaned.append(True)

    async with checked(application(door, work), disconnect=disconnect) as socket:
        pass
    assert (cleaned, socket.close_code, socket.most_readers) == ([True], None, 1)
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("WEBSOCKET / cancelled after ")
    assert record.getMessage().endswith(": disconnect")


@pytest.mark.parametrize("door", STOPPING_DOORS)
@pytest.mark.parametrize(
    ("reason", "code", "text"),
    [
        (CancelationReason.MANUAL, 4499, "enough"),
        (CancelationReason.TIMEOUT, 4504, "enough"),
        (CancelationReason.SIGNAL, 1012, "enough"),
        (CancelationReason.CONDITION, 1011, "enough"),
        (CancelationReason.PARENT, 1011, "An enclosing operation was cancelled"),
        (CancelationReason.ERROR, 1011, "A source of cancellation failed"),
    ],
)
async def test_reason_is_the_close_code(door: str, reason: CancelationReason, code: int, text: str) -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        cancel = current_cancelable()
        assert cancel is not None
        await cancel.cancel(reason, "enough")
        await anyio.sleep_forever()

    async with checked(application(door, work)) as socket:
        pass
    assert closed(socket) == (code, text)


@pytest.mark.parametrize("refusal_response", [True, False])
@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_stop_before_accept_refuses_the_handshake(door: str, refusal_response: bool) -> None:
    async def work(websocket: WebSocket) -> None:
        cancel = current_cancelable()
        assert cancel is not None
        await cancel.cancel(CancelationReason.SIGNAL, "come back")
        await anyio.sleep_forever()

    async with checked(application(door, work), refusal_response=refusal_response) as socket:
        pass
    if refusal_response:
        assert socket.refusal is not None
        assert (socket.refusal.status_code, socket.refusal.json()) == (503, {"detail": "come back"})
        assert socket.refusal.headers["retry-after"] == "5"
    else:
        assert closed(socket) == (1012, "come back")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_drop_before_accept(door: str) -> None:
    async def work(websocket: WebSocket) -> None:
        # The handshake's first message is the application's to take, and until then nobody listens.
        await websocket.receive()
        socket.drop_nowait()
        await anyio.sleep_forever()

    async with checked(application(door, work)) as socket:
        pass
    assert socket.sent == []


async def test_the_handshake_is_left_alone() -> None:
    async def work(websocket: WebSocket) -> None:
        waiting.set()
        await go_on.wait()
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())

    waiting, go_on = anyio.Event(), anyio.Event()
    async with connected(application("all", work)) as socket:
        await waiting.wait()
        await anyio.sleep(0.03)
        assert socket.most_readers == 0
        go_on.set()
        await socket.send_text("hello")
        assert await socket.receive_text() == "hello"


async def test_timeout_of_the_decorator_is_the_total_time() -> None:
    app = FastAPI()

    @app.websocket("/")
    @with_cancelation(timeout=0.05)
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    async with checked(app) as socket:
        await say(socket, "one", "two")
    assert [await socket.receive_text(), await socket.receive_text()] == ["one", "two"]
    assert closed(socket) == (4504, "Timed out after 0.05 seconds")


async def test_statuses_of_the_decorator_are_those_of_the_handshake() -> None:
    app = FastAPI()

    @app.websocket("/")
    @with_cancelation(timeout=0, status_codes={CancelationReason.TIMEOUT: 503})
    async def endpoint() -> None: ...

    async with checked(app) as socket:
        pass
    assert socket.refusal is not None
    assert socket.refusal.status_code == 503


async def test_endpoint_without_a_websocket_parameter() -> None:
    app = FastAPI()

    async def accepted(websocket: WebSocket) -> None:
        await websocket.accept()

    @app.websocket("/", dependencies=[Depends(accepted)])
    @with_cancelation
    async def endpoint() -> None:
        socket.drop_nowait()
        await anyio.sleep_forever()

    async with checked(app) as socket:
        pass


async def test_connection_parameter() -> None:
    app = FastAPI()

    @app.websocket("/")
    @with_cancelation
    async def endpoint(connection: HTTPConnection) -> None:
        assert isinstance(connection, WebSocket)
        await connection.accept()
        socket.drop_nowait()
        await anyio.sleep_forever()

    async with checked(app) as socket:
        pass


def test_plain_function_is_refused() -> None:
    with pytest.raises(TypeError, match="must be awaitable: make it `async def`"):

        @with_cancelation
        def endpoint(websocket: WebSocket) -> None: ...


@pytest.mark.usefixtures("who_reads")
@pytest.mark.parametrize("door", DOORS)
async def test_drop_while_receiving_is_a_disconnect_as_ever(door: str, caplog: pytest.LogCaptureFixture) -> None:
    """`except WebSocketDisconnect` goes on working, and what it awaits is not hit by our cancellation."""
    caplog.set_level(logging.INFO)
    seen: list[Any] = []

    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            await websocket.receive_text()
        except WebSocketDisconnect as exc:
            await anyio.sleep(0.01)
            seen.append(exc.code)

    async with connected(application(door, work)) as socket:
        await socket.accepted()
        await socket.listened_to()
    assert (seen, socket.most_readers) == ([1006], 1)
    assert caplog.records == []


@pytest.mark.usefixtures("who_reads")
@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_uncaught_disconnect_is_no_error(door: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()

    async with connected(application(door, work)) as socket:
        await socket.accepted()
        await socket.listened_to()
    assert [record.levelno for record in caplog.records] == [logging.INFO]


async def test_without_a_block_a_disconnect_is_starlettes_own() -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()

    async with connected(application("event", work), raise_app_exceptions=False) as socket:
        await socket.accepted()
        await socket.listened_to()
    assert type(socket.exception) is WebSocketDisconnect


@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_disconnect_of_another_socket_is_not_ours(door: str, caplog: pytest.LogCaptureFixture) -> None:
    """A broadcast that comes upon a client who has gone, in the handler of one who has not."""
    caplog.set_level(logging.INFO)

    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        await other.send_text("hello all")

    async def connect() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        if message["type"] != "websocket.accept":
            raise OSError("this client has left")

    other = WebSocket({"type": "websocket"}, connect, send)
    await other.accept()
    async with checked(application(door, work), raise_app_exceptions=False) as socket:
        pass
    assert type(socket.exception) is WebSocketDisconnect
    assert caplog.records == []


@pytest.mark.parametrize("how", ["send", "close"])
@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_failed_send_is_a_disconnect(door: str, how: str) -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        socket.drop_nowait()
        if how == "send":
            await websocket.send_text("nobody hears this")
        else:
            await websocket.close()

    async with checked(application(door, work)) as socket:
        pass


@pytest.mark.usefixtures("who_reads")
@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_one_task_receives_while_another_works(door: str) -> None:
    stopped: list[str] = []

    async def work(websocket: WebSocket) -> None:
        await websocket.accept()

        async def listen() -> None:
            async for _ in websocket.iter_text():
                pass

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listen)
                await anyio.sleep_forever()
        finally:
            stopped.append("stopped")

    async with connected(application(door, work)) as socket:
        await socket.accepted()
        await socket.listened_to()
    assert stopped == ["stopped"]


@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_each_task_of_a_group_is_told_and_the_server_of_none(door: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(websocket.receive_text)
            tasks.start_soon(websocket.receive_text)

    async with nothing_left(), connected(application(door, work)) as socket:
        await socket.accepted()
        await socket.listened_to()
    assert socket.outcome == "returned"
    assert [record.levelname for record in caplog.records if record.name == "cancelable_deps"] == ["INFO"]


@pytest.mark.usefixtures("who_reads")
async def test_child_of_a_group_that_receives_may_clean_up() -> None:
    order: list[str] = []

    async def listen(websocket: WebSocket) -> None:
        try:
            await websocket.receive_text()
        except WebSocketDisconnect:
            await anyio.sleep(0.001)
            await anyio.sleep(0.001)
            order.append("cleaned")

    app = FastAPI()

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, get_task_group: RequestTaskGroup) -> None:
        await websocket.accept()
        async with get_task_group() as tasks:
            tasks.start_soon(listen, websocket)
            try:
                await anyio.sleep_forever()
            finally:
                order.append("stopped")

    async with connected(app) as socket:
        await socket.accepted()
        await socket.listened_to()
    assert sorted(order) == ["cleaned", "stopped"]


async def test_error_of_a_plain_cancelable_inside() -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        async with Cancelable(timeout=0):
            raise AssertionError

    async with checked(application("decorator", work)) as socket:
        pass
    assert closed(socket) == (4504, "Timed out after 0 seconds")


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("door", DOORS)
async def test_nothing_is_kept_alive(door: str) -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep(0.02)
        kept.extend([ref(websocket), ref(websocket.scope[SCOPE_KEY])])
        ready.set()
        with suppress(WebSocketDisconnect):
            await websocket.receive_text()

    async def serve() -> None:
        async with checked(application(door, work)) as socket:
            await ready.wait()
            await socket.drop()

    kept: list[Any] = []
    ready = anyio.Event()
    # A timer before it, or the loop would forget one that is cancelled, and what it keeps, at once.
    with anyio.move_on_after(4):
        # What the client itself keeps of the socket ends with it.
        await serve()
        gc.collect()
        assert [there() for there in kept] == [None, None]


@pytest.mark.parametrize("door", DOORS)
async def test_messages_sent_while_busy_are_replayed_in_order(door: str) -> None:
    got: list[Any] = []

    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        await go_on.wait()
        got.extend([await websocket.receive_text() for _ in range(40)])
        got.append(await websocket.receive_bytes())
        got.append(await websocket.receive_json())
        await websocket.close()

    go_on = anyio.Event()
    app = Counted(application(door, work))
    async with checked(app) as socket:
        await say(socket, *[str(number) for number in range(40)], b"bytes", '{"a": 1}')
        await socket.listened_to()
        assert app.taken == 43
        go_on.set()
    assert got == [*[str(number) for number in range(40)], b"bytes", {"a": 1}]
    assert (closed(socket), socket.most_readers) == ((1000, ""), 1)


@pytest.mark.parametrize(("text", "held"), [("x", 64), ("x" * 20_000, 4), ("😀" * 20_000, 1)])
async def test_reading_ahead_is_bounded(text: str, held: int) -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        await go_on.wait()
        for _ in range(200):
            assert await websocket.receive_text() == text

    go_on = anyio.Event()
    app = Counted(application("decorator", work))
    async with checked(app) as socket:
        await say(socket, *[text] * 200)
        while app.taken <= held:  # noqa: ASYNC110
            await anyio.sleep(0.001)
        await anyio.wait_all_tasks_blocked()
        assert app.taken == held + 1
        go_on.set()


async def test_the_last_message_is_not_lost_to_the_disconnect() -> None:
    """Both arrive in one go while the handler waits: it has the message to work on, and is stopped at that."""
    got: list[str] = []
    may_receive = anyio.Event()

    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        await may_receive.wait()
        got.append(await websocket.receive_text())
        await anyio.sleep_forever()

    async with connected(application("decorator", work)) as socket:
        await socket.listened_to()
        may_receive.set()
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(socket.send_text, "last")
            tasks.start_soon(socket.drop)
    assert got == ["last"]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("door", DOORS)
async def test_our_own_close_is_no_disconnect(door: str) -> None:
    finished: list[Any] = []

    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.wait_all_tasks_blocked()
        await websocket.close(1001, "bye")
        await anyio.wait_all_tasks_blocked()
        finished.append(True)

    async with checked(application(door, work)) as socket:
        pass
    assert (finished, closed(socket)) == ([True], (1001, "bye"))


@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_stop_after_our_own_close_sends_nothing_more(door: str) -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()
        cancel = current_cancelable()
        assert cancel is not None
        await cancel.cancel()
        await anyio.sleep_forever()

    async with checked(application(door, work)) as socket:
        pass
    assert closed(socket) == (1000, "")


@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_cleanup_that_closes_is_quiet_when_the_client_is_gone(door: str) -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            socket.drop_nowait()
            await anyio.sleep_forever()
        finally:
            await websocket.close()

    async with checked(application(door, work)) as socket:
        pass
    assert socket.close_code is None


@pytest.mark.parametrize("door", STOPPING_DOORS)
async def test_cleanup_that_closes_for_itself_has_closed(door: str) -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        cancel = current_cancelable()
        assert cancel is not None
        cancel.cancel_nowait(message="enough")
        try:
            await anyio.sleep_forever()
        finally:
            await websocket.send_text("good bye")
            await websocket.close(4000, "mine")

    async with checked(application(door, work)) as socket:
        pass
    assert (await socket.receive_text(), closed(socket)) == ("good bye", (4000, "mine"))


async def test_a_caught_error_leaves_the_socket_open() -> None:
    app = FastAPI()

    @app.websocket("/")
    async def endpoint(
        websocket: WebSocket, cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(0))]
    ) -> None:
        await websocket.accept()
        try:
            async with cancel:
                raise AssertionError
        except TimeoutCancelation as exc:
            await websocket.send_text(f"{exc.reason} {exc.detail}")
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    async with checked(app) as socket:
        await say(socket, "still here")
    texts = [await socket.receive_text(), await socket.receive_text()]
    assert texts == ["timeout Timed out after 0 seconds", "still here"]
    assert closed(socket) == (1000, "")


async def test_what_is_raised_is_both() -> None:
    raised: list[BaseException] = []
    app = FastAPI()

    @app.websocket("/{how}")
    async def endpoint(websocket: WebSocket, how: str, cancel: RequestCancelable) -> None:
        await websocket.accept()
        try:
            async with cancel:
                if how == "drop":
                    socket.drop_nowait()
                else:
                    cancel.cancel_nowait(CancelationReason.TIMEOUT, "slow")
                await anyio.sleep_forever()
        except CancelationError as exc:
            raised.append(exc)
            raise

    async with checked(app, "/time") as socket:
        pass
    async with checked(app, "/drop") as socket:
        pass
    timeout, disconnect = raised
    assert isinstance(timeout, TimeoutCancelation)
    assert isinstance(timeout, WebSocketException)
    assert isinstance(timeout, TimeoutError)
    assert (timeout.reason, timeout.code, timeout.detail) == (CancelationReason.TIMEOUT, 4504, "slow")
    assert isinstance(disconnect, DisconnectCancelation)
    assert isinstance(disconnect, WebSocketDisconnect)
    assert disconnect.code == 1006
    assert "Timeout" in repr(timeout)
    assert str(timeout)


async def test_handlers_for_http_errors_are_not_asked() -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        cancel = current_cancelable()
        assert cancel is not None
        await cancel.cancel()

    async def answer(request: Any, exc: Exception) -> None:
        raise AssertionError

    app = application("decorator", work)
    app.add_exception_handler(CancelationError, answer)
    app.add_exception_handler(HTTPException, answer)
    async with checked(app) as socket:
        pass
    assert closed(socket) == (4499, "The request was cancelled")


async def test_status_handlers_are_asked_before_the_handshake_only() -> None:
    async def answer(request: Any, exc: Exception) -> Response:
        return Response("see you", 504)

    async def work(websocket: WebSocket) -> None:
        if accept:
            await websocket.accept()
        cancel = current_cancelable()
        assert cancel is not None
        await cancel.cancel(CancelationReason.TIMEOUT)

    app = application("decorator", work)
    app.add_exception_handler(504, answer)
    accept = False
    async with checked(app) as socket:
        pass
    assert socket.refusal is not None
    assert (socket.refusal.status_code, socket.refusal.text) == (504, "see you")
    accept = True
    async with checked(app) as socket:
        pass
    assert closed(socket) == (4504, "The request timed out")


async def test_middleware_around_a_bare_application() -> None:
    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if scope["path"] != "/refuse":
            await send({"type": "websocket.accept"})
        cancel = current_cancelable()
        assert cancel is not None
        cancel.cancel_nowait(CancelationReason.SIGNAL)
        if scope["path"] == "/swallow":
            with suppress(anyio.get_cancelled_exc_class()):
                await anyio.sleep_forever()
        else:
            await anyio.sleep_forever()

    app = RequestCancelationMiddleware(bare, exclude="/health")
    for path in ("/", "/swallow", "/refuse"):
        async with checked(app, path) as socket:
            pass
        if path == "/refuse":
            assert socket.refusal is not None
            assert socket.refusal.status_code == 503
        else:
            assert closed(socket) == (1012, "The server is shutting down")


async def test_middleware_leaves_excluded_paths_alone() -> None:
    seen: list[Any] = []

    inner = FastAPI()

    @inner.websocket("/")
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        seen.append((current_cancelable(), SCOPE_KEY in websocket.scope))

    async with checked(RequestCancelationMiddleware(inner, exclude="/")):
        pass
    assert seen == [(None, False)]


async def test_yield_dependencies_see_the_error() -> None:
    seen: list[BaseException] = []

    async def transaction() -> AsyncIterator[None]:
        try:
            yield
        except CancelationError as exc:
            seen.append(exc)
            raise

    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        socket.drop_nowait()
        await anyio.sleep_forever()

    async with checked(application("decorator", work, dependencies=[Depends(transaction)])) as socket:
        pass
    assert [type(exc).__name__ for exc in seen] == ["DisconnectCancelation"]


def test_close_text_is_bounded() -> None:
    assert close_text("short") == "short"
    assert close_text("é" * 100) == "é" * (CLOSE_TEXT_BYTES // 2)
    assert len(close_text("😀" * 100).encode()) <= CLOSE_TEXT_BYTES


async def test_long_message_fits_into_the_close_frame() -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        cancel = current_cancelable()
        assert cancel is not None
        await cancel.cancel(message="é" * 100)

    async with checked(application("decorator", work)) as socket:
        pass
    assert closed(socket) == (4499, "é" * 61)


@pytest.mark.parametrize("door", DOORS)
async def test_cancelled_from_outside_is_not_ours(door: str) -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        waiting.set()
        await anyio.sleep_forever()

    waiting = anyio.Event()
    async with checked(application(door, work)) as socket:
        await waiting.wait()
        await anyio.wait_all_tasks_blocked()
        socket.give_up()
    assert (socket.outcome, socket.close_code) == ("cancelled", None)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("error", [ValueError("a bug"), WebSocketException(4001, "no")])
async def test_other_errors_are_not_replaced(door: str, error: Exception) -> None:
    async def work(websocket: WebSocket) -> None:
        await websocket.accept()
        raise error

    async with checked(application(door, work), raise_app_exceptions=False) as socket:
        pass
    if isinstance(error, ValueError):
        assert (socket.exception, socket.close_code) == (error, None)
    else:
        assert closed(socket) == (4001, "no")


async def test_event_is_set_and_cancels_nothing() -> None:
    seen: list[Any] = []
    app = FastAPI()

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, event: CancellationEvent) -> None:
        await websocket.accept()
        socket.drop_nowait()
        seen.append(await event.wait())
        await anyio.sleep(0.001)
        seen.append(event.is_set())

    async with checked(app) as socket:
        pass
    assert seen == [CancelationReason.DISCONNECT, True]


async def test_doors_share_one_state() -> None:
    seen: list[Any] = []
    app = FastAPI()

    @app.websocket("/")
    @with_cancelation
    async def endpoint(websocket: WebSocket, cancel: RequestCancelable, event: CancellationEvent) -> None:
        await websocket.accept()
        state = websocket.scope[SCOPE_KEY]
        try:
            async with cancel:
                socket.drop_nowait()
                await anyio.sleep_forever()
        finally:
            outer = current_cancelable()
            assert outer is not None
            seen.extend([event.reason, outer.reason, outer.token is state.token, socket.most_readers])

    mounted = FastAPI()
    mounted.mount("/below", app)
    async with checked(mounted, "/below/") as socket:
        pass
    assert seen == [CancelationReason.DISCONNECT, CancelationReason.DISCONNECT, True, 1]


async def test_starlette() -> None:
    async def group(websocket: WebSocket) -> None:
        await websocket.accept()
        async with create_request_task_group(websocket) as tasks:
            tasks.start_soon(anyio.sleep_forever)
            socket.drop_nowait()

    async def wait(websocket: WebSocket) -> None:
        await websocket.accept()
        await socket.send_text("kept")
        await anyio.wait_all_tasks_blocked()
        socket.drop_nowait()
        await wait_for_disconnect(websocket)
        kept.append(await websocket.receive_text())
        with pytest.raises(WebSocketDisconnect):
            await websocket.receive_text()

    @with_cancelation
    async def bare(websocket) -> None:  # type: ignore[no-untyped-def]
        await websocket.accept()
        socket.drop_nowait()
        await anyio.sleep_forever()

    kept: list[str] = []
    app = Starlette(routes=[WebSocketRoute(f"/{f.__name__}", f) for f in (group, wait, bare)])
    for path in ("/group", "/wait", "/bare"):
        async with checked(app, path) as socket:
            pass
    assert kept == ["kept"]


@pytest.mark.parametrize("annotated", [True, False])
async def test_methods_of_a_class_share_the_reader(annotated: bool) -> None:
    got: list[str] = []

    async def connect(self: object, websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep(0.03)

    async def receive(self: object, websocket: WebSocket, data: Any) -> None:
        got.append(data)
        await anyio.sleep(0.03)
        if data == "three":
            socket.drop_nowait()
            await anyio.sleep_forever()

    if not annotated:
        connect.__annotations__.clear()
        receive.__annotations__.clear()

    class Echo(WebSocketEndpoint):
        encoding = "text"
        on_connect = with_cancelation(connect)
        on_receive = with_cancelation(receive)

    app = Starlette(routes=[WebSocketRoute("/", Echo)])
    async with checked(app, raise_app_exceptions=False) as socket:
        await say(socket, "one", "two", "three")
    assert got == ["one", "two", "three"]
    assert socket.most_readers == 1


async def test_what_we_use_of_starlette_is_there() -> None:
    """`_receive`, by which we give back what we have read, and `send`, which its own `close()` goes through."""

    async def never(*args: Any) -> Any:
        raise AssertionError

    websocket = WebSocket({"type": "websocket"}, never, never)
    assert websocket._receive is never
    taken: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        taken.append(message)

    websocket._receive = receive
    assert (await websocket.receive())["type"] == "websocket.connect"
    websocket.send = send  # type: ignore[method-assign]
    await websocket.close(4000, "text")
    assert taken == [{"type": "websocket.close", "code": 4000, "reason": "text"}]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.filterwarnings("ignore:Using `httpx`", "ignore::DeprecationWarning")
def test_starlettes_test_client(door: str, anyio_backend: Literal["asyncio", "trio"]) -> None:
    # Here, as newer versions warn at import of a client that is not theirs.
    from starlette.testclient import TestClient, WebSocketDenialResponse

    async def work(websocket: WebSocket) -> None:
        if websocket.headers.get("refuse"):
            await stop()
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await anyio.sleep(0.02)
        await websocket.send_text(await websocket.receive_text())
        if door != "event":
            await stop()

    async def stop() -> None:
        cancel = current_cancelable()
        assert cancel is not None
        await cancel.cancel(CancelationReason.TIMEOUT, "slow")

    client = TestClient(application(door, work), backend=anyio_backend)
    with client.websocket_connect("/") as session:
        session.send_text("one")
        session.send_text("two")
        assert [session.receive_text(), session.receive_text()] == ["one", "two"]
        if door != "event":
            with pytest.raises(WebSocketDisconnect) as closed:
                session.receive_text()
            assert (closed.value.code, closed.value.reason) == (4504, "slow")
    if door != "event":
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/", headers={"refuse": "1"}):
            pass
        assert (refused.value.status_code, refused.value.json()) == (504, {"detail": "slow"})


@pytest.mark.parametrize("door", ["decorator", "handle", "middleware"])
async def test_a_handler_that_only_sends_is_stopped(door: str) -> None:
    """Under a server whose ``send()`` gives nobody else a turn, as uvicorn's does as long as the client has room."""
    many, sent = 100_000, 0
    app = FastAPI()

    async def flood(websocket: WebSocket) -> None:
        await websocket.accept()
        for number in range(many):
            await websocket.send_text(str(number))
            if number == 10:
                gone.set()

    async def flood_in_block(websocket: WebSocket, cancel: RequestCancelable) -> None:
        async with cancel:
            await flood(websocket)

    async def never_waits(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_at_once(message: Message) -> None:
            nonlocal sent
            if message["type"] == "websocket.send":
                sent += 1
            else:
                await send(message)

        await covered(scope, receive, send_at_once)

    if door == "handle":
        app.websocket("/")(flood_in_block)
    else:
        app.websocket("/")(with_cancelation(flood) if door == "decorator" else flood)
    covered: Any = RequestCancelationMiddleware(app) if door == "middleware" else app
    gone = anyio.Event()
    async with nothing_left(), connected(never_waits) as call:
        await gone.wait()
        await call.drop()
    assert call.outcome == "returned"
    assert sent < many
