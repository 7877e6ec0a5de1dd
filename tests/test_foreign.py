"""What the user or the server has written raises another's cancellation, or what is no `Exception`, in each place."""

from __future__ import annotations

import asyncio
from asyncio import CancelledError
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NoReturn

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import sniffio
from fastapi import APIRouter, FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelableStreamingResponse,
    CancelationError,
    CancelationReason,
    CancelationToken,
    ManualCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    TimeoutCancelation,
    TimeoutPolicy,
    current_cancelable,
    progress_response,
    with_cancelation,
)
from cancelable_deps.kernel.foreign import ThisTask
from cancelable_deps.kernel.task_group import CancelableTaskGroup
from cancelable_deps.kernel.token import Cause
from cancelable_deps.request.shutdown import Graces, Shutdown
from cancelable_deps.request.state import SCOPE_KEY
from cancelable_deps.testing import Call
from tests.calls import CEILING, checked_socket, connected, get, running
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio
SOON = 0.03


class Unusual(BaseException):
    """What a library may raise that is no error to Python."""


async def of_a_cancelled_task() -> NoReturn:
    if sniffio.current_async_library() == "trio":
        # There is no such thing; another's CancelledError may still come by way of a thread.
        await anyio.to_thread.run_sync(raise_cancelled)
    other = asyncio.create_task(asyncio.sleep(CEILING))
    try:
        await asyncio.sleep(0)
    finally:
        # Also if a reader of ours is stopped here, which begins to listen on a busy machine.
        other.cancel()
    await other
    raise AssertionError("a cancelled task has ended well")


async def worded_as_by_anyio() -> NoReturn:
    await anyio.lowlevel.checkpoint()
    raise CancelledError("Cancelled via cancel scope 7f0000000000")


async def unusual() -> NoReturn:
    await anyio.lowlevel.checkpoint()
    raise Unusual


async def closed_by_hand() -> NoReturn:
    await anyio.lowlevel.checkpoint()
    raise GeneratorExit


def raise_cancelled() -> NoReturn:
    raise CancelledError("another's")


def raise_unusual() -> NoReturn:
    raise Unusual


def raise_closed() -> NoReturn:
    raise GeneratorExit


FAILURES = [of_a_cancelled_task, worded_as_by_anyio, unusual, closed_by_hand]
PLAIN_FAILURES = [raise_cancelled, raise_unusual, raise_closed]
every_failure = pytest.mark.parametrize("fail", FAILURES, ids=lambda fail: fail.__name__)
every_plain_failure = pytest.mark.parametrize("fail", PLAIN_FAILURES, ids=lambda fail: fail.__name__)
CANCELLATIONS = [of_a_cancelled_task, worded_as_by_anyio]
every_cancellation = pytest.mark.parametrize("fail", CANCELLATIONS, ids=lambda fail: fail.__name__)
every_exit = pytest.mark.parametrize("exit_kind", [KeyboardInterrupt, SystemExit])


def levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.levelname for record in caplog.records if record.name == "cancelable_deps"]


# Callbacks


@every_plain_failure
def test_a_callback_of_a_token_does_not_keep_the_others_from_being_told(
    fail: Callable[[], NoReturn], caplog: pytest.LogCaptureFixture
) -> None:
    token = CancelationToken()
    told: list[str] = []
    token.on_cancel(lambda token: told.append("first"))
    token.on_cancel(lambda token: fail())
    token.on_cancel(lambda token: told.append("last"))
    assert token.cancel_nowait()
    token.on_cancel(lambda token: fail())
    assert sorted(told) == ["first", "last"]
    assert levels(caplog) == ["ERROR", "ERROR"]


@every_plain_failure
async def test_a_callback_does_not_keep_a_block_from_being_stopped(
    fail: Callable[[], NoReturn], caplog: pytest.LogCaptureFixture
) -> None:
    token = CancelationToken()
    block = Cancelable(token=token)
    block.on_cancel(lambda block: fail())

    async def work() -> None:
        async with block:
            token.on_cancel(lambda token: fail())
            await token.cancel()

    async with nothing_left():
        with anyio.fail_after(CEILING), pytest.raises(ManualCancelation):
            await work()
    assert levels(caplog) == ["ERROR", "ERROR"]


