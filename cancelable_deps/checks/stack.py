"""`check_stack`: everything that can be found out without running anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..hosts.serving import running_server
from ..kernel.loops.current import runs_in_this_thread
from ..kernel.options import seconds
from .around import check_around
from .inside import check_inside
from .outside import Surroundings, check_outside, lifespans_of, operations_of
from .survey import application_in, places_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from starlette.types import ASGIApp

    from .findings import Finding


def check_stack(
    app: ASGIApp, *, workers: int | None = None, server_grace: float | timedelta | None = None
) -> list[Finding]:
    """Return what breaks or weakens cancellation in an application, warnings first.

    Nothing of the application is run, and no request is made: its routes, its middleware, the code of its handlers and
    the settings of the server are read. Called in the event loop of a server (as by a lifespan) it sees the settings of
    uvicorn, hypercorn and gunicorn, as far as a worker knows them. `check_store` looks at the Redis of operations.

    What cannot be seen is not reported: an empty list is no proof. A mount that is added after the start, a dependency
    that reads ``receive()`` and a helper that is chosen at run time are examples.

    :param app: the ASGI application as the server gets it, with all that is wrapped around it.
    :param workers: the number of processes that serve it, if this is not called in the event loop of a known server.
    :param server_grace: the seconds for which the server waits for requests when it shuts down, likewise; ``math.inf``
        without a limit.
    :raises TypeError: if ``app`` is not callable, or a number is none.
    :raises ValueError: if a number is negative or NaN.
    """
    if not callable(app):
        raise TypeError(f"check_stack takes an ASGI application, not {app!r}")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int)):
        raise TypeError(f"workers takes a number of processes, not {workers!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be 1 or more, not {workers}")
    grace = None if server_grace is None else seconds(server_grace, "server_grace")
    application, places = application_in(app), places_in(app)
    server = running_server() if runs_in_this_thread() else None
    around = Surroundings(lifespans_of(application), server, grace, workers)
    findings = [*check_around(places), *check_inside(places), *check_outside(application, places, around)]
    return in_order(findings)


def backends_of(app: Any) -> list[Any]:
    """Return the stores of the operations of an application, as far as they can be found."""
    application, places = application_in(app), places_in(app)
    found = (operations.backend for operations in operations_of(application, places, lifespans_of(application)))
    return list({id(backend): backend for backend in found}.values())


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings without repetitions, warnings first."""
    return sorted(
        dict.fromkeys(findings), key=lambda finding: (finding.level != "warning", finding.code, finding.where)
    )
