"""A worker of operations in a process of its own, for tests that kill and stop it: it obeys lines, and tells of ends."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio

from cancelable_deps import Cancelable
from cancelable_deps.operations import OperationEvent, Operations, OperationsUnavailable, RedisBackend

from .redis_groups import sentinel_client


def tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def told(event: OperationEvent) -> None:
    if event.kind == "end":
        operation = event.operation
        tell(ended=operation.id, state=operation.state, message=operation.message)


async def forever(cancel: Cancelable) -> None:
    await anyio.sleep_forever()


def busy_with(key: str) -> dict[str, str]:
    return {} if key == "-" else {"key": key, "when_busy": "wait"}


async def start(operations: Operations, work: Any, *args: object, **options: Any) -> None:
    try:
        operation = await operations.start(work, *args, owner="me", **options)
    except OperationsUnavailable:
        tell(refused=options["id"])
        return
    tell(started=operation.id, state=operation.state)


async def tracked(operations: Operations, id: str) -> None:
    try:
        async with operations.track(id=id):
            tell(running=id)
            await anyio.sleep_forever()
    except Exception:
        return


async def result_of(cancel: Cancelable, release: anyio.Event) -> str:
    with cancel.shield():
        await release.wait()
    return "finished late"


async def obey(operations: Operations, tasks: Any, words: list[str], releases: dict[str, anyio.Event]) -> None:
    match words:
        case ["track", *ids]:
            for id in ids:
                tasks.start_soon(tracked, operations, id)
        case ["start", id, key]:
            await start(operations, forever, id=None if id == "-" else id, **busy_with(key))
        case ["late", id]:
            releases[id] = anyio.Event()
            await start(operations, result_of, releases[id], id=id)
        case ["release", id]:
            releases[id].set()
        case ["busy", seconds]:
            time.sleep(float(seconds))  # noqa: ASYNC251
        case ["name"]:
            tell(name=operations.worker.local.worker)


@asynccontextmanager
async def backend_of(url: str, lease: float) -> AsyncIterator[RedisBackend]:
    """The store of a URL; of ``sentinel:LIBRARY:PORT,PORT`` that of the master which these sentinels know."""
    if not url.startswith("sentinel:"):
        yield RedisBackend(url, lease=lease)
        return
    _, library, ports = url.split(":")
    async with sentinel_client(library, list(map(int, ports.split(",")))) as client:
        yield RedisBackend(client=client, lease=lease)


async def main(url: str, lease: float, result_ttl: float) -> None:
    async with (
        backend_of(url, lease) as backend,
        Operations(backend, on_event=told, background_grace=0, result_ttl=result_ttl) as operations,
    ):
        tell(ready=operations.worker.local.worker)
        releases: dict[str, anyio.Event] = {}
        async with anyio.create_task_group() as tasks:
            file = anyio.wrap_file(sys.stdin)
            async for line in file:
                if line.strip() == "end":
                    break
                await obey(operations, tasks, line.split(), releases)
            tasks.cancel_scope.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    anyio.run(main, sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), backend=sys.argv[4])
