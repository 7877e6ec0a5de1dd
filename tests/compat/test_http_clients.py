"""The deadline of a request on its way through other HTTP clients than httpx."""

from __future__ import annotations

import pytest

# The short run collects this file as well, and does not have them.
for name in ("aiohttp", "httpx2"):
    pytest.importorskip(name)

import aiohttp
import aiohttp.web
import httpx2

from cancelable_deps import Cancelable, TimeoutCancelation
from cancelable_deps.deadlines import DeadlineTransport, forward_deadline

pytestmark = pytest.mark.anyio

HEADER = "connect-timeout-ms"
LEFT = 200
HOOK = forward_deadline(header=HEADER)


def answer(request: httpx2.Request) -> httpx2.Response:
    timeouts = request.extensions["timeout"]
    return httpx2.Response(200, json=[request.headers.get(HEADER), timeouts["read"], timeouts["connect"]])


@pytest.mark.parametrize("way", ["hook", "transport"])
@pytest.mark.parametrize("is_async", [True, False])
async def test_httpx2(way: str, is_async: bool) -> None:
    transport = httpx2.MockTransport(answer)
    options = {"transport": transport, "event_hooks": {"request": [HOOK]}}
    if way == "transport":
        options = {"transport": DeadlineTransport(transport, header=HEADER)}
    timeout = httpx2.Timeout(None, connect=1)
    async with Cancelable(timeout=LEFT):
        if is_async:
            async with httpx2.AsyncClient(timeout=timeout, **options) as client:
                header, read, connect = (await client.get("http://service/")).json()
        else:
            with httpx2.Client(timeout=timeout, **options) as sync_client:
                header, read, connect = sync_client.get("http://service/").json()
    assert LEFT * 900 < int(header) < LEFT * 1000
    assert LEFT * 0.9 < read < LEFT + 1
    assert connect == 1


async def test_httpx2_without_time_sends_nothing() -> None:
    hook = forward_deadline(header=HEADER, margin=LEFT)
    transport = httpx2.MockTransport(answer)
    async with (
        Cancelable(timeout=LEFT),
        httpx2.AsyncClient(transport=transport, event_hooks={"request": [hook]}) as client,
    ):
        with pytest.raises(TimeoutCancelation):
            await client.get("http://service/")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_aiohttp() -> None:
    async def echo(request: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.Response(text=request.headers.get(HEADER, ""))

    app = aiohttp.web.Application()
    app.router.add_get("/", echo)
    runner = aiohttp.web.AppRunner(app)
    await runner.setup()
    try:
        site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(HOOK.on_request_start)
        async with aiohttp.ClientSession(trace_configs=[trace]) as session:
            async with session.get(f"http://{host}:{port}/") as response:
                assert await response.text() == ""
            async with Cancelable(timeout=LEFT), session.get(f"http://{host}:{port}/") as response:
                assert LEFT * 900 < int(await response.text()) < LEFT * 1000
    finally:
        await runner.cleanup()
