"""The doors that the applications of this tier stand behind, and what a handler in them does."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from cancelable_deps import CancelableRoute, RequestCancelationMiddleware, cancelation_lifespan, with_cancelation
from tests.machine import scaled

SHORT = scaled(0.4)
"""Seconds of the doors that have a timeout."""


def say(key: str, *words: object) -> None:
    # In one piece: a thread may log to the same pipe in between.
    sys.stdout.write(" ".join(["EVENT", key, *map(str, words)]) + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Door:
    """A kind of door, and with which timeout."""

    kind: str
    timeout: float | None = None

    @property
    def name(self) -> str:
        return self.kind if self.timeout is None else f"timed-{self.kind}"

    def app(self, **options: Any) -> FastAPI:
        """An application that stands behind this door, or whose routes do."""
        app = FastAPI(openapi_url=None, **options)
        if self.kind == "route":
            app.router.route_class = CancelableRoute.with_timeout(self.timeout)
        return app

    def cover(self, app: FastAPI) -> FastAPI:
        """Add the middleware, if it is the door, outside of all that ``app`` has already."""
        if self.kind == "mw":
            app.add_middleware(RequestCancelationMiddleware, default_timeout=self.timeout)
        return app

    def decorate(self, endpoint: Callable[..., Any]) -> Any:
        return with_cancelation(timeout=self.timeout)(endpoint) if self.kind == "deco" else endpoint


KINDS = ("mw", "route", "deco")
TIMED = tuple(f"timed-{kind}" for kind in KINDS)
ALL = ("bare", *KINDS)
DOORS = (Door("bare"), *(Door(kind) for kind in KINDS), *(Door(kind, SHORT) for kind in KINDS))

COVERING = tuple(door for door in DOORS if door.kind in ("bare", "mw"))
"""Those that need no endpoint of the user's."""


def each_door(build: Callable[[Door], FastAPI], doors: tuple[Door, ...] = DOORS) -> dict[str, Any]:
    """The applications that ``build`` makes, by the names of their doors."""
    return {door.name: build(door) for door in doors}


def ends_with_its_server() -> Any:
    """The lifespan of an application whose requests have no more time when its server is told to stop."""
    # Unchecked: `test_check.py` looks at what there is to be said of these applications, some of which is a warning.
    return cancelation_lifespan(grace=0.1, background_grace=0.1, check=False)


@asynccontextmanager
async def watched(key: str, *, cleanup: float | None = 0.02) -> AsyncIterator[None]:
    """Say what becomes of the work inside.

    Its cleanup waits, which it can if it is cancelled but once; with ``None`` it does not, for packages that cancel it
    themselves, by a scope that repeats it at every ``await``.
    """
    say(key, "started")
    try:
        yield
        say(key, "finished")
    except asyncio.CancelledError:
        say(key, "cancelled")
        raise
    finally:
        if cleanup is not None:
            await asyncio.sleep(cleanup)
        say(key, "cleaned up")


async def work(key: str) -> None:
    """Work that never ends by itself."""
    async with watched(key):
        await asyncio.Event().wait()
