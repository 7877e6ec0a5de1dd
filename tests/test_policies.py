# pyright: reportPossiblyUnboundVariable=false
from __future__ import annotations

import bdb
import json
import logging
import math
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response, WebSocket
from fastapi.responses import PlainTextResponse
from starlette.types import ASGIApp

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelationError,
    CancelationReason,
    RequestCancelable,
    RequestCancelationMiddleware,
    TimeoutCancelation,
    TimeoutPolicy,
    cancelable_with_timeout,
    configure,
    current_cancelable,
    no_timeout,
    timeout_policy,
    with_cancelation,
)
from cancelable_deps.hosts.debugger import is_debugged
from cancelable_deps.kernel.settings import settings
from cancelable_deps.testing import CancelableClient, SocketClosed, advance, assert_cancelled
from tests.calls import movable_clock

from .leftovers import nothing_left
from .machine import scaled

pytestmark = pytest.mark.anyio
SOON = 0.03
TIMELY = 20
LIMIT = 2
"""In which also a busy machine gets from a request's arrival to its handler."""

LONG = 100


def write(request: Request, error: CancelationError) -> Response:
    return PlainTextResponse(f"{request.url.path}: {error.detail}", status_code=error.status_code)


async def write_later(request: Request, error: CancelationError) -> Response:
    await anyio.sleep(0.001)
    return write(request, error)


POLICIES = {
    "quick": TimeoutPolicy(SOON, status_code=503),
    "own": TimeoutPolicy(timedelta(seconds=SOON), status_code=500, response=write),
    "own later": TimeoutPolicy(SOON, response=write_later),
    "patient": TimeoutPolicy(LONG),
}


def application(**options: Any) -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, policies=POLICIES, **options)

    @app.get("/default")
    async def default() -> str:
        await anyio.sleep(4 * SOON)
        return "done"

    @app.get("/patient", dependencies=[Depends(timeout_policy("patient"))])
    async def patient() -> str:
        return await default()

    @app.get("/quick", dependencies=[Depends(timeout_policy("quick"))])
    async def quick() -> None:
        await anyio.sleep_forever()

    @app.get("/own", dependencies=[Depends(timeout_policy("own"))])
    async def own() -> None:
        await anyio.sleep_forever()

    @app.get("/off", dependencies=[Depends(no_timeout)])
    async def off() -> str:
        return await default()

    @app.get("/decorated")
    @with_cancelation(policy="own later")
    async def decorated() -> None:
        await anyio.sleep_forever()

    @app.get("/object")
    @with_cancelation(policy=TimeoutPolicy(SOON, status_code=598))
    async def with_an_object() -> None:
        await anyio.sleep_forever()

    @app.get("/handle", dependencies=[Depends(timeout_policy("quick"))])
    async def handle(cancel: RequestCancelable) -> None:
        async with cancel:
            await anyio.sleep_forever()

    router = APIRouter(prefix="/router", dependencies=[Depends(timeout_policy("quick"))])
    router.get("/never")(quick)
    app.include_router(router)
    return app


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/default", 503, '{"detail":"Timed out after 0.03 seconds"}'),
        ("/patient", 200, '"done"'),
        ("/quick", 503, '{"detail":"Timed out after 0.03 seconds"}'),
        ("/own", 500, "/own: Timed out after 0.03 seconds"),
        ("/off", 200, '"done"'),
        ("/decorated", 504, "/decorated: Timed out after 0.03 seconds"),
        ("/object", 598, '{"detail":"Timed out after 0.03 seconds"}'),
        ("/handle", 503, '{"detail":"Timed out after 0.03 seconds"}'),
        ("/router/never", 503, '{"detail":"Timed out after 0.03 seconds"}'),
    ],
)
async def test_policies_by_route(path: str, status: int, body: str) -> None:
    async with nothing_left(), CancelableClient(application(default_policy="quick")) as client:
        async with client.start("GET", path) as call:
            pass
        assert (call.status, call.body.decode()) == (status, body)
        assert call.reason is (None if status == 200 else CancelationReason.TIMEOUT)


async def test_a_default_policy_may_be_an_object() -> None:
    async with CancelableClient(application(default_policy=TimeoutPolicy(SOON, status_code=500))) as client:
        assert (await client.get("/default")).status_code == 500


