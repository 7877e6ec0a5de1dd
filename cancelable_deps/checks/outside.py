"""What outside of an application weakens cancellation: its server, other workers, proxies, the installed anyio."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

from ..doors.marks import GRACES, OPERATIONS
from ..doors.middleware import limits_of_middleware, operations_of_middleware
from ..hosts.serving import Serving, sigterm_kills
from ..kernel.loops.current import current_loop, runs_in_this_thread
from ..kernel.loops.known import hooks_are_known
from ..kernel.settings import settings
from ..request.shutdown import Graces
from .findings import found, some_of
from .reading import is_a, objects_named, variables_of
from .survey import mounted_applications

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from starlette.applications import Starlette

    from .findings import Finding
    from .survey import Place

_MARKS: Final = (GRACES, OPERATIONS)
_MOST_LIFESPANS: Final = 100

_PROXIES: Final = {"nginx": 60, "an AWS load balancer": 60, "Cloudflare": 100}
"""The seconds for which proxies wait for a byte of the response, if nobody has told them otherwise."""

_ROUTER_OF_HEROKU: Final = 30


@dataclass(frozen=True)
class Surroundings:
    """What is known of the outside."""

    lifespans: tuple[Any, ...]
    """The `Graces` and `Operations` that the application's lifespans stand for."""

    server: Serving | None
    server_grace: float | None
    workers: int | None

    @property
    def graces(self) -> list[Graces]:
        """The limits at shutdown."""
        return [each for each in self.lifespans if isinstance(each, Graces)]


def check_outside(app: Starlette | None, places: Sequence[Place], around: Surroundings) -> Iterator[Finding]:
    """Yield what is wrong outside of the application."""
    yield from _grace(places, around)
    yield from _workers(app, places, around)
    yield from _proxies(places)
    yield from _handles_under_granian(places, around)
    yield from _lifespans(app, places, around)
    yield from _anyio()


def cleanup_grace(places: Sequence[Place]) -> float:
    """Return the longest time that a cleanup may take."""
    given = [limits_of_middleware(place.ours).cleanup_grace for place in places if place.ours is not None]
    return max([settings.cleanup_grace, *(grace for grace in given if grace is not None)])


def _grace(places: Sequence[Place], around: Surroundings) -> Iterator[Finding]:
    server, cleanup = around.server, cleanup_grace(places)
    name = "the server" if server is None else server.name
    limit = around.server_grace if around.server_grace is not None or server is None else server.grace
    if around.graces:
        longest = max(around.graces, key=lambda graces: graces.grace + graces.background_grace)
        yield from _shutdown(longest, cleanup, name, limit, server)
    disconnect = None if server is None else server.disconnect_grace
    if disconnect is not None and disconnect < cleanup and any(place.is_covered for place in places):
        yield found(
            "disconnect-grace",
            name,
            f"It cancels the task of a request {disconnect:g} s after its client has left (--asgi-disconnect-grace-period), "
            f"and cleanup_grace is {cleanup:g} s: a cleanup that takes longer is interrupted. Give the server "
            f"{cleanup + 1:g} s, or call configure(cleanup_grace={disconnect:g}).",
        )


def _shutdown(
    graces: Graces, cleanup: float, name: str, limit: float | None, server: Serving | None
) -> Iterator[Finding]:
    needed = graces.grace + graces.background_grace + cleanup
    if limit is not None and limit < needed:
        option = "" if server is None or not server.grace_option else f" ({server.grace_option})"
        yield found(
            "server-grace",
            name,
            f"When it shuts down, it waits for requests for {limit:g} s{option}. cancelation_lifespan needs {needed:g} s: "
            f"grace {graces.grace:g}, background_grace {graces.background_grace:g} and cleanup_grace {cleanup:g}. "
            "Requests that take all of that are cut off. Give the server more time, or the lifespan less.",
        )
    if server is not None and sigterm_kills():
        advice = (
            ""
            if server.name != "hypercorn"
            else (
                " Start hypercorn with `-w 0`; with `-k trio` as well, let SIGTERM raise SIGINT: "
                "signal.signal(SIGTERM, lambda *_: signal.raise_signal(SIGINT))."
            )
        )
        yield found(
            "shutdown-unheard",
            name,
            "SIGTERM has its default action in this process, so cancelation_lifespan is not told of a shutdown before the "
            f"requests are over.{advice}",
        )


def _workers(app: Starlette | None, places: Sequence[Place], around: Surroundings) -> Iterator[Finding]:
    server = around.server
    workers = around.workers if around.workers is not None or server is None else server.workers
    in_memory = [
        each for each in operations_of(app, places, around.lifespans) if not getattr(each.backend, "shares", True)
    ]
    if workers is not None and workers > 1 and in_memory:
        yield found(
            "memory-with-workers",
            "operations",
            f"{workers} workers serve this application, and its operations are in the memory of each: a list shows one "
            "worker's, and an operation of another worker cannot be stopped. Use Operations(RedisBackend(...)), or one "
            "worker.",
        )