@every_failure
async def test_an_async_callback_is_logged_and_the_error_of_the_reason_is_raised(
    fail: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    async def fail_later(block: Cancelable) -> None:
        await fail()

    async def tell(block: Cancelable) -> None:
        await anyio.lowlevel.checkpoint()
        told.append("told")

    async with nothing_left():
        block = Cancelable(timeout=SOON)
        for callback in (tell, fail_later, tell):
            block.on_cancel(callback)
        with pytest.raises(TimeoutCancelation):
            async with block:
                await anyio.sleep_forever()
    assert told == ["told", "told"]
    assert levels(caplog) == ["ERROR"]


@every_failure
@pytest.mark.parametrize("door", ["async", "thread"])
async def test_the_callback_of_the_decorator_does_not_cost_the_response(
    door: str, fail: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def fail_later(block: Cancelable) -> None:
        await fail()

    app = FastAPI()

    async def report() -> None:
        await anyio.sleep_forever()

    def report_in_thread() -> None:
        while True:
            anyio.from_thread.check_cancelled()

    endpoint: Any = report if door == "async" else report_in_thread
    app.get("/")(with_cancelation(timeout=SOON, on_cancel=fail_later)(endpoint))
    async with nothing_left():
        call = await get(app)
    assert (call.status, call.exception) == (504, None)
    assert "ERROR" in levels(caplog)


@every_exit
def test_what_ends_the_process_passes_after_everybody_has_been_told(exit_kind: type[BaseException]) -> None:
    token, other = CancelationToken(), CancelationToken()
    told: list[str] = []

    def leave(token: CancelationToken) -> None:
        raise exit_kind("now")

    token.on_cancel(lambda token: told.append("first"))
    other.on_cancel(lambda token: told.append("of the other"))
    other.on_cancel(leave)
    token.on_cancel(lambda token: other.cancel_nowait())
    token.on_cancel(leave)
    token.on_cancel(lambda token: told.append("last"))
    with pytest.raises(exit_kind, match="now"):
        token.cancel_nowait()
    assert sorted(told) == ["first", "last", "of the other"]
    assert token.is_cancelled
    with pytest.raises(exit_kind):
        token.on_cancel(leave)


@every_exit
async def test_what_ends_the_process_leaves_no_block_that_was_not_stopped(exit_kind: type[BaseException]) -> None:
    token = CancelationToken()
    stopped: list[str] = []

    async def work() -> None:
        try:
            async with Cancelable(token=token) as outer:
                outer.on_cancel(leave)
                async with Cancelable(token=token):
                    await anyio.sleep_forever()
        except CancelationError as exc:
            stopped.append(exc.reason)

    def leave(cancelled: object) -> None:
        raise exit_kind

    async with nothing_left(), anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(work)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(exit_kind):
            token.cancel_nowait()
    assert stopped == ["manual"] * 3


@every_exit
async def test_what_ends_the_process_passes_after_the_async_callbacks(exit_kind: type[BaseException]) -> None:
    told: list[object] = []

    async def leave(block: Cancelable) -> None:
        await anyio.lowlevel.checkpoint()
        raise exit_kind

    async def tell(block: Cancelable) -> None:
        told.append(block)

    block = Cancelable()

    async def work() -> None:
        async with block:
            for callback in (leave, tell):
                block.on_cancel(callback)
            await block.cancel()

    with pytest.raises(exit_kind):
        await work()
    assert told == [block]


async def test_the_cancellation_of_its_own_task_passes_through_a_callback() -> None:
    """As a server has it that ends by cancelling its tasks."""
    if sniffio.current_async_library() == "trio":
        pytest.skip("a task cannot be cancelled by its name")
    awaited = anyio.Event()

    async def callback(block: Cancelable) -> None:
        awaited.set()
        await anyio.sleep_forever()

    async def work() -> None:
        async with Cancelable() as block:
            block.on_cancel(callback)
            await block.cancel()

    task = asyncio.create_task(work())
    await awaited.wait()
    task.cancel()
    with anyio.fail_after(CEILING), pytest.raises(CancelledError):
        await task


async def test_callbacks_that_the_grace_leaves_no_time_for_are_closed_and_said_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun: list[str] = []

    async def hang(block: Cancelable) -> None:
        await anyio.sleep_forever()

    async def next_one(block: Cancelable) -> None:
        begun.append("never")

    block = Cancelable(cleanup_grace=SOON)
    block.on_cancel(next_one)
    block.on_cancel(hang)
    with pytest.raises(ManualCancelation):
        async with block:
            await block.cancel()
    assert begun == []
    assert levels(caplog) == ["WARNING"]


@every_failure
@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_a_listener_to_progress_does_not_end_the_work(
    kind: str, fail: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str | None] = []

    def fail_now(message: str | None, metadata: object) -> None:
        raise CancelledError if fail in CANCELLATIONS else Unusual

    async def fail_later(message: str | None, metadata: object) -> None:
        await fail()

    async with Cancelable() as block:
        block.on_progress(lambda message, metadata: told.append(message))
        block.on_progress(fail_now if kind == "plain" else fail_later)
        block.on_progress(lambda message, metadata: told.append(message))
        await block.report_progress("half")
    assert told == ["half", "half"]
    assert levels(caplog) == ["ERROR"]


@every_exit
async def test_what_ends_the_process_passes_when_all_have_heard_of_the_progress(exit_kind: type[BaseException]) -> None:
    told: list[str | None] = []

    def leave(message: str | None, metadata: object) -> None:
        raise exit_kind

    async def work() -> None:
        async with Cancelable() as block:
            block.on_progress(leave)
            block.on_progress(lambda message, metadata: told.append(message))
            await block.report_progress("half")

    with pytest.raises(exit_kind):
        await work()
    assert told == ["half"]


async def test_a_cancellation_of_the_block_passes_through_a_listener_to_progress() -> None:
    went_on: list[str] = []
    block = Cancelable()

    @block.on_progress
    async def listen(message: str | None, metadata: object) -> None:
        await block.cancel()
        went_on.append("the listener")

    async def work() -> None:
        async with block:
            await block.report_progress("half")
            went_on.append("the work")

    async with nothing_left():
        with pytest.raises(ManualCancelation):
            await work()
    assert went_on == []


async def test_a_future_that_a_callback_cancels_does_not_cost_the_response() -> None:
    if sniffio.current_async_library() == "trio":
        pytest.skip("trio has no futures")
    app = FastAPI()
    waited_for: list[asyncio.Future[None]] = []

    @app.get("/")
    @with_cancelation(timeout=SOON)
    async def report() -> None:
        waited_for.append(asyncio.get_running_loop().create_future())
        block = current_cancelable()
        assert block is not None
        # Told before the block is, as it comes after it.
        block.on_cancel(lambda block: waited_for[0].cancel())
        await waited_for[0]

    async with nothing_left():
        call = await get(app)
    assert (call.status, call.exception) == (504, None)


# Conditions


@every_failure
async def test_a_condition_that_fails_stops_the_block(fail: Callable[[], Any]) -> None:
    async def predicate() -> bool:
        await fail()
        return False

    async with nothing_left():
        with anyio.fail_after(CEILING), pytest.raises(CancelationError) as caught:
            async with Cancelable.with_condition(predicate):
                await anyio.sleep_forever()
    assert caught.value.reason is CancelationReason.ERROR
    assert str(caught.value.message).startswith("The condition failed: ")


@every_plain_failure
async def test_a_plain_condition_that_fails_stops_the_block(fail: Callable[[], NoReturn]) -> None:
    async with nothing_left():
        with anyio.fail_after(CEILING), pytest.raises(CancelationError) as caught:
            async with Cancelable.with_condition(fail):
                await anyio.sleep_forever()
    assert caught.value.reason is CancelationReason.ERROR


# Streams


def stream(kind: str, fail: Callable[[], Any], fail_plain: Callable[[], NoReturn]) -> FastAPI:
    """An application whose ``GET /`` streams one chunk, and then fails."""
    if "generator" in kind:
        pytest.importorskip("fastapi.sse", reason="generator endpoints came with FastAPI 0.135")

    async def chunks() -> AsyncIterator[str]:
        yield "one"
        await fail()

    def plain_chunks() -> Iterator[str]:
        yield "one"
        fail_plain()

    app = FastAPI()
    if kind == "response":
        app.get("/")(lambda: CancelableStreamingResponse(chunks()))
    elif kind == "plain iterator":
        app.get("/")(lambda: CancelableStreamingResponse(plain_chunks()))
    elif kind == "generator":
        app.get("/", response_class=StreamingResponse)(with_cancelation(chunks))
    elif kind == "plain generator":
        app.get("/", response_class=StreamingResponse)(with_cancelation(plain_chunks))
    elif kind == "starlette":

        async def endpoint(request: Request) -> StreamingResponse:
            # From here on we listen in the place of Starlette.
            await until(lambda: request.scope[SCOPE_KEY].is_listening)
            return StreamingResponse(chunks())

        app.get("/")(with_cancelation(endpoint))
    return app


STREAMS = ["response", "plain iterator", "generator", "plain generator", "starlette"]


def behind(app: ASGIApp, *doors: str) -> ASGIApp:
    async def pass_on(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    for door in doors:
        app = BaseHTTPMiddleware(app, pass_on) if door == "base" else RequestCancelationMiddleware(app)
    return app


@pytest.mark.parametrize("doors", [(), ("ours",), ("base",), ("base", "ours")], ids=lambda doors: "+".join(doors))
@pytest.mark.parametrize(
    ("fail", "fail_plain"),
    [(of_a_cancelled_task, raise_cancelled), (worded_as_by_anyio, raise_cancelled), (closed_by_hand, raise_closed)],
    ids=["cancelled task", "worded as by anyio", "closed by hand"],
)
@pytest.mark.parametrize("kind", STREAMS)
async def test_a_stream_whose_generator_fails_ends_as_after_any_error(
    kind: str, fail: Callable[[], Any], fail_plain: Callable[[], NoReturn], doors: tuple[str, ...]
) -> None:
    if kind == "starlette" and (fail is closed_by_hand or doors == ("ours",)):
        pytest.skip("that one we do not touch: it goes to the server as it is")

    async def fail_as_usual() -> NoReturn:
        fail_plain_as_usual()

    def fail_plain_as_usual() -> NoReturn:
        raise RuntimeError

    with anyio.fail_after(CEILING):
        async with nothing_left():
            call = await get(behind(stream(kind, fail, fail_plain), *doors), raise_app_exceptions=False)
        usual = await get(behind(stream(kind, fail_as_usual, fail_plain_as_usual), *doors), raise_app_exceptions=False)
    assert (call.body, call.is_complete) == (usual.body, usual.is_complete) == (b"one", doors[:1] == ("base",))
    assert type(call.exception) is type(usual.exception) is RuntimeError


async def unusual_call(kind: str) -> Call:
    async with nothing_left():
        return await get(stream(kind, unusual, raise_unusual), raise_app_exceptions=False)


@pytest.mark.parametrize("kind", STREAMS[:-1])
async def test_a_stream_whose_generator_raises_what_is_no_exception_fails(kind: str) -> None:
    call = await unusual_call(kind)
    assert not call.is_complete
    assert isinstance(call.exception, RuntimeError)
    assert isinstance(call.exception.__cause__, Unusual)


@pytest.mark.parametrize("kind", ["response", "generator"])
async def test_a_plain_generator_that_raises_the_end_of_another_kind_fails(kind: str) -> None:
    if kind != "response":
        pytest.importorskip("fastapi.sse", reason="generator endpoints came with FastAPI 0.135")

    class Items:
        def __iter__(self) -> Items:
            return self

        def __next__(self) -> NoReturn:
            raise StopAsyncIteration

    def generator() -> Iterator[str]:
        yield from Items()

    app = FastAPI()
    if kind == "response":
        app.get("/")(lambda: CancelableStreamingResponse(Items()))
    else:
        app.get("/", response_class=StreamingResponse)(with_cancelation(generator))
    call = await get(app, raise_app_exceptions=False)
    assert not call.is_complete
    assert isinstance(call.exception, RuntimeError)


async def test_a_generator_that_fails_while_it_is_stopped_is_stopped() -> None:
    async def chunks() -> AsyncIterator[str]:
        try:
            yield "one"
            await anyio.sleep_forever()
        finally:
            await of_a_cancelled_task()

    async with nothing_left():
        call = await get(CancelableStreamingResponse(chunks(), media_type="text/event-stream", timeout=SOON))
    assert b"event: cancelled" in call.body if sniffio.current_async_library() == "asyncio" else True


async def test_a_background_task_does_not_run_after_a_stream_that_has_failed() -> None:
    ran: list[str] = []

    async def chunks() -> AsyncIterator[str]:
        yield "one"
        await of_a_cancelled_task()

    response = CancelableStreamingResponse(chunks(), background=BackgroundTask(ran.append, "ran"))
    call = await get(response, raise_app_exceptions=False)
    assert (ran, call.is_complete) == ([], False)


@every_failure
@pytest.mark.parametrize("given", [False, True])
async def test_the_work_of_a_progress_response_ends_with_an_event(
    given: bool, fail: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def work(cancel: Cancelable) -> None:
        await cancel.report_progress("half")
        await fail()

    app = FastAPI()

    @app.get("/")
    async def start(cancel: RequestCancelable) -> Any:
        return progress_response(work, cancel if given else None)

    async with nothing_left():
        call = await get(app)
    lines = [line for line in call.body.splitlines() if line.startswith(b"event")]
    assert lines == [b"event: progress", b"event: error"]
    assert call.is_complete
    assert levels(caplog) == ["ERROR"]


# Policies


@every_failure
@pytest.mark.parametrize("door", ["middleware", "decorator", "route"])
async def test_a_writer_that_fails_is_a_failure_of_the_application(door: str, fail: Callable[[], Any]) -> None:
    async def write(request: Request, error: CancelationError) -> Any:
        await fail()

    policy = TimeoutPolicy(SOON, response=write)

    async def work() -> None:
        await anyio.sleep_forever()

    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute.with_policy(policy)) if door == "route" else APIRouter()
    router.get("/")(with_cancelation(policy=policy)(work) if door == "decorator" else work)
    app.include_router(router)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, default_policy=policy)
    async with nothing_left():
        call = await get(app, raise_app_exceptions=False)
    # Starlette answers what is an Exception.
    assert call.status == 500
    assert isinstance(call.exception, RuntimeError)


# The server


class Faulty:
    """A server whose ``receive()`` or ``send()`` fails."""

    def __init__(self, app: ASGIApp, fail: Callable[[], Any], what: str, *, first: int = 0) -> None:
        self.app = app
        self.fail = fail
        self.what = what
        self.asked = -first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def faulty_receive() -> Message:
            self.asked += 1
            assert self.asked < 100, "it is asked for ever"
            if self.asked <= 0:
                return await receive()
            await self.fail()
            raise AssertionError

        async def faulty_send(message: Message) -> None:
            await self.fail()

        await self.app(
            scope,
            faulty_receive if self.what == "receive" else receive,
            faulty_send if self.what == "send" else send,
        )


async def until(is_so: Callable[[], object]) -> None:
    while not is_so():  # noqa: ASYNC110 - the server that is asked is a double of few lines
        await anyio.sleep(0.001)


def reading(door: str, is_asked: Callable[[], object]) -> FastAPI:
    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute) if door == "route" else APIRouter()

    async def plain(request: Request) -> str:
        await until(is_asked)
        try:
            await request.body()
        except RuntimeError as exc:
            return f"{type(exc.__cause__).__name__}"
        raise AssertionError("a body without an end")

    async def handle(request: Request, cancel: RequestCancelable) -> str:
        async with cancel:
            return await plain(request)

    endpoint: Any = {"decorator": with_cancelation(plain), "handle": handle}.get(door, plain)
    router.post("/")(endpoint)
    app.include_router(router)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    return app


@every_failure
@pytest.mark.parametrize("door", ["middleware", "route", "decorator", "handle"])
async def test_a_receive_that_fails_while_we_listen_fails_for_the_application(
    door: str, fail: Callable[[], Any]
) -> None:
    server = Faulty(reading(door, lambda: server.asked), fail, "receive")
    async with nothing_left():
        call = await get(server, "/", "POST")
    name = "CancelledError" if fail in CANCELLATIONS else "Unusual" if fail is unusual else "GeneratorExit"
    assert call.json() == name
    assert server.asked == 1


@every_cancellation
@pytest.mark.parametrize("door", ["middleware", "decorator"])
async def test_a_receive_that_fails_before_we_listen_fails_for_the_application(
    door: str, fail: Callable[[], Any]
) -> None:
    app = FastAPI()

    async def read(request: Request) -> str:
        with pytest.raises(RuntimeError, match="receive"):
            await request.body()
        return "told"

    app.post("/")(with_cancelation(read) if door == "decorator" else read)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    async with nothing_left():
        call = await get(Faulty(app, fail, "receive"), "/", "POST")
    assert call.json() == "told"


@every_cancellation
@pytest.mark.parametrize("listens", [False, True])
async def test_a_receive_of_a_socket_that_fails_fails_for_the_application(
    listens: bool, fail: Callable[[], Any]
) -> None:
    app = FastAPI()
    told: list[str] = []

    @app.websocket("/")
    @with_cancelation
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        if listens:
            await until(lambda: server.asked)
        with pytest.raises(RuntimeError, match="receive"):
            await websocket.receive()
        told.append("told")
        await websocket.close()

    server = Faulty(app, fail, "receive", first=1)
    async with checked_socket(server):
        pass
    assert told == ["told"]


@every_cancellation
@pytest.mark.parametrize("kind", ["handler", "stream"])
@pytest.mark.parametrize("doors", [("ours",), ("base", "ours")], ids=lambda doors: "+".join(doors))
async def test_a_send_that_fails_is_a_failure(doors: tuple[str, ...], kind: str, fail: Callable[[], Any]) -> None:
    app = FastAPI()
    if kind == "handler":
        app.get("/")(lambda: "done")
    else:

        async def chunks() -> AsyncIterator[str]:
            yield "one"

        app.get("/")(lambda: CancelableStreamingResponse(chunks()))
    async with nothing_left():
        call = await get(Faulty(behind(app, *doors), fail, "send"), raise_app_exceptions=False)
    assert isinstance(call.exception, RuntimeError)


@every_cancellation
async def test_a_send_of_a_socket_that_fails_is_a_failure(fail: Callable[[], Any]) -> None:
    app = FastAPI()
    told: list[str] = []

    @app.websocket("/")
    @with_cancelation
    async def chat(websocket: WebSocket) -> None:
        with pytest.raises(RuntimeError, match="send"):
            await websocket.accept()
        told.append("told")

    async with nothing_left(), connected(Faulty(app, fail, "send")) as socket:
        await socket.ended()
    assert told == ["told"]


@pytest.mark.parametrize("door", ["decorator", "middleware"])
@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_a_receive_that_never_waits_does_not_keep_its_caller_from_being_cancelled(kind: str, door: str) -> None:
    """A reader and a caller that wake each other in each step of the loop."""
    app = FastAPI()
    asked = 0

    async def never_waits() -> Message:
        nonlocal asked
        asked += 1
        assert asked < 20_000, "the caller cannot be stopped"
        await anyio.lowlevel.checkpoint()
        if kind == "http":
            return {"type": "http.request", "body": b"", "more_body": True}
        return {"type": "websocket.connect"} if asked == 1 else {"type": "websocket.receive", "text": ""}

    async def listen(receive: Receive) -> None:
        while True:
            await receive()

    async def until_stopped(receive: Receive) -> str:
        await anyio.sleep(SOON)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen, receive)
            before = asked
            while asked < before + 500:
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        return "stopped"

    async def upload(request: Request) -> str:
        return await until_stopped(request.receive)

    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        answers.append(await until_stopped(websocket.receive))
        await websocket.close()

    answers: list[str] = []
    app.post("/")(with_cancelation(upload) if door == "decorator" else upload)
    app.websocket("/")(with_cancelation(chat) if door == "decorator" else chat)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, never_waits, send)

    async with nothing_left():
        if kind == "http":
            call = await get(server, "/", "POST")
            answers.append(call.json())
        else:
            async with connected(server) as socket:
                await socket.ended()
    assert answers == ["stopped"]


