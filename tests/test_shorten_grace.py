"""A block, or a request, whose cleanup gets less time than it was to have: a firmer cancel."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import FastAPI, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelableStreamingResponse,
    CancelationError,
    CancelationReason,
    CancelationToken,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    with_cancelation,
)
from cancelable_deps.kernel.cancelable import block_of
from cancelable_deps.kernel.task_group import CancelableTaskGroup
from cancelable_deps.kernel.token import Cause
from cancelable_deps.request.state import SCOPE_KEY, RequestState
from cancelable_deps.testing import Call, advance

from .calls import movable_clock, running
from .leftovers import nothing_left

pytestmark = [pytest.mark.anyio, movable_clock]

LONG, SHORT = 100, 20


class Cleanup:
    """Work whose cleanup lasts until it is cancelled; the journal says when that was."""

    def __init__(self) -> None:
        self.journal: list[str] = []
        self.stands = anyio.Event()

    async def run(self, work: Callable[[], Awaitable[object]] = anyio.sleep_forever) -> None:
        self.stands.set()
        try:
            await work()
        finally:
            self.journal.append("told")
            try:
                await anyio.sleep_forever()
            finally:
                self.journal.append("disturbed")

    @property
    def is_undisturbed(self) -> bool:
        return self.journal == ["told"]

    async def is_disturbed_in(self, seconds: float) -> None:
        """Fail if the cleanup is disturbed in the next half of ``seconds``, or not in ``seconds``."""
        assert self.is_undisturbed
        await advance(seconds / 2)
        await settled()
        assert self.is_undisturbed
        await advance(seconds / 2)
        await settled()
        assert self.journal == ["told", "disturbed"]


async def settled() -> None:
    """Nothing more happens because of what has been done."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()
    await anyio.wait_all_tasks_blocked()


@asynccontextmanager
async def beside(work: Callable[[], Awaitable[object]]) -> AsyncGenerator[None]:
    """Run ``work``, which ends by an error of ours, beside a body that strikes when it stands still."""

    async def run() -> None:
        with suppress(CancelationError):
            await work()

    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await settled()
        async with ended_in_time():
            yield


@asynccontextmanager
async def ended_in_time() -> AsyncGenerator[None]:
    """Let a test that fails inside not wait for the end of a grace."""
    try:
        yield
    except BaseException:
        await advance(3 * LONG)
        raise


def shorten(cancel: Cancelable, grace: float = SHORT) -> None:
    block_of(cancel).shorten_grace(grace)


class Work:
    """A block around a cleanup."""

    def __init__(self, stand: Callable[[Work], Awaitable[object]], grace: float = LONG) -> None:
        self.cancel = Cancelable(cleanup_grace=grace)
        self.cleanup = Cleanup()
        self.release = threading.Event()
        self.may_go_on = anyio.Event()
        self._stand = stand

    async def run(self) -> None:
        async with self.cancel:
            await self._stand(self)

    @asynccontextmanager
    async def beside(self) -> AsyncGenerator[None]:
        async with beside(self.run):
            # A thread takes its time.
            await self.cleanup.stands.wait()
            await settled()
            yield

    def go_on(self) -> None:
        self.release.set()
        self.may_go_on.set()


async def asleep(work: Work) -> None:
    await work.cleanup.run()


async def in_a_shield(work: Work) -> None:
    work.cleanup.stands.set()
    with anyio.CancelScope(shield=True):
        await work.may_go_on.wait()
    await work.cleanup.run()


async def in_a_thread(work: Work) -> None:
    work.cleanup.stands.set()
    await anyio.to_thread.run_sync(work.release.wait, 10)
    await work.cleanup.run()


async def in_a_block_inside(work: Work) -> None:
    async with Cancelable(cleanup_grace=LONG):
        await work.cleanup.run()


async def in_a_group_inside(work: Work) -> None:
    async with CancelableTaskGroup(Cancelable(cleanup_grace=LONG)) as group:
        group.start_soon(work.cleanup.run)


async def in_what_a_thread_calls(work: Work) -> None:
    def call() -> None:
        anyio.from_thread.run(work.cleanup.run)

    await anyio.to_thread.run_sync(call)