async def test_a_policy_without_any_default() -> None:
    async with CancelableClient(application()) as client:
        assert (await client.get("/default")).json() == "done"
        assert (await client.get("/quick")).status_code == 503


async def test_a_disconnect_is_answered_as_ever() -> None:
    app = application(default_policy="patient")

    @app.get("/never")
    @with_cancelation(policy=TimeoutPolicy(LONG, response=write))
    async def never() -> None:
        await anyio.sleep_forever()

    async with CancelableClient(app) as client:
        async with client.start("GET", "/never") as call:
            await call.listened_to()
            await call.hang_up()
        assert call.status == 499


async def test_a_route_class_with_a_policy() -> None:
    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute.with_policy(POLICIES["own"]))
    plain = APIRouter(route_class=CancelableRoute.with_policy(POLICIES["quick"]))

    async def never() -> None:
        await anyio.sleep_forever()

    router.get("/own")(never)
    plain.get("/quick")(never)
    router.get("/off", dependencies=[Depends(no_timeout)])(lambda: "done")
    app.include_router(router)
    app.include_router(plain)
    async with CancelableClient(app) as client:
        own = await client.get("/own")
        assert (own.status_code, own.text) == (500, "/own: Timed out after 0.03 seconds")
        assert (await client.get("/quick")).status_code == 503
        assert (await client.get("/off")).json() == "done"


async def test_a_dependency_under_the_bare_route_class() -> None:
    app = FastAPI()
    app.router.route_class = CancelableRoute

    @app.get("/", dependencies=[Depends(timeout_policy(POLICIES["quick"]))])
    async def never() -> None:
        await anyio.sleep_forever()

    async with CancelableClient(app) as client:
        assert (await client.get("/")).status_code == 503


async def test_a_dependency_under_the_bare_middleware() -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware)

    @app.get("/", dependencies=[Depends(timeout_policy(POLICIES["quick"]))])
    async def never() -> None:
        await anyio.sleep_forever()

    async with CancelableClient(app) as client:
        assert (await client.get("/")).status_code == 503


@pytest.mark.parametrize("path", ["/plain", "/chosen", "/decorated"])
async def test_the_middlewares_policies_reach_into_a_route_class_without_a_timeout(path: str) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, policies=POLICIES, default_policy="quick")
    app.router.route_class = CancelableRoute

    async def never() -> None:
        await anyio.sleep_forever()

    app.get("/plain")(never)
    app.get("/chosen", dependencies=[Depends(timeout_policy("own"))])(never)
    app.get("/decorated")(with_cancelation(policy="own")(never))
    async with CancelableClient(app) as client:
        assert (await client.get(path)).status_code == (503 if path == "/plain" else 500)


