from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from contextvars import Context, copy_context
from types import FunctionType, ModuleType
from typing import Annotated, Any
from weakref import ref

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelableStreamingResponse,
    CancelableWebSocket,
    CancelationError,
    CancelationReason,
    CancelationToken,
    DisconnectCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    cancelable_with_timeout,
    current_cancelable,
    with_cancelation,
)
from cancelable_deps.kernel.cancelable import block_of, cancelable_of
from cancelable_deps.request.state import RequestState

from .asgi import Call, running
from .calls import CEILING, checked_socket

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("small_heap")]


class Big:
    """Something that the server keeps for a request."""


class Kept:
    """What has been copied of a request's context, at several points of its work."""

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self.blocks: list[Cancelable] = []

    def copy(self) -> None:
        self.contexts.append(copy_context())
        block = current_cancelable()
        assert block is not None
        self.blocks.append(block)


# The loop, the backend's task and what Python itself has are no part of a request.
_SHARED = (ModuleType, type, FunctionType, asyncio.AbstractEventLoop)


def reachable(root: object) -> list[Any]:
    """Everything that ``root`` keeps alive, short of what all requests share."""
    found: dict[int, Any] = {}
    todo: list[Any] = [root]
    while todo:
        one = todo.pop()
        if id(one) in found or isinstance(one, _SHARED) or type(one).__name__ in ("AsyncioLoop", "TrioLoop"):
            continue
        found[id(one)] = one
        todo.extend(gc.get_referents(one))
    return list(found.values())


def app_of(door: str, kept: Kept) -> FastAPI:
    if door == "generator":
        pytest.importorskip("fastapi.sse", reason="generator endpoints came with FastAPI 0.135")
    app = FastAPI()
    if door.startswith("middleware"):
        timeout = 100 if door.endswith("timeout") else None
        app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)

    async def work() -> None:
        kept.copy()
        await anyio.sleep(0.02)
        kept.copy()

    async def by_handle(cancel: RequestCancelable) -> None:
        async with cancel:
            await work()

    async def by_handle_with_timeout(cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(100))]) -> None:
        cancel.on_cancel(lambda _: None)
        async with cancel:
            await work()

    async def by_group(get_task_group: RequestTaskGroup) -> None:
        async with get_task_group() as tasks:
            tasks.start_soon(work)

    async def by_plain(cancel: RequestCancelable, request: Request) -> None:
        token = CancelationToken()
        token.on_cancel(lambda _: request)
        async with cancel, Cancelable(token=token, timeout=100) as inner:
            inner.on_progress(lambda message, metadata: request)
            inner.on_cancel(lambda _: request)
            await work()

    async def by_condition(cancel: RequestCancelable, request: Request) -> None:
        async with cancel, Cancelable.with_condition(lambda: request is None, 0.001):
            await work()

    def in_a_thread(cancel: RequestCancelable) -> None:
        with cancel:
            kept.copy()
            anyio.from_thread.run(anyio.sleep, 0.02)

    def by_thread_of_the_decorator() -> None:
        anyio.from_thread.run(anyio.sleep, 0.02)
        kept.copy()

    async def items() -> AsyncIterator[int]:
        yield 1
        await work()
        yield 2

    def stream() -> CancelableStreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            yield "1"
            await work()

        return CancelableStreamingResponse(chunks(), timeout=100, gap_timeout=100)

    endpoints: dict[str, Callable[..., Any]] = {
        "decorator": with_cancelation(work),
        "decorator with a timeout": with_cancelation(timeout=100)(work),
        "decorator of a thread": with_cancelation(by_thread_of_the_decorator),
        "handle": by_handle,
        "handle with a timeout": by_handle_with_timeout,
        "group": by_group,
        "plain": by_plain,
        "condition": by_condition,
        "thread": in_a_thread,
        **({"generator": with_cancelation(timeout=100)(items)} if door == "generator" else {}),
        "stream": stream,
    }
    endpoint = endpoints.get(door, work)
    if door == "route":
        router = APIRouter(route_class=CancelableRoute.with_timeout(100))
        router.get("/")(endpoint)
        app.include_router(router)
    else:
        app.get("/", response_model=None)(endpoint)
    return app


