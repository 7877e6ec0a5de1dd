# ruff: noqa: SIM117 - the client is one thing, a call another
"""Every file in `examples/` does what its docstring says."""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
import runpy
import sqlite3
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import httpx
import psutil
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from cancelable_deps import CancelationReason, CancelationToken, begin_shutdown
from cancelable_deps.observability import operation_id_filter
from cancelable_deps.testing import CancelableClient, HangUp, SocketClosed, advance, assert_cancelled
from examples import (
    background_report,
    background_worker,
    cancel_by_id,
    databases,
    deadlines,
    disconnect,
    latest_wins,
    middleware,
    observability,
    operations_page,
    partial_result,
    policies,
    processes,
    route_class,
    several_workers,
    shutdown,
    streaming,
    sync_handlers,
    task_group,
    testing,
    timeout,
    upload,
    websocket,
)
from tests.calls import CEILING, connected, movable_clock, running
from tests.redis_server import redis_server

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from fastapi import FastAPI

    Message = MutableMapping[str, Any]

pytestmark = pytest.mark.anyio

EXAMPLES = sorted(path.stem for path in Path(__file__).parent.with_name("examples").glob("[!_]*.py"))


async def hang_up(app: FastAPI, method: str, path: str, *body: bytes) -> int | None:
    """The status of a request whose client leaves before its last byte, as soon as somebody listens for that."""
    size = sum(map(len, body))
    async with CancelableClient(app, ceiling=CEILING) as client:
        async with client.start(method, path, content=body or None, hang_up=HangUp.after_request(size - 1)) as call:
            pass
    return call.status


async def stay(app: FastAPI, method: str, path: str, *body: bytes, after: float = 0) -> httpx.Response:
    """The response to a client that stays, when the clock has gone on by so many seconds."""
    async with CancelableClient(app, ceiling=CEILING) as client:
        async with client.start(method, path, content=body or None) as call:
            if after:
                await call.running()
                await advance(after)
        return await call.response()


async def test_disconnect(capsys: pytest.CaptureFixture[str]) -> None:
    assert await hang_up(disconnect.app, "GET", "/report") == 499
    assert capsys.readouterr().out == "the query is over, its connection is back in the pool\n"


@movable_clock
@pytest.mark.parametrize(("path", "status"), [("/decorated", 504), ("/dependency", 504), ("/own-status", 503)])
async def test_timeout(path: str, status: int) -> None:
    client = await stay(timeout.app, "GET", path, after=0.5)
    assert (client.status_code, client.json()) == (status, {"detail": "Timed out after 0.5 seconds"})


async def test_task_group_hang_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert await hang_up(task_group.app, "GET", "/offers") == 499
    assert sorted(capsys.readouterr().out.splitlines()) == ["far was not waited for", "near was not waited for"]


async def test_task_group_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    client = await stay(task_group.app, "GET", "/offers?article=sold-out")
    assert (client.status_code, client.json()) == (409, {"detail": "near has sold out"})
    assert capsys.readouterr().out == "far was not waited for\n"


async def test_partial_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_result, "PAGES", 5)
    monkeypatch.setattr(partial_result, "imported", {})
    assert await hang_up(partial_result.app, "POST", "/imports/7") == 200
    done = partial_result.imported[7]
    assert 0 < done < 5
    client = await stay(partial_result.app, "POST", "/imports/7")
    assert client.json() == {"from": done, "imported": 5}


@movable_clock
async def test_partial_result_before_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_result, "imported", {})
    answer = (await stay(partial_result.app, "POST", "/imports/8", after=1.6)).json()
    assert answer["stopped"] == "timeout"
    assert 0 < answer["imported"] == partial_result.imported[8] < 30


@movable_clock
async def test_middleware_timeout() -> None:
    assert (await stay(middleware.app, "GET", "/report", after=2)).status_code == 504


