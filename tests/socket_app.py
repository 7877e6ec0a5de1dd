"""The WebSockets behind the real servers: the same endpoints under every door. Journal and gates are `server_app`'s.

A path is `<door>/<endpoint>`; the header `x-id` names the WebSocket in the journal, `?reason=` is why it stops itself.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import APIRouter, FastAPI, WebSocket, WebSocketDisconnect
from starlette.middleware import Middleware

from cancelable_deps import (
    CancelableWebSocket,
    CancelationReason,
    CancellationEvent,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    current_cancelable,
    with_cancelation,
)
from tests.server_app import gates, journal
from tests.server_app import root as http
from tests.server_workers import LIMIT


def key_of(websocket: WebSocket) -> str:
    return websocket.headers.get("x-id", "")


def reason_of(websocket: WebSocket) -> CancelationReason:
    return CancelationReason[websocket.query_params.get("reason", "MANUAL")]


async def stop(websocket: WebSocket) -> None:
    cancel = current_cancelable()
    assert cancel is not None
    await cancel.cancel(reason_of(websocket), "Enough of it")
    await anyio.sleep_forever()


@asynccontextmanager
async def journaled(websocket: WebSocket) -> AsyncIterator[None]:
    key = key_of(websocket)
    cancel = current_cancelable()
    journal.add(key, "started")
    try:
        yield
    except anyio.get_cancelled_exc_class():
        await anyio.sleep(0.01)
        reason = None if cancel is None else cancel.reason
        journal.add(key, f"cancelled:{reason.name if reason else None}")
        raise
    except WebSocketDisconnect as exc:
        journal.add(key, f"disconnect:{exc.code}")
        raise
    finally:
        journal.add(key, "ended")


async def busy(websocket: WebSocket) -> None:
    await websocket.accept()
    async with journaled(websocket):
        await anyio.sleep_forever()


async def before_accept(websocket: WebSocket) -> None:
    # To take the handshake's first message is what makes the server tell of the client's leaving.
    await websocket.receive()
    async with journaled(websocket):
        await anyio.sleep_forever()


async def refuse(websocket: WebSocket) -> None:
    await stop(websocket)


async def close(websocket: WebSocket) -> None:
    await websocket.accept()
    await stop(websocket)


async def echo(websocket: WebSocket) -> None:
    """Echo each message from the moment at which the gate is open."""
    await websocket.accept()
    async with journaled(websocket):
        await gates[key_of(websocket)].wait()
        async for text in websocket.iter_text():
            await websocket.send_text(text)


async def echo_after_work(websocket: WebSocket) -> None:
    await websocket.accept()
    async with journaled(websocket):
        while True:
            text = await websocket.receive_text()
            await anyio.sleep(0.02)
            await websocket.send_text(text)


async def drain(websocket: WebSocket) -> None:
    """Take no message before the gate is open, then all."""
    await websocket.accept()
    async with journaled(websocket):
        await gates[key_of(websocket)].wait()
        async for _ in websocket.iter_text():
            pass


async def wait(websocket: WebSocket) -> None:
    """As most handlers are written."""
    await websocket.accept()
    try:
        async with journaled(websocket):
            await websocket.receive_text()
    except WebSocketDisconnect:
        await anyio.sleep(0.01)
        journal.add(key_of(websocket), "cleaned")


ENDPOINTS: list[Callable[[WebSocket], Awaitable[None]]] = [
    busy,
    before_accept,
    refuse,
    close,
    echo,
    echo_after_work,
    drain,
    wait,
]


def add_endpoints(router: APIRouter | FastAPI, wrap: Callable[[Any], Any]) -> None:
    for endpoint in ENDPOINTS:
        router.websocket(f"/{endpoint.__name__.replace('_', '-')}")(wrap(endpoint))


def in_block(endpoint: Any) -> Any:
    async def run(websocket: WebSocket, cancel: RequestCancelable) -> None:
        async with cancel:
            await endpoint(websocket)

    return run


def in_group(endpoint: Any) -> Any:
    async def run(websocket: WebSocket, get_task_group: RequestTaskGroup) -> None:
        async with get_task_group() as tg:
            tg.start_soon(endpoint, websocket)

    return run


def as_it_is(endpoint: Any) -> Any:
    return endpoint


def build() -> FastAPI:
    app = FastAPI()
    doors: dict[str, Callable[[Any], Any]] = {"deco": with_cancelation, "dep": in_block, "tg": in_group}
    for name, wrap in doors.items():
        router = APIRouter(prefix=f"/{name}")
        add_endpoints(router, wrap)
        app.include_router(router)
    covered = FastAPI(middleware=[Middleware(RequestCancelationMiddleware, default_timeout=LIMIT)])
    add_endpoints(covered, as_it_is)
    app.mount("/mw", covered)
    return app


app = build()


@app.websocket("/timed")
@with_cancelation(timeout=LIMIT)
async def timed(websocket: WebSocket) -> None:
    await websocket.accept()
    await anyio.sleep_forever()


@app.websocket("/idle")
async def idle(websocket: WebSocket, cancel: RequestCancelable) -> None:
    async with CancelableWebSocket(websocket, cancel, idle_timeout=LIMIT) as socket:
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text(text)


@app.websocket("/event")
async def event(websocket: WebSocket, event: CancellationEvent) -> None:
    await websocket.accept()
    journal.add(key_of(websocket), "started")
    journal.add(key_of(websocket), f"event:{(await event.wait()).name}")


@app.get("/readers")
async def readers() -> int:
    """How many tasks of ours there are."""
    return sum(task.name is not None and "ReadAhead" in task.name for task in anyio.get_running_tasks())


app.mount("/", http)
