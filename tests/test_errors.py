from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
from fastapi import APIRouter, FastAPI, Request, Response, WebSocket
from starlette.exceptions import HTTPException

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelableStreamingResponse,
    CancelableWebSocket,
    CancelationError,
    CancelationReason,
    ConditionCancelation,
    DisconnectCancelation,
    ManualCancelation,
    ParentCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    SignalCancelation,
    TimeoutCancelation,
    current_cancelable,
    with_cancelation,
)

from .calls import checked_socket, get

CLASSES: list[tuple[CancelationReason, type[CancelationError]]] = [
    (CancelationReason.DISCONNECT, DisconnectCancelation),
    (CancelationReason.MANUAL, ManualCancelation),
    (CancelationReason.TIMEOUT, TimeoutCancelation),
    (CancelationReason.SIGNAL, SignalCancelation),
    (CancelationReason.CONDITION, ConditionCancelation),
    (CancelationReason.PARENT, ParentCancelation),
    (CancelationReason.ERROR, CancelationError),
]
every_class = pytest.mark.parametrize(("reason", "error_class"), CLASSES)


@pytest.fixture
def classes_restored() -> Iterator[None]:
    kept = dict(CancelationError._classes)
    yield
    CancelationError._classes.clear()
    CancelationError._classes.update(kept)


@every_class
def test_each_reason_has_its_class(reason: CancelationReason, error_class: type[CancelationError]) -> None:
    error = CancelationError.for_reason(reason, "why")
    assert type(error) is error_class
    assert error.reason is reason
    assert error.message == "why"
    assert error.status_code == reason.status_code


@every_class
def test_it_is_an_http_exception(reason: CancelationReason, error_class: type[CancelationError]) -> None:
    assert issubclass(error_class, HTTPException)
    assert issubclass(error_class, CancelationError)


@every_class
def test_only_a_timeout_is_a_timeout_error(reason: CancelationReason, error_class: type[CancelationError]) -> None:
    assert issubclass(error_class, TimeoutError) == (reason is CancelationReason.TIMEOUT)


def test_except_timeout_error_catches_it() -> None:
    with pytest.raises(TimeoutError) as caught:
        raise TimeoutCancelation
    assert isinstance(caught.value, HTTPException)


@every_class
def test_only_a_shutdown_says_when_to_come_back(reason: CancelationReason, error_class: type[CancelationError]) -> None:
    headers = dict(error_class().headers or {})
    assert headers == ({"retry-after": "5"} if reason is CancelationReason.SIGNAL else {})


@every_class
def test_without_a_message_the_detail_is_the_reasons_sentence(
    reason: CancelationReason, error_class: type[CancelationError]
) -> None:
    error = error_class()
    assert error.message is None
    assert error.detail == reason.text


@every_class
def test_the_message_is_the_detail_except_where_it_tells_of_the_inside(
    reason: CancelationReason, error_class: type[CancelationError]
) -> None:
    error = error_class("a secret")
    assert error.message == "a secret"
    tells_of_the_inside = reason in {CancelationReason.ERROR, CancelationReason.PARENT}
    assert error.detail == (reason.text if tells_of_the_inside else "a secret")
    assert ("a secret" in str(error)) == (not tells_of_the_inside)


def test_an_empty_message_is_a_message() -> None:
    assert ManualCancelation("").detail == ""


@every_class
@pytest.mark.parametrize("message", [None, "why"])
def test_it_survives_pickle_and_copy(
    reason: CancelationReason, error_class: type[CancelationError], message: str | None
) -> None:
    error = error_class(message)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is error_class
        assert (twin.reason, twin.message) == (reason, message)
        assert (twin.status_code, twin.detail, twin.headers) == (error.status_code, error.detail, error.headers)


@every_class
@pytest.mark.usefixtures("classes_restored")
def test_a_subclass_of_a_user_does_not_take_over(
    reason: CancelationReason, error_class: type[CancelationError]
) -> None:
    subclass = type("Subclass", (error_class,), {"reason": reason})
    assert type(CancelationError.for_reason(reason)) is error_class
    assert subclass is not error_class


@pytest.mark.usefixtures("classes_restored")
def test_a_subclass_without_a_reason_does_not_take_over_either() -> None:
    type("Subclass", (CancelationError,), {})
    assert type(CancelationError.for_reason(CancelationReason.ERROR)) is CancelationError