# Groups


@every_cancellation
@pytest.mark.parametrize("how", ["start_soon", "create_task", "start"])
async def test_a_child_that_fails_fails_its_group(how: str, fail: Callable[[], Any]) -> None:
    cancelled: list[str] = []

    async def child(*, task_status: Any = None) -> None:
        if task_status is not None:
            task_status.started()
        await fail()

    async def sibling() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append("sibling")

    async def in_a_group() -> None:
        async with CancelableTaskGroup(Cancelable()) as tasks:
            tasks.start_soon(sibling)
            await anyio.wait_all_tasks_blocked()
            if how == "start":
                await tasks.start(child)
            elif how == "create_task":
                tasks.create_task(child())
            else:
                tasks.start_soon(child)

    async with nothing_left():
        with anyio.fail_after(CEILING), pytest.raises(RuntimeError, match="CancelledError") as caught:
            await in_a_group()
    assert isinstance(caught.value.__cause__, CancelledError)
    assert cancelled == ["sibling"]


async def test_what_a_child_raises_that_is_no_exception_arrives_as_itself() -> None:
    for fail, kind in ((unusual, Unusual), (closed_by_hand, GeneratorExit)):
        with pytest.raises(kind):
            async with CancelableTaskGroup(Cancelable()) as tasks:
                tasks.start_soon(fail)