async def test_a_websocket_takes_a_policy_from_its_decorator_alone() -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, policies=POLICIES, default_policy="quick")
    router = APIRouter(dependencies=[Depends(timeout_policy("quick"))])

    async def say(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep(2 * SOON)
        await websocket.send_text("still here")

    async def never(websocket: WebSocket) -> None:
        await websocket.accept()
        await anyio.sleep_forever()

    router.websocket("/chosen")(say)
    router.websocket("/decorated")(with_cancelation(policy="quick")(never))
    app.include_router(router)
    async with CancelableClient(app) as client:
        async with client.websocket("/chosen") as socket:
            assert await socket.receive_text() == "still here"
        async with client.websocket("/decorated") as socket:
            with pytest.raises(SocketClosed, match=f"closed with 4504: Timed out after {SOON} seconds"):
                await socket.receive_text()


async def test_a_policy_without_a_request() -> None:
    async def never() -> None:
        await anyio.sleep_forever()

    with pytest.raises(TimeoutCancelation):
        await with_cancelation(policy=TimeoutPolicy(SOON))(never)()


async def test_a_policy_without_a_door_says_what_to_do() -> None:
    app = FastAPI()
    app.get("/", dependencies=[Depends(timeout_policy(POLICIES["quick"]))])(lambda: None)
    async with CancelableClient(app) as client:
        with pytest.raises(RuntimeError, match=r"Use @with_cancelation\(policy=...\)"):
            await client.get("/")


@pytest.mark.parametrize("where", ["decorator", "dependency", "router", "include", "mounted", "wrapped"])
async def test_an_unknown_name_is_found_when_the_application_starts(where: str) -> None:
    app = inner = FastAPI()
    if where == "mounted":
        app = FastAPI()
        app.mount("/inner", inner)
    served: ASGIApp = app
    if where == "wrapped":
        served = RequestCancelationMiddleware(app, policies=POLICIES)
    else:
        app.add_middleware(RequestCancelationMiddleware, policies=POLICIES)

    async def endpoint() -> None: ...

    if where == "dependency":
        app.get("/wrong", dependencies=[Depends(timeout_policy("quikc"))])(endpoint)
    elif where in ("router", "include"):
        chosen = [Depends(timeout_policy("quikc"))]
        router = APIRouter(dependencies=chosen if where == "router" else [])
        router.get("/wrong")(endpoint)
        app.include_router(router, dependencies=chosen if where == "include" else [])
    else:
        inner.get("/wrong")(with_cancelation(policy="quikc")(endpoint))
    with pytest.raises(LookupError, match=r"no timeout policy 'quikc' \(route .*\); known are 'quick', 'own'"):
        async with CancelableClient(served):
            pass


@pytest.mark.parametrize("outermost", ["added", "wrapped"])
async def test_several_of_us_around_one_application_know_the_policies_of_each_other(outermost: str) -> None:
    async def never() -> None:
        await anyio.sleep_forever()

    app = FastAPI()
    for name in ("inner", "outer"):
        app.get(f"/{name}", dependencies=[Depends(timeout_policy(name))])(never)
    app.add_middleware(RequestCancelationMiddleware, policies={"inner": TimeoutPolicy(SOON, status_code=501)})
    outer = {"outer": TimeoutPolicy(SOON, status_code=502)}
    served: ASGIApp = app
    if outermost == "wrapped":
        served = RequestCancelationMiddleware(app, policies=outer)
    else:
        app.add_middleware(RequestCancelationMiddleware, policies=outer)
    async with CancelableClient(served) as client:
        assert (await client.get("/inner")).status_code == 501
        assert (await client.get("/outer")).status_code == 502


@pytest.mark.parametrize("path", ["/inner/own", "/inner/outer", "/inner/both"])
async def test_a_mounted_application_has_policies_of_its_own_beside_those_around_it(path: str) -> None:
    async def never() -> None:
        await anyio.sleep_forever()

    inner = FastAPI()
    own = {"own": TimeoutPolicy(SOON, status_code=501), "both": TimeoutPolicy(SOON, status_code=501)}
    inner.add_middleware(RequestCancelationMiddleware, policies=own)
    for name in ("own", "outer", "both"):
        inner.get(f"/{name}", dependencies=[Depends(timeout_policy(name))])(never)
    app = FastAPI()
    outer = {"outer": TimeoutPolicy(SOON, status_code=502), "both": TimeoutPolicy(60)}
    app.add_middleware(RequestCancelationMiddleware, policies=outer, default_policy="both")
    app.mount("/inner", inner)
    async with CancelableClient(app) as client:
        assert (await client.get(path)).status_code == (502 if path == "/inner/outer" else 501)


async def test_an_unknown_name_without_a_lifespan_or_middleware() -> None:
    app = FastAPI()

    @app.get("/wrong")
    @with_cancelation(policy="quick")
    async def wrong() -> None: ...

    async with CancelableClient(app) as client:
        with pytest.raises(LookupError, match="pass `policies="):
            await client.get("/wrong")


@pytest.mark.parametrize("door", ["middleware", "decorator", "route"])
@movable_clock
async def test_advisory_mode_logs_and_counts(door: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    policy = TimeoutPolicy(TIMELY, advisory=True)
    app = FastAPI()

    async def endpoint(seconds: float) -> str:
        if seconds:
            await advance(seconds)
        return "done"

    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, default_policy=policy)
    elif door == "route":
        app.router.route_class = CancelableRoute.with_policy(policy)
    app.get("/work")(with_cancelation(policy=policy)(endpoint) if door == "decorator" else endpoint)
    async with CancelableClient(app) as client:
        assert (await client.get("/work", params={"seconds": 0})).json() == "done"
        assert (policy.exceeded, caplog.records) == (0, [])
        assert (await client.get("/work", params={"seconds": 2 * TIMELY})).json() == "done"
    assert policy.exceeded == 1
    (record,) = caplog.records
    assert (record.levelname, record.route, record.limit) == ("INFO", "/work", TIMELY)  # type: ignore[attr-defined]
    assert "longer than its advisory limit of 20 s" in record.getMessage()
    assert repr(policy) == "<TimeoutPolicy 20 s, advisory>"


@pytest.mark.parametrize("door", ["decorator", "middleware", "route"])
@pytest.mark.parametrize("how", ["extend", "disable"])
@movable_clock
async def test_a_handle_that_is_not_entered_moves_the_deadline_of_its_handler(door: str, how: str) -> None:
    app = FastAPI()
    router = APIRouter(route_class=CancelableRoute.with_timeout(LIMIT)) if door == "route" else APIRouter()

    async def work(cancel: RequestCancelable) -> str:
        assert cancel.extend(LONG) if how == "extend" else cancel.disable_timeout()
        await advance(1.5 * LIMIT)
        return "done"

    router.get("/")(with_cancelation(timeout=LIMIT)(work) if door == "decorator" else work)
    app.include_router(router)
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, default_timeout=LIMIT)
    async with nothing_left(), CancelableClient(app) as client:
        assert (await client.get("/")).json() == "done"


