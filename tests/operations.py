"""Workers on one hub, work that waits, and requests that wait, for the tests of operations."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel

from cancelable_deps import Cancelable
from cancelable_deps.operations import Operation, Operations
from cancelable_deps.testing import OperationsHub, advance
from tests.calls import CEILING

FOREVER = 10**6


@asynccontextmanager
async def workers(count: int, **options: Any) -> AsyncGenerator[tuple[OperationsHub, list[Operations]]]:
    """A hub with so many workers that know each other."""
    hub = OperationsHub()
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(hub.operations(**options)) for _ in range(count)]
        await until(lambda: all(len(each.worker.exchange.alive) == count for each in opened))
        with anyio.fail_after(CEILING + FOREVER):  # The clock may be moved inside.
            yield hub, opened


async def until(is_so: Callable[[], object]) -> None:
    """Wait until something is so, without the passing of time."""
    for _ in range(100_000):
        if is_so():
            return
        await anyio.lowlevel.checkpoint()
    raise AssertionError("it has not come true")


async def all_known(*opened: Operations) -> None:
    """Let each worker learn who is alive."""
    await advance(5.1)
    assert len({frozenset(each.worker.exchange.alive) for each in opened}) == 1


async def endless(cancel: Cancelable, *args: object) -> None:
    await anyio.sleep_forever()


class Steps:
    """Work that waits to be told how to end, and says how it has."""

    def __init__(self) -> None:
        self.begun = anyio.Event()
        self.go_on = anyio.Event()
        self.is_left = anyio.Event()
        self.result: object = None
        self.error: BaseException | None = None
        self.swallows = False

    async def __call__(self, cancel: Cancelable) -> object:
        self.begun.set()
        try:
            await self.go_on.wait()
        except BaseException:
            if not self.swallows:
                raise
        finally:
            self.is_left.set()
        if self.error is not None:
            raise self.error
        return self.result


async def ended(operations: Operations, operation: Operation | str) -> Operation:
    """Wait for the end of an operation."""
    id = operation if isinstance(operation, str) else operation.id
    return await operations.wait(id, timeout=CEILING)


def nothing_is_kept(*opened: Operations) -> None:
    """Fail if something of operations that have ended is left, besides what is remembered of them."""
    for operations in opened:
        worker = operations.worker
        kept = {
            "by id": vars(worker.local)["_by_id"],
            "arrived": vars(worker.local)["_arrived"],
            "young": vars(worker.local)["_young"],
            "blocks": vars(worker.local)["_blocks"],
            "questions": vars(worker.exchange)["_questions"],
            "followed": vars(worker.watching)["_followed"],
            "followers": vars(worker.watching)["_followers"],
            "jobs": vars(worker.background)["_jobs"],
            "starting": vars(worker.background)["_starting"],
            "turns": worker.turns,
            "fallback": vars(worker.turns)["_fallback"],
        }
        assert {name: len(what) for name, what in kept.items()} == dict.fromkeys(kept, 0)


async def outcome(call: Awaitable[Any]) -> str:
    return str((await call).outcome)
