"""The changes of an operation as Server-Sent Events."""

from __future__ import annotations

import json
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Final

import anyio

from ..doors.streaming import CancelableStreamingResponse
from ..request.sse import SSE, format_sse
from .errors import OperationsUnavailable, OperationUnknown

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from .model import OperationEvent
    from .names import Owner
    from .operations import Operations

HEARTBEAT_SECONDS: Final = 15.0
"""Seconds between two comments, which show a proxy and us whether the client is there."""

END_ID: Final = "end"
"""The id of the last event. A browser that connects again says that it has seen it."""

_HEARTBEAT: Final = b": waiting\n\n"


class EventsResponse(CancelableStreamingResponse):
    """A stream of Server-Sent Events."""

    media_type = SSE


def events_response(operations: Operations, id: str, owner: Owner) -> EventsResponse:
    """Return a stream of the events of an operation. It ends with the operation, or when its client leaves."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return EventsResponse(_pieces(operations, id, owner), headers=headers)


async def _pieces(operations: Operations, id: str, owner: Owner) -> AsyncGenerator[bytes]:
    sender, receiver = anyio.create_memory_object_stream[bytes](0)

    async def follow() -> None:
        # Unknown: it was known when the response began, and is forgotten by now.
        with sender, suppress(OperationUnknown, OperationsUnavailable):
            async with aclosing(operations.events(id, owner=owner)) as events:
                async for event in events:
                    await sender.send(encoded(event))

    async def beat() -> None:
        with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):
            while True:
                await anyio.sleep(HEARTBEAT_SECONDS)
                await sender.send(_HEARTBEAT)

    with sender, receiver:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            tasks.start_soon(beat)
            async for piece in receiver:
                yield piece
            tasks.cancel_scope.cancel()


def encoded(event: OperationEvent) -> bytes:
    """Return an event as its client gets it. The data of ``progress`` are those of a `progress_response`."""
    shown: dict[str, Any] = event.operation.model_dump(mode="json")
    if event.kind == "progress":
        shown = shown["progress"] or {"message": None, "metadata": {}}
    data = format_sse(json.dumps(shown, allow_nan=False), event=event.kind)
    return f"id: {END_ID}\n".encode() + data if event.kind == "end" else data
