"""Workers of operations on a real Redis: in this event loop, and in processes of their own."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import anyio
from anyio.abc import Process

from cancelable_deps import Cancelable
from cancelable_deps.operations import Operations, RedisBackend

from .stores import until


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

    async def hears(self, key: str, value: str | None = None, count: int = 1) -> list[dict[str, Any]]:
        async def found() -> list[dict[str, Any]] | None:
            fitting = [each for each in self.heard if key in each and value in (None, each[key])]
            return fitting if len(fitting) >= count else None

        fitting: list[dict[str, Any]] = await until(
            found, f"{key} {value} {count} times, and not {self.heard[-3:]} {''.join(self.log)[-3000:]}"
        )
        return fitting

    @property
    def ended(self) -> dict[str, str]:
        return {each["ended"]: each["state"] for each in self.heard if "ended" in each}


@asynccontextmanager
async def worker_process(url: str, *, lease: float = 3, backend: str = "asyncio") -> AsyncIterator[WorkerProcess]:
    command = [sys.executable, "-m", "tests.operations_worker", url, str(lease), backend]
    async with await anyio.open_process(command) as process, anyio.create_task_group() as tasks:
        worker = WorkerProcess(process)
        tasks.start_soon(worker.listen)
        tasks.start_soon(worker.listen_to_log)
        try:
            await worker.hears("ready")
            yield worker
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                    process.kill()
            tasks.cancel_scope.cancel()


async def forever(cancel: Cancelable) -> None:
    await anyio.sleep_forever()


async def know_each_other(*all_of_them: Operations) -> None:
    async def do_they() -> bool:
        return all(len(each.worker.exchange.alive) == len(all_of_them) for each in all_of_them)

    await until(do_they, "the workers know each other")
