"""Workers of operations on a real Redis: in this event loop, and in processes of their own."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import anyio
import pytest
from anyio.abc import Process

from cancelable_deps import Cancelable
from cancelable_deps.operations import Operations, OperationState, OperationsUnavailable, RedisBackend

from .stores import CEILING, until

Work = Callable[[], Coroutine[Any, Any, None]]

MARKS = [
    pytest.mark.anyio,
    pytest.mark.usefixtures("collected"),
    # coredis leaves the streams of connections that break to the garbage collector.
    pytest.mark.filterwarnings("ignore:Exception ignored in.*MemoryObject:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]
"""Of tests with a Redis, besides ``pytest_plugins = ["tests.redis_fixtures"]``."""


@asynccontextmanager
async def opened(
    url: str, count: int = 1, *, lease: float = 3, prefix: str = "app", **options: Any
) -> AsyncIterator[list[Operations]]:
    """Several workers in this event loop."""
    options.setdefault("background_grace", 0)
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(Operations(RedisBackend(url, lease=lease, prefix=prefix), **options))
            for _ in range(count)
        ]


class WorkerProcess:
    """A worker in a process of its own."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.heard: list[dict[str, Any]] = []
        self.log: list[str] = []

    async def listen(self) -> None:
        assert self.process.stdout
        buffer = b""
        async for part in self.process.stdout:
            *lines, buffer = (buffer + part).split(b"\n")
            self.heard += [json.loads(line) for line in lines]

    async def listen_to_log(self) -> None:
        assert self.process.stderr
        async for part in self.process.stderr:
            self.log.append(part.decode())

    async def say(self, *words: object) -> None:
        assert self.process.stdin
        await self.process.stdin.send((" ".join(map(str, words)) + "\n").encode())

    async def hears(
        self, key: str, value: str | None = None, count: int = 1, ceiling: float = CEILING
    ) -> list[dict[str, Any]]:
        async def found() -> list[dict[str, Any]] | None:
            fitting = [each for each in self.heard if key in each and value in (None, each[key])]
            return fitting if len(fitting) >= count else None

        try:
            fitting: list[dict[str, Any]] = await until(found, f"{key} {value} {count} times", ceiling)
        except AssertionError as exc:
            told = f"the exit status of its process is {self.process.returncode}; {self.heard[-3:]} {''.join(self.log)[-3000:]}"
            raise AssertionError(f"{exc}: {told}") from None
        return fitting

    @property
    def ended(self) -> dict[str, str]:
        return {each["ended"]: each["state"] for each in self.heard if "ended" in each}


@asynccontextmanager
async def worker_process(
    url: str,
    *,
    lease: float = 3,
    backend: str = "asyncio",
    result_ttl: float = 3,
    module: str = "tests.operations_worker",
) -> AsyncIterator[WorkerProcess]:
    command = [sys.executable, "-m", module, url, str(lease), str(result_ttl), backend]
    async with await anyio.open_process(command) as process, anyio.create_task_group() as tasks:
        worker = WorkerProcess(process)
        tasks.start_soon(worker.listen)
        tasks.start_soon(worker.listen_to_log)
        try:
            # Python and the client libraries take 15 seconds to start on a machine with six times its work.
            await worker.hears("ready", ceiling=90)
            yield worker
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                    process.kill()
            tasks.cancel_scope.cancel()


async def forever(cancel: Cancelable) -> None:
    await anyio.sleep_forever()


ACKNOWLEDGED = ("cancelled", "stopping", "sent")

LEASE = 12
"""Seconds that no outage of a test comes near, also on a slow machine: for tests in which nobody may be given up."""


async def cancelled_during(a: Operations, ids: list[str], seconds: float) -> dict[str, str]:
    """Cancel operations one after the other, evenly, without waiting for each; and return what was answered."""
    answers: dict[str, str] = {}

    async def cancel(id: str) -> None:
        try:
            answers[id] = (await a.cancel(id, wait=1.0)).outcome
        except OperationsUnavailable:
            answers[id] = "unavailable"

    async with anyio.create_task_group() as tasks:
        for id in ids:
            tasks.start_soon(cancel, id)
            await anyio.sleep(seconds / len(ids))
    return answers


async def none_is_lost(
    what: str,
    a: Operations,
    b: WorkerProcess,
    ids: list[str],
    disturb: Work,
    seconds: float = 3,
    others: tuple[str, ...] = ("unavailable",),
) -> None:
    """Cancel the operations of ``b`` within some seconds while it is disturbed: all that were acknowledged end.

    :param others: the outcomes that may be answered as well, and acknowledge nothing.
    """
    answers: dict[str, str] = {}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(disturb)
        answers = await cancelled_during(a, ids, seconds)
    acknowledged = {id for id, outcome in answers.items() if outcome in ACKNOWLEDGED}
    counted = Counter(answers.values())
    print(f"\n{what}: {dict(counted)}, acknowledged {len(acknowledged)}")
    # Most of them, so that there is something to lose; the others are told that it is not known.
    assert len(acknowledged) > len(ids) / 4
    assert set(counted) <= {*ACKNOWLEDGED, *others}

    async def are_all_ended() -> bool:
        return acknowledged <= b.ended.keys()

    try:
        await until(are_all_ended, "all that were acknowledged have ended")
    finally:
        print(f"{what}: lost {len(acknowledged - b.ended.keys())} of {len(acknowledged)}")


async def cancelled_or_none(operations: Operations, id: str) -> str | None:
    """Cancel an operation, and return what has become of it; ``None`` while that is not known."""
    try:
        outcome = (await operations.cancel(id, wait=2)).outcome
    except OperationsUnavailable:
        return None
    return outcome if outcome not in ("sent", "stopping") else None


async def is_cancelled(operations: Operations, id: str) -> bool:
    return await cancelled_or_none(operations, id) == "cancelled"


async def is_in(operations: Operations, id: str, state: OperationState) -> bool:
    """Whether an operation is known to be in a state."""
    try:
        found = await operations.get(id)
    except OperationsUnavailable:
        return False
    return found is not None and found.state is state


async def know_each_other(*all_of_them: Operations) -> None:
    async def do_they() -> bool:
        return all(len(each.worker.exchange.alive) == len(all_of_them) for each in all_of_them)

    await until(do_they, "the workers know each other")
