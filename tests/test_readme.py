"""Every snippet of the README runs, and does what the README says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.asgi import get, hang_up_once, running

pytestmark = pytest.mark.anyio

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(number: int) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": f"readme_{number}"}
    exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), namespace)  # noqa: S102 - our own README
    return namespace


def test_none_is_forgotten() -> None:
    assert len(SNIPPETS) == 9


async def test_five_lines() -> None:
    app = run(0)["app"]
    async with running(app, "/report") as call:
        await call.listened_to()
        call.hang_up()
    assert (call.status, call.json) == (499, {"detail": "Client closed the request"})


async def test_decorator() -> None:
    app = run(1)["app"]
    async with running(app, "/generate/small", method="POST") as call:
        await call.listened_to()
        call.hang_up()
    assert call.status == 499


async def test_cancelable() -> None:
    app = run(2)["app"]
    assert (await get(app, "/search")).json == ["found"]
    assert (await get(app, "/suggest")).json == ["something cheaper"]


async def test_task_group() -> None:
    app = run(3)["app"]
    assert (await get(app, "/shards/4")).json == [0, 1, 2, 3]
    call = await get(app, "/shards/102")
    assert (call.status, call.json) == (409, {"detail": "no such shard"})


async def test_event() -> None:
    app = run(4)["app"]
    async with running(app, "/count") as call:
        await call.listened_to()
        call.hang_up()
    assert call.json["stopped_by"] == "disconnect"
    assert call.json["rows"] < 1000


async def test_middleware_and_route_class() -> None:
    app = run(5)["app"]
    assert (await get(app, "/anything")).json == "covered"
    assert (await get(app, "/export")).json == "takes its time"
    app = run(6)["app"]
    started = anyio.Event()
    started.set()
    assert (await hang_up_once(app, started, "/slow")).status == 499


def test_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    run(7)
    assert capsys.readouterr().out == "half {'percent': 50}\n"


async def test_starlette() -> None:
    app = run(8)["app"]
    assert (await get(app, "/both")).json == "both done"
    assert (await get(app, "/one")).json == "done"
