"""Requests whose client, server and handler do what they do in a random order, and what must hold whatever the order.

A `Plan` says for one request what happens when; its seed makes it the same every time. Time is virtual: a request of
ten seconds takes a millisecond, and one that hangs is seen at once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from random import Random
from typing import Annotated, Any

import anyio
import anyio.lowlevel
import trio
import trio.testing
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Scope

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    CancelableStreamingResponse,
    CancelationError,
    CancellationEvent,
    RequestCancelable,
    RequestCancelationMiddleware,
    cancelable_with_timeout,
    with_cancelation,
)
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.request.state import SCOPE_KEY
from tests.leftovers import nothing_left
from tests.runners import Runner, Work, run_in_group, run_plainly

LIMIT = 0.5
"""Seconds, of every door that has a timeout."""

HANG = 1000
"""Seconds after which a request does not end any more."""

ABORTED = (
    "Caught handled exception, but response already started.",
    "Unexpected message: {'type': 'cancelable_deps.abort'",
)
"""What Starlette makes of it when a response that has started is left by an exception, or broken inside of its middleware."""

# Negative: passes of the event loop. 5 ms is when listening begins.
PAUSES = (0.0, -1, -1, -2, -3, -7, 0.001, 0.004, 0.005, 0.006, 0.05, 0.3, 0.5, 0.7)
STACKS = ("plain", "mw", "timed-mw", "mw-base", "base-mw", "base")
DOORS = ("bare", "route", "deco", "dep", "tg", "event", "timed-deco", "timed-dep", "all")
KINDS = ("plain", "cancel", "upload", "body", "stream", "length", "ours", "sse", "background", "generated")
COVERED = ("mw", "timed-mw", "mw-base", "base-mw")


async def pause(how_long: float) -> None:
    if how_long < 0:
        for _ in range(-int(how_long)):
            await anyio.lowlevel.checkpoint()
    else:
        await anyio.sleep(how_long)


@dataclass
class Life:
    """What must have happened as often as it has begun."""

    begun: int = 0
    ended: int = 0
    is_struck: bool = False
    is_cleaned_up: bool = False

    @asynccontextmanager
    async def lived(self, plan: Plan) -> AsyncIterator[None]:
        self.begun += 1
        try:
            yield
        except BaseException:
            self.is_struck = True
            raise
        finally:
            self.ended += 1
            await plan.pause()
            self.is_cleaned_up = True


@dataclass
class Plan:
    """One request: where it goes, and what happens when."""

    key: str
    random: Random
    spec_version: str
    once: bool
    """The server says the disconnect once, and then blocks."""
    send_raises: bool
    stack: str
    door: str
    kind: str
    hangs_up_after: float | None
    """Seconds, or passes if it is negative; or as many messages of the response as `hangs_up_at` says."""
    hangs_up_at: int | None
    body: list[bytes]
    chunks: int
    limits: dict[str, float | None]
    handler: Life = field(default_factory=Life)
    iterator: Life = field(default_factory=Life)
    background: Life = field(default_factory=Life)

    @classmethod
    def of(cls, key: str) -> Plan:
        random = Random(key)
        leaves = random.choice(("never", "never", "after", "at"))
        version = random.choice(("2.1", "2.2", "2.3", "2.4"))
        return cls(
            key=key,
            random=random,
            spec_version=version,
            once=random.random() < 0.5,
            send_raises=version == "2.4" or random.random() < 0.2,
            stack=random.choice(STACKS),
            door=random.choice(DOORS),
            kind=random.choice(KINDS),
            hangs_up_after=random.choice(PAUSES) if leaves == "after" else None,
            hangs_up_at=random.randint(1, 5) if leaves == "at" else None,
            body=[random.randbytes(random.choice((0, 1, 100, 70_000))) for _ in range(random.randint(1, 3))],
            chunks=random.randint(0, 4),
            limits={
                name: random.choice((None, None, 0.2, LIMIT)) for name in ("timeout", "gap_timeout", "send_timeout")
            },
        )

    def pause(self) -> Awaitable[None]:
        return pause(self.random.choice(PAUSES))

    @property
    def path(self) -> str:
        return f"/{self.door}/{self.kind}"

    @property
    def is_ours(self) -> bool:
        return self.stack in COVERED or self.door != "bare"

    @property
    def has_limit(self) -> bool:
        timed = "timed" in self.stack or "timed" in self.door or self.kind == "cancel"
        return timed or (self.kind in ("ours", "sse") and any(self.limits.values()))

    async def live(self, life: Life, steps: int) -> None:
        """Work, and a cleanup that takes a while."""
        async with life.lived(self):
            for _ in range(steps):
                await self.pause()

    def expected_body(self) -> bytes:
        if self.kind in ("stream", "length", "ours", "sse", "generated"):
            return b"".join(self.chunk(number) for number in range(self.chunks))
        if self.kind in ("upload", "body"):
            return hashlib.sha256(self.key.encode() + b"".join(self.body)).hexdigest().encode()
        return self.key.encode()

    def chunk(self, number: int) -> bytes:
        return f"data: {self.key}/{number}\n\n".encode()


plans: dict[str, Plan] = {}


def plan_of(request: Request) -> Plan:
    return plans[request.headers["x-key"]]


async def generated(plan: Plan) -> AsyncGenerator[bytes]:
    async with plan.iterator.lived(plan):
        for number in range(plan.chunks):
            await plan.pause()
            yield plan.chunk(number)


class Chunks:
    """For Starlette's own response, which would leave a generator to the garbage collector."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._number = 0

    def __aiter__(self) -> Chunks:
        return self

    async def __anext__(self) -> bytes:
        if self._number == self._plan.chunks:
            raise StopAsyncIteration
        await self._plan.pause()
        self._number += 1
        return self._plan.chunk(self._number - 1)


