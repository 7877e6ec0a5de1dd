"""Every snippet of docs/ runs, and does what its page says."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import anyio
import httpx
import pytest
import structlog
import trio.testing
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp

import cancelable_deps
import cancelable_deps.checks
import cancelable_deps.databases
import cancelable_deps.deadlines
import cancelable_deps.observability
import cancelable_deps.operations
import cancelable_deps.testing
from cancelable_deps import CancelationReason, begin_shutdown, configure
from cancelable_deps.kernel.detached import all_detached
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.testing import Call, CancelableClient, SocketClosed, advance, assert_cancelled
from tests.calls import CEILING, connected, get, hang_up, movable_clock, running
from tests.redis_groups import redis_sentinels
from tests.redis_server import redis_server
from tests.snippets import PAGES, ROOT, compiled, forgotten, run, snippets_of

pytestmark = pytest.mark.anyio

asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"])
"""For code of others, which knows no other event loop."""

mock_clock = pytest.mark.parametrize(
    "anyio_backend", ["asyncio", pytest.param(("trio", {"clock": trio.testing.MockClock()}), id="trio")]
)
"""For tests that are tests themselves, and call `advance`."""


def events(body: bytes) -> list[tuple[str, Any]]:
    """Return name and data of each Server-Sent Event."""
    found = re.findall(r"event: (.*)\ndata: (.*)\n", body.decode())
    return [(name, json.loads(data)) for name, data in found]


async def after(seconds: float, app: ASGIApp, path: str, **options: Any) -> Call:
    """Return a request that has run for ``seconds`` of the event loop's clock, or has ended before."""
    async with running(app, path, **options) as call:
        await call.running()
        await advance(seconds)
    return call


# The pages themselves


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_snippet_is_forgotten(page: Path) -> None:
    assert forgotten(page, Path(__file__).read_text()) == []


def test_every_page_is_in_the_navigation() -> None:
    # `--strict` says nothing of a page that the navigation leaves out, or names and does not find.
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert sorted(re.findall(r"- ([\w-]+\.md)$", navigation, re.MULTILINE)) == [page.name for page in PAGES]


def test_the_reference_has_every_public_name() -> None:
    found = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    public = [f"cancelable_deps.{name}" for name in cancelable_deps.__all__]
    for module in (
        cancelable_deps.checks,
        cancelable_deps.databases,
        cancelable_deps.deadlines,
        cancelable_deps.observability,
        cancelable_deps.operations,
        cancelable_deps.testing,
    ):
        public += [f"{module.__name__}.{name}" for name in module.__all__]
    assert sorted(found) == sorted(public)


def test_snippets_import_from_the_public_modules_alone() -> None:
    imports = {
        module
        for page in PAGES
        for snippet in snippets_of(page).values()
        for module in re.findall(r"(?:from|import) (cancelable_deps[\w.]*)", snippet)
    }
    public = ("", ".checks", ".databases", ".deadlines", ".observability", ".operations", ".testing")
    assert imports <= {f"cancelable_deps{module}" for module in public}


# index.md, decorator.md, handles.md


async def test_first_steps() -> None:
    app = run("index.md", "First steps")["app"]
    assert (await hang_up(app, "/report")).status == 499


async def test_decorator() -> None:
    names = run("decorator.md", "The decorator")
    assert (await hang_up(names["app"], "/generate/small", "POST")).status == 499
    assert names["stopped"] == [CancelationReason.DISCONNECT]