@every_cancellation
async def test_a_child_of_a_request_that_fails_is_answered_as_a_failure(fail: Callable[[], Any]) -> None:
    app = FastAPI()

    @app.get("/")
    async def gather(get_task_group: RequestTaskGroup) -> str:
        async with get_task_group() as tasks:
            tasks.start_soon(fail)
        return "whole"

    async with nothing_left():
        call = await get(app, raise_app_exceptions=False)
    assert call.status == 500


async def test_a_child_that_is_cancelled_by_itself_is_no_failure() -> None:
    async with nothing_left(), CancelableTaskGroup(Cancelable()) as tasks:
        handle: Any = tasks.create_task(anyio.sleep_forever())
        await anyio.wait_all_tasks_blocked()
        handle.cancel()


@every_cancellation
async def test_a_body_that_fails_does_not_end_its_group_as_if_whole(fail: Callable[[], Any]) -> None:
    went_on = False

    async def work() -> None:
        nonlocal went_on
        async with CancelableTaskGroup(Cancelable()) as tasks:
            tasks.start_soon(anyio.sleep_forever)
            await fail()
        went_on = True

    with anyio.fail_after(CEILING), pytest.raises(BaseException) as caught:  # noqa: PT011
        await work()
    assert isinstance(caught.value, CancelledError | RuntimeError)
    assert not went_on


