from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from functools import partial
from itertools import permutations
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI, Request
from starlette.applications import Starlette
from starlette.responses import StreamingResponse

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelationReason,
    CancellationEvent,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    SignalCancelation,
    begin_shutdown,
    cancelation_lifespan,
    create_request_task_group,
    shutdown_token,
    with_cancelation,
)
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.kernel.settings import settings
from cancelable_deps.request.shutdown import Shutdown, running_shutdown
from cancelable_deps.testing import CancelableClient
from tests.calls import CEILING, get, running
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio

DOORS = ("mw", "route", "deco", "dep", "tg")
SOON = 0.05


class Work:
    """Handlers that wait, under every door."""

    def __init__(self, lifespan: Any) -> None:
        self.started = anyio.Event()
        self.gate = anyio.Event()
        self.cleaned_up: list[str] = []
        self.statuses: list[int | None] = []
        self.app = FastAPI(lifespan=lifespan)
        self._covered = FastAPI()
        self._covered.add_middleware(RequestCancelationMiddleware)
        self.app.mount("/mw", self._covered)
        router = APIRouter(route_class=CancelableRoute)
        self._covered.get("/")(self.plain)
        self._covered.get("/background")(self.background)
        self._covered.get("/stream")(self.stream)
        router.get("/route/")(self.plain)
        router.get("/route/background")(self.background)
        self.app.include_router(router)
        self.app.get("/deco/")(with_cancelation(self.plain))
        self.app.get("/dep/")(self.dep)
        self.app.get("/tg/")(self.tg)
        self.app.get("/event/")(self.event)

    async def _wait(self, what: str) -> None:
        self.started.set()
        try:
            await self.gate.wait()
        finally:
            await anyio.sleep(0.01)
            self.cleaned_up.append(what)

    async def ask(self, path: str) -> None:
        self.statuses.append((await get(self.app, path)).status)

    async def plain(self) -> str:
        await self._wait("handler")
        return "done"

    async def dep(self, cancel: RequestCancelable) -> str:
        async with cancel:
            await self._wait("handler")
        return "done"

    async def tg(self, get_task_group: RequestTaskGroup) -> str:
        async with get_task_group() as tg:
            tg.start_soon(self._wait, "handler")
        return "done"

    async def event(self, event: CancellationEvent) -> str:
        self.started.set()
        return (await event.wait()).name

    async def background(self, tasks: BackgroundTasks) -> str:
        tasks.add_task(self._wait, "background")
        return "done"

    async def stream(self) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"first"
            try:
                await self.gate.wait()
            finally:
                self.cleaned_up.append("stream")

        return StreamingResponse(chunks())


@asynccontextmanager
async def served(app: Any) -> AsyncGenerator[Any]:
    """The application between startup and shutdown, and nothing left of it after that."""
    with anyio.fail_after(CEILING):
        async with nothing_left(), app.router.lifespan_context(app) as state:
            yield state
        assert current_loop().shutdown is None


async def settled(condition: Any) -> None:
    with anyio.fail_after(CEILING):
        while not condition():  # noqa: ASYNC110 - a registry that nobody but the tests waits for
            await anyio.sleep(0.001)


async def armed(count: int = 1) -> None:
    """Wait until so many requests are known to be in flight."""
    await settled(lambda: len(running_shutdown().requests) == count)


@pytest.mark.parametrize("door", DOORS)
async def test_a_request_that_ends_within_the_grace_is_answered(door: str) -> None:
    work = Work(cancelation_lifespan(grace=CEILING))
    async with served(work.app):
        async with running(work.app, f"/{door}/") as call:
            await work.started.wait()
            assert begin_shutdown()
            work.gate.set()
        assert (call.status, call.json()) == (200, "done")


@pytest.mark.parametrize("door", DOORS)
async def test_one_that_needs_longer_is_told_to_come_back(door: str) -> None:
    work = Work(cancelation_lifespan(grace=SOON, retry_after=6.5))
    async with served(work.app):
        async with running(work.app, f"/{door}/") as call:
            await armed()
            begin_shutdown()
        assert (call.status, call.json()) == (503, {"detail": "The server is shutting down"})
        assert call.headers["retry-after"] == "7"
        assert work.cleaned_up == ["handler"]


