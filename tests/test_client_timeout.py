"""The time that a client gives for its request, in a header."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import anyio
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelationError,
    CancelationReason,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    TimeoutPolicy,
    cancelable_with_timeout,
    current_cancelable,
    no_timeout,
    timeout_policy,
    with_cancelation,
)
from cancelable_deps.deadlines import ClientTimeout
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.request import blocks
from cancelable_deps.testing import Call, advance
from tests.calls import CEILING, connected, get, movable_clock, running

from . import asgi
from .leftovers import nothing_left

pytestmark = [pytest.mark.anyio, movable_clock]

LONG = 1000
"""Seconds that pass on the movable clock alone."""

MARKER = "x-deadline-expired"
ALL = ["Prefer", "gRPC-Timeout", "CONNECT-TIMEOUT-MS", "x-envoy-expected-rq-timeout-ms", "X-Budget"]


async def never() -> None:
    await anyio.sleep_forever()


def write(request: Request, error: CancelationError) -> Response:
    return PlainTextResponse("of the policy", status_code=error.status_code)


def application(
    door: str = "middleware",
    endpoint: Callable[..., Any] = never,
    *,
    client: ClientTimeout | None = None,
    **options: Any,
) -> FastAPI:
    """An application whose door honours the headers of clients; `dependencies` are those of the route at `/`."""
    app = FastAPI()
    client = ClientTimeout(ALL) if client is None else client
    dependencies = options.pop("dependencies", [])
    router = APIRouter()
    if door == "middleware":
        app.add_middleware(RequestCancelationMiddleware, client_timeout=client, **options)
    elif "default_policy" in options:
        router = APIRouter(route_class=CancelableRoute.with_policy(options["default_policy"], client_timeout=client))
    else:
        timeout = options.get("default_timeout")
        router = APIRouter(route_class=CancelableRoute.with_timeout(timeout, client_timeout=client))
    router.get("/", dependencies=dependencies)(endpoint)
    app.include_router(router)
    return app


async def after(seconds: float, app: FastAPI, **headers: str) -> Call:
    """A request that has run for so many seconds of the clock, or has ended before."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with nothing_left(), running(app, headers=names) as call:
        await call.running()
        await advance(seconds)
        if not call.has_ended:
            await call.hang_up()
    return call


def is_of_client(call: Call) -> bool:
    """Whether the client's own time has ended the request."""
    assert call.status == 504
    assert call.reason is CancelationReason.TIMEOUT
    return bool(call.headers.get(MARKER) == "1")


doors = pytest.mark.parametrize("door", ["middleware", "route"])


@doors
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefer", "wait=5"),
        ("Prefer", 'respond-later, WAIT = "5" ; a=b'),
        ("grpc-timeout", "5S"),
        ("grpc-timeout", "5000m"),
        ("Connect-Timeout-Ms", "5000"),
        ("x-envoy-expected-rq-timeout-ms", "5000"),
        ("x-budget", "5.0"),
    ],
)
async def test_each_header_sets_the_time(door: str, name: str, value: str) -> None:
    app = application(door)
    assert (await after(4, app, **{name: value})).status == 499
    call = await after(5, app, **{name: value})
    assert is_of_client(call)
    assert call.json() == {"detail": "Timed out after 5 seconds, the client's own limit"}


@doors
async def test_the_smallest_of_several_headers_counts(door: str) -> None:
    assert is_of_client(await after(3, application(door), grpc_timeout="1M", x_budget="3", prefer="wait=20"))


@doors
@pytest.mark.parametrize("kind", ["timeout", "policy"])
@pytest.mark.parametrize("client", [3, 100])
async def test_the_smaller_of_the_clients_and_the_servers_time_counts(door: str, kind: str, client: int) -> None:
    policy = TimeoutPolicy(10, status_code=504, response=write)
    options: dict[str, Any] = {"default_timeout": 10} if kind == "timeout" else {"default_policy": policy}
    call = await after(min(client, 10), application(door, **options), x_budget=str(client))
    assert is_of_client(call) is (client == 3)
    assert (call.body == b"of the policy") is (client == 100 and kind == "policy")


def measured(cancel: Cancelable) -> list[float]:
    return [cancel.remaining(), cancel.deadline - anyio.current_time()]


async def in_handle(cancel: RequestCancelable) -> list[float]:
    return measured(cancel)


async def in_entered_handle(cancel: RequestCancelable) -> list[float]:
    async with cancel:
        return measured(cancel)


async def in_longer_handle(cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(LONG))]) -> list[float]:
    before = measured(cancel)
    async with cancel:
        return before + measured(cancel)


