"""Work whose progress its client follows as Server-Sent Events."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
from fastapi.encoders import jsonable_encoder

from ..kernel.cancelable import Cancelable, block_of
from ..kernel.errors import CancelationError
from ..kernel.foreign import ThisTask
from ..kernel.log import logger
from ..kernel.task_group import CancelableTaskGroup
from ..request.sse import SSE, format_sse
from .streaming import CancelableStreamingResponse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
    from datetime import timedelta


def progress_response(
    work: Callable[[Cancelable], Awaitable[object]],
    cancel: Cancelable | None = None,
    *,
    timeout: float | timedelta | None = None,
    gap_timeout: float | timedelta | None = None,
    send_timeout: float | timedelta | None = None,
    headers: Mapping[str, str] | None = None,
) -> CancelableStreamingResponse:
    """Run ``work(cancel)`` for as long as its client listens, and stream its progress as ``text/event-stream``.

    Each ``cancel.report_progress(message, metadata)`` becomes ``event: progress`` with the JSON data ``{"message": ...,
    "metadata": {...}}``, and waits until it is sent: work does not run ahead of a client that reads slowly. At last
    comes ``event: result``, whose data is what ``work`` returned, as FastAPI encodes it. Work that is stopped ends with
    ``event: cancelled``, unless its client has left; work that fails is logged, and ends with ``event: error``, whose
    data tells nothing of the failure but ``{"message": "The work failed"}``.

    ``cancel`` is entered for you, around ``work``; without one, a new `Cancelable` is. The limits are those of
    `CancelableStreamingResponse`: ``gap_timeout`` is for the time between two reports.
    """
    if not callable(work):
        raise TypeError(f"work must be an async function that takes the Cancelable, not {work!r}")
    cancel = Cancelable() if cancel is None else cancel
    return CancelableStreamingResponse(
        _events(work, cancel),
        headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})},
        media_type=SSE,
        cancel=cancel,
        timeout=timeout,
        gap_timeout=gap_timeout,
        send_timeout=send_timeout,
    )


async def _events(work: Callable[[Cancelable], Awaitable[object]], cancel: Cancelable) -> AsyncGenerator[bytes]:
    sender, receiver = anyio.create_memory_object_stream[bytes](0)

    @cancel.on_progress
    async def report(message: str | None, metadata: Mapping[str, Any]) -> None:
        await say(_event("progress", {"message": message, "metadata": metadata}))

    async def say(event: bytes) -> None:
        # Nobody takes what stopped work says while it cleans up, nor what is said after its end.
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await sender.send(event)

    async def run() -> None:
        with sender:
            this_task = ThisTask()
            try:
                result = _event("result", await work(cancel))
            except CancelationError:
                raise
            except BaseException as exc:
                if this_task.is_ended_by(exc):
                    raise
                logger.exception("the work of a progress_response() failed")
                result = _event("error", {"message": "The work failed"})
            await say(result)

    with sender, receiver:
        # A response runs its generator in one task, from the first step to the last: a group may stay open.
        inside = Cancelable(token=cancel.token, cleanup_grace=block_of(cancel).grace)
        async with CancelableTaskGroup(inside) as tasks:
            tasks.start_soon(run)
            # Closed before the work is waited for, which may be waiting for us.
            with receiver:
                async for event in receiver:
                    yield event


def _event(name: str, data: object) -> bytes:
    return format_sse(json.dumps(jsonable_encoder(data)), event=name)