@pytest.mark.parametrize("door", DOORS)
async def test_one_that_is_too_young_to_be_known_is_found(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # So long that the machine may be busy.
    monkeypatch.setattr(settings, "listen_after", 0.2)
    work = Work(cancelation_lifespan(grace=0))
    async with served(work.app):
        async with running(work.app, f"/{door}/") as call:
            await work.started.wait()
            assert not running_shutdown().requests
            begin_shutdown()
        assert call.status == 503


async def test_an_event_is_set_when_the_grace_is_over() -> None:
    work = Work(cancelation_lifespan(grace=SOON))
    async with served(work.app):
        async with running(work.app, "/event/") as call:
            await armed()
            begin_shutdown()
        assert (call.status, call.json()) == (200, "SIGNAL")


async def test_without_end_of_grace_nothing_is_cancelled() -> None:
    work = Work(cancelation_lifespan(grace=math.inf))
    async with served(work.app):
        async with running(work.app, "/mw/") as call:
            await armed()
            begin_shutdown()
            await anyio.sleep(SOON)
            work.gate.set()
        assert call.status == 200


@pytest.mark.parametrize("door", DOORS)
async def test_new_requests_are_answered_during_the_grace(door: str) -> None:
    work = Work(cancelation_lifespan(grace=CEILING))
    work.gate.set()
    async with served(work.app):
        begin_shutdown()
        assert (await get(work.app, f"/{door}/")).status == 200


@pytest.mark.parametrize("door", DOORS)
async def test_new_requests_are_refused_if_so_configured(door: str) -> None:
    work = Work(cancelation_lifespan(grace=CEILING, retry_after=3, refuse_new=True))
    async with served(work.app):
        async with running(work.app, f"/{door}/") as earlier:
            await armed()
            begin_shutdown()
            later = await get(work.app, f"/{door}/")
            assert (later.status, later.headers["retry-after"]) == (503, "3")
            work.gate.set()
        assert earlier.status == 200
        assert work.cleaned_up == ["handler"]


@pytest.mark.parametrize("door", DOORS)
async def test_after_the_grace_all_are_refused(door: str) -> None:
    work = Work(cancelation_lifespan(grace=0))
    async with served(work.app):
        begin_shutdown()
        await settled(lambda: running_shutdown().refuses)
        assert (await get(work.app, f"/{door}/")).status == 503
        assert not work.started.is_set()


async def test_a_stream_is_cut() -> None:
    work = Work(cancelation_lifespan(grace=SOON))
    async with served(work.app):
        async with running(work.app, "/mw/stream") as call:
            await armed()
            begin_shutdown()
        assert (call.status, call.body, call.is_complete) == (200, b"first", False)
        assert work.cleaned_up == ["stream"]


@pytest.mark.parametrize("door", ["mw", "route"])
async def test_background_tasks_outlive_the_grace(door: str) -> None:
    work = Work(cancelation_lifespan(grace=0, background_grace=CEILING))
    async with served(work.app):
        async with running(work.app, f"/{door}/background") as call:
            await armed()
            begin_shutdown()
            await settled(lambda: running_shutdown().refuses)
            await anyio.sleep(SOON)
            assert not work.cleaned_up
            work.gate.set()
        assert call.status == 200
        assert work.cleaned_up == ["background"]


@pytest.mark.parametrize("door", ["mw", "route"])
async def test_background_tasks_are_cancelled_after_their_own_grace(
    door: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    work = Work(cancelation_lifespan(grace=0, background_grace=SOON))
    async with served(work.app):
        async with running(work.app, f"/{door}/background") as call:
            await armed()
            begin_shutdown()
        assert call.status == 200
        assert work.cleaned_up == ["background"]
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert caplog.messages[1].endswith(": signal")


async def test_background_tasks_that_are_too_young_to_be_known_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # So long that the machine may be busy.
    monkeypatch.setattr(settings, "listen_after", 0.5)
    work = Work(cancelation_lifespan(grace=0, background_grace=0))
    async with served(work.app):
        async with running(work.app, "/mw/background") as call:
            await work.started.wait()
            assert not running_shutdown().requests
            begin_shutdown()
        assert call.status == 200
        assert work.cleaned_up == ["background"]


async def test_background_tasks_under_several_doors_clean_up_undisturbed() -> None:
    work = Work(None)
    router = APIRouter(route_class=CancelableRoute)
    router.get("/")(work.background)
    app = FastAPI(lifespan=cancelation_lifespan(grace=0, background_grace=SOON))
    app.add_middleware(RequestCancelationMiddleware)
    app.add_middleware(RequestCancelationMiddleware)
    app.include_router(router)
    async with served(app):
        async with running(app) as call:
            await armed()
            begin_shutdown()
        assert call.status == 200
        assert work.cleaned_up == ["background"]


async def test_a_block_in_a_background_task_is_not_refused_as_a_new_request() -> None:
    app = FastAPI(lifespan=cancelation_lifespan(grace=CEILING, background_grace=CEILING, refuse_new=True))
    app.add_middleware(RequestCancelationMiddleware)
    done = anyio.Event()

    async def together(request: Request) -> None:
        await shutdown_token().wait()
        async with create_request_task_group(request) as tg:
            tg.start_soon(anyio.sleep, 0.01)
        done.set()

    @app.get("/")
    async def handler(request: Request, tasks: BackgroundTasks) -> None:
        tasks.add_task(together, request)

    async with served(app):
        async with running(app) as call:
            await armed()
            begin_shutdown()
        assert call.status == 200
        assert done.is_set()


async def test_a_fast_request_never_meets_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(cancelation_lifespan())
    work.gate.set()
    async with served(work.app):
        monkeypatch.setattr(running_shutdown().in_flight, "add", None)
        for door in DOORS:
            assert (await get(work.app, f"/{door}/")).status == 200


@pytest.mark.parametrize("door", DOORS)
async def test_a_request_that_is_over_has_left_the_registry(door: str) -> None:
    work = Work(cancelation_lifespan())
    async with served(work.app):
        async with running(work.app, f"/{door}/"):
            await armed()
            work.gate.set()
        assert not running_shutdown().requests


async def test_between_two_blocks_a_request_is_still_known() -> None:
    gate, between = anyio.Event(), anyio.Event()
    app = FastAPI(lifespan=cancelation_lifespan(grace=SOON))

    @app.get("/")
    async def handler(first: RequestCancelable, second: RequestCancelable) -> None:
        async with first:
            await armed()
        between.set()
        await gate.wait()
        async with second:
            await anyio.sleep_forever()

    async with served(app):
        async with running(app) as call:
            await between.wait()
            gate.set()
            await armed()
            begin_shutdown()
        assert call.status == 503


async def test_the_token_tells_at_once() -> None:
    app = FastAPI(lifespan=cancelation_lifespan(grace=CEILING))
    told: list[object] = []
    async with served(app):

        async def wait() -> None:
            told.append(await shutdown_token().wait())

        async def work() -> None:
            try:
                async with Cancelable(token=shutdown_token()):
                    await anyio.sleep_forever()
            except SignalCancelation as exc:
                told.append(exc.reason)

        async with anyio.create_task_group() as tg:
            tg.start_soon(wait)
            tg.start_soon(work)
            await anyio.wait_all_tasks_blocked()
            assert shutdown_token().reason is None
            assert begin_shutdown("by order")
            assert not begin_shutdown()
        assert told == [CancelationReason.SIGNAL] * 2
        assert shutdown_token().message == "by order"


async def test_the_token_can_be_cancelled_from_a_thread() -> None:
    work = Work(cancelation_lifespan(grace=0))
    async with served(work.app):
        async with running(work.app, "/mw/") as call:
            await armed()
            await anyio.to_thread.run_sync(shutdown_token().cancel_nowait, CancelationReason.SIGNAL)
        assert call.status == 503


async def test_a_def_endpoint_may_ask_and_order() -> None:
    app = FastAPI(lifespan=cancelation_lifespan())

    @app.get("/")
    def stop() -> list[bool]:
        return [shutdown_token().is_cancelled, begin_shutdown(), begin_shutdown(), shutdown_token().is_cancelled]

    async with nothing_left(), CancelableClient(app) as client:
        assert (await client.get("/")).json() == [False, True, False, True]


async def test_without_a_lifespan_the_token_is_there_and_a_shutdown_is_not() -> None:
    assert not shutdown_token().is_cancelled
    with pytest.raises(RuntimeError, match=r"FastAPI\(lifespan=cancelation_lifespan"):
        begin_shutdown()
    work = Work(None)
    work.gate.set()
    assert (await get(work.app, "/mw/")).status == 200


async def test_a_token_that_was_cancelled_without_a_lifespan_is_not_that_of_the_next() -> None:
    assert shutdown_token().cancel_nowait(CancelationReason.SIGNAL)
    assert shutdown_token().is_cancelled
    async with served(Work(cancelation_lifespan()).app):
        assert not shutdown_token().is_cancelled


async def test_an_own_lifespan_gives_its_state_and_ends_after_the_requests() -> None:
    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        assert app is work.app
        assert not shutdown_token().is_cancelled
        yield {"pool": "open"}
        assert shutdown_token().reason is CancelationReason.SIGNAL
        work.cleaned_up.append("own lifespan")

    work = Work(cancelation_lifespan(own, grace=5 * SOON))
    async with anyio.create_task_group() as tg, served(work.app) as state:
        assert state == {"pool": "open"}
        tg.start_soon(work.ask, "/mw/")
        await armed()
    assert work.statuses == [503]
    assert work.cleaned_up == ["handler", "own lifespan"]


async def test_the_end_of_a_lifespan_waits_for_requests_that_are_too_young_to_be_known() -> None:
    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[None]:
        yield
        work.cleaned_up.append("own lifespan")

    work = Work(cancelation_lifespan(own, grace=0))
    with anyio.fail_after(CEILING):
        async with anyio.create_task_group() as tg, work.app.router.lifespan_context(work.app):
            tg.start_soon(work.ask, "/mw/")
            await work.started.wait()
            # From a thread that the event loop has not heard of yet.
            thread = threading.Thread(target=shutdown_token().cancel_nowait, args=[CancelationReason.SIGNAL])
            thread.start()
            thread.join()
    assert work.statuses == [503]
    assert work.cleaned_up == ["handler", "own lifespan"]


async def test_a_lifespan_that_is_cancelled_waits_for_nobody() -> None:
    work = Work(cancelation_lifespan(grace=math.inf))
    async with running(work.app, "/mw/"):
        with anyio.CancelScope() as scope:
            async with work.app.router.lifespan_context(work.app):
                await work.started.wait()
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert current_loop().shutdown is None
        work.gate.set()


async def test_a_lifespan_that_fails_leaves_nothing() -> None:
    @asynccontextmanager
    async def broken(app: FastAPI) -> AsyncIterator[None]:
        raise ConnectionError("no database")
        yield

    with handled() as received:
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(ConnectionError, match="no database"):
            async with served(FastAPI(lifespan=cancelation_lifespan(broken))):
                pass
        assert signal.getsignal(signal.SIGTERM) is before
        assert current_loop().shutdown is None
    assert not received


async def test_one_lifespan_after_the_other() -> None:
    work = Work(cancelation_lifespan(grace=0))
    for _ in range(3):
        async with served(work.app):
            token = shutdown_token()
            assert not token.is_cancelled
            async with running(work.app, "/mw/") as call:
                await armed()
                begin_shutdown()
            assert call.status == 503


async def test_applications_of_one_loop_end_together_by_the_longest_limits() -> None:
    patient = Work(cancelation_lifespan(grace=CEILING, retry_after=1))
    hasty = Work(cancelation_lifespan(grace=0, retry_after=30, refuse_new=True))
    async with nothing_left(), patient.app.router.lifespan_context(patient.app):
        async with hasty.app.router.lifespan_context(hasty.app), running(hasty.app, "/mw/") as call:
            await armed()
            begin_shutdown()
            assert (await get(patient.app, "/mw/")).headers["retry-after"] == "30"
            hasty.gate.set()
        assert call.status == 200


async def test_the_end_of_one_of_two_lifespans_ends_nothing() -> None:
    outer, inner = Work(cancelation_lifespan()), Work(cancelation_lifespan())
    async with nothing_left(), outer.app.router.lifespan_context(outer.app):
        async with running(outer.app, "/mw/") as call:
            async with inner.app.router.lifespan_context(inner.app):
                await armed()
            assert not shutdown_token().is_cancelled
            outer.gate.set()
        assert call.status == 200


async def test_the_ends_of_two_lifespans_wait_for_the_same_requests() -> None:
    works = [Work(cancelation_lifespan(grace=2 * CEILING)) for _ in range(2)]
    may_end = anyio.Event()

    async def serve(work: Work) -> None:
        async with work.app.router.lifespan_context(work.app):
            await may_end.wait()

    with anyio.fail_after(CEILING):
        async with nothing_left(), anyio.create_task_group() as tg:
            for work in works:
                tg.start_soon(serve, work)
            await anyio.wait_all_tasks_blocked()
            async with running(works[0].app, "/mw/"):
                await armed()
                begin_shutdown()
                may_end.set()
                await anyio.sleep(SOON)
                works[0].gate.set()


async def test_starlette_and_a_router_without_an_app() -> None:
    app = Starlette(lifespan=cancelation_lifespan(grace=0))
    async with served(app):
        begin_shutdown()
    async with cancelation_lifespan()(None):
        assert begin_shutdown()


@contextmanager
def handled() -> Iterator[list[tuple[int, Any]]]:
    """Handlers for SIGTERM and SIGINT, as a server would install them, and what they received."""
    received: list[tuple[int, Any]] = []

    def handler(number: int, frame: Any) -> None:
        received.append((number, frame))

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield received
        assert all(signal.getsignal(number) is handler for number in numbers)
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_begins_the_shutdown_and_reaches_its_handler(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    work = Work(cancelation_lifespan(grace=SOON))
    with handled() as received:
        async with served(work.app):
            async with running(work.app, "/mw/") as call:
                await armed()
                signal.raise_signal(number)
                assert [(got, frame is None) for got, frame in received] == [(number, False)]
                assert await shutdown_token().wait() is CancelationReason.SIGNAL
                assert shutdown_token().message == number.name
                signal.raise_signal(number)
                assert len(received) == 2
            assert call.status == 503
    assert caplog.messages[0] == f"shutdown begins (signal: {number.name}): requests have 0.05 s to finish"
    assert {record.levelname for record in caplog.records} == {"INFO"}


async def test_a_handler_put_on_top_of_ours_stays_and_still_reaches_the_first() -> None:
    received: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("server"))
    try:
        async with cancelation_lifespan()(None):
            ours: Any = signal.getsignal(signal.SIGTERM)

            def on_top(number: int, frame: Any) -> None:
                received.append("on top")
                ours(number, frame)

            signal.signal(signal.SIGTERM, on_top)
            signal.raise_signal(signal.SIGTERM)
            assert await shutdown_token().wait()
        assert signal.getsignal(signal.SIGTERM) is on_top
        async with nothing_left():
            signal.raise_signal(signal.SIGTERM)
        assert received == ["on top", "server"] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_after_the_lifespan_a_handler_that_stays_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Shutdown, "begin_from_thread", lambda shutdown, message: told.append(message))
    with handled() as received:
        async with cancelation_lifespan()(None):
            ours: Any = signal.getsignal(signal.SIGTERM)
        ours(signal.SIGTERM, None)
    assert received == [(signal.SIGTERM, None)]
    assert not told


def own_lifespan(*, fails: bool) -> Any:
    @asynccontextmanager
    async def own(app: Any) -> AsyncIterator[None]:
        yield
        if fails:
            raise ValueError("at its end")

    return cancelation_lifespan(own)


async def ended(lifespan: Any, *, fails: bool) -> None:
    if fails:
        with pytest.raises(ValueError, match="at its end"):
            await lifespan.__aexit__(None, None, None)
    else:
        await lifespan.__aexit__(None, None, None)


@pytest.mark.parametrize("failing", [None, 0, 1, 2])
@pytest.mark.parametrize("order", list(permutations(range(3))))
async def test_lifespans_that_end_in_any_order_put_every_handler_back(
    order: tuple[int, ...], failing: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Shutdown, "begin_from_thread", lambda shutdown, message: told.append(message))
    with handled() as received:
        lifespans = [own_lifespan(fails=number == failing)(None) for number in range(3)]
        for lifespan in lifespans:
            await lifespan.__aenter__()
        for ends, number in enumerate(order, start=1):
            await ended(lifespans[number], fails=number == failing)
            told.clear()
            received.clear()
            signal.raise_signal(signal.SIGTERM)
            assert told == ["SIGTERM"] * (3 - ends)
            assert len(received) == 1


@pytest.mark.parametrize("order", list(permutations(["first", "second", "third", "stranger"])))
async def test_a_strangers_handler_among_those_of_lifespans_is_none_of_ours_to_put_back(order: tuple[str, ...]) -> None:
    """It stands on top of the first, below the others, and puts back what was there before it, as anybody would."""
    calls: list[str] = []
    with handled() as received:
        lifespans = {name: cancelation_lifespan()(None) for name in ("first", "second", "third")}
        await lifespans["first"].__aenter__()
        below: Any = signal.getsignal(signal.SIGTERM)

        def stranger(number: int, frame: Any) -> None:
            calls.append("stranger")
            below(number, frame)

        signal.signal(signal.SIGTERM, stranger)
        await lifespans["second"].__aenter__()
        await lifespans["third"].__aenter__()
        for name in order:
            if name == "stranger":
                signal.signal(signal.SIGTERM, below)
            else:
                await lifespans[name].__aexit__(None, None, None)
        # Of a handler that is put back when all lifespans have ended we hear with the next signal.
        signal.raise_signal(signal.SIGTERM)
        assert len(received) == 1
        assert not calls


async def test_below_a_strangers_handler_a_lifespan_that_ended_is_left_out() -> None:
    with handled() as received:
        first = cancelation_lifespan()(None)
        await first.__aenter__()
        below: Any = signal.getsignal(signal.SIGTERM)

        def stranger(number: int, frame: Any) -> None:
            received.append((0, None))
            below(number, frame)

        signal.signal(signal.SIGTERM, stranger)
        second = cancelation_lifespan()(None)
        await second.__aenter__()
        await first.__aexit__(None, None, None)
        await second.__aexit__(None, None, None)
        assert signal.getsignal(signal.SIGTERM) is stranger
        signal.raise_signal(signal.SIGTERM)
        assert [number for number, _ in received] == [0, signal.SIGTERM]
        signal.signal(signal.SIGTERM, below)
        # The next one stands on top of the server's, not on that of a lifespan that is over.
        async with cancelation_lifespan()(None):
            pass


def test_a_lifespan_that_ended_below_another_lets_its_event_loop_go() -> None:
    with handled():
        outer = asyncio.new_event_loop()
        inner = asyncio.new_event_loop()
        first, second = cancelation_lifespan()(None), cancelation_lifespan()(None)
        outer.run_until_complete(first.__aenter__())
        inner.run_until_complete(second.__aenter__())
        outer.run_until_complete(first.__aexit__(None, None, None))
        outer.close()
        gone = weakref.ref(outer)
        del outer, first
        inner.run_until_complete(inner.shutdown_asyncgens())
        # Ours of the thread, which is of the loop that it has seen last.
        assert inner.run_until_complete(_loop_here()) is not None
        gc.collect()
        assert gone() is None
        inner.run_until_complete(second.__aexit__(None, None, None))
        inner.close()


async def _loop_here() -> Any:
    return current_loop()


@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])
async def test_a_signal_that_nobody_handles_is_left_alone(disposition: signal.Handlers) -> None:
    before = signal.signal(signal.SIGTERM, disposition)
    try:
        async with cancelation_lifespan()(None):
            assert signal.getsignal(signal.SIGTERM) is disposition
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_in_a_thread_that_cannot_take_signals_only_an_order_counts(anyio_backend: str) -> None:
    work = Work(cancelation_lifespan(grace=0))

    async def serve() -> int | None:
        async with served(work.app):
            async with running(work.app, "/mw/") as call:
                await armed()
                begin_shutdown()
            return call.status

    with handled() as received:
        there = signal.getsignal(signal.SIGTERM)
        status = await anyio.to_thread.run_sync(partial(anyio.run, serve, backend=anyio_backend))
        assert status == 503
        assert signal.getsignal(signal.SIGTERM) is there
    assert not received


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
async def test_a_forked_child_does_what_it_did_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Shutdown, "begin_from_thread", lambda shutdown, message: told.append(message))
    with handled() as received:
        async with served(Work(cancelation_lifespan()).app):
            child = os.fork()
            if not child:
                signal.raise_signal(signal.SIGTERM)
                os._exit(len(received) + 10 * len(told))
            _, status = os.waitpid(child, 0)  # noqa: ASYNC222 - it ends at once
            assert os.waitstatus_to_exitcode(status) == 1
            assert not told