async def in_handler() -> list[float]:
    cancel = current_cancelable()
    assert cancel is not None
    return measured(cancel)


async def in_child_task(cancel: RequestCancelable) -> list[float]:
    found = []

    async def child() -> None:
        async with cancel:
            found.extend(measured(cancel))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child)
    return found


async def in_task_group(get_task_group: RequestTaskGroup, cancel: RequestCancelable) -> list[float]:
    found = []

    async def child() -> None:
        found.extend(measured(cancel))
        found.extend(await in_handler())

    async with get_task_group() as tasks:
        tasks.start_soon(child)
    return found


def in_thread(cancel: RequestCancelable) -> list[float]:
    around = current_cancelable()
    assert around is not None
    before = [cancel.remaining(), around.remaining()]
    with cancel:
        return [*before, cancel.remaining()]


HANDLERS = [in_handle, in_entered_handle, in_longer_handle, in_handler, in_child_task, in_task_group, in_thread]


@doors
@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("decorated", [False, True])
@pytest.mark.parametrize("handler", HANDLERS)
async def test_what_remains_is_the_smallest_of_all(
    door: str, observed: bool, decorated: bool, handler: Callable[..., Any]
) -> None:
    endpoint = with_cancelation(timeout=2 * LONG)(handler) if decorated else handler
    app = application(door, endpoint, default_timeout=3 * LONG)

    async def observe(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    if observed:
        # Inside of the middleware, which then has its handler in another task.
        app.user_middleware.append(Middleware(BaseHTTPMiddleware, dispatch=observe))
    times = (await get(app, headers={"x-budget": "200"})).json()
    assert times == pytest.approx([200] * len(times), abs=CEILING)


async def entered_extension(cancel: RequestCancelable) -> None:
    async with cancel:
        cancel.extend(LONG)
        await never()


async def extension(cancel: RequestCancelable) -> None:
    assert cancel.extend(LONG)
    assert not cancel.extend(LONG)
    await never()


async def disabling(cancel: RequestCancelable) -> None:
    assert cancel.disable_timeout()
    assert not cancel.disable_timeout()
    await never()


async def handle(cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(LONG))]) -> None:
    async with cancel:
        await never()


REPLACED: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "decorator": (with_cancelation(timeout=LONG)(never), []),
    "decorator without": (with_cancelation(timeout=None)(never), []),
    "decorator with a policy": (with_cancelation(policy=TimeoutPolicy(LONG, response=write))(never), []),
    "handle": (handle, []),
    "policy": (never, [Depends(timeout_policy(TimeoutPolicy(LONG, response=write)))]),
    "advisory policy": (never, [Depends(timeout_policy(TimeoutPolicy(1, advisory=True)))]),
    "none": (never, [Depends(no_timeout)]),
    "extend": (extension, []),
    "extend, entered": (entered_extension, []),
    "disable": (disabling, []),
}


@doors
@pytest.mark.parametrize("how", REPLACED)
async def test_a_route_replaces_the_default_and_not_the_clients_time(door: str, how: str) -> None:
    endpoint, dependencies = REPLACED[how]
    app = application(door, endpoint, default_timeout=3, dependencies=dependencies)
    assert (await after(4, app, x_budget="5")).status == 499
    assert is_of_client(await after(5, app, x_budget="5"))


@doors
async def test_a_route_may_have_less_than_the_client_gives(door: str) -> None:
    app = application(door, with_cancelation(timeout=2)(never))
    assert not is_of_client(await after(2, app, x_budget="5"))


async def test_a_timeout_is_extended_up_to_the_clients_time() -> None:
    async def endpoint(cancel: RequestCancelable) -> None:
        assert cancel.extend(1)
        assert cancel.remaining() == pytest.approx(3, abs=1)
        await never()

    assert not is_of_client(await after(3, application(endpoint=endpoint, default_timeout=2), x_budget="50"))


