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


JOBS: dict[str, Cancelable] = {}
"""Work that waits for its release, by id."""


async def result_of(cancel: Cancelable, id: str, release: anyio.Event) -> str:
    JOBS[id] = cancel
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
            await start(operations, result_of, id, releases[id], id=id)
        case ["release", id]:
            releases[id].set()
        case ["busy", seconds]:
            time.sleep(float(seconds))  # noqa: ASYNC251
        case ["name"]:
            tell(name=operations.worker.local.worker)
        case [("cancel" | "list" | "wait" | "result" | "events") as what, id]:
            tasks.start_soon(ask, operations, what, id)
        case ["report", id, text]:
            await JOBS[id].report_progress(text, {"done": 1})
        case ["fly"]:
            await fly(operations)
        case ["know", count]:
            tasks.start_soon(know, operations, int(count))
        case ["until", id, state]:
            tasks.start_soon(until_in, operations, id, state)


async def ask(operations: Operations, what: str, id: str) -> None:
    """Ask for something that another worker has, and tell the answer."""
    match what:
        case "cancel":
            answer: Any = (await operations.cancel(id, owner="me", message="enough", wait=10)).outcome
        case "list":
            answer = sorted(each.id for each in (await operations.list(owner="me")).items)
        case "wait":
            answer = (await operations.wait(id, timeout=60, owner="me")).state
        case "result":
            answer = await operations.result(id, owner="me")
        case _:
            answer = []
            async for event in operations.events(id, owner="me"):
                progress = event.operation.progress
                tell(event=id, kind=event.kind, progress=progress and progress.message)
                answer.append(event.kind)
    tell(**{what: id, "answer": answer})


async def know(operations: Operations, count: int) -> None:
    while len(operations.worker.exchange.alive) < count:  # noqa: ASYNC110 - nothing tells of it
        await anyio.sleep(0.02)
    tell(knows=count)


async def until_in(operations: Operations, id: str, state: str) -> None:
    while (found := await operations.get(id)) is None or found.state != state:  # noqa: ASYNC110 - a look from outside
        await anyio.sleep(0.02)
    tell(until=id, state=state)


async def fly(operations: Operations) -> None:
    """Send entries of a kind that nobody knows."""
    exchange = operations.worker.exchange
    await exchange.broadcast("fly", {"height": 7})
    for worker in exchange.others:
        await exchange.send(worker, "swim", {"depth": 7})
    tell(has_flown=True)


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