async def answer(plan: Plan, request: Request) -> Response:
    """The handler's work and its response."""
    data = b""
    if plan.kind == "upload":
        async for piece in request.stream():
            data += piece
    elif plan.kind == "body":
        await plan.pause()
        data = await request.body()
    await plan.live(plan.handler, plan.random.randint(0, 3))
    return response(plan, data)


def response(plan: Plan, data: bytes) -> Response:
    if plan.kind in ("upload", "body"):
        return Response(hashlib.sha256(plan.key.encode() + data).hexdigest())
    if plan.kind == "length":
        return StreamingResponse(Chunks(plan), headers={"content-length": str(len(plan.expected_body()))})
    if plan.kind == "stream":
        return StreamingResponse(Chunks(plan))
    if plan.kind in ("ours", "sse"):
        media_type = "text/event-stream" if plan.kind == "sse" else "text/plain"
        limits: dict[str, Any] = plan.limits
        return CancelableStreamingResponse(generated(plan), media_type=media_type, **limits)
    task = BackgroundTask(plan.live, plan.background, 2) if plan.kind == "background" else None
    return Response(plan.key, background=task)


async def run_in_block(request: Request, cancel: RequestCancelable) -> Runner:
    return _in_block(plan_of(request), cancel)


async def run_in_timed_block(
    request: Request, cancel: Annotated[Cancelable, Depends(cancelable_with_timeout(LIMIT))]
) -> Runner:
    return _in_block(plan_of(request), cancel)


def _in_block(plan: Plan, cancel: Cancelable) -> Runner:
    async def run(work: Work) -> Response:
        async with cancel:
            if plan.kind == "cancel":
                await plan.pause()
                cancel.cancel_nowait()
            response = await work()
        return response

    return run


async def run_until_told(event: CancellationEvent) -> Runner:
    async def run(work: Work) -> Response:
        response: Response = JSONResponse({"partial": True})

        async def stop(scope: anyio.CancelScope) -> None:
            await event.wait()
            scope.cancel()

        async with anyio.create_task_group() as tg:
            tg.start_soon(stop, tg.cancel_scope)
            response = await work()
            tg.cancel_scope.cancel()
        return response

    return run


def as_it_is(handler: Any) -> Any:
    return handler


def router(door: str, runner: Any, decorate: Callable[[Any], Any] = as_it_is, **options: Any) -> APIRouter:
    doorway = APIRouter(prefix=f"/{door}", **options)
    for kind in KINDS:
        if kind != "generated":
            doorway.post(f"/{kind}")(decorate(_handler(runner)))
    # FastAPI leaves a generator of its own to the garbage collector; a decorated one is ours.
    decorate = with_cancelation if decorate is as_it_is else decorate
    doorway.post("/generated", response_class=StreamingResponse)(decorate(_generator()))
    return doorway


def _handler(runner: Any) -> Any:
    async def handle(request: Request, run: Runner = Depends(runner)) -> Response:
        plan = plan_of(request)
        return await run(lambda: answer(plan, request))

    return handle


