"""The rest of a request's time on its way to the services that the request calls."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx
import pytest
from fastapi import FastAPI
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse

from cancelable_deps import (
    Cancelable,
    RequestCancelable,
    RequestCancelationMiddleware,
    TimeoutCancelation,
    TimeoutPolicy,
)
from cancelable_deps.deadlines import ClientTimeout, DeadlineTransport, forward, forward_deadline, no_deadline
from cancelable_deps.kernel.cancelable import block_of
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.kernel.remaining import next_deadline
from cancelable_deps.request import blocks
from cancelable_deps.testing import advance
from tests.calls import CEILING, get, movable_clock, running

from .leftovers import nothing_left

pytestmark = [pytest.mark.anyio, movable_clock]

HEADER = "x-budget"
LEFT = 200
TIMEOUTS = ("connect", "read", "write", "pool")


class Service:
    """A service that is called, and notes the requests it gets."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.transport = httpx.MockTransport(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(200)

    @property
    def header(self) -> str | None:
        """The deadline of the last request."""
        value: str | None = self.requests[-1].headers.get(HEADER)
        return value

    @property
    def timeouts(self) -> dict[str, Any]:
        found: dict[str, Any] = self.requests[-1].extensions["timeout"]
        return found

    def is_told(self, seconds: float, abs: float = CEILING) -> bool:
        return self.header is not None and float(self.header) == pytest.approx(seconds, abs=abs)


WAYS = ["hook", "transport"]
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def service() -> Service:
    return Service()


@asynccontextmanager
async def client_of(service: Service, way: str = "hook", **options: Any) -> AsyncGenerator[httpx.AsyncClient]:
    options.setdefault("header", HEADER)
    timeout = options.pop("timeout", 5)
    if way == "hook":
        hook = forward_deadline(**options)
        made = httpx.AsyncClient(transport=service.transport, event_hooks={"request": [hook]}, timeout=timeout)
    else:
        made = httpx.AsyncClient(transport=DeadlineTransport(service.transport, **options), timeout=timeout)
    async with made as client:
        yield client


@contextmanager
def sync_client_of(service: Service, way: str) -> Generator[httpx.Client]:
    if way == "hook":
        hook = forward_deadline(header=HEADER)
        made = httpx.Client(transport=service.transport, event_hooks={"request": [hook]})
    else:
        made = httpx.Client(transport=DeadlineTransport(service.transport, header=HEADER))
    with made as client:
        yield client


def application(endpoint: Callable[..., Any], **options: Any) -> FastAPI:
    app = FastAPI()
    options = options or {"client_timeout": ClientTimeout([HEADER])}
    app.add_middleware(RequestCancelationMiddleware, **options)
    app.get("/")(endpoint)
    return app


async def ask(endpoint: Callable[..., Any], **options: Any) -> Any:
    call = await get(application(endpoint, **options), headers={HEADER: str(LEFT)})
    assert call.status == 200
    return call


@ways
@pytest.mark.parametrize("margin", [0, 0.05, 100])
async def test_the_rest_of_the_clients_time_less_the_margin_is_sent(service: Service, way: str, margin: float) -> None:
    async def endpoint(cancel: RequestCancelable) -> None:
        async with client_of(service, way, margin=margin) as client:
            await client.get("http://service/")

    await ask(endpoint)
    assert service.is_told(LEFT - margin)
    assert float(service.header or "") <= LEFT - margin


@ways
async def test_the_clients_own_timeouts_are_shortened_to_what_is_left(service: Service, way: str) -> None:
    async def endpoint() -> None:
        async with client_of(service, way, timeout=httpx.Timeout(None, connect=1, read=3 * LEFT)) as client:
            await client.get("http://service/", extensions={"own": 1})
            assert service.requests[-1].extensions["own"] == 1
            assert service.timeouts["connect"] == 1
            for name in ("read", "write", "pool"):
                assert service.timeouts[name] == pytest.approx(LEFT, abs=CEILING)

    await ask(endpoint)


@ways
async def test_the_clients_own_timeouts_do_not_strike_together_with_the_deadline(service: Service, way: str) -> None:
    # Of two that do, trio takes the one or the other, and the handler failed now and then with `httpx.ReadTimeout`.
    async def endpoint(cancel: RequestCancelable) -> None:
        async with client_of(service, way, timeout=None) as client:
            await client.get("http://service/")
            assert min(service.timeouts.values()) - cancel.remaining() >= 0.1

    await ask(endpoint)