async def test_middleware(capsys: pytest.CaptureFixture[str]) -> None:
    assert await hang_up(middleware.app, "GET", "/report") == 499
    assert (await stay(middleware.app, "GET", "/health")).json() == "alive"
    assert (await stay(middleware.app, "POST", "/orders")).json() == "ordered"
    assert capsys.readouterr().out == "the invoice is on its way\n"


async def test_route_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert await hang_up(route_class.app, "GET", "/reports/5") == 499
    assert capsys.readouterr().out == "report 5 was stopped\n"


async def test_upload_complete() -> None:
    client = await stay(upload.app, "POST", "/files", b"first ", b"second")
    assert client.json() == {"bytes": 12, "sha256": hashlib.sha256(b"first second").hexdigest()}


async def test_upload_broken_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert await hang_up(upload.app, "POST", "/files", b"first ", b"second") == 499
    assert re.fullmatch(r"broken off after \d+ bytes; the file is gone\n", capsys.readouterr().out)


async def test_background_worker(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = {"short": 1, "endless": 10_000, "last": 1}
    assert await background_worker.work_off(jobs, CancelationToken(), limit=0.5) == {
        "short": "done",
        "endless": "too slow",
        "last": "done",
    }
    assert "  short: step 1 of 1\n" in capsys.readouterr().out


async def test_background_worker_is_interrupted() -> None:
    stop, outcomes = CancelationToken(), dict[str, str]()

    async def work() -> None:
        outcomes.update(await background_worker.work_off({"endless": 10_000, "next": 1}, stop, limit=60))

    with anyio.fail_after(CEILING):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            await anyio.wait_all_tasks_blocked()
            stop.cancel_nowait(CancelationReason.SIGNAL)
    assert outcomes == {"endless": "interrupted"}


async def test_websocket(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(websocket, "THINKING", 0.001)
    monkeypatch.setattr(websocket, "IDLE", 0.2)
    async with connected(websocket.app, "/ask") as socket:
        await socket.send_text("Why?")
        words = [await socket.receive_text() for _ in range(5)]
        with pytest.raises(SocketClosed, match=r"4504: No message for 0\.2 seconds"):
            await socket.receive_text()
    assert " ".join(words) == "I have thought about 'Why?'"
    assert capsys.readouterr().out == "Why? is answered\n"
    assert (await stay(websocket.app, "GET", "/")).status_code == 200


@pytest.mark.parametrize("path", ["/ask", "/report"])
async def test_websocket_dropped(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with connected(websocket.app, path) as socket:
        await socket.send_text("Why?")
        await socket.running()
    assert_cancelled(socket, CancelationReason.DISCONNECT)
    assert capsys.readouterr().out.endswith(" was stopped: nobody listens any more\n")


@movable_clock
async def test_shutdown(capsys: pytest.CaptureFixture[str]) -> None:
    async with CancelableClient(shutdown.app, ceiling=CEILING) as client:
        async with (
            client.start("GET", "/report") as report,
            client.start("GET", "/ticks") as ticks,
            client.start("POST", "/orders") as orders,
        ):
            await orders.running()
            begin_shutdown()
            assert (await ticks.response()).content == b"tick\ngoodbye\n"
            await advance(2.9)
            assert report.status is None
            await advance(0.1)
            assert report.status == 503
    assert [call.status for call in (report, ticks, orders)] == [503, 200, 200]
    assert capsys.readouterr().out == ("the e-mail waits for the next start, because of a signal\nthe pool is closed\n")


async def test_sync_handlers(capsys: pytest.CaptureFixture[str]) -> None:
    assert await hang_up(sync_handlers.app, "GET", "/primes") == 499
    assert re.fullmatch(r"stopped after \d+ primes: disconnect\n", capsys.readouterr().out)
    assert (await stay(sync_handlers.app, "GET", "/primes/limited")).status_code == 504
    assert re.fullmatch(r"stopped after \d+ primes: timeout\n", capsys.readouterr().out)


async def test_sync_handlers_legacy(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()
    monkeypatch.setattr(sync_handlers, "time", SimpleNamespace(sleep=lambda seconds: may_end.wait(CEILING)))
    assert (await stay(sync_handlers.app, "GET", "/legacy")).status_code == 504
    assert anyio.to_thread.current_default_thread_limiter().borrowed_tokens == 1
    may_end.set()


async def test_processes(capfd: pytest.CaptureFixture[str]) -> None:
    client = await stay(processes.app, "GET", "/collatz?below=1000")
    answer = client.json()
    assert (answer["start"], answer["steps"]) == (871, 178)
    # The next job finds this process waiting, and is killed with it.
    assert await hang_up(processes.app, "GET", "/collatz?below=100000000") == 499
    assert not psutil.pid_exists(answer["process"])
    assert (await stay(processes.app, "GET", "/collatz/limited?below=100000000")).status_code == 504
    assert not [child for child in psutil.Process().children() if "_child.py" in " ".join(child.cmdline())]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_databases(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    connected_to = threading.Event()

    def connect(path: str, *, check_same_thread: bool) -> sqlite3.Connection:
        connected_to.set()
        return sqlite3.connect(path, check_same_thread=check_same_thread)

    monkeypatch.setattr(databases, "sqlite3", SimpleNamespace(connect=connect))
    async with CancelableClient(databases.app, ceiling=CEILING, lifespan=True) as client:
        assert [(await client.post("/visits")).json() for _ in range(2)] == [1, 2]
        async with client.start("GET", "/count") as call:
            assert await anyio.to_thread.run_sync(connected_to.wait, CEILING)
            await call.hang_up()
    assert call.status == 499
    assert capsys.readouterr().out == "the query is over: disconnect\n"


@movable_clock
async def test_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies.REPORT, "exceeded", 0)
    assert (await stay(policies.app, "GET", "/search?thorough=true", after=3)).json() == ["found"]
    assert (await stay(policies.app, "GET", "/report?seconds=5", after=5)).json() == "the report"
    assert (await stay(policies.app, "GET", "/stats")).json() == {"reports that took longer than 2 seconds": 1}
    response = await stay(policies.app, "GET", "/search", after=1)
    assert (response.status_code, response.json()["hint"]) == (503, "ask for less")


@movable_clock
async def test_deadlines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    itself = httpx.AsyncClient(
        transport=httpx.ASGITransport(deadlines.app), base_url="http://prices", event_hooks=deadlines.http.event_hooks
    )
    monkeypatch.setattr(deadlines, "http", itself)
    async with CancelableClient(deadlines.app, ceiling=CEILING) as client:
        for wait, status in ((50, 200), (2, 504)):
            async with client.start("GET", "/offers", headers={"Prefer": f"wait={wait}"}) as call:
                await call.running()
                await advance(3)
            response = await call.response()
            assert response.status_code == status
            assert response.headers.get("preference-applied") == ("wait=50" if status == 200 else None)
        refused = await client.get("/offers", headers={"Prefer": "wait=0"})
        assert (refused.status_code, refused.headers["x-deadline-expired"]) == (504, "1")
    had = re.findall(r"(\w+) had ([\d.]+) s", capsys.readouterr().out)
    assert [name for name, _ in had] == ["prices", "statistics", "prices"]
    assert [float(seconds) for _, seconds in had] == pytest.approx([30, 30, 2], abs=1.9)


async def test_testing() -> None:
    await testing.test_hang_up()
    await testing.test_hang_up_by_itself()


@movable_clock
async def test_testing_in_no_time() -> None:
    await testing.test_timeout()


@pytest.mark.parametrize("name", EXAMPLES)
def test_runs_as_a_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(uvicorn, "run", started.append)
    monkeypatch.setattr(anyio, "run", started.append)
    monkeypatch.delitem(sys.modules, f"examples.{name}")
    runpy.run_module(f"examples.{name}", run_name="__main__")
    assert [callable(entry) for entry in started] == [True]


@pytest.mark.parametrize("name", EXAMPLES)
def test_tells_how_to_run_it(name: str) -> None:
    docstring = importlib.import_module(f"examples.{name}").__doc__ or ""
    assert f"python -m examples.{name}\n" in docstring
    assert "curl" in docstring or name == "testing"


def test_every_example_is_tested() -> None:
    tested = {name for name in globals() if name.startswith("test_")}
    untested = [name for name in EXAMPLES if not any(test.startswith(f"test_{name}") for test in tested)]
    assert EXAMPLES
    assert untested == []


async def test_streaming(capsys: pytest.CaptureFixture[str]) -> None:
    async with running(streaming.app, "/chat", hang_up=HangUp.after_response()):
        pass
    assert capsys.readouterr().out == "upstream closed\n"


async def test_streaming_past_the_point_of_cancelling(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streaming, "THINKING", 0.05)
    async with running(streaming.app, "/chat") as call:
        async for chunk in call.chunks():
            if b"finish" in chunk:
                break
        await call.hang_up()
    assert capsys.readouterr().out == "billed: usage: 3 tokens\nupstream closed\n"


@movable_clock
async def test_streaming_events_and_report(capsys: pytest.CaptureFixture[str]) -> None:
    ticks = await stay(streaming.app, "GET", "/ticks", after=1.1)
    assert capsys.readouterr().out == "ticks closed\n"
    assert 'event: cancelled\ndata: {"reason": "timeout"' in ticks.text
    report = await stay(streaming.app, "GET", "/report", after=1)
    assert report.text.count("event: progress\n") == 2
    assert report.text.endswith('event: result\ndata: {"pages": 2}\n\n')


async def test_cancel_by_id() -> None:
    async with CancelableClient(cancel_by_id.app, ceiling=CEILING) as client:
        async with client.start("GET", "/report", headers={"operation-id": "my-report"}) as call:
            await call.running()
            assert [each["id"] for each in (await until(client, "/running", len))] == ["my-report"]
            assert (await client.post("/stop/my-report")).json()["outcome"] == "cancelled"
        assert (await call.response()).json() == {"detail": "stopped by its stop button"}
        assert (await client.post("/stop/my-next-report")).json()["outcome"] == "unknown"
        early = await client.get("/report", headers={"operation-id": "my-next-report"})
    assert early.status_code == 499


async def test_operations_page() -> None:
    admin = ("admin", "secret")
    async with CancelableClient(operations_page.app, ceiling=CEILING) as client:
        assert (await client.get("/admin/operations/page")).status_code == 401
        assert (await client.get("/admin/operations/page", auth=("admin", "guessed"))).status_code == 401
        assert "<title>Operations</title>" in (await client.get("/admin/operations/page", auth=admin)).text
        async with client.start("GET", "/report/7") as call:
            await call.running()
            shown: dict[str, Any] = {}
            with anyio.fail_after(CEILING):
                while not shown.get("progress"):
                    listed = (await client.get("/admin/operations/?label=report:7", auth=admin)).json()["operations"]
                    shown = listed[0] if listed else {}
            assert shown["progress"] == {"message": "rendering", "metadata": {"done": 0, "total": 60}}
            started = await client.post("/exports/8")
            for path in (f"/admin/operations/{shown['id']}", started.headers["location"]):
                assert (await client.post(f"{path}/cancel", auth=admin)).json()["outcome"] == "cancelled"
    assert call.status == 499


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_several_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    ann, bob = {"user": "ann"}, {"user": "bob"}
    with redis_server() as redis:
        monkeypatch.setenv("REDIS_URL", redis.url)
        app = importlib.reload(several_workers).app
        async with CancelableClient(app, ceiling=CEILING) as client:
            assert (await client.get("/health")).status_code == 200
            async with client.start("GET", "/report", headers={**ann, "operation-id": "mine"}) as call:
                await call.running()
                assert (await client.post("/operations/mine/cancel", headers=bob)).status_code == 404
                assert (await client.post("/operations/mine/cancel", headers=ann)).json()["outcome"] == "cancelled"
            assert call.status == 499
            started = await client.post("/reports", headers=ann)
            path = started.headers["location"]
            assert (await client.get(path, headers=bob)).status_code == 404
            assert (await client.post(f"{path}/cancel", headers=ann)).json()["outcome"] == "cancelled"
            assert (await client.get(f"{path}/result", headers=ann)).status_code == 499


async def test_observability(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    # The handler is that of all tests of this process.
    with caplog.filtering(operation_id_filter()):
        await _observed(caplog)


async def _observed(caplog: pytest.LogCaptureFixture) -> None:
    async with CancelableClient(observability.app, ceiling=CEILING) as client:
        async with client.start("GET", "/reports/7") as call:
            await call.running()
            await call.hang_up()
        async with client.start("GET", "/reports/8") as call:
            await call.running()
            id = vars(next(record for record in reversed(caplog.records) if record.name == "reports"))["operation_id"]
            stopped = await client.post(f"/operations/{id}/cancel")
            assert stopped.json()["outcome"] == "cancelled"
        assert call.status == 499
        page = (await client.get("/metrics", follow_redirects=True)).text
    found = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    counted = [sample.labels for sample in found if sample.name == "cancelable_deps_cancelations_total"]
    assert {(labels.get("http_route"), labels["reason"]) for labels in counted} >= {
        ("/reports/{name}", "disconnect"),
        ("/reports/{name}", "manual"),
    }
    asked = [sample.labels["outcome"] for sample in found if sample.name == "cancelable_deps_cancels_sent_total"]
    assert "cancelled" in asked


@movable_clock
async def test_latest_wins() -> None:
    ann, bob = {"user": "ann"}, {"user": "bob"}
    async with CancelableClient(latest_wins.app, ceiling=CEILING) as client:
        async with (
            client.start("GET", "/search?text=c", headers=ann) as first,
            client.start("GET", "/search?text=c", headers=bob) as other,
        ):
            await first.running()
            await other.running()
            async with client.start("GET", "/search?text=canv", headers=ann) as second:
                assert (await first.response()).json() == {"detail": "superseded by a newer request"}
                await second.running()
                await advance(1.1)
        assert (await second.response()).json() == ["canvas"]
        assert (await other.response()).status_code == 200


@movable_clock
async def test_latest_wins_or_waits() -> None:
    ann = {"user": "ann"}
    async with CancelableClient(latest_wins.app, ceiling=CEILING) as client:
        async with (
            client.start("GET", "/export", headers=ann) as first,
            client.start("GET", "/export", headers=ann) as second,
        ):
            await first.running()
            await second.running()
            await advance(1.1)
            assert (await first.response()).status_code == 200
            await advance(1.1)
            assert (await second.response()).status_code == 200


@movable_clock
async def test_background_report() -> None:
    async with CancelableClient(background_report.app, ceiling=CEILING) as client:
        accepted = await client.post("/start-background-task", params={"pages": 2})
        assert accepted.status_code == 202
        await advance(1.1)
        assert (await until(client, accepted.headers["location"], lambda task: task["progress"]))["state"] == "running"
        await advance(1)
        assert (await client.get(accepted.headers["location"] + "/result")).json() == {"pages": 2}

        task = (await client.post("/start-background-task")).json()
        assert (await client.post(f"/cancel-task/{task['id']}")).json()["outcome"] == "cancelled"
        result = await client.get(f"/tasks/{task['id']}/result")
        assert (result.status_code, result.json()) == (499, {"detail": "no longer needed"})
        assert (await client.get("/tasks/unknown")).status_code == 404


async def until(client: CancelableClient, path: str, is_there: Callable[[Any], object]) -> Any:
    """The JSON at a path, once it has what the test waits for."""
    with anyio.fail_after(CEILING):
        while True:
            found = (await client.get(path)).json()
            if is_there(found):
                return found