def by_the_loop(factory: Any) -> list[str]:
    """As hypercorn, granian and gunicorn take their signals."""
    received: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        event = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, event.set)
        async with cancelation_lifespan()(None):
            os.kill(os.getpid(), signal.SIGTERM)
            received.append(str(await asyncio.wait_for(shutdown_token().wait(), CEILING)))
            await asyncio.wait_for(event.wait(), CEILING)
            received.append("server")
            event.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(event.wait(), CEILING)
        received.append("server")

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
    return received


@pytest.mark.skipif(sys.platform == "win32", reason="its loops take no signals")
@pytest.mark.parametrize("package", ["asyncio", "uvloop"])
def test_a_handler_of_the_loop_is_chained_too(package: str) -> None:
    assert by_the_loop(pytest.importorskip(package).new_event_loop) == ["signal", "server", "server"]


def test_a_receiver_of_trio_is_chained_too() -> None:
    trio = pytest.importorskip("trio")

    async def main() -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals, trio.fail_after(CEILING):
            async with cancelation_lifespan()(None):
                signal.raise_signal(signal.SIGTERM)
                assert await shutdown_token().wait()
                assert await anext(signals) == signal.SIGTERM

    trio.run(main)


@pytest.mark.parametrize("name", ["grace", "background_grace", "retry_after"])
def test_limits_are_checked_when_the_app_is_built(name: str) -> None:
    options: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=f"{name} must be zero or more seconds"):
        cancelation_lifespan(**options)
    options = {name: "soon"}
    with pytest.raises(TypeError, match=f"{name} takes seconds"):
        cancelation_lifespan(**options)


