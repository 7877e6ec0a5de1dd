"""Requests in random orders, the same ones every time: whatever the order, nothing is lost, doubled, mixed up or left.

A seed is eight requests beside each other, each through a stack and a door of its own. To look for more, give other
numbers to `run_together`; one that fails belongs into the list as soon as what it found is mended.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import anyio
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from tests import orders
from tests.orders import STACKS, Exchange, Plan, build, faults, run_together

pytest.importorskip("fastapi.sse", reason="generator endpoints came with FastAPI 0.135")

# Starlette leaves the generator of a response that it could not send to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Exception ignored in.*body_stream:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Async generator 'starlette.middleware.base:ResourceWarning"),
]

REQUESTS = 8
# fmt: off
SEEDS = [
    1, 4, 8, 19, 26, 36, 42, 51, 53, 54, 56, 61, 63, 64, 65, 66, 68, 81, 86, 87, 89, 90, 91, 95, 96, 98, 105, 109, 117,
    124, 128,
]
# Single requests that went wrong once: a `BaseHTTPMiddleware` and a `send()` that raises, a stream stopped while its
# start is being sent, a body that is read there when the client leaves.
MENDED = [
    "11/0", "13/6", "14/7", "15/7", "16/0", "18/7", "20/5", "23/5", "25/6", "27/0", "28/4", "31/3", "33/5", "34/1",
    "48/0", "52/6", "71/1", "76/3", "79/6", "80/7", "85/1", "159/0", "177/6", "186/7", "194/6", "216/4", "232/1",
    "255/7", "272/1", "289/3", "298/1",
]
# fmt: on


@pytest.fixture(scope="module")
def apps() -> Iterator[dict[str, ASGIApp]]:
    yield {stack: build(stack) for stack in STACKS}
    # What is garbage is so here, and not in a test of another module.
    gc.collect()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_it_holds_in_every_order(apps: dict[str, ASGIApp], backend: str, seed: int) -> None:
    assert run_together(apps, [f"{seed}/{number}" for number in range(REQUESTS)], backend) == {}


@pytest.mark.parametrize("key", MENDED)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_it_holds_where_it_once_did_not(apps: dict[str, ASGIApp], backend: str, key: str) -> None:
    assert run_together(apps, [key], backend) == {}


KEY = "an ordinary request"


@pytest.fixture
def plan() -> Plan:
    """A request that nothing stops."""
    plan = Plan.of(KEY)
    plan.stack, plan.door, plan.kind = "mw", "deco", "plain"
    plan.hangs_up_after = plan.hangs_up_at = None
    return plan


def what_is_wrong(app: ASGIApp, plan: Plan) -> list[str]:
    exchange: list[Exchange] = []

    async def main() -> None:
        exchange.append(Exchange(plan))
        await exchange[0].run(app)

    anyio.run(main, backend="asyncio", backend_options={"loop_factory": orders.VirtualLoop})
    return faults(exchange[0])


START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": KEY.encode()}


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ([START, END], []),
        ([], ["no response", "status None, complete: False, though nothing stopped it"]),
        ([START, START, END], ["two starts"]),
        (
            [START, END, END],
            ["a message after the last", f"whole, but {KEY.encode() * 2!r} instead of {KEY.encode()!r}"],
        ),
        ([START, {**END, "body": b"of another"}], [f"whole, but b'of another' instead of {KEY.encode()!r}"]),
        ([{**START, "status": 418}, END], ["status 418, complete: True, though nothing stopped it", "status 418"]),
    ],
)
def test_what_does_not_hold_is_found(plan: Plan, messages: list[dict[str, object]], wrong: list[str]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    assert what_is_wrong(app, plan) == wrong


def test_an_error_of_the_application_is_found(plan: Plan) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send(END)
        raise KeyError("mine")

    assert what_is_wrong(app, plan) == ["raised KeyError('mine')"]


def test_work_that_does_not_end_is_found(plan: Plan) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        plan.handler.begun += 1
        await send(START)
        await send(END)

    assert what_is_wrong(app, plan) == ["the handler began 1 times and ended 0 times"]


def test_a_cleanup_that_is_disturbed_is_found(plan: Plan) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope() as cancelled:
            cancelled.cancel()
            await plan.live(plan.handler, 20)
        await send(START)
        await send(END)

    assert what_is_wrong(app, plan) == ["the cleanup of the handler was disturbed"]