def operations_of(app: Starlette | None, places: Sequence[Place], lifespans: Sequence[Any]) -> list[Any]:
    """Return the `Operations` of an application, as far as they can be found.

    :param lifespans: what `lifespans_of` has found.
    """
    given = [operations_of_middleware(place.ours) for place in places if place.ours is not None]
    named = [] if app is None else _opened_by(app)
    operations = [each for each in (*lifespans, *given, *named) if not (each is None or isinstance(each, Graces))]
    return list({id(each): each for each in operations}.values())


def _proxies(places: Sequence[Place]) -> Iterator[Finding]:
    waits = [
        (place, place.timeout)
        for place in places
        if place.kind == "http" and place.handler is not None and not place.handler.streams
    ]
    limits = _PROXIES if "DYNO" not in os.environ else {"the router of Heroku": _ROUTER_OF_HEROKU}
    shortest = min(limits.values())
    longer = {place.path: seconds for place, seconds in waits if seconds is not None and seconds > shortest}
    if longer:
        longest = max(longer.values())
        proxies = ", ".join(f"{name} {limit} s" for name, limit in limits.items() if limit < longest)
        yield found(
            "proxy-timeout",
            some_of(longer),
            f"The timeout is {longest:g} s. If nothing is sent before, proxies give up sooner by default ({proxies}): they "
            "answer 504 themselves, and ours is never seen. Make the timeout shorter, or the proxy's longer.",
        )


def _handles_under_granian(places: Sequence[Place], around: Surroundings) -> Iterator[Finding]:
    if around.server is None or around.server.name != "granian":
        return
    concerned = [
        place.path
        for place in places
        if place.handler is not None and not place.is_covered
        if place.handler.has_handle and place.handler.streams_of_others
    ]
    if concerned:
        yield found(
            "handle-without-door",
            some_of(concerned),
            "It has a handle and returns a stream: granian then reports a client as gone that is still there, if the handler "
            "takes longer than 5 ms. Put @with_cancelation above the handler, or pass the handle on to "
            "cancelable_streaming_response.",
        )


def _lifespans(app: Starlette | None, places: Sequence[Place], around: Surroundings) -> Iterator[Finding]:
    handlers = [place for place in places if place.handler is not None]
    is_used = any(place.is_covered or (place.handler is not None and place.handler.has_handle) for place in places)
    # Operations hear of the shutdown, too, for their background work.
    if around.graces and handlers and not is_used and not operations_of(app, places, around.lifespans):
        yield found(
            "nothing-covered",
            "cancelation_lifespan",
            "It ends requests under a door only, and no route has one: all of them end as the server lets them. Add "
            "RequestCancelationMiddleware.",
        )
    unknown = [
        place.path
        for place in handlers
        if place.handler is not None and place.handler.takes_background_tasks and place.handler.decorated is not None
        if place.covering is None and not place.handler.has_route_of_ours
    ]
    if around.graces and unknown:
        yield found(
            "background-not-covered",
            some_of(unknown),
            "Only RequestCancelationMiddleware and CancelableRoute know of background tasks: those of a handler with "
            "@with_cancelation alone are not ended at shutdown.",
        )
    for path, mounted in () if app is None else mounted_applications(app):
        if lifespans_of(mounted):
            yield found(
                "lifespan-in-mount",
                f"mount {path}",
                "Starlette runs the lifespan of the outermost application only. This one is a lifespan of ours, and runs if "
                "your own lifespan enters it; otherwise move it to the outermost application.",
            )


def lifespans_of(app: Starlette | None) -> tuple[Any, ...]:
    """Return the `Graces` and `Operations` that the lifespans of ours in that of an application stand for."""
    functions = [] if app is None else _functions_of(app)
    marks = [vars(each)[name] for each in functions for name in _MARKS if name in vars(each)]
    return tuple({id(each): each for each in marks}.values())


def _opened_by(app: Starlette) -> list[Any]:
    """Return the `Operations` that the application's own lifespan names: ``async with operations:``."""
    return [named for each in _functions_of(app) for named in objects_named(each) if _is_operations(named)]


def _functions_of(app: Starlette) -> list[FunctionType]:
    """Return the functions of which the lifespan of an application is made."""
    to_look_at: list[Any] = [app.router.lifespan_context]
    made_of: dict[int, FunctionType] = {}
    while to_look_at and len(made_of) < _MOST_LIFESPANS:
        each = to_look_at.pop()
        if is_a(each, FunctionType) and id(each) not in made_of:
            made_of[id(each)] = each
            to_look_at += [getattr(each, "__wrapped__", None), *variables_of(each)]
            to_look_at += [
                named
                for named in objects_named(each)
                if is_a(named, FunctionType) and any(map(vars(named).__contains__, _MARKS))
            ]
    return list(made_of.values())


def _is_operations(value: Any) -> bool:
    # Who has such an object has imported its class; who has none need not.
    loaded = sys.modules.get("cancelable_deps.operations")
    return loaded is not None and is_a(value, loaded.Operations)


def _anyio() -> Iterator[Finding]:
    is_trio = runs_in_this_thread() and current_loop().is_trio
    if not hooks_are_known(is_trio):
        package = "trio" if is_trio else "anyio"
        yield found(
            "unknown-anyio",
            package,
            f"The internals of this version of {package} are unknown: cancellations are delivered by its public API, which "
            "keeps all promises and costs more. A warning in the log says which versions are known.",
        )