async def that_checks(work: Work) -> None:
    async def check() -> None:
        work.cancel.check()

    work.cleanup.stands.set()
    with anyio.CancelScope(shield=True):
        await work.may_go_on.wait()
    await work.cleanup.run(check)


async def that_a_block_inside_has_ended(work: Work) -> None:
    """The error of the inner block unwinds the task, and delays the cancellation of the outer one."""

    async def stop() -> None:
        async with Cancelable() as inner:
            await inner.cancel()

    await work.cleanup.run(stop)


STANDS = [
    asleep,
    in_a_block_inside,
    in_a_group_inside,
    in_what_a_thread_calls,
    that_checks,
    that_a_block_inside_has_ended,
]
LATER = [in_a_shield, in_a_thread]


@pytest.mark.parametrize("stand", STANDS)
async def test_a_cleanup_that_runs_ends_earlier(stand: Callable[[Work], Awaitable[object]]) -> None:
    work = Work(stand)
    async with work.beside():
        work.cancel.cancel_nowait()
        work.go_on()
        await advance(1)
        assert work.cleanup.is_undisturbed
        shorten(work.cancel)
        await work.cleanup.is_disturbed_in(SHORT)


@pytest.mark.parametrize("stand", STANDS)
async def test_without_a_grace_the_cleanup_is_cancelled_at_once(stand: Callable[[Work], Awaitable[object]]) -> None:
    work = Work(stand)
    async with work.beside():
        work.cancel.cancel_nowait()
        work.go_on()
        await settled()
        assert work.cleanup.is_undisturbed
        shorten(work.cancel, 0)
        await settled()
        assert work.cleanup.journal == ["told", "disturbed"]


@pytest.mark.parametrize("stand", [stand for stand in STANDS if stand is not that_a_block_inside_has_ended])
async def test_a_cleanup_that_begins_later_is_shorter(stand: Callable[[Work], Awaitable[object]]) -> None:
    work = Work(stand)
    async with work.beside():
        shorten(work.cancel)
        await advance(2 * SHORT)
        work.cancel.cancel_nowait()
        work.go_on()
        await settled()
        await work.cleanup.is_disturbed_in(SHORT)


async def test_a_block_that_is_not_entered_yet() -> None:
    work = Work(asleep)
    shorten(work.cancel)
    async with work.beside():
        work.cancel.cancel_nowait()
        await settled()
        await work.cleanup.is_disturbed_in(SHORT)


async def test_a_cancellation_that_waits_for_an_error_on_its_way_waits_shorter() -> None:
    work = Work(that_a_block_inside_has_ended)
    async with work.beside():
        shorten(work.cancel)
        work.cancel.cancel_nowait()
        await work.cleanup.is_disturbed_in(SHORT)


@pytest.mark.parametrize("grace", [0, SHORT])
@pytest.mark.parametrize("stand", LATER)
async def test_between_the_cancellation_and_its_delivery(
    stand: Callable[[Work], Awaitable[object]], grace: float
) -> None:
    work = Work(stand)
    async with work.beside():
        work.cancel.cancel_nowait()
        await settled()
        shorten(work.cancel, grace)
        await advance(2 * SHORT)
        assert work.cleanup.journal == []
        work.go_on()
        while not work.cleanup.journal:
            await anyio.lowlevel.checkpoint()
        if grace:
            await settled()
            await work.cleanup.is_disturbed_in(SHORT)
    assert work.cleanup.journal == ["told", "disturbed"]


@pytest.mark.parametrize("when", ["before", "in the cleanup"])
@pytest.mark.parametrize("stand", [asleep, in_what_a_thread_calls, that_checks, that_a_block_inside_has_ended])
async def test_a_grace_is_never_lengthened(stand: Callable[[Work], Awaitable[object]], when: str) -> None:
    work = Work(stand, grace=SHORT)
    async with work.beside():
        if when == "before":
            shorten(work.cancel, LONG)
        work.cancel.cancel_nowait()
        work.go_on()
        await settled()
        if when == "in the cleanup":
            shorten(work.cancel, LONG)
        await work.cleanup.is_disturbed_in(SHORT)