DOORS = [
    "middleware",
    "middleware with a timeout",
    "route",
    "decorator",
    "decorator with a timeout",
    "decorator of a thread",
    "handle",
    "handle with a timeout",
    "group",
    "plain",
    "condition",
    "thread",
    "generator",
    "stream",
]


async def settled() -> None:
    """Let go what the backend, and an idle thread, still has of the last step of a request."""
    for _ in range(5):
        await anyio.lowlevel.checkpoint()
    await anyio.to_thread.run_sync(int)
    gc.collect()


async def run_once(app: Any) -> list[Callable[[], object]]:
    """One request; references to its scope and to what the server kept for it."""
    call = Call(app)
    big = Big()
    call.scope["state"] = {"big": big}
    states: list[Any] = []

    def note(found: object) -> None:
        # The block of the first door is known to the contexts, and keeps nothing.
        if isinstance(found, RequestState):
            states.append(ref(found))

    call.scope["cancelable_deps.probe"] = note
    with anyio.fail_after(CEILING):
        await call.run()
    assert call.status == 200
    return [ref(big), *states]


@pytest.mark.parametrize("door", DOORS)
async def test_a_context_that_outlives_its_request_keeps_nothing_of_it(door: str) -> None:
    kept = Kept()
    app = app_of(door, kept)
    await run_once(app)
    kept.__init__()  # type: ignore[misc]
    references = await run_once(app)
    await settled()
    assert [reference() for reference in references] == [None] * len(references)
    assert kept.contexts


@pytest.mark.parametrize("door", DOORS)
async def test_what_a_left_block_keeps_is_a_handful(door: str) -> None:
    kept = Kept()
    app = app_of(door, kept)
    await run_once(app)
    kept.__init__()  # type: ignore[misc]
    await run_once(app)
    await settled()
    for block in kept.blocks:
        found = reachable(block)
        assert not [one for one in found if isinstance(one, (RequestState, Context, Big))]
        assert len(found) < 80, found


@pytest.mark.parametrize("door", ["middleware", "decorator", "handle"])
async def test_a_task_that_the_handler_leaves_behind_keeps_nothing_of_its_request(door: str) -> None:
    kept = Kept()
    app = app_of(door, kept)
    stop = anyio.Event()
    seen: list[Cancelable | None] = []

    async def outlive() -> None:
        with suppress(Exception):
            await stop.wait()
        seen.append(current_cancelable())

    copy = kept.copy

    def copy_and_leave_a_task() -> None:
        copy()
        from cancelable_deps.kernel.loops.current import current_loop

        if len(kept.contexts) == 1:
            current_loop().spawn(outlive, kept.contexts[0])

    kept.copy = copy_and_leave_a_task  # type: ignore[method-assign]
    references = await run_once(app)
    await settled()
    assert [reference() for reference in references] == [None] * len(references)
    stop.set()
    await settled()
    (block,) = seen
    assert block is not None
    assert block is kept.blocks[0]
    assert not block.is_active


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("door", ["middleware", "decorator with a timeout", "handle"])
async def test_a_timer_that_was_cancelled_keeps_nothing_of_its_request(door: str, anyio_backend: object) -> None:
    kept = Kept()
    timers: list[asyncio.TimerHandle] = []
    copy = kept.copy

    def start_a_timer() -> None:
        copy()
        timers.append(asyncio.get_running_loop().call_later(1000, int))
        timers[-1].cancel()

    kept.copy = start_a_timer  # type: ignore[method-assign]
    references = await run_once(app_of(door, kept))
    kept.contexts.clear()
    await settled()
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.parametrize("door", ["decorator", "middleware", "handle", "socket"])
async def test_a_websocket_is_kept_by_no_context(door: str) -> None:
    kept = Kept()
    app: Any = FastAPI()
    scopes: list[Any] = []

    async def talk(websocket: WebSocket) -> None:
        big = Big()
        websocket.scope["state"] = {"big": big}
        scopes.extend([ref(big), ref(websocket)])
        await websocket.accept()
        kept.copy()
        await websocket.close()

    async def by_handle(websocket: WebSocket, cancel: RequestCancelable) -> None:
        async with cancel:
            await talk(websocket)

    async def by_socket(websocket: WebSocket) -> None:
        async with CancelableWebSocket(websocket, timeout=100, idle_timeout=100):
            await talk(websocket)

    endpoints = {"decorator": with_cancelation(timeout=100)(talk), "handle": by_handle, "socket": by_socket}
    app.websocket("/")(endpoints.get(door, talk))
    async with checked_socket(RequestCancelationMiddleware(app) if door == "middleware" else app) as socket:
        pass
    del socket
    await settled()
    assert kept.contexts
    assert [reference() for reference in scopes] == [None, None]
    (block,) = kept.blocks
    block.check()
    assert not block.client_has_left


