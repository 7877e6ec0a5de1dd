"""What in handlers themselves weakens cancellation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import anyio

from .findings import found, some_of
from .reading import is_installed, may_use, names_in, uses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .findings import Finding
    from .handler import Handler
    from .survey import Place

_ASKS: Final = {
    "check",
    "check_cancelled",
    "current_cancelable",
    "from_thread",
    "interrupting",
    "is_cancelled",
    "is_set",
    "run_in_process",
}
"""The names by which code in a thread asks whether it should stop, or lets itself be interrupted."""


def check_inside(places: Sequence[Place]) -> Iterator[Finding]:
    """Yield what is wrong in the handlers of these places."""
    handlers = [(place, place.handler) for place in places if place.handler is not None]
    checks: list[Callable[[Sequence[tuple[Place, Handler]]], Iterator[Finding]]] = [
        _streams,
        _plain_defs,
        _polling,
        _task_groups,
        _websockets,
    ]
    for check in checks:
        yield from check(handlers)


def _streams(handlers: Sequence[tuple[Place, Handler]]) -> Iterator[Finding]:
    looks_complete, is_logged, without_grace = [], [], []
    for place, handler in handlers:
        if place.kind != "http":
            continue
        is_behind = any(layer.is_base_http for layer in place.outside_ours)
        only_decorated = place.covering is None and not handler.has_route_of_ours and handler.decorated is not None
        if is_behind and handler.is_generator and not handler.is_event_stream and only_decorated:
            looks_complete.append(place.path)
        elif is_behind and _is_cut(place, handler):
            is_logged.append(place.path)
        if handler.is_event_stream and place.covering is not None and not handler.has_door:
            without_grace.append(place.path)
        yield from _outlives(place, handler)
    if looks_complete:
        yield found(
            "stream-looks-complete",
            some_of(looks_complete),
            "A BaseHTTPMiddleware stands around this generator, and only @with_cancelation covers it: when it is stopped "
            "after its start, the client gets an end of the response as if it were complete. Add "
            "RequestCancelationMiddleware after that middleware, so that ours stands outside; or use CancelableRoute.",
        )
    if is_logged:
        yield found(
            "stream-cut-is-logged",
            some_of(is_logged),
            "A BaseHTTPMiddleware stands outside of our door: hypercorn and granian log an error when this stream is "
            "stopped, unless it is an event stream. Add RequestCancelationMiddleware after that middleware, so that ours "
            "stands outside.",
        )
    if without_grace:
        yield found(
            "event-stream-grace",
            some_of(without_grace),
            "FastAPI runs the generator of an event stream in a task group of its own, which cancels the generator's "
            "cleanup at every await. Put @with_cancelation above it: then its cleanup has its grace.",
        )


def _is_cut(place: Place, handler: Handler) -> bool:
    """Return whether something of ours stops the stream of a handler, which is no event stream for all that we know."""
    by_door = handler.streams and (place.covering is not None or handler.has_route_of_ours)
    return (by_door or handler.streams_by_ours) and not handler.is_event_stream


def _outlives(place: Place, handler: Handler) -> Iterator[Finding]:
    if handler.limits_itself and handler.streams_of_others:
        yield found(
            "stream-outlives-timeout",
            place.path,
            "The timeout of @with_cancelation ends with the handler, which returns a stream: the stream itself has no limit. "
            "Return cancelable_streaming_response(..., timeout=...), or make the handler a generator, or leave the timeout "
            "to RequestCancelationMiddleware or CancelableRoute.",
        )


def _plain_defs(handlers: Sequence[tuple[Place, Handler]]) -> Iterator[Finding]:
    unlimited = []
    for place, handler in handlers:
        if place.kind != "http" or not handler.is_plain_def or handler.has_handle:
            continue
        if handler.decorated is not None and handler.decorated.options.abandon_thread:
            continue
        has_timeout = handler.limits_itself
        if not (has_timeout or place.timeout) or may_use(handler.function, _ASKS):
            continue
        if has_timeout:
            yield found(
                "def-never-checks",
                place.path,
                "This `def` handler has a timeout, and nothing that it calls asks whether it should stop, as far as can be "
                "seen: a thread cannot be interrupted, so the timeout does nothing. Call current_cancelable().check() in its "
                "loops, or make it `async def`, or use abandon_thread=True, or run_in_process().",
            )
        elif not is_installed(handler.function):
            unlimited.append(place.path)
    if unlimited:
        yield found(
            "def-without-check",
            some_of(unlimited),
            "The default timeout does not end these `def` handlers: a thread cannot be interrupted, and nothing in them asks "
            "whether it should stop, as far as can be seen. If they may take long, call current_cancelable().check() in "
            "their loops, or make them `async def`.",
        )


def _polling(handlers: Sequence[tuple[Place, Handler]]) -> Iterator[Finding]:
    for place, handler in handlers:
        if place.is_covered or handler.has_handle or handler.is_class:
            continue
        layers = [layer for layer in place.layers if layer.is_base_http]
        if layers and "is_disconnected" in names_in(handler.function):
            yield found(
                "polling-in-vain",
                place.path,
                f"It asks request.is_disconnected(), which stays False behind the BaseHTTPMiddleware {layers[0].name}. Take a "
                "CancellationEvent, or put @with_cancelation above the handler.",
            )


def _task_groups(handlers: Sequence[tuple[Place, Handler]]) -> Iterator[Finding]:
    openers: list[Any] = [anyio.create_task_group]
    trio = sys.modules.get("trio")
    if trio is not None:
        openers.append(trio.open_nursery)
    concerned = [
        place.path
        for place, handler in handlers
        if (place.is_covered or handler.has_handle) and not handler.is_class and uses(handler.function, *openers)
    ]
    if concerned:
        yield found(
            "task-group",
            some_of(concerned),
            "A plain task group of anyio or trio cancels the cleanup of its body at every await, and that of its tasks. Take "
            "a RequestTaskGroup, or call create_request_task_group(request): these have the grace.",
        )


def _websockets(handlers: Sequence[tuple[Place, Handler]]) -> Iterator[Finding]:
    for place, handler in handlers:
        if place.kind != "websocket" or place.is_covered or handler.has_handle:
            continue
        if handler.is_beside_routes_of_ours:
            yield found(
                "websocket-not-covered",
                place.path,
                "CancelableRoute does not cover the WebSocket routes of its router, as FastAPI makes these of another class. "
                "Put @with_cancelation above the handler, or use RequestCancelationMiddleware.",
            )