def _generator() -> Any:
    async def generate(request: Request) -> AsyncIterator[bytes]:
        async with aclosing(generated(plan_of(request))) as chunks:
            async for chunk in chunks:
                yield chunk

    return generate


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def build(stack: str) -> FastAPI:
    layers = {
        "mw": Middleware(RequestCancelationMiddleware),
        "timed": Middleware(RequestCancelationMiddleware, default_timeout=LIMIT),
        "base": Middleware(BaseHTTPMiddleware, dispatch=pass_on),
    }
    names = ["timed"] if stack == "timed-mw" else [name for name in stack.split("-") if name in layers]
    app = FastAPI(middleware=[layers[name] for name in names], openapi_url=None)
    timed = with_cancelation(timeout=LIMIT)
    for doorway in (
        router("bare", run_plainly),
        router("route", run_plainly, route_class=CancelableRoute),
        router("deco", run_plainly, with_cancelation),
        router("dep", run_in_block),
        router("tg", run_in_group),
        router("event", run_until_told),
        router("timed-deco", run_plainly, timed),
        router("timed-dep", run_in_timed_block),
        router("all", run_in_block, with_cancelation, route_class=CancelableRoute),
    ):
        app.include_router(doorway)
    return app


class Exchange:
    """The server's end and the client's of one request, with what has come of it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sent: list[Message] = []
        self.faults: list[str] = []
        self.error: BaseException | None = None
        self.has_left = False
        self.ended = float(HANG)
        self._pieces = list(plan.body)
        self._readers = 0
        self._said = False
        self._gone = anyio.Event()

    @property
    def is_complete(self) -> bool:
        return bool(self.sent) and self.sent[-1]["type"].endswith("body") and not self.sent[-1].get("more_body", False)

    @property
    def status(self) -> int | None:
        return next((message["status"] for message in self.sent if "status" in message), None)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    def scope(self) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": self.plan.spec_version},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.plan.path,
            "raw_path": self.plan.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"x-key", self.plan.key.encode())],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 80),
        }

    async def receive(self) -> Message:
        self._readers += 1
        if self._readers > 1 and self.plan.is_ours:
            self.faults.append("two read at once")
        try:
            return await self._next()
        finally:
            self._readers -= 1

    async def _next(self) -> Message:
        if self._pieces and not self.has_left:
            with anyio.move_on_after(HANG) as scope:
                # Nothing is lost of what is on its way: a real server keeps it, too.
                await self.plan.pause()
            del scope
            if not self.has_left:
                piece = self._pieces.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}
        await self._gone.wait()
        if self._said and self.plan.once:
            await anyio.sleep_forever()
        self._said = True
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.plan.pause()
        if self.has_left and self.plan.send_raises:
            raise OSError("the client has left")
        self._check(message)
        self.sent.append(message)
        if self.is_complete:
            self._gone.set()
        if len(self.sent) == self.plan.hangs_up_at:
            self.hang_up()

    def _check(self, message: Message) -> None:
        starts = [known for known in self.sent if known["type"] == "http.response.start"]
        if message["type"] == "http.response.start":
            if starts:
                self.faults.append("two starts")
        elif message["type"] == "http.response.body":
            if not starts:
                self.faults.append("a body before the start")
            if self.is_complete:
                self.faults.append("a message after the last")
        elif message["type"] != "cancelable_deps.abort":
            self.faults.append(f"an unknown message: {message['type']}")

    def hang_up(self) -> None:
        if not self.is_complete:
            self.has_left = True
        self._gone.set()

    async def run(self, app: ASGIApp) -> None:
        scope = self.scope()

        async def serve() -> None:
            try:
                await app(scope, self.receive, self.send)
            except Exception as exc:
                self.error = exc

        async with anyio.create_task_group() as tg:
            tg.start_soon(self._leave_in_time)
            # As by a server: on asyncio without a scope of anyio around it.
            await current_loop().spawn(serve, copy_context()).join()
            tg.cancel_scope.cancel()
        self.ended = anyio.current_time()
        if SCOPE_KEY in scope:
            self.faults.append("the scope keeps the state")

    async def _leave_in_time(self) -> None:
        if self.plan.hangs_up_after is not None:
            await pause(self.plan.hangs_up_after)
            self.hang_up()


def faults(exchange: Exchange) -> list[str]:
    """What did not hold."""
    return [*exchange.faults, *_faults_of_lives(exchange.plan), *_faults_of_response(exchange)]


def _faults_of_lives(plan: Plan) -> list[str]:
    found = []
    for name, life in (("handler", plan.handler), ("iterator", plan.iterator), ("background", plan.background)):
        if life.begun > 1:
            found.append(f"the {name} ran {life.begun} times")
        if life.ended != life.begun:
            found.append(f"the {name} began {life.begun} times and ended {life.ended} times")
        # Starlette's middleware, and an endpoint's own task group, cancel as anyio does, again and again.
        if life.is_struck and not life.is_cleaned_up and "base" not in plan.stack and plan.door != "event":
            found.append(f"the cleanup of the {name} was disturbed")
    return found


def _faults_of_response(exchange: Exchange) -> list[str]:
    plan = exchange.plan
    found = []
    if exchange.error is not None and not _may_raise(exchange, exchange.error):
        found.append(f"raised {exchange.error!r}")
    if not exchange.has_left:
        if exchange.status is None:
            found.append("no response")
        if not plan.has_limit and not (exchange.status == 200 and exchange.is_complete):
            found.append(f"status {exchange.status}, complete: {exchange.is_complete}, though nothing stopped it")
    # Starlette alone makes a 500 of a client that leaves while its body is being read.
    known = (200, 499, 504) if plan.is_ours else (200, 500)
    if exchange.status not in (None, *known):
        found.append(f"status {exchange.status}")
    if exchange.status == 200:
        found += _faults_of_body(exchange)
    return found


def _faults_of_body(exchange: Exchange) -> list[str]:
    plan, expected, body = exchange.plan, exchange.plan.expected_body(), exchange.body
    if plan.door == "event" and body == b'{"partial":true}':
        return []
    if exchange.is_complete and not exchange.has_left and body != expected:
        farewell = body.find(b"event: cancelled")
        if plan.kind != "sse" or farewell < 0 or not expected.startswith(body[:farewell]):
            return [f"whole, but {body!r} instead of {expected!r}"]
        return []
    cut = body if plan.kind != "sse" else body.partition(b"event: cancelled")[0]
    return [] if expected.startswith(cut) else [f"{body!r} is no part of {expected!r}"]


def _may_raise(exchange: Exchange, error: BaseException) -> bool:
    # A response that has started is cut by raising, where the server cannot be told; a send() that fails is told to all.
    if isinstance(error, CancelationError) or str(error).startswith(ABORTED):
        return exchange.status is not None
    return exchange.has_left and isinstance(error, OSError | ClientDisconnect)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its clock jumps to the next timer as soon as there is nothing else to do. For work without threads."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def jump(timeout: float | None = None) -> Any:
            events = select(0)
            if not events:
                if timeout is None:
                    raise RuntimeError("nothing will ever happen again")
                self._now += max(timeout, 0)
            return events

        selector.select = jump

    def time(self) -> float:
        return self._now


def run_together(apps: dict[str, ASGIApp], keys: list[str], backend: str) -> dict[str, list[str]]:
    """Run these requests beside each other in one event loop; what did not hold, for each that has something."""
    plans.update((key, Plan.of(key)) for key in keys)
    exchanges: list[Exchange] = []

    async def main() -> None:
        with anyio.fail_after(HANG):
            async with nothing_left(), anyio.create_task_group() as tg:
                for key in keys:
                    exchange = Exchange(plans[key])
                    exchanges.append(exchange)
                    tg.start_soon(exchange.run, apps[plans[key].stack])

    options: dict[str, Any] = (
        {"loop_factory": VirtualLoop}
        if backend == "asyncio"
        else {"clock": trio.testing.MockClock(autojump_threshold=0)}
    )
    # Private: trio else lets chance decide which of two tasks goes first, and a seed would not be the same every time.
    scheduler: Any = trio._core._run
    by_chance = scheduler._r, scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    scheduler._r, scheduler._ALLOW_DETERMINISTIC_SCHEDULING = Random(keys[0]), True
    try:
        anyio.run(main, backend=backend, backend_options=options)
    except Exception as exc:
        running = ", ".join(exchange.plan.key for exchange in exchanges if exchange.ended >= HANG)
        return {running or ", ".join(keys): [f"the loop ended with {exc!r}"]}
    finally:
        scheduler._r, scheduler._ALLOW_DETERMINISTIC_SCHEDULING = by_chance
        for key in keys:
            del plans[key]
    found = {exchange.plan.key: faults(exchange) for exchange in exchanges}
    return {key: wrong for key, wrong in found.items() if wrong}