@pytest.mark.parametrize("second", [SHORT, 2 * SHORT, LONG])
async def test_the_end_that_comes_first_holds(second: float) -> None:
    work = Work(asleep)
    async with work.beside():
        work.cancel.cancel_nowait()
        await settled()
        shorten(work.cancel, 1.5 * SHORT)
        await advance(SHORT / 2)
        shorten(work.cancel, second)
        await work.cleanup.is_disturbed_in(SHORT)


async def test_it_can_be_shortened_twice() -> None:
    work = Work(asleep)
    async with work.beside():
        work.cancel.cancel_nowait()
        await settled()
        shorten(work.cancel, 2 * SHORT)
        shorten(work.cancel, SHORT)
        await work.cleanup.is_disturbed_in(SHORT)


async def test_a_grace_without_an_end_gets_one() -> None:
    work = Work(asleep, grace=float("inf"))
    async with work.beside():
        work.cancel.cancel_nowait()
        await settled()
        shorten(work.cancel)
        await work.cleanup.is_disturbed_in(SHORT)


async def test_what_a_block_inside_begins_later_is_shorter_too() -> None:
    outer, inner = Cancelable(cleanup_grace=LONG), Cancelable(cleanup_grace=LONG)
    async with outer, inner:
        shorten(outer)
        assert block_of(inner).cleanup_grace == SHORT


@pytest.mark.parametrize("stand", [asleep, in_a_group_inside])
async def test_a_block_is_shortened_from_a_thread(stand: Callable[[Work], Awaitable[object]]) -> None:
    work = Work(stand)
    async with work.beside():
        work.cancel.cancel_nowait()
        await settled()
        await anyio.to_thread.run_sync(shorten, work.cancel)
        await work.cleanup.is_disturbed_in(SHORT)


@pytest.mark.parametrize("when", ["before", "in the cleanup"])
@pytest.mark.parametrize("inside", ["nothing", "a block", "a group"])
async def test_the_children_and_the_body_of_a_group(inside: str, when: str) -> None:
    cancel, body, child = Cancelable(cleanup_grace=LONG), Cleanup(), Cleanup()

    async def in_child() -> None:
        if inside == "a block":
            async with Cancelable(cleanup_grace=LONG):
                await child.run()
        elif inside == "a group":
            async with CancelableTaskGroup(Cancelable(cleanup_grace=LONG)) as inner:
                inner.start_soon(child.run)
        else:
            await child.run()

    async def work() -> None:
        async with CancelableTaskGroup(cancel) as group:
            group.start_soon(in_child)
            await body.run()

    async with beside(work):
        if when == "before":
            shorten(cancel)
        cancel.cancel_nowait()
        await settled()
        if when == "in the cleanup":
            shorten(cancel)
        await child.is_disturbed_in(SHORT)
        assert body.journal == ["told", "disturbed"]


async def test_children_that_the_group_cancels_around_a_block_without_a_scope() -> None:
    cancel, child = Cancelable(cleanup_grace=LONG), Cleanup()
    block_of(cancel).may_begin_late = True
    async with nothing_left(), CancelableTaskGroup(cancel) as group:

        async def strike() -> None:
            with anyio.CancelScope(shield=True):
                async with ended_in_time():
                    await settled()
                    group.cancel_scope.cancel()
                    await settled()
                    shorten(cancel)
                    await child.is_disturbed_in(SHORT)

        group.start_soon(strike)
        group.start_soon(child.run)


async def test_a_child_that_is_started_later() -> None:
    cancel, child = Cancelable(cleanup_grace=LONG), Cleanup()

    async def work() -> None:
        async with CancelableTaskGroup(cancel) as group:
            shorten(cancel)
            group.start_soon(child.run)

    async with beside(work):
        cancel.cancel_nowait()
        await settled()
        await child.is_disturbed_in(SHORT)


async def test_a_block_in_a_child_that_cleans_up_for_itself() -> None:
    cancel, cleanup = Cancelable(cleanup_grace=LONG), Cleanup()

    async def in_child() -> None:
        async with Cancelable(timeout=1, cleanup_grace=LONG):
            await cleanup.run()

    async def work() -> None:
        async with CancelableTaskGroup(cancel) as group:
            group.start_soon(in_child)

    async with beside(work):
        await advance(2)
        cancel.cancel_nowait()
        shorten(cancel)
        await cleanup.is_disturbed_in(SHORT)


