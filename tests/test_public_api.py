"""What is exported, and how it looks to a type checker: mypy and pyright read this file as a user's code."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import types
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, assert_type, get_args

import httpx
import pytest
from anyio import CapacityLimiter
from anyio.abc import TaskGroup
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider
from psycopg import AsyncConnection as PsycopgConnection
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request

import cancelable_deps
import cancelable_deps.checks
import cancelable_deps.databases
import cancelable_deps.deadlines
import cancelable_deps.observability
import cancelable_deps.operations
import cancelable_deps.testing
from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelableStreamingResponse,
    CancelableWebSocket,
    CancelationReason,
    CancelationToken,
    CancellationEvent,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    begin_shutdown,
    cancelable_streaming_response,
    cancelable_with_timeout,
    cancelation_lifespan,
    configure,
    create_request_task_group,
    current_cancelable,
    progress_response,
    shutdown_token,
    wait_for_disconnect,
    with_cancelation,
)
from cancelable_deps.checks import Finding, check_stack, check_store
from cancelable_deps.databases import cancelable_session, limit_statements
from cancelable_deps.deadlines import ClientTimeout, DeadlineTransport, forward_deadline, no_deadline
from cancelable_deps.observability import (
    CancelationTelemetry,
    ObservedEvent,
    current_operation_id,
    operation_id_filter,
)
from cancelable_deps.operations import MemoryBackend
from tests.snippets import PAGES, README

DOCS = "".join(path.read_text() for path in [README, *PAGES] if path.name != "api.md")
EXAMPLES = "".join(path.read_text() for path in (Path(__file__).parent.parent / "examples").rglob("*.py"))


MODULES = (
    cancelable_deps,
    cancelable_deps.checks,
    cancelable_deps.databases,
    cancelable_deps.deadlines,
    cancelable_deps.observability,
    cancelable_deps.operations,
    cancelable_deps.testing,
)
NAMES = [(module, name) for module in MODULES[:-1] for name in module.__all__]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all_is_what_is_there(module: Any) -> None:
    there = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert there == set(module.__all__)
    assert module.__all__ == sorted(module.__all__)


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_everything_is_shown_to_users(module: Any, name: str) -> None:
    told_by_pattern = name.endswith("Cancelation") and "a class for each reason" in DOCS
    assert name in DOCS or name in EXAMPLES or told_by_pattern


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_everything_has_a_docstring(module: Any, name: str) -> None:
    value = getattr(module, name)
    if hasattr(value, "__metadata__"):
        assert value.__metadata__
    else:
        assert value.__doc__


def exported_classes() -> dict[str, type]:
    """Return the classes that the package exports, by name, and those that its `Annotated` exports stand for."""
    values = {name: getattr(module, name) for module in MODULES for name in module.__all__}
    meant = {name: get_args(value)[0] if hasattr(value, "__metadata__") else value for name, value in values.items()}
    return {name: value for name, value in meant.items() if inspect.isclass(value)}


def members_of_ours(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties of a class that this package defines, inherited ones included."""
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        wrapped = getattr(member, "fget", None) or getattr(member, "__func__", member)
        is_ours = inspect.isfunction(wrapped) and wrapped.__module__.startswith("cancelable_deps.")
        if is_ours and not name.startswith("_"):
            yield name, wrapped


@pytest.mark.parametrize(
    "cls", [pytest.param(cls, id=name) for name, cls in exported_classes().items() if any(members_of_ours(cls))]
)
def test_every_public_member_has_a_docstring(cls: type) -> None:
    assert [name for name, function in members_of_ours(cls) if not function.__doc__] == []


def test_everything_for_tests_has_a_docstring() -> None:
    # `Outcome` is a Literal, which cannot have one.
    values = {name: getattr(module, name) for module in MODULES[1:] for name in module.__all__}
    assert [name for name, value in values.items() if not value.__doc__ and name != "Outcome"] == []


