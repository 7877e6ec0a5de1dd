"""One handler behind each of the doors, for HTTP and for WebSockets."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from starlette.requests import HTTPConnection

from cancelable_deps import CancellationEvent, RequestCancelable, RequestTaskGroup, with_cancelation


def endpoint(door: str, work: Callable[..., Any], connection: type[HTTPConnection] | None = None) -> Any:
    """Return an endpoint that does ``await work(connection)`` behind the named door.

    ``connection`` is the class that it asks FastAPI for; without one it asks for none, and does ``await work()``. A door
    that is none of the endpoint's own, as the middleware, leaves it plain.
    """

    async def plain(**given: Any) -> Any:
        return await work(*given.values())

    async def cancelable(cancel: RequestCancelable, **given: Any) -> Any:
        async with cancel:
            return await work(*given.values())

    async def task_group(get_task_group: RequestTaskGroup, **given: Any) -> Any:
        async with get_task_group():
            return await work(*given.values())

    async def event(cancellation: CancellationEvent, **given: Any) -> Any:
        return await work(*given.values())

    async def everything(
        cancel: RequestCancelable, get_task_group: RequestTaskGroup, cancellation: CancellationEvent, **given: Any
    ) -> Any:
        async with cancel, get_task_group():
            return await work(*given.values())

    behind = {"cancelable": cancelable, "task_group": task_group, "event": event, "all": everything}.get(door, plain)
    chosen = _taking(connection, behind)
    return with_cancelation(chosen) if door in {"decorator", "all"} else chosen


def _taking(connection: type[HTTPConnection] | None, endpoint: Any) -> Any:
    """Show a parameter for the connection, or none, in place of ``**given``."""
    signature = inspect.signature(endpoint)
    *parameters, given = signature.parameters.values()
    if connection is not None:
        parameters.append(given.replace(name="connection", kind=given.KEYWORD_ONLY, annotation=connection))
    endpoint.__signature__ = signature.replace(parameters=parameters)
    return endpoint