async def test_a_block_in_a_shield_keeps_its_grace() -> None:
    outer, inner, cleanup = Cancelable(cleanup_grace=LONG), Cancelable(cleanup_grace=2 * SHORT), Cleanup()

    async def work() -> None:
        async with outer:
            with outer.shield(), suppress(CancelationError):
                async with inner:
                    await cleanup.run()

    async with beside(work):
        outer.cancel_nowait()
        inner.cancel_nowait()
        await settled()
        shorten(outer, 1)
        await cleanup.is_disturbed_in(2 * SHORT)


async def test_a_block_in_a_shield_that_is_cancelled_for_the_same_cause() -> None:
    token, cleanup = CancelationToken(), Cleanup()
    outer = Cancelable(token=token, cleanup_grace=LONG)

    async def work() -> None:
        async with outer:
            with outer.shield():
                async with Cancelable(token=token, cleanup_grace=LONG):
                    await cleanup.run()

    async with beside(work):
        token.cancel_nowait()
        await settled()
        shorten(outer)
        await cleanup.is_disturbed_in(SHORT)


async def test_work_that_goes_on_after_the_error_of_an_inner_block() -> None:
    """The outer block has the same token, and leaves that work alone for one grace."""
    token, told = CancelationToken(), anyio.Event()

    async def work() -> None:
        async with Cancelable(token=token, cleanup_grace=LONG) as outer:
            with pytest.raises(CancelationError):
                async with Cancelable(token=token):
                    await anyio.sleep_forever()
            blocks.append(outer)
            try:
                await anyio.sleep_forever()
            finally:
                told.set()

    blocks: list[Cancelable] = []
    async with beside(work):
        token.cancel_nowait()
        await settled()
        shorten(blocks[0])
        await advance(SHORT / 2)
        shorten(blocks[0], LONG)
        assert not told.is_set()
        await advance(SHORT / 2)
        await settled()
        assert told.is_set()


async def test_a_block_that_has_been_left_is_not_changed() -> None:
    cancel = Cancelable(cleanup_grace=LONG)
    async with cancel:
        pass
    shorten(cancel)
    await anyio.to_thread.run_sync(shorten, cancel)
    assert block_of(cancel).cleanup_grace == LONG


async def test_a_block_in_a_worker_thread_only_keeps_the_limit() -> None:
    cancel, may_end = Cancelable(cleanup_grace=LONG), threading.Event()

    def in_thread() -> None:
        with cancel:
            shorten(cancel, 2 * SHORT)
            anyio.from_thread.run_sync(entered.set)
            may_end.wait(10)

    entered = anyio.Event()
    async with nothing_left(), anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, in_thread)
        await entered.wait()
        assert block_of(cancel).cleanup_grace == 2 * SHORT
        shorten(cancel)
        assert block_of(cancel).cleanup_grace == SHORT
        may_end.set()


def by_middleware(cleanup: Cleanup) -> ASGIApp:
    app = FastAPI()

    @app.get("/")
    async def endpoint() -> None:
        await cleanup.run()

    return RequestCancelationMiddleware(app, cleanup_grace=LONG)


def by_decorator(cleanup: Cleanup) -> ASGIApp:
    app = FastAPI()

    @app.get("/")
    @with_cancelation(cleanup_grace=LONG)
    async def endpoint() -> None:
        await cleanup.run()

    return app


def by_route(cleanup: Cleanup) -> ASGIApp:
    app = FastAPI()
    app.router.route_class = CancelableRoute.with_timeout(None, cleanup_grace=LONG)

    @app.get("/")
    async def endpoint() -> None:
        await cleanup.run()

    return app


def by_handle(cleanup: Cleanup) -> ASGIApp:
    app = FastAPI()

    @app.get("/")
    async def endpoint(cancel: RequestCancelable) -> None:
        block_of(cancel).grace = LONG
        async with cancel:
            await cleanup.run()

    return app


def by_group(cleanup: Cleanup) -> ASGIApp:
    app = FastAPI()

    @app.get("/")
    async def endpoint(get_task_group: RequestTaskGroup) -> None:
        async with get_task_group() as group:
            group.start_soon(cleanup.run)

    return RequestCancelationMiddleware(app, cleanup_grace=LONG)