def test_importing_brings_no_optional_dependency() -> None:
    code = (
        "import sys, cancelable_deps, cancelable_deps.databases\n"
        "print([m for m in ('trio', 'uvloop', 'uvicorn', 'httpx', 'pytest', 'sqlalchemy', 'asyncpg', 'psycopg')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_loads_the_checks_but_a_start() -> None:
    code = (
        "import sys, cancelable_deps, cancelable_deps.operations\n"
        "print([m for m in sys.modules if 'cancelable_deps.checks' in m or 'serving' in m], 'dis' in sys.modules)\n"
        "import cancelable_deps.checks; assert 'argparse' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[]")


def test_nothing_needs_an_http_client() -> None:
    code = (
        "import sys; sys.modules['httpx'] = sys.modules['aiohttp'] = None\n"
        "import cancelable_deps; assert 'cancelable_deps.deadlines' not in sys.modules\n"
        "from cancelable_deps.deadlines import ClientTimeout, DeadlineTransport, forward_deadline\n"
        "ClientTimeout(['prefer']); forward_deadline(header='prefer'); DeadlineTransport(None, header='prefer')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_imports_opentelemetry_but_the_telemetry() -> None:
    # FastAPI itself imports the API since 0.165.
    code = (
        "import sys, cancelable_deps; assert 'cancelable_deps.observability' not in sys.modules\n"
        "from cancelable_deps.observability import CancelationTelemetry\n"
        "ours = {f'cancelable_deps.observability.{name}' for name in ('metrics', 'spans')}\n"
        "assert not ours & set(sys.modules)\n"
        "CancelationTelemetry(); assert ours < set(sys.modules) and 'opentelemetry.sdk' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@with_cancelation
async def bare(item_id: int, *, flag: bool = False) -> str:
    """A user's endpoint."""
    return f"{item_id} {flag}"


@with_cancelation(timeout=timedelta(seconds=3), status_codes={CancelationReason.TIMEOUT: 503}, on_cancel=print)
async def configured(item_id: int) -> list[int]:
    return [item_id]


@with_cancelation
def bare_def(item_id: int, *, flag: bool = False) -> str:
    """A user's endpoint, which runs in a thread."""
    return f"{item_id} {flag}"


@with_cancelation(timeout=3, abandon_thread=True)
def configured_def(item_id: int) -> list[int]:
    return [item_id]


def plain_work(number: int, text: str) -> float:
    with Cancelable() as entered:
        assert_type(entered, Cancelable)
        entered.check()
    return number / len(text)


async def generator(item_id: int) -> AsyncIterator[str]:
    yield f"{item_id}"


# FastAPI has generators as endpoints since 0.135.
generated = with_cancelation(timeout=3)(generator) if find_spec("fastapi.sse") else generator


async def reporting(cancel: Cancelable) -> int:
    await cancel.report_progress("half", {"percent": 50})
    return 1


def streaming_code(cancel: RequestCancelable) -> None:
    assert_type(generated(1), AsyncIterator[str])
    assert_type(cancelable_streaming_response(generated(1), cancel, gap_timeout=3), CancelableStreamingResponse)
    assert_type(CancelableStreamingResponse([b"x"], 200, cancel=cancel), CancelableStreamingResponse)
    assert_type(progress_response(reporting, cancel, timeout=3), CancelableStreamingResponse)
    with cancel.defer_disconnect():
        assert_type(cancel.client_has_left, bool)


async def user_code(
    request: Request,
    cancel: RequestCancelable,
    get_task_group: RequestTaskGroup,
    event: CancellationEvent,
    limited: Annotated[Cancelable, Depends(cancelable_with_timeout(30))],
) -> None:
    assert_type(await bare(1, flag=True), str)
    assert_type(await configured(1), list[int])
    assert_type(await bare_def(1, flag=True), str)
    assert_type(await configured_def(1), list[int])
    assert_type(await cancel.run_in_thread(plain_work, 1, "a"), float)
    assert_type(
        await cancel.run_in_thread(plain_work, 1, "a", abandon_on_cancel=True, limiter=CapacityLimiter(1)), float
    )
    assert_type(await cancel.run_in_process(plain_work, 1, "a"), float)
    async with cancel as entered:
        assert_type(entered, Cancelable)
    assert_type(cancel.reason, CancelationReason | None)
    assert_type(cancel.remaining(), float)
    assert_type(await cancel.cancel(message="enough"), bool)
    assert_type(cancel.cancel_nowait(CancelationReason.MANUAL), bool)
    async with limited, limited.shield():
        limited.check()
    async with get_task_group() as tg:
        assert_type(tg, TaskGroup)
        tg.start_soon(bare, 1)
    assert_type(create_request_task_group(request), AbstractAsyncContextManager[TaskGroup])
    assert_type(event.is_set(), bool)
    assert_type(await event.wait(), CancelationReason)
    assert_type(event.reason, CancelationReason | None)
    assert_type(await wait_for_disconnect(request), None)
    assert_type(current_cancelable(), Cancelable | None)
    assert_type(Cancelable.with_timeout(3), Cancelable)
    token = CancelationToken()
    assert_type(await token.wait(), CancelationReason)

    @cancel.on_cancel
    def told(block: Cancelable) -> None: ...

    told(cancel)


async_maker = async_sessionmaker(class_=AsyncSession)
sync_maker = sessionmaker(class_=Session)
AsyncSessionOfRequest = Annotated[AsyncSession, Depends(cancelable_session(async_maker), scope="function")]
SessionOfRequest = Annotated[Session, Depends(cancelable_session(sync_maker, cleanup_grace=3), scope="function")]


async def with_databases(
    cancel: RequestCancelable, session: AsyncSessionOfRequest, connection: PsycopgConnection
) -> None:
    assert_type(cancelable_session(async_maker), Callable[[], AsyncGenerator[AsyncSession]])
    assert_type(cancelable_session(AsyncSession), Callable[[], AsyncGenerator[AsyncSession]])
    assert_type(cancelable_session(sync_maker), Callable[[], Generator[Session]])
    assert_type(limit_statements(session, cancel), Awaitable[None])
    assert_type(limit_statements(await session.connection(), cancel, timedelta(seconds=1)), Awaitable[None])
    assert_type(limit_statements(connection, cancel, margin=1), Awaitable[None])
    async with cancel.interrupting(print, discard=session.expire_all):
        pass


def with_databases_in_thread(cancel: RequestCancelable, session: SessionOfRequest) -> None:
    limit_statements(session, cancel)
    limit_statements(session.connection(), cancel)
    with cancel.interrupting(session.expire_all):
        pass


@with_cancelation(timeout=3)
async def on_a_socket(websocket: WebSocket, cancel: RequestCancelable) -> None:
    async with CancelableWebSocket(websocket, cancel, timeout=timedelta(hours=1), idle_timeout=30) as socket:
        assert_type(socket, CancelableWebSocket)
        await socket.accept(subprotocol="chat")
        assert_type(await socket.receive_text(), str)
        assert_type(await socket.receive_bytes(), bytes)
        async for text in socket.iter_text():
            await socket.send_text(assert_type(text, str))
        assert_type(socket.cancelable.remaining(), float)
        assert_type(socket.websocket, WebSocket)
        await socket.close(code=1000, reason="done")
    assert_type(await wait_for_disconnect(websocket), None)
    assert_type(create_request_task_group(websocket), AbstractAsyncContextManager[TaskGroup])


async def code_with_deadlines() -> None:
    client_timeout = ClientTimeout(
        ["prefer", "grpc-timeout"],
        parsers={"x-minutes": lambda text: 60 * float(text)},
        maximum=timedelta(minutes=1),
        minimum=0.05,
        trust=lambda request: request.client is not None,
        invalid="reject",
    )
    assert_type(client_timeout.exceeded, int)
    FastAPI().add_middleware(RequestCancelationMiddleware, client_timeout=client_timeout)
    assert_type(CancelableRoute.with_timeout(30, client_timeout=client_timeout), type[CancelableRoute])
    hook = forward_deadline(header="grpc-timeout", margin=timedelta(seconds=0.1))
    async with httpx.AsyncClient(event_hooks={"request": [hook]}) as client:
        with no_deadline():
            await client.get("http://service/")
    transport = DeadlineTransport(httpx.AsyncHTTPTransport(), header="prefer", write=lambda left: f"wait={left:.0f}")
    async with no_deadline(), httpx.AsyncClient(transport=transport):
        pass
    httpx.Client(transport=DeadlineTransport(httpx.HTTPTransport(), header="x-budget"), event_hooks={"request": [hook]})


async def code_with_checks() -> None:
    findings = check_stack(FastAPI(), workers=2, server_grace=timedelta(seconds=30))
    assert_type(findings, list[Finding])
    assert_type(await check_store(MemoryBackend()), list[Finding])
    assert_type(findings[0].level, Literal["warning", "info"])
    assert_type(findings[0].code + findings[0].where + findings[0].message, str)
    cancelation_lifespan(check=False)


def observe(event: ObservedEvent) -> None:
    assert_type(event.what, Literal["started", "running", "cancelled", "ended", "exceeded", "cancel"])
    assert_type(event.kind, Literal["request", "websocket", "background", "detached", "tracked"] | None)
    assert_type(event.reason, CancelationReason | None)
    assert_type(event.seconds, float)
    assert_type(event.route, str | None)


def code_with_telemetry(tracers: TracerProvider, meters: MeterProvider, handler: logging.Handler) -> None:
    configure(on_event=CancelationTelemetry())
    configure(on_event=[CancelationTelemetry(tracer_provider=tracers, meter_provider=meters), observe, print])
    configure(on_event=(), cleanup_grace=3)
    assert_type(current_operation_id(), str | None)
    assert_type(operation_id_filter(), logging.Filter)
    handler.addFilter(operation_id_filter(default=None))


@asynccontextmanager
async def own_lifespan(app: FastAPI) -> AsyncIterator[dict[str, int]]:
    yield {"pool": 1}


@asynccontextmanager
async def lifespan_of_starlette(app: Starlette) -> AsyncIterator[None]:
    assert_type(shutdown_token(), CancelationToken)
    assert_type(begin_shutdown("by order"), bool)
    yield


def test_lifespan_is_accepted_by_the_applications() -> None:
    wrapped = cancelation_lifespan(own_lifespan, grace=timedelta(seconds=10), retry_after=30)
    assert_type(wrapped(FastAPI()), AbstractAsyncContextManager[dict[str, int]])
    assert FastAPI(lifespan=cancelation_lifespan(grace=10, background_grace=5, refuse_new=True))
    assert FastAPI(lifespan=wrapped)
    assert Starlette(lifespan=cancelation_lifespan(lifespan_of_starlette))
    assert APIRouter(lifespan=cancelation_lifespan(lifespan_of_starlette))


def test_middleware_is_accepted_by_add_middleware() -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, default_timeout=30, exclude=["/health"], cleanup_grace=1.5)
    assert app.user_middleware
