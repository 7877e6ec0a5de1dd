"""What stands around handlers and weakens cancellation: middleware, and applications that are mounted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .findings import found, some_of
from .reading import can_tell_disconnect, functions_in, receives_that_never_wait, with_helpers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .findings import Finding
    from .survey import Layer, Place


def check_around(places: Sequence[Place]) -> Iterator[Finding]:
    """Yield what is wrong around these places."""
    yield from _base_http_middleware(places)
    yield from _replays(places)
    yield from _wsgi(places)


def _by_layer(pairs: Iterator[tuple[Layer, Place]]) -> dict[str, list[Place]]:
    grouped: dict[str, list[Place]] = {}
    for layer, place in pairs:
        grouped.setdefault(layer.name, []).append(place)
    return grouped


def _base_http_middleware(places: Sequence[Place]) -> Iterator[Finding]:
    """Look for one that ours stands around and does not find: a cancellation strikes its task group at every ``await``."""
    hidden = (
        (layer, place)
        for place in places
        if place.kind != "wsgi" and not (place.handler is not None and place.handler.has_door)
        for layer in place.hidden_from_ours
        if layer.is_base_http
    )
    for name, concerned in _by_layer(hidden).items():
        between = some_of(layer.name for place in concerned for layer in place.inside_ours if layer.hides)
        yield found(
            "base-http-middleware",
            f"middleware {name}",
            f"It is a BaseHTTPMiddleware, and RequestCancelationMiddleware does not find it behind {between}, which keeps "
            f"its application in another attribute than `app`. A request to {some_of(place.path for place in concerned)} that "
            "is cancelled has its cleanup interrupted at every await, and this middleware sees a CancelledError and no "
            "response. Rename that attribute to `app`, or add another RequestCancelationMiddleware directly around this "
            "middleware.",
        )


def _replays(places: Sequence[Place]) -> Iterator[Finding]:
    """Look for middleware that gives the doors inside of it messages of its own, and never those of the server."""
    outside = ((layer, place) for place in places if place.is_covered for layer in place.outside_ours)
    seen: dict[str, tuple[Layer, list[Place]]] = {}
    for layer, place in outside:
        seen.setdefault(layer.name, (layer, []))[1].append(place)
    for name, (layer, concerned) in seen.items():
        functions = functions_in(layer.kind if layer.dispatch is None else layer.dispatch)
        replays = list(receives_that_never_wait(with_helpers(functions)))
        if not replays:
            continue
        paths = some_of(place.path for place in concerned)
        what_to_do = (
            "Let it return `await receive()` when it has returned the body; or put RequestCancelationMiddleware around it: "
            "call add_middleware(RequestCancelationMiddleware) after it has been added."
        )
        if any(map(can_tell_disconnect, replays)):
            yield found(
                "false-disconnect",
                f"middleware {name}",
                f"It passes a receive() on that returns http.disconnect as soon as the body has been read, while the client "
                f"is there: {paths} will be stopped with 499. {what_to_do}",
            )
        else:
            yield found(
                "hidden-disconnect",
                f"middleware {name}",
                f"It passes a receive() on that never returns the server's http.disconnect: a client that leaves is not "
                f"noticed in {paths}. {what_to_do}",
            )


def _wsgi(places: Sequence[Place]) -> Iterator[Finding]:
    for place in places:
        if place.kind != "wsgi" or place.covering is None:
            continue
        where = f"mount {place.path or '/'}"
        if place.is_hidden_from_ours:
            between = some_of(layer.name for layer in place.inside_ours if layer.hides)
            yield found(
                "wsgi-interrupted",
                where,
                f"RequestCancelationMiddleware does not find this WSGI application behind {between}, which keeps its "
                "application in another attribute than `app`. A request that is stopped leaves its worker thread waiting, "
                "and the bridge has few of them. Rename that attribute to `app`, or `exclude` the path.",
            )
        else:
            yield found(
                "wsgi-mount",
                where,
                "A WSGI application runs in threads: its views run to their ends, also when the client has left or the "
                "time is up, and only then is the request answered. Give it limits of its own; `exclude` the path if you "
                "want no 504 of ours.",
            )