@doors
@pytest.mark.parametrize("value", ["0.04", "0", "0.0000000001"])
async def test_too_little_is_refused_before_any_code_of_the_application(
    door: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")
    called = []
    app = application(
        door,
        lambda: None,
        client=ClientTimeout(["x-budget"], minimum=0.05),
        dependencies=[Depends(lambda: called.append(1))],
    )
    call = await get(app, headers={"x-budget": value})
    assert (call.status, call.headers[MARKER], called) == (504, "1", [])
    assert "which is too little" in call.json()["detail"]
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert (await get(app, headers={"x-budget": "5"})).status == 200
    assert called == [1]


@pytest.mark.parametrize("name", ["grpc-timeout", "prefer", "connect-timeout-ms", "x-budget"])
async def test_no_time_at_all_is_refused_without_a_minimum_too(name: str) -> None:
    value = {"prefer": "wait=0", "grpc-timeout": "0n"}.get(name, "0")
    assert (await get(application(), headers={name: value})).headers[MARKER] == "1"


GARBAGE = {
    "prefer": ["wait", "wait=", "wait=x", "wait=1.5", "wait=-1", 'wait="5', "wait=" + "9" * 11, "wait=1," + "a," * 500],
    "grpc-timeout": ["", "5", "S", "5s", "-5S", "123456789S", "5 S", "\u0665S", "9" * 60_000],
    "connect-timeout-ms": ["", "1.5", "0x10", "12345678901", "1_0", "+5", "9" * 60_000],
    "x-budget": ["", "inf", "nan", "-1", "1e3", "5s", "9" * 60_000, "\xb2"],
}


@doors
@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_is_ignored_or_rejected(door: str, name: str) -> None:
    ignoring = application(door, lambda: "done")
    rejecting = application(door, lambda: "done", client=ClientTimeout(ALL, invalid="reject"))
    for value in GARBAGE[name]:
        raw = [(name.encode(), value.encode("utf-8"))]
        assert (await get(ignoring, headers=raw)).json() == "done"
        call = await get(rejecting, headers=raw)
        assert (call.status, call.json()) == (400, {"detail": f"The header {name} is malformed"})
    assert (
        await get(rejecting, headers={name: {"prefer": "wait=5", "grpc-timeout": "5S"}.get(name, "5")})
    ).status == 200


async def test_a_good_header_counts_beside_a_malformed_one() -> None:
    assert is_of_client(await after(3, application(), grpc_timeout="soon", x_budget="3"))


async def test_other_preferences_are_left_alone() -> None:
    async def endpoint(request: Request) -> list[str]:
        return request.headers.getlist("prefer")

    app = application(endpoint=endpoint, client=ClientTimeout(["prefer"], invalid="reject"))
    given = ["return=minimal", 'handling="lenient, wait=1"; a', "wait=30, wait=2"]
    call = await get(app, headers=[("prefer", value) for value in given])
    assert call.json() == given
    assert call.headers["preference-applied"] == "wait=30"


async def test_a_client_that_wants_202_after_that_time_gives_no_time() -> None:
    assert (await after(50, application(), prefer="wait=5, respond-async")).status == 499


async def test_applied_preferences_are_told() -> None:
    app = application("middleware", lambda: "done")

    @app.get("/own")
    async def own(response: Response) -> None:
        response.headers["Preference-Applied"] = "return=minimal"

    @app.get("/same")
    async def same(response: Response) -> None:
        response.headers["Preference-Applied"] = "wait=3"

    async def told(path: str = "/", value: str = "wait=30") -> list[str]:
        return (await get(app, path, headers={"prefer": value})).headers.get_list("preference-applied")

    assert await told() == ["wait=30"]
    assert await told("/own") == ["return=minimal", "wait=30"]
    assert await told("/same") == ["wait=3"]
    assert await told(value="return=minimal") == []
    assert "preference-applied" not in (await get(app, headers={"x-budget": "30"})).headers
    late = await after(5, application(), prefer="wait=5")
    assert is_of_client(late)
    assert "preference-applied" not in late.headers


@doors
async def test_only_who_is_trusted_sets_the_time(door: str) -> None:
    asked: list[str] = []

    def trust(request: Request) -> bool:
        asked.append(request.url.path)
        return request.headers.get("authorization") == "internal"

    app = application(door, client=ClientTimeout(["x-budget"], trust=trust))
    assert (await after(5, app, x_budget="5")).status == 499
    assert (await after(5, app)).status == 499
    assert asked == ["/"]
    assert is_of_client(await after(5, app, x_budget="5", authorization="internal"))


async def test_more_than_the_maximum_is_the_maximum_and_then_ours() -> None:
    app = application(client=ClientTimeout(["x-budget"], maximum=10))
    assert not is_of_client(await after(10, app, x_budget="100"))
    assert is_of_client(await after(10, app, x_budget="10"))
    assert (await after(11, app)).status == 499


def in_minutes(text: str) -> float | None:
    return None if text == "any" else 60 * int(text)


def broken(text: str) -> float:
    raise ZeroDivisionError(text)


async def test_a_header_of_ones_own_has_a_parser(caplog: pytest.LogCaptureFixture) -> None:
    app = application(
        client=ClientTimeout(parsers={"X-Minutes": in_minutes, "x-broken": broken, "x-nan": lambda _: math.nan})
    )
    assert is_of_client(await after(60, app, x_minutes="1"))
    assert (await after(60, app, x_minutes="any")).status == 499
    assert (await after(60, app, x_minutes="soon")).status == 499
    assert (await after(60, app, x_nan="1")).status == 499
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert (await after(60, app, x_broken="1")).status == 499
    assert "the parser of the header x-broken failed" in caplog.text


@doors
async def test_advisory_mode_logs_and_counts(door: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cancelable_deps")

    async def endpoint(cancel: RequestCancelable, seconds: float) -> float:
        await advance(seconds)
        return cancel.remaining()

    client = ClientTimeout(["x-budget", "prefer"], minimum=8, invalid="reject", advisory=True)
    app = application(door, endpoint, client=client, default_timeout=LONG)
    in_time = await get(app, "/?seconds=1", headers={"x-budget": "5", "prefer": "wait=9"})
    assert in_time.json() == pytest.approx(LONG, abs=100)
    assert "preference-applied" not in in_time.headers
    assert (await get(app, "/?seconds=1", headers={"x-budget": "garbage"})).status == 200
    assert (client.exceeded, caplog.records) == (0, [])
    assert (await get(app, "/?seconds=6", headers={"x-budget": "5"})).status == 200
    assert client.exceeded == 1
    assert "longer than the 5 s of its client (advisory)" in caplog.text
    assert repr(client) == "<ClientTimeout by x-budget, prefer, advisory>"


async def test_a_websocket_lives_as_long_as_it_likes() -> None:
    app = application()

    @app.websocket("/socket")
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()
        await websocket.send_text("still here")

    for value in ("5", "0"):
        async with connected(app, "/socket", headers={"x-budget": value, "prefer": "wait=5"}) as socket:
            await socket.running()
            await advance(50)
            await socket.send_text("?")
            assert await socket.receive_text() == "still here"


@doors
async def test_a_plain_handler_is_stopped_where_it_checks(door: str) -> None:
    goes_on = threading.Event()

    def endpoint() -> str:
        cancel = current_cancelable()
        assert cancel is not None
        assert goes_on.wait(CEILING)
        cancel.check()
        return "too late"

    async with running(application(door, endpoint), headers={"x-budget": "5"}) as call:
        await call.running()
        await advance(5)
        goes_on.set()
    assert is_of_client(call)


@doors
async def test_a_stream_is_aborted_in_the_middle(door: str) -> None:
    closed = []

    async def items() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"item "
                await anyio.sleep(2)
        finally:
            closed.append("closed")

    async def endpoint() -> StreamingResponse:
        return StreamingResponse(items())

    call = await after(50, application(door, endpoint), grpc_timeout="5S")
    assert (call.status, call.body, call.is_complete, closed) == (200, b"item item item ", False, ["closed"])


async def test_work_after_the_response_has_all_the_time_it_wants() -> None:
    done = []

    async def work() -> None:
        await anyio.sleep(50)
        done.append(True)

    async def endpoint() -> Response:
        return PlainTextResponse("soon", background=BackgroundTask(work))

    async with nothing_left(), running(application(endpoint=endpoint), headers={"x-budget": "5"}) as call:
        assert (await call.response()).text == "soon"
        await advance(60)
    assert done == [True]


@pytest.mark.parametrize("headers", [{"x-budget": "5"}, {}])
async def test_a_route_class_inside_leaves_the_default_of_the_middleware(headers: dict[str, str]) -> None:
    app = application("route")
    app.add_middleware(RequestCancelationMiddleware, default_timeout=10)
    call = await after(10, app, **{name.replace("-", "_"): value for name, value in headers.items()})
    assert is_of_client(call) is bool(headers)
    assert not is_of_client(await after(10, app, x_budget="50"))


async def test_both_doors_may_honour_headers() -> None:
    app = application("route", client=ClientTimeout(["x-inner", "prefer"]))
    app.add_middleware(RequestCancelationMiddleware, client_timeout=ClientTimeout(["x-outer", "prefer"]))
    app.get("/done")(lambda: "done")
    assert is_of_client(await after(5, app, x_inner="5", x_outer="50"))
    assert is_of_client(await after(5, app, x_inner="50", x_outer="5"))
    assert (await get(app, "/done", headers={"prefer": "wait=5"})).headers.get_list("preference-applied") == ["wait=5"]


async def test_a_middleware_inside_sees_the_answer() -> None:
    seen = []

    async def observe(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        seen.append((response.status_code, response.headers.get(MARKER)))
        if response.status_code == 200:
            await never()
        return response

    app = FastAPI()
    app.add_middleware(BaseHTTPMiddleware, dispatch=observe)
    app.add_middleware(RequestCancelationMiddleware, client_timeout=ClientTimeout(["x-budget"]), cleanup_grace=0.01)

    @app.get("/")
    async def endpoint() -> str:
        return "done"

    # The dispatch takes longer than the client gives, when the handler has returned.
    call = await after(5, app, x_budget="5")
    assert seen == [(200, None)]
    assert is_of_client(call)
    app.get("/never")(never)
    async with running(app, "/never", headers={"x-budget": "5"}) as other:
        await other.running()
        await advance(5)
    assert is_of_client(other)
    assert seen == [(200, None), (504, "1")]


async def test_a_middleware_that_holds_the_response_back_has_the_clients_time_too() -> None:
    class HoldsBack:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            kept: list[Message] = []

            async def keep(message: Message) -> None:
                kept.append(message)

            await self.app(scope, receive, keep)
            await never()

    app = FastAPI()
    app.add_middleware(HoldsBack)
    app.add_middleware(RequestCancelationMiddleware, client_timeout=ClientTimeout(["x-budget"]), default_timeout=LONG)

    @app.get("/")
    async def endpoint() -> str:
        return "done"

    # In a task of its own, as on a server: under a scope of anyio, as the client of the other tests has, no block moves.
    if current_loop().is_trio:
        pytest.skip("no block moves on trio")
    request = asgi.Call(app, headers={"x-budget": "0.1"})
    with anyio.fail_after(CEILING):
        async with nothing_left():
            await asyncio.create_task(app(request.scope, request.receive, request.send))
    start = request.sent[0]
    assert (start["status"], (MARKER.encode(), b"1") in start["headers"]) == (504, True)


async def test_the_applications_own_handler_has_the_marker() -> None:
    app = application("route")

    @app.exception_handler(CancelationError)
    async def handler(request: Request, error: CancelationError) -> Response:
        return PlainTextResponse("own", status_code=error.status_code, headers=error.headers)

    call = await after(5, app, x_budget="5")
    assert is_of_client(call)
    assert call.body == b"own"


async def test_without_the_option_headers_mean_nothing() -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, default_timeout=10)
    app.get("/")(never)
    headers = {"prefer": "wait=1", "grpc_timeout": "1S"}
    assert (await after(9, app, **headers)).status == 499
    assert not is_of_client(await after(10, app, **headers))


async def test_the_schema_does_not_change() -> None:
    plain = FastAPI()
    plain.get("/")(never)
    assert application("route").openapi() == application("middleware").openapi() == plain.openapi()


async def test_no_timeout_strikes_under_a_debugger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "is_debugged", lambda: True)
    assert (await after(50, application(), x_budget="5")).status == 499


@pytest.mark.usefixtures("at_once")
async def test_a_request_that_is_listened_to_from_the_start() -> None:
    assert is_of_client(await after(5, application(default_timeout=50), x_budget="5"))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ClientTimeout(), ValueError, "needs the names of headers"),
        (lambda: ClientTimeout("prefer"), TypeError, r"such as \['prefer'\]"),
        (lambda: ClientTimeout([3]), TypeError, "name of a header must be a string"),  # type: ignore[list-item]
        (lambda: ClientTimeout(["a b"]), ValueError, "cannot be the name of a header"),
        (lambda: ClientTimeout(["prefer"], maximum=-1), ValueError, "maximum must be zero or more"),
        (lambda: ClientTimeout(["prefer"], minimum=2, maximum=1), ValueError, "maximum must be more than minimum"),
        (lambda: ClientTimeout(["prefer"], trust=3), TypeError, "trust must be a plain function"),  # type: ignore[arg-type]
        (lambda: ClientTimeout(["prefer"], trust=answer_later), TypeError, "trust must be a plain function"),
        (lambda: ClientTimeout(parsers={"x": 3}), TypeError, "parser of 'x'"),  # type: ignore[dict-item]
        (lambda: ClientTimeout(["prefer"], invalid="400"), ValueError, "'ignore' or 'reject'"),  # type: ignore[arg-type]
        (lambda: CancelableRoute.with_timeout(1, client_timeout=3), TypeError, "takes a ClientTimeout"),  # type: ignore[arg-type]
    ],
)
async def test_wrong_use_says_how_to_do_it_right(
    make: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make()


async def answer_later(request: Request) -> bool:
    return True