async def test_decorator_among_others(capsys: pytest.CaptureFixture[str]) -> None:
    app = run("decorator.md", "Other decorators")["app"]
    assert (await get(app, "/items/3")).json() == 3
    assert capsys.readouterr().out == "called with {'number': 3}\n"
    parameters = (await get(app, "/openapi.json")).json()["paths"]["/items/{number}"]["get"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == ["number"]


def test_decorated_handlers_are_called() -> None:
    run("decorator.md", "Calling a decorated handler yourself")


async def test_part_of_a_handler() -> None:
    names = run("handles.md", "A part of a handler")
    assert (await hang_up(names["app"], "/search")).status == 499
    assert names["released"] == ["connection"]
    assert "parameters" not in (await get(names["app"], "/openapi.json")).json()["paths"]["/search"]["get"]


async def test_handle_with_a_timeout() -> None:
    app = run("handles.md", "A timeout")["app"]
    assert (await get(app, "/suggest")).json() == ["something cheaper"]


@movable_clock
async def test_what_a_block_can_tell() -> None:
    names = run("handles.md", "What a block can tell, and be told")
    assert (await after(50, names["app"], "/render")).json() == {"enough": True}
    call = await get(names["app"], "/quota")
    assert (call.status, call.json()) == (499, {"detail": "Your quota is used up"})
    assert names["stopped"] == ["manual: Your quota is used up"]


async def test_past_the_point_of_no_return() -> None:
    names = run("handles.md", "Past the point of no return")
    assert (await hang_up(names["app"], "/order", "POST")).status == 499
    assert names["paid"] == [True]


async def test_condition() -> None:
    app = run("handles.md", "A condition")["app"]
    assert (await get(app, "/export")).json() == "not enough space"


async def test_task_group() -> None:
    app = run("handles.md", "Several tasks")["app"]
    assert (await get(app, "/shards/4")).json() == [0, 1, 2, 3]
    call = await get(app, "/shards/102")
    assert (call.status, call.json()) == (409, {"detail": "no such shard"})


async def test_event() -> None:
    app = run("handles.md", "A stopping point of your own")["app"]
    answer = (await hang_up(app, "/count")).json()
    assert answer["stopped_by"] == "disconnect"
    assert answer["rows"] < 1000


@movable_clock
async def test_event_before_the_timeout() -> None:
    app = run("handles.md", "A stopping point before the timeout")["app"]
    call = await after(25.5, app, "/search")
    assert call.status == 200
    answer = call.json()
    assert answer["complete"] is False
    assert answer["found"] > 0


async def test_detached_work() -> None:
    names = run("handles.md", "Work that goes on")
    assert (await hang_up(names["app"], "/prices/7")).status == 499
    await all_detached(current_loop()).wait_empty()
    assert names["prices"] == {"7": 42}
    assert (await get(names["app"], "/prices/7")).json() == 42


# middleware.md, policies.md, guarantees.md


@movable_clock
async def test_middleware() -> None:
    app = run("middleware.md", "A whole application")["app"]
    assert (await after(60, app, "/anything")).status == 504
    assert (await after(60, app, "/export")).json() == "takes its time"
    assert (await after(60, app, "/health")).json() == "not covered"


@movable_clock
async def test_middleware_around_a_bare_application() -> None:
    app = run("middleware.md", "A whole application (2)")["app"]
    assert (await after(30, app, "/")).status == 504


@movable_clock
async def test_route_class() -> None:
    app = run("middleware.md", "One router")["app"]
    assert (await after(30, app, "/slow")).status == 504


@movable_clock
async def test_policies() -> None:
    names = run("policies.md", "Timeout policies")
    app: FastAPI = names["app"]
    assert (await after(10, app, "/anything")).status == 504
    call = await after(5, app, "/search")
    assert (call.status, call.json()) == (503, {"try": "again later", "path": "/search"})
    assert (await after(3, app, "/import")).json() == "imported"
    assert names["soon"].exceeded == 1
    assert (await after(20, app, "/render")).json() == "rendered"
    assert (await after(20, app, "/batch")).json() == "all of it"


@movable_clock
async def test_the_time_of_the_client() -> None:
    app = run("deadlines.md", "The time of the client")["app"]
    call = await after(5, app, "/report", headers={"Prefer": "wait=5"})
    assert (call.status, call.headers["x-deadline-expired"]) == (504, "1")
    assert (await after(20, app, "/report")).json() == "done"
    assert (await get(app, "/left", headers={"grpc-timeout": "5S"})).json() <= 5


async def test_the_services_behind() -> None:
    names = run("deadlines.md", "The services behind yours")
    called: dict[str, str | None] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        called[request.url.host] = request.headers.get("prefer")
        return httpx.Response(200, json=["tea"])

    hooks = names["http"].event_hooks
    names["http"] = httpx.AsyncClient(transport=httpx.MockTransport(answer), event_hooks=hooks)
    assert (await get(names["app"], "/offers", headers={"prefer": "wait=500"})).json() == ["tea"]
    assert called["statistics"] is None
    assert int((called["prices"] or "").removeprefix("wait=")) < 500


def test_deadline_transport() -> None:
    with run("deadlines.md", "A transport")["http"] as client:
        assert isinstance(client, httpx.Client)


async def test_the_header_alone() -> None:
    headers_of_a_call = run("deadlines.md", "Other clients")["headers_of_a_call"]
    assert headers_of_a_call() == {}
    async with cancelable_deps.Cancelable(timeout=500):
        assert 0 < int(headers_of_a_call()["connect-timeout-ms"]) < 500_000


async def test_errors_meet_the_applications_own_handlers() -> None:
    call = await get(run("guarantees.md", "Reasons and statuses")["app"], "/report")
    assert (call.status, call.json()) == (504, {"reason": "timeout", "is_error": True})


@pytest.mark.parametrize("reason", CancelationReason)
@pytest.mark.parametrize("page", ["guarantees.md"])
def test_the_table_of_reasons_is_right(reason: CancelationReason, page: str) -> None:
    row = re.search(rf"^\| `{reason.name}` \|.*$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    assert row is not None
    cells = [cell.strip() for cell in row[0].strip("|").split("|")]
    assert cells[2].startswith(str(reason.status_code))
    assert cells[3] == ("(closed)" if reason.close_code is None else str(reason.close_code))
    assert cells[4] == ("yes" if reason.is_error else "no")


async def test_defaults() -> None:
    try:
        run("guarantees.md", "Two defaults")
    finally:
        configure(cleanup_grace=5, listen_after=0.005)


# streams.md, progress.md, websockets.md


async def test_stream() -> None:
    app = run("streams.md", "Streams and Server-Sent Events")["app"]
    call = await get(app, "/tokens")
    assert (call.body.count(b"data: "), call.is_complete) == (5, True)


@movable_clock
async def test_what_a_client_sees() -> None:
    names = run("streams.md", "What a client sees")
    call = await after(5, names["app"], "/events")
    assert call.is_complete
    assert b"data: tick" in call.body
    assert events(call.body) == [("cancelled", {"reason": "timeout", "message": "Timed out after 5 seconds"})]
    call = await after(5, names["app"], "/rows", raise_app_exceptions=False)
    assert (call.status, call.is_complete, names["released"]) == (200, False, ["cursor"])


@movable_clock
@pytest.mark.skipif(find_spec("fastapi.sse") is None, reason="FastAPI has generator endpoints since 0.135")
async def test_generator_endpoint() -> None:
    names = run("streams.md", "FastAPI's generator endpoints")
    call = await after(5, names["app"], "/prices")
    assert b"data: 1.5" in call.body
    assert [name for name, _ in events(call.body)] == ["cancelled"]
    assert names["cleaned"] == ["feed"]


async def test_progress() -> None:
    app = run("progress.md", "Progress")["app"]
    call = await get(app, "/report")
    assert call.body.decode().strip() in (ROOT / "docs/progress.md").read_text()


def test_progress_without_a_stream() -> None:
    run("progress.md", "Without a stream")


async def test_websockets() -> None:
    app = run("websockets.md", "WebSockets")["app"]
    async with connected(app, "/report") as socket:
        await socket.accepted()
        await socket.listened_to()
    assert_cancelled(socket, CancelationReason.DISCONNECT)
    async with connected(app, "/chat") as socket:
        for text in ("hello", "again"):
            await socket.send_text(text)
            assert await socket.receive_text() == text.upper()
        with pytest.raises(SocketClosed, match=r"4504: No message for 0\.2 seconds"):
            await socket.receive_text()


# threads.md


async def test_def_handlers() -> None:
    app = run("threads.md", "A def handler")["app"]
    assert (await hang_up(app, "/primes")).status == 499
    assert (await get(app, "/wait")).status == 504
    assert (await get(app, "/legacy")).status == 504


async def test_threads_and_processes() -> None:
    app = run("threads.md", "Work in a thread or in a process, from an async handler")["app"]
    assert (await get(app, "/factors/17")).json() == {"root": 4, "digits": 15}


async def test_blocking_call() -> None:
    app = run("threads.md", "A blocking call that can be interrupted")["app"]
    assert (await hang_up(app, "/count")).reason is CancelationReason.DISCONNECT


# databases.md


@asyncio_only
async def test_databases_session() -> None:
    names = run("databases.md", "A session for each request")
    assert (await get(names["app"], "/answer")).json() == 42
    await names["engine"].dispose()


@pytest.mark.parametrize("path", ["/def", "/async"])
async def test_databases_in_threads(path: str) -> None:
    app = run("databases.md", "A driver that blocks its thread")["app"]
    assert (await hang_up(app, path)).reason is CancelationReason.DISCONNECT


async def test_databases_limit() -> None:
    class Connection:
        autocommit = False
        statements: ClassVar[list[str]] = []

        async def execute(self, statement: str) -> None:
            self.statements.append(statement)

    await run("databases.md", "A limit that the server keeps")["report"](Connection())
    first, _ = Connection.statements
    assert re.fullmatch(r"select set_config\('statement_timeout', '30\d{3}', true\)", first)


# observability.md


@pytest.fixture
def no_hooks_left() -> Iterator[None]:
    yield
    configure(on_event=())


@pytest.fixture
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("no_hooks_left")
async def test_telemetry() -> None:
    app = run("observability.md", "OpenTelemetry")["app"]
    assert (await hang_up(app, "/reports/7")).status == 499


@pytest.mark.usefixtures("no_hooks_left")
async def test_prometheus() -> None:
    app: FastAPI = run("observability.md", "Prometheus")["app"]

    @app.get("/reports/{id}")
    async def report(id: int) -> None:
        await anyio.sleep(60)

    assert (await hang_up(app, "/reports/7")).status == 499
    page = (await get(app, "/metrics/", headers={"accept-encoding": "identity"})).body.decode()
    found = [
        sample.labels
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "cancelable_deps_cancelations_total"
    ]
    assert {"http_route": "/reports/{id}", "kind": "request", "reason": "disconnect"}.items() <= found[-1].items()


@pytest.mark.usefixtures("no_hooks_left")
async def test_hook() -> None:
    names = run("observability.md", "A hook of your own")
    for _ in range(2):
        assert (await hang_up(names["app"], "/reports/7")).status == 499
    assert names["counts"] == {("disconnect", "/reports/{id}"): 2}


@pytest.mark.usefixtures("logging_restored")
async def test_ids_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    app = run("observability.md", "Logs")["app"]
    async with CancelableClient(app) as client:
        assert (await client.get("/reports/7")).status_code == 200
        assert (await client.get("/reports/8", headers={"operation-id": "mine"})).status_code == 200
    first, second = [line for line in capsys.readouterr().out.splitlines() if "rendering" in line]
    assert re.fullmatch(r"INFO \[w[\w-]{11}\.[\w-]{16}\] rendering", first)
    assert second == "INFO [mine] rendering"


async def test_ids_in_the_lines_of_structlog() -> None:
    names = run("observability.md", "structlog")
    written = StringIO()
    try:
        structlog.configure(logger_factory=lambda *args: structlog.WriteLogger(written))
        async with cancelable_deps.operations.Operations() as operations:
            names["log"].info("outside")
            async with operations.track(id="job-1"):
                names["log"].info("inside", rows=3)
    finally:
        structlog.reset_defaults()
    assert [json.loads(line) for line in written.getvalue().splitlines()] == [
        {"event": "outside", "operation_id": None},
        {"event": "inside", "operation_id": "job-1", "rows": 3},
    ]


@pytest.mark.usefixtures("logging_restored")
async def test_ids_in_the_lines_of_loguru(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("observability.md", "loguru")
    logger = names["logger"]
    try:
        async with cancelable_deps.operations.Operations() as operations, operations.track(id="job-1"):
            logger.info("by loguru")
            logging.getLogger("somewhere").warning("by logging")
        logger.info("outside")
        assert (await hang_up(run("index.md", "First steps")["app"], "/report")).status == 499
    finally:
        logger.remove()
        logger.configure(patcher=lambda record: None)
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == ["INFO [job-1] by loguru", "WARNING [job-1] by logging", "INFO [None] outside"]
    assert re.fullmatch(r"INFO \[None\] GET /report cancelled after \S+ s: disconnect", last)


def test_sentry() -> None:
    # It changes the whole process, and is in the dependency group `compat` alone: tests/compat/test_observers.py runs it.
    compiled("observability.md", "Sentry")


# operations-redis.md


async def test_operations_across_workers() -> None:
    heading = "Operations across workers"
    assert compiled("operations-redis.md", "Operations across workers")
    with redis_server() as server:
        text = snippets_of(ROOT / "docs/operations-redis.md")[heading].replace(
            "localhost:6379", f"127.0.0.1:{server.port}"
        )
        here: dict[str, Any] = {"__name__": "snippet"}
        there: dict[str, Any] = {"__name__": "snippet"}
        exec(text, here)  # noqa: S102 - our own pages
        exec(text, there)  # noqa: S102 - our own pages
        async with here["operations"] as operations, CancelableClient(there["app"]) as client:
            operation = await operations.start(wait_until_stopped)
            assert (await client.post(f"/jobs/{operation.id}/stop")).json() == "cancelled"


@pytest.mark.real
@asyncio_only
@pytest.mark.parametrize("heading", ["Redis Sentinel", "Redis Sentinel (2)"])
async def test_operations_behind_sentinels(heading: str) -> None:
    assert compiled("operations-redis.md", "Redis Sentinel")
    assert compiled("operations-redis.md", "Redis Sentinel (2)")
    with redis_sentinels() as sentinels:
        text = snippets_of(ROOT / "docs/operations-redis.md")[heading]
        for number, port in enumerate(sentinels.ports):
            text = text.replace(str(26379 + number), str(port))
        names: dict[str, Any] = {"__name__": "snippet"}
        exec(text, names)  # noqa: S102 - our own pages
        async with CancelableClient(names["app"]):
            operation = await names["operations"].start(wait_until_stopped)
            assert (await names["operations"].cancel(operation.id, wait=10)).outcome == "cancelled"
            assert f"{{app}}:op:{operation.id}" in sentinels.master.names()
        if heading == "Redis Sentinel":
            for each in names["sentinel"].sentinels:
                await each.aclose()
            await vars(names["operations"].backend)["_own"].aclose()


async def wait_until_stopped(cancel: Any) -> None:
    await anyio.sleep_forever()


# mcp.md, llm-usage.md, reverse-proxy.md


def test_recipes() -> None:
    # `test_recipes.py` compares them with the programs that they are parts of, and which have tests of their own.
    compiled("mcp.md", "A tool call that stops")
    compiled("mcp.md", "The application")
    compiled("mcp.md", "The application (2)")
    compiled("llm-usage.md", "The stream")
    compiled("llm-usage.md", "The stream (2)")
    compiled("llm-usage.md", "What the ledger says")
    compiled("reverse-proxy.md", "The request and its answer")
    compiled("reverse-proxy.md", "The request and its answer (2)")
    compiled("reverse-proxy.md", "Headers of this hop")
    compiled("reverse-proxy.md", "The time that is left")
    compiled("reverse-proxy.md", "The time that is left (2)")


# check.md


def test_check() -> None:
    run("check.md", "When it runs")


# shutdown.md, without-a-request.md, testing.md


async def test_shutdown() -> None:
    app = run("shutdown.md", "When the server shuts down")["app"]
    async with running(app, "/next", lifespan=True) as call:
        assert call.scope["state"] == {"pool": "open"}
        await call.running()
        begin_shutdown()
    assert call.json() == "signal"


async def test_shutdown_without_a_signal() -> None:
    app = run("shutdown.md", "Without a signal")["app"]
    async with cancelable_deps.testing.CancelableClient(app) as client, client.start("GET", "/report") as call:
        await call.running()
        assert (await client.post("/internal/drain")).json() is True
        response = await call.response()
    assert (response.status_code, response.headers["retry-after"]) == (503, "30")


def test_blocks_and_tokens() -> None:
    run("without-a-request.md", "Blocks and tokens")


def test_blocks_inside_blocks() -> None:
    run("without-a-request.md", "Blocks inside blocks")


async def test_starlette() -> None:
    app = run("without-a-request.md", "Starlette, and handlers without Depends")["app"]
    assert (await get(app, "/both")).json() == "both done"
    assert (await get(app, "/one")).json() == "done"
    assert (await hang_up(app, "/gone")).json() == "gone"


@mock_clock
async def test_testing() -> None:
    names = run("testing.md", "Hanging up, and letting the time pass")
    await names["test_client_hangs_up"]()
    await names["test_time_is_up"]()


async def test_testing_at_a_given_moment() -> None:
    names = run("testing.md", "Hanging up at a given moment")
    await names["test_upload_breaks_off"]()
    await names["test_download_breaks_off"]()


@mock_clock
async def test_testing_websockets() -> None:
    names = run("testing.md", "WebSockets")
    await names["test_client_drops"]()
    await names["test_time_is_up"]()


@pytest.mark.usefixtures("no_tasks_left")
async def test_testing_with_fixtures(cancelable_client: Any) -> None:
    await run("testing.md", "For pytest")["test_hello"](cancelable_client)


@mock_clock
async def test_testing_operations() -> None:
    await run("testing.md", "Operations of several workers")["test_a_worker_is_killed"]()


# operations.md


def served(names: dict[str, Any]) -> CancelableClient:
    return CancelableClient(names["app"], ceiling=CEILING)


async def test_operations() -> None:
    names = run("operations.md", "Operations")
    async with served(names) as client, client.start("GET", "/report", headers={"operation-id": "mine"}) as call:
        await call.running()
        stopped = await client.post("/stop/mine")
        assert stopped.json()["outcome"] == "cancelled"
        response = await call.response()
    assert (response.status_code, response.headers["operation-id"]) == (499, "mine")
    assert response.json() == {"detail": "stopped by its stop button"}


async def test_operations_which_one() -> None:
    names = run("operations.md", "Which one")
    async with served(names) as client, client.start("GET", "/report") as call:
        with anyio.fail_after(CEILING):
            while (await client.get("/mine")).json() != 1:
                pass
        assert [each.outcome for each in await names["operations"].cancel_all(owner="ann")]
        assert (await call.response()).status_code == 499


async def test_operations_latest_wins() -> None:
    names = run("operations.md", "Latest wins")
    async with served(names) as client:
        ann = {"user": "ann"}
        async with client.start("GET", "/search?text=c", headers=ann) as first:
            await first.running()
            assert (await client.get("/search?text=ca", headers=ann)).json() == "ca"
        assert (await first.response()).json() == {"detail": "superseded by a newer request"}
        assert (await client.get("/export", headers=ann)).json() == "a file"


async def test_operations_background() -> None:
    names = run("operations.md", "Work that outlives its request")
    async with served(names) as client:
        accepted = await client.post("/reports")
        assert (accepted.status_code, accepted.headers["retry-after"]) == (202, "1")
        assert (await client.get(accepted.headers["location"])).json() == {"pages": 3}


async def test_operations_of_a_queue() -> None:
    names = run("operations.md", "Work that outlives its request (2)")
    async with names["operations"] as operations:
        await names["job"]("thumbnails-7")
        assert (await operations.get("thumbnails-7")).state == "finished"


# job-queues.md

PARTS = {
    "The operations, and the work": "reports",
    "The hooks of arq and SAQ": "hooks",
    "arq": "with_arq",
    "SAQ": "with_saq",
    "Celery": "with_celery",
    "Celery (2)": "with_celery",
}
"""The snippets of the page with the example that each is a part of: `tests/compat/test_job_queues.py` runs these."""


def test_job_queues_shows_parts_of_the_examples() -> None:
    compiled("job-queues.md", "The operations, and the work")
    compiled("job-queues.md", "The hooks of arq and SAQ")
    compiled("job-queues.md", "arq")
    compiled("job-queues.md", "SAQ")
    compiled("job-queues.md", "Celery")
    compiled("job-queues.md", "Celery (2)")
    snippets = snippets_of(ROOT / "docs/job-queues.md")
    assert snippets.keys() == PARTS.keys()
    for heading, example in PARTS.items():
        text = (ROOT / f"examples/queues/{example}.py").read_text()
        shown = re.findall(r"^(?:@|async def |def |class ).*?(?=^\S|\Z)", snippets[heading], re.DOTALL | re.MULTILINE)
        assert shown
        for part in shown:
            assert part.strip() in text, part


# operations-http.md


async def test_operations_over_http() -> None:
    names = run("operations-http.md", "Operations over HTTP")
    ann, admin = ("ann", "x"), ("admin", "x")
    async with cancelable_deps.testing.CancelableClient(names["app"]) as client:
        started = await client.post("/reports", auth=ann)
        path = started.headers["location"]
        assert (started.status_code, path) == (202, f"/operations/{started.json()['id']}")
        result = await client.get(f"{path}/result", auth=ann, headers={"prefer": "wait=10"})
        assert (result.status_code, result.json()) == (200, {"pages": 3})
        assert (await client.get(path, auth=("bob", "x"))).status_code == 404
        assert (await client.get(f"/admin{path}", auth=ann)).status_code == 403
        assert (await client.get(f"/admin{path}", auth=admin)).json()["state"] == "finished"
        page = await client.get("/admin/operations/page", auth=admin)
    assert page.headers["content-type"].startswith("text/html")


# moving-from.md


@asyncio_only
async def test_moving_from_a_watcher() -> None:
    watched = await hang_up(run("moving-from.md", "Watcher: before")["app"], "/generate?prompt=x", "POST")
    assert (watched.status, watched.json()) == (200, None)
    assert (await hang_up(run("moving-from.md", "Watcher: after")["app"], "/generate?prompt=x", "POST")).status == 499


@asyncio_only
async def test_moving_from_polling() -> None:
    async with running(run("moving-from.md", "Polling: before")["app"], "/steps", "POST") as polled:
        # Its reader comes and goes: nobody listens to it for long.
        await polled.running()
        polled.hang_up_nowait()
    assert polled.json() < 1000
    assert (await hang_up(run("moving-from.md", "Polling: after")["app"], "/steps", "POST")).json() < 1000


@asyncio_only
async def test_moving_from_a_timeout_in_a_middleware() -> None:
    names = run("moving-from.md", "Timeout: before")
    assert (await get(names["app"], "/report")).status == 504
    assert names["finished"] == ["report"]
    names = run("moving-from.md", "Timeout: after")
    assert (await get(names["app"], "/report")).status == 504
    assert names["finished"] == []


@asyncio_only
async def test_moving_from_fastapi_disconnect() -> None:
    # It needs Python 3.12, and is in the dependency group `rivals` alone.
    compiled("moving-from.md", "fastapi-disconnect: before")
    if find_spec("fastapi_disconnect") is not None:
        await _generates_and_counts(run("moving-from.md", "fastapi-disconnect: before"))
    await _generates_and_counts(run("moving-from.md", "fastapi-disconnect: after"))


@asyncio_only
async def test_moving_from_hother_cancelable() -> None:
    # It needs Python 3.13, and is in the dependency group `rivals` alone.
    compiled("moving-from.md", "hother-cancelable: before")
    if find_spec("hother") is not None:
        names = run("moving-from.md", "hother-cancelable: before")
        await hang_up(names["app"], "/data", raise_app_exceptions=False)
        assert (await get(names["app"], "/quick", raise_app_exceptions=False)).status == 504
    names = run("moving-from.md", "hother-cancelable: after")
    assert (await hang_up(names["app"], "/data")).status == 499
    assert (await get(names["app"], "/quick")).status == 504


async def _generates_and_counts(names: dict[str, Any]) -> None:
    assert (await hang_up(names["app"], "/generate")).status == 499
    assert names["released"] == ["GPU"]
    assert (await hang_up(names["app"], "/agent")).json() >= 1