# Jobs


@pytest.mark.parametrize("abandon", [False, True])
async def test_a_thread_that_raises_a_cancellation_has_failed(abandon: bool) -> None:
    async with nothing_left(), Cancelable() as block:
        with pytest.raises(RuntimeError, match="another's") as caught:
            await block.run_in_thread(raise_cancelled, abandon_on_cancel=abandon)
    assert isinstance(caught.value.__cause__, CancelledError)


@pytest.mark.parametrize("abandon", [False, True])
async def test_what_a_thread_raises_that_is_no_exception_arrives(abandon: bool) -> None:
    for fail, kind in ((raise_unusual, Unusual), (raise_closed, RuntimeError)):
        async with nothing_left(), Cancelable() as block:
            with pytest.raises(kind):
                await block.run_in_thread(fail, abandon_on_cancel=abandon)


@pytest.mark.parametrize("abandon", [False, True])
async def test_a_def_endpoint_that_raises_a_cancellation_is_answered_as_a_failure(abandon: bool) -> None:
    app = FastAPI()

    @app.get("/")
    @with_cancelation(abandon_thread=abandon)
    def report() -> None:
        raise_cancelled()

    async with nothing_left():
        call = await get(app, raise_app_exceptions=False)
    assert (call.status, type(call.exception)) == (500, RuntimeError)


