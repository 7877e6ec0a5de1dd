"""Drive an ASGI application in process as uvicorn does: each request has its own task, `receive` and `send`."""

import asyncio
import functools
import importlib.util
import statistics
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Scope

Work = Callable[[], Awaitable[None]]
"""What a handler awaits before it answers."""


async def at_once() -> None:
    """Do nothing: the work of a handler that returns at once."""


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


WAITING_AT_ONCE = 32


def work_of(milliseconds: float) -> tuple[Work, int]:
    """Return work that takes so long, and the number of such requests to serve at a time."""
    if milliseconds:
        return functools.partial(asyncio.sleep, milliseconds / 1000), WAITING_AT_ONCE
    return at_once, 1


def warmed(app: ASGIApp) -> ASGIApp:
    """Return the application in a wrapper that only its first request needs; other applications as they are."""
    inner: ASGIApp = getattr(app, "warmed", app)
    return inner


_HEADERS = [
    (b"host", b"127.0.0.1:8000"),
    (b"user-agent", b"benchmark/1"),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"connection", b"keep-alive"),
]


class Exchange:
    """One GET request, whose `receive` blocks after the empty body until the response is complete or the client leaves."""

    __slots__ = ("_gone", "_ready", "complete", "listened_to", "scope", "status")

    def __init__(self, query: bytes = b"") -> None:
        self.scope = _scope(query)
        self.status: int | None = None
        self.complete = False
        self.listened_to = False
        self._gone = False
        self._ready = asyncio.Event()
        self._ready.set()

    async def receive(self) -> Message:
        if not self._gone and not self.complete:
            self.listened_to = not self._ready.is_set()
            await self._ready.wait()
            self._ready.clear()
        if self._gone or self.complete:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
            self._ready.set()

    def hang_up(self) -> None:
        self._gone = True
        self._ready.set()


def _scope(query: bytes) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 54321),
        "scheme": "http",
        "method": "GET",
        "root_path": "",
        "path": "/",
        "raw_path": b"/",
        "query_string": query,
        "headers": list(_HEADERS),
        "state": {},
    }


def start(app: ASGIApp, exchange: Exchange) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(_run(app, exchange))


async def _run(app: ASGIApp, exchange: Exchange) -> None:
    await app(exchange.scope, exchange.receive, exchange.send)


async def serve(app: ASGIApp, requests: int, concurrency: int, query: bytes = b"") -> None:
    """Serve `requests` requests, `concurrency` at a time; raise an error if a status is not 200."""
    for first in range(0, requests, concurrency):
        exchanges = [Exchange(query) for _ in range(min(concurrency, requests - first))]
        for task in [start(app, exchange) for exchange in exchanges]:
            await task
        statuses = {exchange.status for exchange in exchanges}
        if statuses != {200}:
            raise RuntimeError(f"expected status 200, got {statuses}")


def loops(choice: str) -> list[str]:
    """Return the event loops that `--loop` names; if uvloop is not installed, print that and leave it out."""
    wanted = ["asyncio", "uvloop"] if choice == "both" else [choice]
    if "uvloop" in wanted and importlib.util.find_spec("uvloop") is None:
        print("uvloop: not installed, skipped")
        wanted.remove("uvloop")
    return wanted


def run_on(loop: str, coroutine: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
        return runner.run(coroutine)


def _loop_factory(loop: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if loop == "asyncio":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


def median_and_spread(samples: Sequence[float]) -> tuple[float, float]:
    """Return the median and the interquartile range."""
    if len(samples) < 2:
        return samples[0], 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, high - low
