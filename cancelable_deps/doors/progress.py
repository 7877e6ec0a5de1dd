"""Responses that stream the progress and the result of work as Server-Sent Events."""

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
from ..kernel.options import checked_work
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
    """Return a response that runs ``work(cancel)`` until it ends or its client leaves, and streams its progress.

    The media type is ``text/event-stream``. Each ``cancel.report_progress(message, metadata)`` becomes ``event: progress``
    with the JSON data ``{"message": ..., "metadata": {...}}``. The report waits until the event is sent, so that work does
    not run ahead of a client that reads slowly. The last event depends on how the work ends:

    - ``event: result``: the work has returned. The data is its result, as FastAPI encodes it.
    - ``event: cancelled``: the work was stopped, and the client is still there.
    - ``event: error``: the work has raised. The exception is logged; the data is only ``{"message": "The work failed"}``.

    :param work: an async function that takes the `Cancelable`.
    :param cancel: the `Cancelable` for ``work``, which the response enters; by default a new one.
    :param timeout: the seconds that the whole response may take.
    :param gap_timeout: the seconds that may pass between two reports.
    :param send_timeout: the seconds that the client may take to make room for one event.
    :param headers: additional headers of the response.
    :raises TypeError: if ``work`` is no async function of one argument, ``cancel`` is not a `Cancelable`, or a limit
        is not a number.
    :raises ValueError: if a limit is negative or NaN.
    """
    work = checked_work(work, 0)
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
        # The stream is closed while stopped work cleans up, and after its end: such reports are dropped.
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
        # The group may stay open across a `yield`, because the response runs its generator in one task.
        inside = Cancelable(token=cancel.token, cleanup_grace=block_of(cancel).grace)
        async with CancelableTaskGroup(inside) as tasks:
            tasks.start_soon(run)
            # Closed before the group waits for the work, which may itself be waiting to send.
            with receiver:
                async for event in receiver:
                    yield event


def _event(name: str, data: object) -> bytes:
    return format_sse(json.dumps(jsonable_encoder(data)), event=name)