def by_middleware_and_decorator(cleanup: Cleanup) -> ASGIApp:
    return RequestCancelationMiddleware(by_decorator(cleanup), cleanup_grace=2 * LONG)


DOORS = [by_middleware, by_decorator, by_route, by_handle, by_group, by_middleware_and_decorator]
CAUSE = Cause(CancelationReason.MANUAL, None)


def state_of(call: Call) -> RequestState:
    state: RequestState = call.scope[SCOPE_KEY].state
    return state


@pytest.mark.parametrize("when", ["before", "in the cleanup", "from a thread"])
@pytest.mark.parametrize("door", DOORS)
async def test_a_request(door: Callable[[Cleanup], ASGIApp], when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cancelable_deps.kernel.settings.settings.cleanup_grace", LONG)
    cleanup = Cleanup()
    async with running(door(cleanup)) as call:
        await call.listened_to()
        await settled()
        state = state_of(call)
        if when == "before":
            state.shorten_grace(SHORT)
        state.stop(CAUSE)
        await settled()
        if when == "in the cleanup":
            state.shorten_grace(SHORT)
        elif when == "from a thread":
            await anyio.to_thread.run_sync(state.shorten_grace, SHORT)
        await cleanup.is_disturbed_in(SHORT)


@pytest.mark.parametrize("door", DOORS)
async def test_a_request_whose_block_has_no_scope_yet(door: Callable[[Cleanup], ASGIApp]) -> None:
    cleanup = Cleanup()
    async with running(door(cleanup)) as call:
        await call.running()
        state = state_of(call)
        state.shorten_grace(0)
        await call.listened_to()
        await settled()
        state.stop(CAUSE)
    assert cleanup.journal == ["told", "disturbed"]


async def test_a_block_that_is_entered_after_that() -> None:
    app, cleanup, may_enter = FastAPI(), Cleanup(), anyio.Event()

    @app.get("/")
    async def endpoint(cancel: RequestCancelable) -> None:
        block_of(cancel).grace = LONG
        await may_enter.wait()
        async with cancel:
            await cleanup.run()

    async with running(RequestCancelationMiddleware(app, cleanup_grace=LONG)) as call:
        await call.listened_to()
        state_of(call).shorten_grace(SHORT)
        may_enter.set()
        await settled()
        state_of(call).stop(CAUSE)
        await settled()
        await cleanup.is_disturbed_in(SHORT)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_the_time_of_listeners_is_shorter_too(when: str) -> None:
    """They are told of a disconnect, and may end by themselves, before they are cancelled."""
    cleanup = Cleanup()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            told.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            await cleanup.run()

    told = anyio.Event()
    async with running(RequestCancelationMiddleware(app, cleanup_grace=LONG)) as call:
        await call.listened_to()
        await settled()
        if when == "before":
            state_of(call).shorten_grace(SHORT)
        await call.hang_up()
        await told.wait()
        if when == "after":
            state_of(call).shorten_grace(SHORT)
        await advance(SHORT / 2)
        state_of(call).shorten_grace(LONG)
        assert cleanup.journal == []
        await advance(SHORT / 2)
        await settled()
        await cleanup.is_disturbed_in(SHORT)


async def test_a_stream_whose_start_is_not_sent_is_held_for_a_shorter_time() -> None:
    app, stalled, journal = FastAPI(), anyio.Event(), list[str]()

    @app.get("/")
    async def endpoint(request: Request) -> CancelableStreamingResponse:
        return CancelableStreamingResponse(iter([b"chunk"]), cleanup_grace=LONG)

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        async def never_send(message: Any) -> None:
            stalled.set()
            try:
                await anyio.sleep_forever()
            finally:
                journal.append("told")

        # Starlette's error for an answer after the start.
        with suppress(RuntimeError):
            await app(scope, receive, never_send)

    async with running(server) as call:
        await stalled.wait()
        await call.listened_to()
        state = state_of(call)
        state.stop(CAUSE)
        await settled()
        state.shorten_grace(SHORT)
        await advance(SHORT / 2)
        state.shorten_grace(LONG)
        assert journal == []
        await advance(SHORT / 2)
        await settled()
        assert journal == ["told"]