def test_retry_after_is_a_number_that_a_header_can_carry() -> None:
    with pytest.raises(ValueError, match="retry_after must be a finite number"):
        cancelation_lifespan(retry_after=math.inf)
    cancelation_lifespan(retry_after=timedelta(minutes=1), grace=timedelta(seconds=3))


def test_what_is_no_lifespan_is_refused() -> None:
    async def bare(app: FastAPI) -> AsyncIterator[None]:
        yield

    wrong: Any = bare
    with pytest.raises(TypeError, match="put @asynccontextmanager above it"):
        cancelation_lifespan(wrong)
    wrong = 10
    with pytest.raises(TypeError, match="a lifespan is a function of the application"):
        cancelation_lifespan(wrong)


async def test_a_lifespan_given_in_the_wrong_place_is_refused() -> None:
    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[None]:
        yield

    with pytest.raises(TypeError, match=r"cancelation_lifespan\(my_lifespan, grace=10\)"):
        cancelation_lifespan(grace=10)(own)


def test_ctrl_c_under_trio_is_not_raised_into_the_handler_that_happens_to_run() -> None:
    events: list[str] = []

    async def busy() -> None:
        signal.raise_signal(signal.SIGINT)
        events.append("went on")
        await anyio.sleep_forever()

    async def main() -> None:
        async with cancelation_lifespan()(None), anyio.create_task_group() as tasks:
            tasks.start_soon(busy)
            try:
                await shutdown_token().wait()
                await anyio.sleep_forever()
            except KeyboardInterrupt:
                events.append("main task")
                tasks.cancel_scope.cancel()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        anyio.run(main, backend="trio")
    finally:
        signal.signal(signal.SIGINT, before)
    assert events == ["went on", "main task"]


def test_a_second_ctrl_c_under_trio_reaches_what_never_yields() -> None:
    async def main() -> None:
        async with cancelation_lifespan()(None):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            anyio.run(main, backend="trio")
    finally:
        signal.signal(signal.SIGINT, before)
