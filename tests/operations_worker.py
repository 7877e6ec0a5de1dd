"""A worker of operations in a process of its own, for tests that kill and stop it: it obeys lines, and tells of ends."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import anyio

from cancelable_deps import Cancelable
from cancelable_deps.operations import OperationEvent, Operations, OperationsUnavailable, RedisBackend


def tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def told(event: OperationEvent) -> None:
    if event.kind == "end":
        operation = event.operation
        tell(ended=operation.id, state=operation.state, message=operation.message)


async def forever(cancel: Cancelable) -> None:
    await anyio.sleep_forever()


async def tracked(operations: Operations, id: str) -> None:
    try:
        async with operations.track(id=id):
            tell(running=id)
            await anyio.sleep_forever()
    except Exception:
        return


async def obey(operations: Operations, tasks: Any, words: list[str]) -> None:
    match words:
        case ["track", *ids]:
            for id in ids:
                tasks.start_soon(tracked, operations, id)
        case ["start", id, key]:
            busy = {"key": key, "when_busy": "wait"} if key != "-" else {}
            try:
                operation = await operations.start(forever, id=id, owner="me", **busy)  # type: ignore[arg-type]
            except OperationsUnavailable:
                tell(refused=id)
                return
            tell(started=operation.id, state=operation.state)
        case ["busy", seconds]:
            time.sleep(float(seconds))  # noqa: ASYNC251
        case ["name"]:
            tell(name=operations.worker.local.worker)


async def main(url: str, lease: float) -> None:
    backend = RedisBackend(url, lease=lease)
    async with Operations(backend, on_event=told, background_grace=0, result_ttl=3) as operations:
        tell(ready=operations.worker.local.worker)
        async with anyio.create_task_group() as tasks:
            file = anyio.wrap_file(sys.stdin)
            async for line in file:
                if line.strip() == "end":
                    break
                await obey(operations, tasks, line.split())
            tasks.cancel_scope.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    anyio.run(main, sys.argv[1], float(sys.argv[2]), backend=sys.argv[3])