async def hang_up(app: FastAPI) -> None:
    """One request whose client leaves as soon as somebody listens; nothing of it is kept here."""
    async with running(app) as call:
        await call.listened_to()
        call.hang_up()


async def test_a_left_block_still_says_what_became_of_it() -> None:
    blocks: list[Cancelable] = []
    app = FastAPI()

    @app.get("/")
    @with_cancelation(timeout=100)
    async def work(cancel: RequestCancelable) -> None:
        async with cancel:
            blocks.extend([cancel, cancelable_of(block_of(cancel).parent)])
            await anyio.sleep_forever()

    await hang_up(app)
    await settled()
    for block in blocks:
        assert getattr(block_of(block), "known_request") is None  # noqa: B009
        assert (block.is_cancelled, block.is_active, block.client_has_left) == (True, False, True)
        assert block.reason is CancelationReason.DISCONNECT
        assert block.elapsed > 0
        assert block.deadline < float("inf")
        assert block.extend(1) is False
        assert block.cancel_nowait() is False
        assert "disconnect" in repr(block).lower()
        with pytest.raises(DisconnectCancelation):
            block.check()
        with block.defer_disconnect(), block.shield():
            pass
        with pytest.raises(RuntimeError, match="entered before"):
            async with block:
                pass


async def here(is_true: Callable[[], bool]) -> None:
    """Wait for what no event tells of."""
    with anyio.fail_after(CEILING):
        while not is_true():  # noqa: ASYNC110
            await anyio.sleep(0.001)


@pytest.mark.parametrize("is_deferred", [True, False])
async def test_a_block_that_was_left_before_its_client_left_hears_of_that(is_deferred: bool) -> None:
    early: list[Cancelable] = []
    app = FastAPI()

    @app.get("/")
    @with_cancelation
    async def work(cancel: RequestCancelable) -> None:
        async with cancel:
            early.append(cancel)
        around = current_cancelable()
        assert around is not None
        with around.defer_disconnect() if is_deferred else around.shield():
            await here(lambda: around.client_has_left)
            assert cancel.client_has_left

    await hang_up(app)
    await settled()
    (block,) = early
    assert getattr(block_of(block), "known_request") is None  # noqa: B009
    assert block.client_has_left
    assert not block.is_cancelled


async def test_a_stream_of_a_handle_that_was_left_is_still_stopped_with_its_request() -> None:
    app = FastAPI()
    ended: list[str] = []

    @app.get("/")
    async def stream(cancel: RequestCancelable) -> CancelableStreamingResponse:
        async with cancel:
            pass

        async def chunks() -> AsyncIterator[str]:
            try:
                yield "first"
                await anyio.sleep_forever()
            finally:
                ended.append("stream")

        return CancelableStreamingResponse(chunks(), cancel=cancel)

    await hang_up(app)
    assert ended == ["stream"]


async def test_a_plain_block_lets_go_of_what_it_was_given() -> None:
    class Callable_(Big):
        def __call__(self, *args: object) -> None: ...

    token = CancelationToken()
    given = [Callable_(), Callable_()]
    known = [ref(one) for one in given]
    async with Cancelable(token=token, timeout=100) as block:
        block.on_cancel(given[0])
        block.on_progress(given[1])
        context = copy_context()
        with suppress(CancelationError):
            block.check()
    given.clear()
    await settled()
    assert [reference() for reference in known] == [None, None]
    assert token not in reachable(block)
    assert context not in reachable(block)