async def test_a_thread_that_asks_whether_it_is_cancelled_has_not_failed() -> None:
    started = anyio.Event()

    def ask() -> None:
        anyio.from_thread.run_sync(started.set)
        try:
            while True:
                anyio.from_thread.check_cancelled()
        finally:
            anyio.from_thread.run_sync(list)

    async with nothing_left():
        with anyio.fail_after(CEILING):
            async with anyio.create_task_group() as tasks:
                block = Cancelable()
                tasks.start_soon(cancel_when, started, block)
                with pytest.raises(ManualCancelation):
                    async with block:
                        await block.run_in_thread(ask)


async def test_a_thread_that_asks_for_a_scope_of_anyio_has_not_failed() -> None:
    started = anyio.Event()

    def ask() -> None:
        anyio.from_thread.run_sync(started.set)
        while True:
            anyio.from_thread.check_cancelled()

    async def cancel_when_started(scope: anyio.CancelScope) -> None:
        await started.wait()
        scope.cancel()

    scope = anyio.CancelScope()
    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(cancel_when_started, scope)
        with anyio.fail_after(CEILING), scope:
            async with Cancelable() as block:
                await block.run_in_thread(ask)
    assert scope.cancelled_caught


async def cancel_when(started: anyio.Event, block: Cancelable) -> None:
    await started.wait()
    block.cancel_nowait()