@pytest.mark.parametrize("kind", ["kernel", "handle", "decorator", "middleware", "thread"])
@pytest.mark.parametrize("how", ["extend", "disable"])
@movable_clock
async def test_the_handler_moves_its_deadline(kind: str, how: str) -> None:
    def move(cancel: Cancelable | None) -> None:
        assert cancel is not None
        before = cancel.remaining()
        assert cancel.extend(LONG) if how == "extend" else cancel.disable_timeout()
        assert cancel.remaining() == (pytest.approx(before + LONG, abs=1) if how == "extend" else math.inf)

    async def work(cancel: Cancelable | None) -> str:
        move(cancel)
        await advance(1.5 * LIMIT)
        return "done"

    if kind == "kernel":
        async with nothing_left(), Cancelable(timeout=LIMIT) as block:
            assert await work(block) == "done"
        return
    app = FastAPI()

    async def with_handle(cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(LIMIT))]) -> str:
        async with cancel:
            return await work(cancel)
        raise AssertionError

    async def with_untimed_handle(cancel: RequestCancelable) -> str:
        async with cancel:
            return await work(cancel)
        raise AssertionError

    async def plain() -> str:
        return await work(current_cancelable())

    async def in_a_thread() -> str:
        cancel = current_cancelable()
        await anyio.to_thread.run_sync(move, cancel)
        await advance(1.5 * LIMIT)
        return "done"

    if kind == "middleware":
        app.add_middleware(RequestCancelationMiddleware, default_timeout=LIMIT)
    endpoints: dict[str, Any] = {
        "handle": with_handle,
        "decorator": with_cancelation(timeout=LIMIT)(plain),
        "middleware": with_untimed_handle,
        "thread": with_cancelation(timeout=LIMIT)(in_a_thread),
    }
    app.get("/")(endpoints[kind])
    async with nothing_left(), CancelableClient(app) as client:
        assert (await client.get("/")).json() == "done"


async def test_a_deadline_that_was_moved_still_strikes() -> None:
    with pytest.raises(TimeoutCancelation, match=r"Timed out after 0.06 seconds"):  # noqa: PT012
        async with Cancelable(timeout=SOON) as block:
            assert block.extend(SOON)
            await anyio.sleep_forever()
    assert block.elapsed >= 2 * SOON


async def test_moving_a_deadline_too_late_or_where_there_is_none() -> None:
    async with Cancelable() as block:
        assert not block.extend(1)
        assert not block.disable_timeout()
    before = Cancelable(timeout=SOON)
    assert before.extend(LONG)
    assert before.remaining() == SOON + LONG
    with pytest.raises(TimeoutCancelation):  # noqa: PT012
        async with Cancelable(timeout=0.001) as block:
            try:
                await anyio.sleep_forever()
            finally:
                assert not block.extend(LONG)
    assert not block.extend(LONG)
    with pytest.raises(ValueError, match="extend must be zero or more seconds"):
        block.extend(-1)
    with pytest.raises(ValueError, match="extend"):
        block.extend(math.nan)


