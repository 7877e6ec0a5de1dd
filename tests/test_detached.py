"""`cancel.detach(work)`: work that goes on without the request that has started it."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import APIRouter, FastAPI, Request

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelationError,
    CancelationReason,
    Detached,
    ManualCancelation,
    RequestCancelable,
    RequestCancelationMiddleware,
    SignalCancelation,
    TimeoutCancelation,
    begin_shutdown,
    cancelation_lifespan,
    current_cancelable,
    with_cancelation,
)
from cancelable_deps.kernel.detached import all_detached
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.operations import Operations, OperationState, RequestOperation
from cancelable_deps.request.state import SCOPE_KEY
from cancelable_deps.testing import CancelableClient, OperationsHub
from tests.calls import CEILING, get, hang_up
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio

DOORS = ["decorator", "middleware", "route", "handle"]


class Work:
    """Work that waits until it may go on, and what has become of it."""

    def __init__(self) -> None:
        self.started = anyio.Event()
        self.gate = anyio.Event()
        self.ended = anyio.Event()
        self.cancelable: Cancelable | None = None
        self.cleaned_up = False

    async def __call__(self, cancel: Cancelable, result: str = "done") -> str:
        self.cancelable = cancel
        assert current_cancelable() is cancel
        self.started.set()
        try:
            await self.gate.wait()
        except BaseException:
            await anyio.lowlevel.checkpoint()
            self.cleaned_up = True
            raise
        finally:
            self.ended.set()
        return result


def application(door: str, handler: Callable[..., Any]) -> FastAPI:
    app = FastAPI()
    match door:
        case "decorator":
            app.get("/")(with_cancelation(handler))
        case "route":
            router = APIRouter(route_class=CancelableRoute)
            router.get("/")(handler)
            app.include_router(router)
        case _:
            app.get("/")(handler)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware)
    return app


async def all_ended() -> None:
    with anyio.fail_after(CEILING):
        await all_detached(current_loop()).wait_empty()


@pytest.mark.parametrize("door", DOORS)
async def test_the_client_leaves_and_the_work_goes_on(door: str) -> None:
    work = Work()

    async def in_block() -> str:
        detached = (current_cancelable() or Cancelable()).detach(work)
        return await detached.result()

    async def in_handle(cancel: RequestCancelable) -> str:
        async with cancel:
            return await in_block()

    async with nothing_left():
        call = await hang_up(application(door, in_handle if door == "handle" else in_block))
        assert call.status == 499
        assert not work.ended.is_set()
        work.gate.set()
        await all_ended()
        assert work.ended.is_set()
        assert not work.cleaned_up


@pytest.mark.parametrize("door", DOORS)
async def test_who_stays_gets_the_result(door: str) -> None:
    async def quick(cancel: Cancelable, a: int, b: int) -> int:
        return a + b

    async def handler(cancel: RequestCancelable) -> int:
        return await cancel.detach(quick, 1, 2).result()

    assert (await get(application(door, handler))).body == b"3"


async def test_a_cleanup_may_detach_what_it_has_to_send() -> None:
    work = Work()
    handles: list[Detached[str]] = []

    @with_cancelation
    async def handler() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancel = current_cancelable()
            assert cancel is not None
            assert cancel.is_cancelled
            handles.append(cancel.detach(work, "sent"))

    app = FastAPI()
    app.get("/")(handler)
    assert (await hang_up(app)).status == 499
    work.gate.set()
    assert await handles[0].result() == "sent"


async def test_a_def_endpoint_detaches_in_its_event_loop() -> None:
    work = Work()
    threads: list[int] = []
    handles: list[Detached[str]] = []

    async def at_home(cancel: Cancelable) -> str:
        threads.append(threading.get_ident())
        return await work(cancel)

    def handler() -> None:
        cancel = current_cancelable()
        assert cancel is not None
        handles.append(cancel.detach(at_home))

    app = FastAPI()
    app.get("/")(with_cancelation(handler))
    assert (await get(app)).status == 200
    work.gate.set()
    assert await handles[0].result() == "done"
    assert threads == [threading.get_ident()]


async def test_it_ends_with_the_thread_of_nobody() -> None:
    def alone() -> None:
        with pytest.raises(RuntimeError, match="needs an event loop"):
            Cancelable().detach(Work())

    thread = threading.Thread(target=alone)
    thread.start()
    await anyio.to_thread.run_sync(thread.join)


@pytest.mark.parametrize("wrong", [lambda: None, print, 1, anyio.sleep])
async def test_what_is_no_work_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(TypeError, match="work "):
        Cancelable().detach(wrong, 1, 2, 3)


async def test_a_failure_is_logged_unless_somebody_waits(caplog: pytest.LogCaptureFixture) -> None:
    gate = anyio.Event()

    async def fails(cancel: Cancelable) -> None:
        await gate.wait()
        raise ValueError("broken")

    alone, awaited = Cancelable().detach(fails), Cancelable().detach(fails, name="awaited")
    errors: list[BaseException] = []

    async def wait() -> None:
        with pytest.raises(ValueError, match="broken") as raised:
            await awaited.result()
        errors.append(raised.value)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        gate.set()
    await all_ended()
    assert [record.getMessage() for record in caplog.records] == ["detached work failed: fails"]
    assert alone.has_ended
    assert isinstance(alone.error, ValueError)
    with pytest.raises(ValueError, match="broken"):
        await alone.result()


async def test_it_is_stopped_by_its_handle(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    work = Work()
    detached = Cancelable().detach(work, name="audit")
    await work.started.wait()
    assert detached.cancel_nowait(message="enough")
    assert not detached.cancel_nowait(CancelationReason.MANUAL)
    with pytest.raises(ManualCancelation, match="enough"):
        await detached.result()
    assert work.cleaned_up
    assert repr(detached) == "<Detached audit (failed)>"
    # Somebody waited for it.
    assert not caplog.records
    forgotten = Cancelable().detach(Work(), name="forgotten")
    forgotten.cancel_nowait()
    await all_ended()
    assert [record.getMessage() for record in caplog.records] == ["detached work was stopped: forgotten (manual)"]


async def test_it_has_a_timeout_of_its_own_and_no_other() -> None:
    work = Work()
    async with Cancelable(timeout=100) as outer:
        assert outer.deadline < 1e9 + anyio.current_time()
        endless, timed = outer.detach(work), outer.detach(Work(), timeout=0.01)
        with pytest.raises(TimeoutCancelation):
            await timed.result()
        assert endless.cancelable.deadline == float("inf")
        endless.cancel_nowait()
    await all_ended()


async def test_who_waits_and_is_stopped_leaves_it_running() -> None:
    work = Work()
    detached = Cancelable().detach(work)
    with anyio.move_on_after(0.01):
        await detached.result()
    assert not detached.has_ended
    work.gate.set()
    assert await detached.result() == "done"


async def test_it_keeps_nothing_of_its_request() -> None:
    work = Work()
    requests: list[weakref.ref[Any]] = []
    handles: list[Any] = []

    async def handler(request: Request, cancel: RequestCancelable) -> None:
        requests.extend([weakref.ref(request), weakref.ref(request.scope[SCOPE_KEY].state)])
        async with cancel:
            handles.append(weakref.ref(cancel.detach(work)))

    call = await get(application("middleware", handler))
    assert call.status == 200
    await work.started.wait()
    del call
    gc.collect()
    assert [reference() for reference in requests] == [None, None]
    # It lives while it runs, though nobody has its handle.
    assert handles[0]() is not None
    work.gate.set()
    await all_ended()
    gc.collect()
    assert handles[0]() is None


async def test_anothers_cancellation_is_its_failure(caplog: pytest.LogCaptureFixture) -> None:
    if current_loop().is_trio:
        pytest.skip("no task of trio ends with another's cancellation")

    async def work(cancel: Cancelable) -> None:
        other = asyncio.ensure_future(asyncio.sleep(100))
        other.cancel()
        await other

    detached = Cancelable().detach(work)
    with pytest.raises(RuntimeError, match="CancelledError"):
        await detached.result()
    Cancelable().detach(work, name="alone")
    await all_ended()
    assert [record.getMessage() for record in caplog.records] == ["detached work failed: alone"]


async def test_each_who_waits_gets_an_error_of_its_own_with_the_frames_of_the_work() -> None:
    async def fails(cancel: Cancelable) -> None:
        raise ValueError("broken")

    detached = Cancelable().detach(fails)
    seen: list[BaseException] = []
    for _ in range(3):
        with pytest.raises(ValueError, match="broken") as raised:
            await detached.result()
        seen.append(raised.value)
        assert [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)][-1] == "fails"
    assert len({*map(id, seen)}) == 3
    assert len({len(traceback.extract_tb(error.__traceback__)) for error in seen}) == 1


async def test_who_leaves_when_it_fails_has_it_logged(caplog: pytest.LogCaptureFixture) -> None:
    gate = anyio.Event()

    async def fails(cancel: Cancelable) -> None:
        await gate.wait()
        scope.cancel()
        raise ValueError("broken")

    detached = Cancelable().detach(fails)
    with anyio.CancelScope() as scope:
        gate.set()
        await detached.result()
    await all_ended()
    assert [record.getMessage() for record in caplog.records] == ["detached work failed: fails"]


async def test_work_of_a_request_that_is_gone_is_listed_too() -> None:
    left: list[Cancelable] = []

    async def handler(cancel: RequestCancelable) -> None:
        async with cancel:
            left.append(cancel)

    async with Operations(background_grace=0) as operations:
        assert (await get(application("middleware", handler))).status == 200
        gc.collect()
        detached = left[0].detach(Work())
        assert (await operations.list(kind="detached")).total == 1
        detached.cancel_nowait()
        await all_ended()


async def test_work_that_is_detached_in_a_shield_does_not_keep_the_block() -> None:
    work = Work()
    blocks: list[weakref.ref[Any]] = []

    async def start() -> None:
        async with Cancelable() as cancel:
            with cancel.shield():
                cancel.detach(work)
            blocks.append(weakref.ref(cancel._block))

    await start()
    await work.started.wait()
    gc.collect()
    assert blocks[0]() is None
    work.gate.set()
    await all_ended()


# The shutdown.


def server(work: Work, grace: float = 0, background_grace: float = 0) -> FastAPI:
    app = FastAPI(lifespan=cancelation_lifespan(grace=grace, background_grace=background_grace))
    handles: list[Detached[str]] = []
    app.state.handles = handles

    @app.get("/")
    @with_cancelation
    async def handler() -> None:
        cancel = current_cancelable()
        assert cancel is not None
        handles.append(cancel.detach(work))

    return app


@pytest.mark.parametrize("by_signal", [False, True])
async def test_a_server_that_ends_waits_for_it(by_signal: bool) -> None:
    work = Work()

    async def let_go() -> None:
        await work.started.wait()
        await anyio.sleep(0.05)
        work.gate.set()

    app = server(work, grace=CEILING)
    with anyio.fail_after(CEILING):
        async with nothing_left(), anyio.create_task_group() as tasks, app.router.lifespan_context(app):
            await get(app)
            if by_signal:
                begin_shutdown()
            tasks.start_soon(let_go)
    assert work.ended.is_set()
    assert not work.cleaned_up


async def test_it_is_stopped_when_the_graces_are_over() -> None:
    work = Work()
    app = server(work, grace=0.01, background_grace=0.01)
    with anyio.fail_after(CEILING):
        async with nothing_left(), app.router.lifespan_context(app):
            await get(app)
    assert work.cleaned_up
    with pytest.raises(SignalCancelation):
        await app.state.handles[0].result()


async def test_what_is_detached_after_that_is_stopped_at_once() -> None:
    first, late = Work(), Work()
    app = server(first)
    handles: list[Detached[str]] = []
    with anyio.fail_after(CEILING):
        async with app.router.lifespan_context(app):
            begin_shutdown()
            await anyio.lowlevel.checkpoint()
            first_handle = Cancelable().detach(first)
            with pytest.raises(CancelationError):
                await first_handle.result()
            handles.append(Cancelable().detach(late))
    with pytest.raises(SignalCancelation):
        await handles[0].result()


# Operations.


async def test_operations_list_it_and_stop_it() -> None:
    work = Work()
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())

    @app.get("/")
    async def handler(operation: RequestOperation, cancel: RequestCancelable) -> None:
        operation.claim("ann")
        async with cancel:
            cancel.detach(work, name="n" * 300)

    async with CancelableClient(app) as client:
        await client.get("/")
        await work.started.wait()
        [found] = (await operations.list(kind="detached")).items
        assert (found.kind, found.name, found.owner, found.state) == ("detached", "n" * 256, "ann", "running")
        assert (await operations.cancel(found.id, owner="bob")).outcome == "unknown"
        assert (await operations.cancel(found.id, owner="ann", message="enough")).outcome == "cancelled"
        assert work.cleaned_up
        ended = await operations.get(found.id)
        assert ended is not None
        assert (ended.state, ended.message) == (OperationState.CANCELLED, "enough")
        assert (await operations.list()).total == 0


@pytest.mark.parametrize(("raises", "state"), [(False, "finished"), (True, "failed")])
async def test_operations_know_how_it_has_ended(raises: bool, state: str) -> None:
    gate = anyio.Event()

    async def work(cancel: Cancelable) -> None:
        await gate.wait()
        if raises:
            raise ValueError

    async with Operations() as operations:
        detached = Cancelable().detach(work)
        [found] = (await operations.list()).items
        gate.set()
        await detached._ended.wait()
        await all_ended()
        ended = await operations.get(found.id)
        assert ended is not None
        assert ended.state == state


async def test_of_several_operations_in_one_loop_one_lists_it() -> None:
    hub = OperationsHub()
    async with hub.operations(background_grace=0) as a, hub.operations(background_grace=0) as b:
        detached = Cancelable().detach(Work())
        assert [each.worker.local.everything() != [] for each in (a, b)] == [True, False]
        detached.cancel_nowait()
        await all_ended()
