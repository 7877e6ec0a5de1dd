"""The decorator inside of the middleware or route class, where it joins the first door until something happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelationError,
    CancelationReason,
    CancelationToken,
    RequestCancelationMiddleware,
    configure,
    current_cancelable,
    with_cancelation,
)
from cancelable_deps.kernel.cancelable import block_of
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.request.first_door import JoinedBlock
from cancelable_deps.request.state import RequestState

from .asgi import Call, as_by_a_server
from .calls import CEILING

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("door", ["middleware", "route class"])]


def app_of(door: str, handler: Callable[..., Any], timeout: float | None = None) -> FastAPI:
    app = FastAPI()
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)
        app.get("/")(with_cancelation(handler))
    else:
        router = APIRouter(route_class=CancelableRoute.with_timeout(timeout))
        router.get("/")(with_cancelation(handler))
        app.include_router(router)
    return app


def block() -> Cancelable:
    found = current_cancelable()
    assert found is not None
    return found


def joins() -> bool:
    """Whether the decorator has joined the first door; also where scopes cannot be entered later, as on trio."""
    return isinstance(block_of(block()), JoinedBlock) or current_loop().task_without_scope is None


async def served(app: FastAPI) -> tuple[Call, list[RequestState]]:
    call = Call(app)
    made: list[Any] = []
    call.scope["cancelable_deps.probe"] = made.append
    with anyio.fail_after(CEILING):
        await as_by_a_server(call)
    return call, [one for one in made if isinstance(one, RequestState)]


@pytest.fixture
def late() -> Iterator[None]:
    """Let no request of the test grow old, however busy the machine is."""
    configure(listen_after=10)
    yield
    configure(listen_after=0.005)


@pytest.mark.usefixtures("late")
async def test_a_request_that_nothing_happens_to_has_no_state(door: str) -> None:
    seen: list[Cancelable] = []

    async def handler() -> bool:
        seen.append(block())
        assert block().is_active
        await anyio.lowlevel.checkpoint()
        return joins()

    call, states = await served(app_of(door, handler))
    assert (call.status, call.body) == (200, b"true")
    assert states == [] or current_loop().task_without_scope is None
    assert not seen[0].is_active
    assert not seen[0].is_cancelled
    assert not seen[0].cancel_nowait()


async def test_an_exception_of_the_handler_passes(door: str) -> None:
    async def handler() -> None:
        assert joins()
        raise HTTPException(418)

    call, _ = await served(app_of(door, handler))
    assert call.status == 418


async def test_a_hang_up_stops_the_handler(door: str) -> None:
    reasons: list[CancelationReason | None] = []

    async def handler() -> None:
        assert joins()
        try:
            await anyio.sleep_forever()
        finally:
            reasons.append(block().reason)

    call = Call(app_of(door, handler))
    with anyio.fail_after(CEILING):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(as_by_a_server, call)
            await call.listened_to()
            call.hang_up()
    assert call.status == 499
    assert reasons == [CancelationReason.DISCONNECT]


async def test_the_default_timeout_stops_the_handler(door: str) -> None:
    async def handler() -> None:
        assert joins()
        await anyio.sleep_forever()

    call, _ = await served(app_of(door, handler, 0.01))
    assert call.status == 504


@pytest.mark.parametrize("in_thread", [False, True])
async def test_the_block_is_cancelled_through_its_face(door: str, in_thread: bool) -> None:
    async def handler() -> None:
        assert joins()
        cancel = partial(block().cancel_nowait, CancelationReason.MANUAL, "enough")
        assert await anyio.to_thread.run_sync(cancel) if in_thread else cancel()
        assert block().reason is CancelationReason.MANUAL
        await anyio.sleep_forever()

    call, _ = await served(app_of(door, handler))
    assert call.status == 499


async def test_a_token_makes_an_ordinary_block_of_it(door: str) -> None:
    async def handler() -> bool:
        joined, token = joins(), block().token
        assert not isinstance(block_of(block()), JoinedBlock)
        return joined and not token.is_cancelled

    call, _ = await served(app_of(door, handler))
    assert (call.status, call.body) == (200, b"true")


async def test_a_block_inside_is_stopped_alone(door: str) -> None:
    async def handler() -> bool:
        assert joins()
        with pytest.raises(CancelationError, match="Timed out"):
            async with Cancelable.with_timeout(0.001):
                await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        return block().is_cancelled

    call, _ = await served(app_of(door, handler))
    assert (call.status, call.body) == (200, b"false")


async def test_after_a_token_was_made_there_is_an_ordinary_block(door: str) -> None:
    """A middleware or dependency further out has asked for it."""

    async def handler(token: Annotated[Any, Depends(token_of_the_door)]) -> bool:
        assert not isinstance(block_of(block()), JoinedBlock)
        return bool(token.is_cancelled)

    call, _ = await served(app_of(door, handler))
    assert (call.status, call.body) == (200, b"false")


async def token_of_the_door() -> CancelationToken:
    return block().token