class FailsWhenPickled:
    def __reduce__(self) -> NoReturn:
        raise_cancelled()


async def test_a_job_that_cannot_be_sent_for_a_cancellation_has_failed() -> None:
    async with Cancelable() as block:
        with pytest.raises(RuntimeError, match="process"):
            await block.run_in_process(print, FailsWhenPickled())


async def test_a_job_that_raises_a_cancellation_has_failed() -> None:
    async with Cancelable() as block:
        with pytest.raises(RuntimeError, match="CancelledError"):
            await block.run_in_process(raise_cancelled)


# The question itself


async def test_a_request_to_end_that_has_not_arrived_belongs_to_what_comes() -> None:
    if sniffio.current_async_library() == "trio":
        pytest.skip("there are scopes only")
    answers: list[bool] = []

    async def work() -> None:
        task: Any = asyncio.current_task()
        task.cancel()
        this_task = ThisTask()
        try:
            await asyncio.sleep(0)
        except CancelledError as exc:
            answers.append(this_task.is_ended_by(exc))
        # It went on in spite of that, and has not been asked again.
        this_task = ThisTask()
        answers.append(this_task.is_ended_by(CancelledError()))
        task.uncancel()

    await asyncio.create_task(work())
    assert answers == [True, False]


async def test_a_scope_around_the_task_ends_it() -> None:
    this_task = ThisTask()
    ended, anothers = (False, False), True
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.sleep_forever()
        except BaseException as exc:
            ended = this_task.is_ended_by(exc), this_task.is_ended_by(BaseExceptionGroup("", [exc, ValueError()]))
            anothers = this_task.is_anothers(exc)
            raise
    assert (ended, anothers) == ((True, True), False)
    assert not this_task.is_ended_by(ValueError())
    assert not this_task.is_ended_by(BaseExceptionGroup("", [Unusual()]))
    assert this_task.is_ended_by(KeyboardInterrupt())