@ways
async def test_without_a_deadline_requests_are_as_they_were(service: Service, way: str) -> None:
    async with client_of(service, way) as client:
        await client.get("http://service/")
    assert service.header is None
    assert service.timeouts == dict.fromkeys(TIMEOUTS, 5)


@pytest.mark.parametrize("options", [{"default_timeout": LEFT}, {"default_policy": TimeoutPolicy(LEFT)}])
async def test_a_deadline_of_the_server_is_sent_as_well(service: Service, options: dict[str, Any]) -> None:
    async def endpoint() -> None:
        async with client_of(service) as client:
            await client.get("http://service/")

    await ask(endpoint, **options)
    assert service.is_told(LEFT)


@pytest.mark.parametrize("limit", [100, 1000])
async def test_the_nearest_of_all_blocks_around_counts(service: Service, limit: float) -> None:
    async def call() -> None:
        async with Cancelable(timeout=limit), Cancelable(), client_of(service) as client:
            await client.get("http://service/")

    async def endpoint() -> None:
        await call()
        assert service.is_told(min(limit, LEFT))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)

    await ask(endpoint)
    assert service.is_told(min(limit, LEFT))
    await call()
    assert service.is_told(limit)


@pytest.mark.parametrize(
    ("header", "known", "expected"),
    [
        ("grpc-timeout", None, "200000m"),
        ("connect-timeout-ms", None, "200000"),
        ("X-Envoy-Expected-RQ-Timeout-Ms", None, "200000"),
        ("prefer", None, "wait=200"),
        ("prefer", "return=minimal, wait=500", "return=minimal, wait=200"),
        ("prefer", "wait=3; a, b", "wait=3; a, b"),
        ("prefer", '"', "wait=200"),
        ("x-budget", None, "200.000"),
        ("x-budget", "5", "5"),
        ("x-budget", "500", "200.000"),
        ("x-budget", "garbage", "200.000"),
    ],
)
async def test_each_header_has_its_unit_and_a_smaller_time_is_kept(
    service: Service, header: str, known: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endpoint() -> None:
        found = next_deadline()
        assert found is not None
        block, _ = found
        monkeypatch.setattr(forward, "next_deadline", lambda: (block, 200.0))
        async with client_of(service, header=header, margin=0) as client:
            await client.get("http://service/", headers={} if known is None else {header: known})

    await ask(endpoint)
    assert service.requests[-1].headers[header] == expected


async def test_whole_seconds_that_are_none_are_left_out(service: Service) -> None:
    async with Cancelable(timeout=0.9), client_of(service, header="prefer", margin=0) as client:
        await client.get("http://service/")
    assert "prefer" not in service.requests[-1].headers


async def test_a_header_of_ones_own_is_written_by_a_function(service: Service) -> None:
    async with Cancelable(timeout=LEFT), client_of(service, write=lambda left: f"{left / 60:.0f} min") as client:
        await client.get("http://service/")
    assert service.header == "3 min"


@ways
async def test_a_redirect_gets_what_is_left_by_then(service: Service, way: str) -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        service.requests.append(request)
        await advance(50)
        return httpx.Response(200 if request.url.path == "/there" else 307, headers={"location": "/there"})

    service.transport = httpx.MockTransport(answer)
    async with Cancelable(timeout=LEFT), client_of(service, way) as client:
        await client.get("http://service/", follow_redirects=True)
    first, second = (float(request.headers[HEADER]) for request in service.requests)
    assert first - second >= 50


# No time left


@ways
@pytest.mark.parametrize("of_client", [True, False])
async def test_with_no_more_than_the_margin_nothing_is_sent(service: Service, way: str, of_client: bool) -> None:
    async def endpoint() -> None:
        async with client_of(service, way, margin=LEFT + 1) as client:
            await client.get("http://service/")

    options: dict[str, Any] = {} if of_client else {"default_timeout": LEFT}
    call = await get(application(endpoint, **options), headers={HEADER: str(LEFT)})
    assert (call.status, service.requests) == (504, [])
    assert call.headers.get("x-deadline-expired") == ("1" if of_client else None)


async def test_who_has_no_time_for_the_call_may_still_answer(service: Service) -> None:
    async def endpoint() -> str:
        async with client_of(service, margin=LEFT + 1) as client:
            try:
                await client.get("http://service/")
            except TimeoutError:
                await anyio.lowlevel.checkpoint()
                return "something cheaper"
        return "the answer"

    assert (await ask(endpoint)).json() == "something cheaper"


@ways
async def test_a_deadline_that_the_loop_has_not_seen_yet_is_raised(service: Service, way: str) -> None:
    async def work() -> None:
        async with Cancelable(timeout=LEFT) as cancel, client_of(service, way) as client:
            block_of(cancel).own_deadline = anyio.current_time()
            await client.get("http://service/")

    with pytest.raises(TimeoutCancelation, match="Timed out after 200 seconds"):
        await work()
    assert service.requests == []


@ways
async def test_the_cleanup_of_what_was_stopped_has_no_deadline(service: Service, way: str) -> None:
    async def endpoint() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            async with client_of(service, way) as client:
                await client.delete("http://service/job")

    async with nothing_left(), running(application(endpoint), headers={HEADER: str(LEFT)}) as call:
        await call.running()
        await advance(LEFT)
    assert call.status == 504
    assert (len(service.requests), service.header) == (1, None)


async def test_a_debugger_switches_it_off(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "is_debugged", lambda: True)

    async def endpoint(cancel: RequestCancelable) -> None:
        block: Any = block_of(cancel)
        block.state.doors[0].own_deadline = anyio.current_time()
        async with client_of(service) as client:
            await client.get("http://service/")

    await ask(endpoint)
    assert service.header is None


# Threads


@ways
async def test_a_plain_handler_forwards_as_well(service: Service, way: str) -> None:
    def endpoint() -> None:
        with sync_client_of(service, way) as client:
            client.get("http://service/")

    await ask(endpoint)
    assert service.is_told(LEFT)
    assert service.timeouts == pytest.approx(dict.fromkeys(TIMEOUTS, 5))


@ways
@pytest.mark.parametrize("entered", [True, False])
async def test_a_thread_that_is_past_its_deadline_sends_nothing(service: Service, way: str, entered: bool) -> None:
    goes_on = threading.Event()

    def call() -> None:
        with sync_client_of(service, way) as client:
            client.get("http://service/")

    def endpoint(cancel: RequestCancelable) -> None:
        assert goes_on.wait(CEILING)
        if entered:
            with cancel:
                call()
        else:
            call()

    async with running(application(endpoint), headers={HEADER: str(LEFT)}) as call_to_us:
        await call_to_us.running()
        await advance(LEFT)
        goes_on.set()
    assert (call_to_us.status, call_to_us.headers["x-deadline-expired"], service.requests) == (504, "1", [])


async def test_a_timeout_of_httpx_at_the_deadline_is_that_of_the_deadline() -> None:
    reached = threading.Event()
    goes_on = threading.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        reached.set()
        assert goes_on.wait(CEILING)
        raise httpx.ReadTimeout("too slow", request=request)

    def endpoint() -> None:
        transport = DeadlineTransport(httpx.MockTransport(answer), header=HEADER)
        with httpx.Client(transport=transport) as client:
            client.get("http://service/")

    async with running(application(endpoint), headers={HEADER: str(LEFT)}) as call:
        await anyio.to_thread.run_sync(reached.wait, CEILING)
        await advance(LEFT)
        goes_on.set()
    assert (call.status, call.headers["x-deadline-expired"]) == (504, "1")


@pytest.mark.parametrize("error", [httpx.ReadTimeout, httpx.ConnectError])
async def test_another_failure_of_httpx_stays_what_it_is(error: type[httpx.TransportError]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error("failed", request=request)

    transport = DeadlineTransport(httpx.MockTransport(answer), header=HEADER)
    async with Cancelable(timeout=LEFT), httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(error):
            await client.get("http://service/")


@pytest.mark.usefixtures("anyio_backend")
@pytest.mark.parametrize("error", [httpx.ReadTimeout, httpx.ConnectError])
def test_another_failure_outside_of_any_block_too(error: type[httpx.TransportError]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error("failed", request=request)

    transport = DeadlineTransport(httpx.MockTransport(answer), header=HEADER)
    with httpx.Client(transport=transport) as client, pytest.raises(error):
        client.get("http://service/")


# What the deadline does not reach


async def test_no_deadline_hides_those_around_it(service: Service) -> None:
    async def endpoint() -> None:
        async with client_of(service) as client:
            get_it = partial(client.get, "http://service/")
            with no_deadline():
                await get_it()
                assert service.header is None
                async with Cancelable(timeout=1000):
                    await get_it()
                    assert service.is_told(1000)
                    async with no_deadline():
                        await get_it()
                        assert service.header is None
                    await get_it()
                    assert service.is_told(1000)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(get_it)
                assert service.header is None
            await get_it()
            assert service.is_told(LEFT)

    await ask(endpoint)


async def test_a_shield_hides_them_too(service: Service) -> None:
    async def endpoint(cancel: RequestCancelable) -> None:
        async with client_of(service) as client:
            async with cancel.shield():
                await client.get("http://service/")
            assert service.header is None
            with cancel.shield():
                await client.get("http://service/")
            assert service.header is None
            await client.get("http://service/")
            assert service.is_told(LEFT)

    await ask(endpoint)


async def test_work_after_the_response_has_no_deadline(service: Service) -> None:
    async def work() -> None:
        async with client_of(service) as client:
            await client.get("http://service/")

    async def endpoint() -> JSONResponse:
        return JSONResponse("soon", background=BackgroundTask(work))

    await ask(endpoint)
    assert (len(service.requests), service.header) == (1, None)


@pytest.mark.parametrize("entered", [True, False])
async def test_a_task_that_outlives_its_request_has_none_from_then_on(service: Service, entered: bool) -> None:
    called, may_go_on, ended = anyio.Event(), anyio.Event(), anyio.Event()

    async def work() -> None:
        async with client_of(service) as client:
            await client.get("http://service/")
            assert service.is_told(LEFT)
            called.set()
            await may_go_on.wait()
            await client.get("http://service/")
        ended.set()

    async def endpoint(cancel: RequestCancelable) -> None:
        async with cancel if entered else nullcontext():
            current_loop().spawn(work, copy_context())
        await called.wait()

    await ask(endpoint)
    may_go_on.set()
    with anyio.fail_after(CEILING):
        await ended.wait()
    assert (len(service.requests), service.header) == (2, None)


async def test_a_task_that_outlives_its_block_has_none_from_then_on(service: Service) -> None:
    may_go_on, ended = anyio.Event(), anyio.Event()

    async def work() -> None:
        await may_go_on.wait()
        async with client_of(service) as client:
            await client.get("http://service/")
        ended.set()

    async with Cancelable(timeout=LEFT):
        current_loop().spawn(work, copy_context())
    may_go_on.set()
    with anyio.fail_after(CEILING):
        await ended.wait()
    assert service.header is None


# Other clients


async def test_an_aiohttp_request_gets_the_header() -> None:
    # Its own tests of a `TraceConfig` are in the tier `compat`.
    params = SimpleNamespace(headers={})
    async with Cancelable(timeout=LEFT):
        await forward_deadline(header="grpc-timeout").on_request_start(None, None, params)
    assert params.headers["grpc-timeout"].startswith("199")


async def test_headers_alone() -> None:
    hook, headers = forward_deadline(header=HEADER), dict[str, str]()
    assert (hook.set_header(headers), headers) == (None, {})
    async with Cancelable(timeout=LEFT):
        assert hook.set_header(headers) == pytest.approx(LEFT, abs=CEILING)
    assert list(headers) == [HEADER]
    assert repr(hook) == "<DeadlineHook x-budget>"


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: forward_deadline(header="a b"), ValueError, "cannot be the name"),
        (lambda: forward_deadline(header="a", margin=-1), ValueError, "margin must be zero or more"),
        (lambda: forward_deadline(header="a", margin=math.nan), ValueError, "margin must be zero or more"),
        (lambda: forward_deadline(header="a", write=3), TypeError, "write must be"),  # type: ignore[arg-type]
    ],
)
async def test_wrong_use_says_how_to_do_it_right(
    make: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make()
