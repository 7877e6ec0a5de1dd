"""Every file in `examples/` does what its docstring says."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import uvicorn

from cancelable_deps import CancelationReason, CancelationToken
from examples import (
    background_worker,
    disconnect,
    middleware,
    partial_result,
    route_class,
    task_group,
    timeout,
    upload,
)

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from fastapi import FastAPI

    Message = MutableMapping[str, Any]

pytestmark = pytest.mark.anyio

EXAMPLES = sorted(path.stem for path in Path(__file__).parent.with_name("examples").glob("[!_]*.py"))


class Client:
    """One request by plain ASGI; it hangs up as soon as somebody listens for that, or stays to the end."""

    def __init__(self, method: str, path: str, *, body: tuple[bytes, ...] = (b"",), stays: bool = False) -> None:
        path, _, query = path.partition("?")
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "headers": [(b"host", b"test")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.pieces = list(body)
        self.stays = stays
        self.status = 0
        self.body = b""
        self.complete = anyio.Event()

    async def receive(self) -> Message:
        if self.pieces:
            piece = self.pieces.pop(0)
            unfinished = bool(piece) and not self.stays
            return {"type": "http.request", "body": piece, "more_body": bool(self.pieces) or unfinished}
        if self.stays:
            await self.complete.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.body += message["body"]
        if not message.get("more_body"):
            self.complete.set()

    async def request(self, app: FastAPI) -> int:
        with anyio.fail_after(20):
            await app(self.scope, self.receive, self.send)
        return self.status

    def json(self) -> Any:
        return json.loads(self.body)


async def hang_up(app: FastAPI, method: str, path: str, *body: bytes) -> int:
    return await Client(method, path, body=body or (b"",)).request(app)


async def stay(app: FastAPI, method: str, path: str, *body: bytes) -> Client:
    client = Client(method, path, body=body or (b"",), stays=True)
    await client.request(app)
    return client


async def test_disconnect(capsys: pytest.CaptureFixture[str]) -> None:
    assert await hang_up(disconnect.app, "GET", "/report") == 499
    assert capsys.readouterr().out == "the query is over, its connection is back in the pool\n"


@pytest.mark.parametrize(("path", "status"), [("/decorated", 504), ("/dependency", 504), ("/own-status", 503)])
async def test_timeout(path: str, status: int) -> None:
    client = await stay(timeout.app, "GET", path)
    assert (client.status, client.json()) == (status, {"detail": "Timed out after 0.5 seconds"})


async def test_task_group_hang_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert await hang_up(task_group.app, "GET", "/offers") == 499
    assert sorted(capsys.readouterr().out.splitlines()) == ["far was not waited for", "near was not waited for"]


async def test_task_group_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    client = await stay(task_group.app, "GET", "/offers?article=sold-out")
    assert (client.status, client.json()) == (409, {"detail": "near has sold out"})
    assert capsys.readouterr().out == "far was not waited for\n"


async def test_partial_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_result, "PAGES", 5)
    monkeypatch.setattr(partial_result, "imported", {})
    assert await hang_up(partial_result.app, "POST", "/imports/7") == 200
    done = partial_result.imported[7]
    assert 0 < done < 5
    client = await stay(partial_result.app, "POST", "/imports/7")
    assert client.json() == {"from": done, "imported": 5}


async def test_middleware(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert await hang_up(middleware.app, "GET", "/report") == 499
    assert (await stay(middleware.app, "GET", "/report")).status == 504
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

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            await anyio.wait_all_tasks_blocked()
            stop.cancel_nowait(CancelationReason.SIGNAL)
    assert outcomes == {"endless": "interrupted"}


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
    assert "curl" in docstring


def test_every_example_is_tested() -> None:
    tested = {name for name in globals() if name.startswith("test_")}
    untested = [name for name in EXAMPLES if not any(test.startswith(f"test_{name}") for test in tested)]
    assert EXAMPLES
    assert untested == []