async def test_a_coroutine_that_is_closed_ends() -> None:
    seen: list[bool] = []

    async def work() -> None:
        this_task = ThisTask()
        try:
            await anyio.sleep_forever()
        except GeneratorExit as exc:
            seen.append(this_task.is_ended_by(exc))
            raise

    if sniffio.current_async_library() == "trio":
        pytest.skip("trio does not leave tasks behind")
    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    coroutine: Any = task.get_coro()
    await asyncio.to_thread(coroutine.close)
    assert seen == [True]
    task.cancel()
    with pytest.raises((CancelledError, RuntimeError)):
        await task


async def test_a_call_that_waits_can_be_stopped_by_its_client() -> None:
    """The reference: nothing of all that keeps an ordinary cancellation from coming through."""
    journal: list[str] = []

    async def chunks() -> AsyncIterator[str]:
        try:
            yield "one"
            await anyio.sleep_forever()
        finally:
            journal.append("stopped")

    async with nothing_left(), running(CancelableStreamingResponse(chunks())) as call:
        await call.listened_to()
        await call.hang_up()
    assert journal == ["stopped"]


class InFlight:
    """A request, as a `Shutdown` sees it."""

    pen: Any = None
    is_closed = False

    def __init__(self, exit_kind: type[BaseException]) -> None:
        self.token = CancelationToken()
        self.token.on_cancel(lambda token: self.leave(exit_kind))

    def leave(self, exit_kind: type[BaseException]) -> None:
        raise exit_kind

    def stop(self, cause: Cause) -> None:
        self.token.cancel_because(cause)

    stop_all = stop


@every_exit
async def test_what_ends_the_process_passes_when_all_requests_have_been_stopped(exit_kind: type[BaseException]) -> None:
    limits = Graces(grace=0, background_grace=0, retry_after=1, refuse_new=False)
    shutdown = Shutdown.joined(limits)
    requests = [InFlight(exit_kind) for _ in range(3)]
    for request in requests:
        shutdown.in_flight.add(request)
    try:
        for stop in (shutdown._stop_requests, shutdown._stop_background):
            with pytest.raises(exit_kind):
                stop()
            assert all(request.token.is_cancelled for request in requests)
            for request in requests:
                request.token = InFlight(exit_kind).token
    finally:
        for request in requests:
            shutdown.requests.pop(request)
        shutdown.leave(limits)


@every_cancellation
@pytest.mark.parametrize("doors", [("ours",), ("base", "ours")], ids=lambda doors: "+".join(doors))
async def test_a_background_task_that_fails_is_a_failure(doors: tuple[str, ...], fail: Callable[[], Any]) -> None:
    async def chunks() -> AsyncIterator[str]:
        yield "one"

    response = CancelableStreamingResponse(chunks(), background=BackgroundTask(fail))
    async with nothing_left():
        call = await get(behind(response, *doors), raise_app_exceptions=False)
    assert (call.body, call.is_complete) == (b"one", True)
    assert isinstance(call.exception, RuntimeError)