def telling(path: str, reason: CancelationReason) -> FastAPI:
    """An application in which each way to cancel, and each door, has a message that is for nobody outside."""
    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute)

    async def cancelled() -> None:
        block = current_cancelable()
        assert block is not None
        block.cancel_nowait(reason, SECRET)
        await anyio.sleep_forever()

    async def chunks(cancel: Cancelable | None = None) -> AsyncIterator[str]:
        yield "data: 1\n\n"
        if cancel is not None:
            cancel.cancel_nowait(reason, SECRET)
        await cancelled()

    def stream(cancel: RequestCancelable) -> CancelableStreamingResponse:
        return CancelableStreamingResponse(chunks(cancel), cancel=cancel, media_type="text/event-stream")

    async def nested() -> None:
        async with Cancelable(name=SECRET) as outer, Cancelable() as inner:
            outer.cancel_nowait(reason, SECRET)
            inner.check()
            await anyio.sleep_forever()

    async def raised() -> None:
        raise CancelationError.for_reason(reason, SECRET)

    class Own(CancelationError):
        pass

    async def own() -> None:
        Own.reason = reason
        raise Own(SECRET)

    def predicate() -> bool:
        raise KeyError(SECRET)

    async def condition() -> None:
        async with Cancelable.with_condition(predicate):
            await anyio.sleep_forever()

    async def handle(cancel: RequestCancelable) -> None:
        async with cancel:
            await cancelled()

    app.get("/decorator")(with_cancelation(cancelled))
    app.get("/handle")(handle)
    app.get("/nested")(with_cancelation(nested))
    app.get("/raised")(raised)
    app.get("/own")(own)
    app.get("/condition")(condition)
    app.get("/stream")(stream)
    app.get("/plain")(cancelled)
    router.get("/route")(cancelled)
    app.include_router(router)
    if path == "/plain":
        app.add_middleware(RequestCancelationMiddleware)
    return app


SECRET = "password=hunter2"
PATHS = ["/decorator", "/handle", "/nested", "/raised", "/own", "/condition", "/stream", "/plain", "/route"]
of_the_inside = pytest.mark.parametrize("reason", [CancelationReason.PARENT, CancelationReason.ERROR])


@of_the_inside
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("classes_restored")
@pytest.mark.anyio
async def test_no_response_tells_of_the_inside(path: str, reason: CancelationReason) -> None:
    call = await get(telling(path, reason), path)
    text = call.body.decode()
    told = {reason.text, CancelationReason.PARENT.text, CancelationReason.ERROR.text}
    assert any(sentence in text for sentence in told)
    assert "hunter2" not in text
    assert "hunter2" not in str(call.headers)


@of_the_inside
@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("door", ["decorator", "middleware", "class", "nested"])
@pytest.mark.anyio
async def test_no_close_of_a_socket_tells_of_the_inside(door: str, accepts: bool, reason: CancelationReason) -> None:
    app = FastAPI()

    async def cancelled(websocket: WebSocket) -> None:
        if accepts:
            await websocket.accept()
        block = current_cancelable()
        assert block is not None
        block.cancel_nowait(reason, SECRET)
        await anyio.sleep_forever()

    async def in_a_class(websocket: WebSocket) -> None:
        async with CancelableWebSocket(websocket):
            await cancelled(websocket)

    async def nested(websocket: WebSocket) -> None:
        async with Cancelable(name=SECRET) as outer, CancelableWebSocket(websocket) as socket:
            if accepts:
                await websocket.accept()
            outer.cancel_nowait(reason, SECRET)
            socket.cancelable.check()

    endpoint: Any = {"decorator": with_cancelation(cancelled), "class": in_a_class, "nested": nested}.get(
        door, cancelled
    )
    app.websocket("/")(endpoint)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    async with checked_socket(app, raise_app_exceptions=False) as socket:
        pass
    assert "hunter2" not in str(socket.sent)


@of_the_inside
@pytest.mark.anyio
async def test_the_message_is_there_for_the_application_and_in_the_log(
    reason: CancelationReason, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    app = telling("/plain", reason)
    seen: list[str | None] = []

    @app.exception_handler(CancelationError)
    async def handle(request: Request, error: CancelationError) -> Response:
        seen.append(error.message)
        return Response(status_code=error.status_code)

    await get(app, "/decorator")
    assert seen == [SECRET]
    assert [SECRET in record.getMessage() for record in caplog.records] == [True]
