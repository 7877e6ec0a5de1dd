"""Every snippet of the README runs, and does what the README says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trio.testing

from cancelable_deps import CancelationReason, begin_shutdown
from cancelable_deps.testing import SocketClosed, assert_cancelled
from tests.calls import connected, get, hang_up, running

pytestmark = pytest.mark.anyio

README = (Path(__file__).parent.parent / "README.md").read_text()


def _snippets() -> dict[str, str]:
    """By the heading above each; the second under one heading has a 2 behind it."""
    found: dict[str, str] = {}
    heading = ""
    for line in re.finditer(
        r"^#+ (?P<heading>[^\n]*)$|^```python\n(?P<code>.*?)^```", README, re.DOTALL | re.MULTILINE
    ):
        if line["heading"] is not None:
            heading = line["heading"].replace("`", "")
        else:
            count = sum(key.removesuffix(" (2)") == heading for key in found)
            found[f"{heading} ({count + 1})" if count else heading] = line["code"]
    return found


SNIPPETS = _snippets()


def run(heading: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(compile(SNIPPETS[heading], f"README.md, {heading}", "exec"), namespace)  # noqa: S102 - our own README
    return namespace


def test_none_is_forgotten() -> None:
    tests = Path(__file__).read_text()
    assert [heading for heading in SNIPPETS if f'run("{heading}")' not in tests] == []


async def test_five_lines() -> None:
    app = run("cancelable_deps")["app"]
    call = await hang_up(app, "/report")
    assert (call.status, call.json()) == (499, {"detail": "Client closed the request"})


async def test_decorator() -> None:
    app = run("The whole handler: @with_cancelation")["app"]
    assert (await hang_up(app, "/generate/small", "POST")).status == 499


async def test_cancelable() -> None:
    app = run("A part of it: RequestCancelable")["app"]
    assert (await get(app, "/search")).json() == ["found"]
    assert (await get(app, "/suggest")).json() == ["something cheaper"]


async def test_task_group() -> None:
    app = run("Several tasks: RequestTaskGroup")["app"]
    assert (await get(app, "/shards/4")).json() == [0, 1, 2, 3]
    call = await get(app, "/shards/102")
    assert (call.status, call.json()) == (409, {"detail": "no such shard"})


async def test_event() -> None:
    app = run("A stopping point of your own: CancellationEvent")["app"]
    answer = (await hang_up(app, "/count")).json()
    assert answer["stopped_by"] == "disconnect"
    assert answer["rows"] < 1000


async def test_middleware_and_route_class() -> None:
    app = run("The whole application: RequestCancelationMiddleware")["app"]
    assert (await get(app, "/anything")).json() == "covered"
    assert (await get(app, "/export")).json() == "takes its time"
    app = run("One router: CancelableRoute")["app"]
    assert (await hang_up(app, "/slow")).status == 499


async def test_streaming() -> None:
    app = run("Streams and Server-Sent Events: cancelable_streaming_response")["app"]
    call = await get(app, "/tokens")
    assert (call.body.count(b"data: "), call.is_complete) == (5, True)
    report = await get(app, "/report")
    assert [line for line in report.body.decode().split("\n") if line.startswith("event")] == [
        "event: progress",
        "event: result",
    ]


async def test_policies() -> None:
    app = run("Timeout policies")["app"]
    call = await get(app, "/search")
    assert (call.status, call.json()) == (503, {"try": "again later", "path": "/search"})
    assert (await get(app, "/import")).json() == "imported"
    assert (await get(app, "/render")).json() == "rendered"


async def test_websockets() -> None:
    app = run("WebSockets")["app"]
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


def test_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    run("Without a request: Cancelable and CancelationToken")
    assert capsys.readouterr().out == "half {'percent': 50}\n"


async def test_starlette() -> None:
    app = run("Without Depends, Starlette included")["app"]
    assert (await get(app, "/both")).json() == "both done"
    assert (await get(app, "/one")).json() == "done"


async def test_shutdown() -> None:
    app = run("When the server shuts down")["app"]
    async with running(app, "/next", lifespan=True) as call:
        assert call.scope["state"] == {"pool": "open"}
        await call.running()
        begin_shutdown()
    assert call.json() == "signal"


async def test_threads_and_processes() -> None:
    app = run("Plain def handlers, threads and processes")["app"]
    assert (await hang_up(app, "/primes")).status == 499
    assert (await get(app, "/wait")).status == 504
    assert (await get(app, "/legacy")).status == 504
    assert (await get(app, "/factors/7")).json() == {"prime": True, "digits": 4}


@pytest.mark.parametrize("anyio_backend", ["asyncio", ("trio", {"clock": trio.testing.MockClock()})])
async def test_testing() -> None:
    namespace = run("Testing your own endpoints")
    await namespace["test_client_hangs_up"]()
    await namespace["test_time_is_up"]()