def wrong(value: object) -> Any:
    return value


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TimeoutPolicy(-1), ValueError, "zero or more seconds"),
        (lambda: TimeoutPolicy(wrong("1")), TypeError, "takes seconds"),
        (lambda: TimeoutPolicy(1, status_code=200), ValueError, "must be an error status"),
        (lambda: TimeoutPolicy(1, status_code=408), ValueError, "send the request again"),
        (lambda: TimeoutPolicy(1, response=wrong("late")), TypeError, "a function of the request and the error"),
        (lambda: TimeoutPolicy(1, response=wrong(str.upper)), TypeError, "a function of the request and the error"),
        (
            lambda: FastAPI().get("/", dependencies=[Depends(timeout_policy)])(lambda: None),
            TypeError,
            "Call it, with a name",
        ),
        (lambda: timeout_policy(wrong(1)), TypeError, "the name of a policy or a TimeoutPolicy"),
        (lambda: with_cancelation(policy=wrong(1)), TypeError, "the name of a policy or a TimeoutPolicy"),
        (lambda: with_cancelation(policy="a", timeout=1), TypeError, "not both"),
        (lambda: RequestCancelationMiddleware(FastAPI(), policies={"a": wrong(1)}), TypeError, "'a' is 1"),
        (lambda: RequestCancelationMiddleware(FastAPI(), default_policy="a"), LookupError, "no timeout policy 'a'"),
        (lambda: RequestCancelationMiddleware(FastAPI(), default_policy=wrong(3)), TypeError, "default_policy must be"),
        (
            lambda: RequestCancelationMiddleware(FastAPI(), default_timeout=3, default_policy=TimeoutPolicy(1)),
            TypeError,
            "not both",
        ),
        (lambda: configure(timeouts_under_debugger=wrong(1)), TypeError, "True or False"),
    ],
)
def test_wrong_use_is_told_when_the_app_is_built(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def traced(trace: Any, function: Any) -> Any:
    """What ``function`` returns in a thread that is traced."""
    results: list[Any] = []

    def run() -> None:
        sys.settrace(trace)
        try:
            results.append(function())
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def test_a_debugger_is_told_from_a_coverage_tool() -> None:
    def trace(*args: object) -> None: ...

    assert not is_debugged()
    debugger = bdb.Bdb()
    debugger.reset()
    assert traced(debugger.trace_dispatch, is_debugged)
    assert not traced(trace, is_debugged)


PROGRAM = """
import bdb, sys, threading
import anyio
from fastapi import FastAPI
from cancelable_deps import configure, with_cancelation
from cancelable_deps.testing import CancelableClient

app = FastAPI()

@app.get("/")
@with_cancelation(timeout=0.02)
async def endpoint():
    await anyio.sleep(0.1)
    return "done"

async def main():
    async with CancelableClient(app) as client:
        print((await client.get("/")).status_code)

class Debugger(bdb.Bdb):
    def user_line(self, frame):
        pass

for asked_for in (False, True):
    configure(timeouts_under_debugger=asked_for)
    for backend in ("asyncio", "trio"):
        debugger = Debugger()
        debugger.reset()
        sys.settrace(debugger.trace_dispatch)
        anyio.run(main, backend=backend)
        sys.settrace(None)
"""


def test_timeouts_are_off_under_a_debugger_unless_asked_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=scaled(50), check=True
    )
    assert done.stdout.split() == ["200", "200", "504", "504"]


@pytest.mark.real
def test_timeouts_strike_under_coverage(tmp_path: Path) -> None:
    program = PROGRAM.replace("sys.settrace(debugger.trace_dispatch)", "").replace("sys.settrace(None)", "")
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "coverage", "run", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=scaled(50), check=False)
    assert done.stdout.split() == ["504"] * 4, done.stderr


def test_the_setting_is_off_by_default() -> None:
    assert settings.timeouts_under_debugger is False


async def test_a_policys_error_in_the_applications_own_handler() -> None:
    app = application(default_policy="own")

    @app.exception_handler(CancelationError)
    async def told(request: Request, error: CancelationError) -> Response:
        return Response(json.dumps([error.status_code, error.reason]), status_code=error.status_code)

    async with CancelableClient(app) as client:
        async with client.start("GET", "/handle") as call:
            pass
        assert_cancelled(call, CancelationReason.TIMEOUT)
        assert (await call.response()).json() == [503, "timeout"]
