"""Packages that decorate endpoints, above our decorator and below it: slowapi, fastapi-cache2, dependency-injector, dishka, tenacity."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import tenacity
from dependency_injector import containers, providers
from dependency_injector.wiring import Closing, Provide
from dependency_injector.wiring import inject as wire
from dishka import Provider, Scope, make_async_container, provide
from dishka.integrations.fastapi import FastapiProvider, FromDishka, inject, setup_dishka
from fastapi import Depends, FastAPI, Request
from fastapi_cache import FastAPICache
from fastapi_cache.backends.inmemory import InMemoryBackend
from fastapi_cache.decorator import cache
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware
from slowapi.util import get_remote_address

from cancelable_deps import cancelation_lifespan
from tests.compat.doors import DOORS, SHORT, Door, say, work

Decorate = Callable[[Any], Any]


class Session:
    """What both containers provide for the length of a request."""

    def __init__(self, key: str) -> None:
        self.key = key


class Sessions(Provider):
    @provide(scope=Scope.REQUEST)
    async def session(self, request: Request) -> AsyncIterator[Session]:
        key = request.headers["x-id"]
        yield Session(key)
        await asyncio.sleep(0.02)
        say(key, "session closed")


async def wired_session() -> AsyncIterator[Session]:
    session = Session("")
    yield session
    await asyncio.sleep(0.02)
    say(session.key, "session closed")


class Container(containers.DeclarativeContainer):
    session = providers.Resource(wired_session)


container = Container()


def both_orders(other: Decorate, door: Door) -> tuple[Decorate, Decorate]:
    """``other`` above ours, and below it."""
    return (lambda endpoint: other(door.decorate(endpoint))), (lambda endpoint: door.decorate(other(endpoint)))


def add(app: FastAPI, path: str, decorate: Decorate) -> Decorate:
    """Make a route of what ``decorate`` makes of an endpoint; if that fails, the others are to be served."""

    def register(endpoint: Any) -> Any:
        try:
            app.get(path)(decorate(endpoint))
        except Exception:
            logging.getLogger("compat").exception("%s cannot be built", path)
        return endpoint

    return register


def add_limits(app: FastAPI, door: Door) -> None:
    limiter = Limiter(key_func=get_remote_address)
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)  # type: ignore[arg-type]
    above, below = both_orders(limiter.limit("2/hour", key_func=lambda request: request.headers["x-id"]), door)

    @add(app, "/limited/above", above)
    async def limited_above(request: Request) -> str:
        return "ok"

    @add(app, "/limited/below", below)
    async def limited_below(request: Request) -> str:
        return "ok"


def add_cached(app: FastAPI, door: Door) -> None:
    above, below = both_orders(cache(expire=60), door)

    async def compute(name: str, slowly: bool) -> dict[str, str]:
        say(name, "computed")
        if slowly and name not in computed:
            computed.add(name)
            await work(name)
        await asyncio.sleep(0.01)
        return {"name": name}

    computed: set[str] = set()

    @add(app, "/cached/above/{name}", above)
    async def cached_above(name: str, slowly: bool = False) -> dict[str, str]:
        return await compute(name, slowly)

    @add(app, "/cached/below/{name}", below)
    async def cached_below(name: str, slowly: bool = False) -> dict[str, str]:
        return await compute(name, slowly)


def add_injected(app: FastAPI, door: Door) -> None:
    wired_above, wired_below = both_orders(wire, door)
    above, below = both_orders(inject, door)
    found = Depends(Closing[Provide[Container.session]])

    @add(app, "/wired/above", wired_above)
    async def injector_above(request: Request, session: Session = found) -> None:
        session.key = request.headers["x-id"]
        await work(session.key)

    @add(app, "/wired/below", wired_below)
    async def injector_below(request: Request, session: Session = found) -> None:
        session.key = request.headers["x-id"]
        await work(session.key)

    @add(app, "/dishka/above", above)
    async def dishka_above(session: FromDishka[Session]) -> None:
        await work(session.key)

    @add(app, "/dishka/below", below)
    async def dishka_below(session: FromDishka[Session]) -> None:
        await work(session.key)


def add_retried(app: FastAPI, door: Door) -> None:
    retry: Any = tenacity.retry(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_none(), reraise=True)
    above, below = both_orders(retry, door)

    async def attempt(request: Request) -> None:
        say(request.headers["x-id"], "attempt")
        await work(request.headers["x-id"])

    @add(app, "/retried/below", below)
    async def retried_below(request: Request) -> None:
        await attempt(request)

    @add(app, "/retried/inside", door.decorate)
    async def retried_inside(request: Request) -> None:
        async for trial in tenacity.AsyncRetrying(stop=tenacity.stop_after_attempt(3)):
            with trial:
                await attempt(request)

    @add(app, "/retried/above", above)
    async def retried_above(request: Request) -> None:
        await attempt(request)

    @add(app, "/retried/failing", below)
    async def failing(request: Request) -> None:
        say(request.headers["x-id"], "attempt")
        raise ValueError("again")


def build(door: Door, *middleware: Any) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        FastAPICache.init(InMemoryBackend(), prefix="compat")
        yield

    app = door.app(lifespan=cancelation_lifespan(lifespan, grace=0.1, background_grace=0.1))
    add_limits(app, door)
    add_cached(app, door)
    add_injected(app, door)
    add_retried(app, door)

    @app.get("/work")
    @door.decorate
    async def endless(request: Request) -> None:
        await work(request.headers["x-id"])

    for kind in middleware:
        app.add_middleware(kind)
    setup_dishka(make_async_container(Sessions(), FastapiProvider()), app)
    return door.cover(app)


def apps() -> dict[str, Any]:
    made: dict[str, Any] = {door.name: build(door) for door in DOORS}
    for name, kind in (("base", SlowAPIMiddleware), ("asgi", SlowAPIASGIMiddleware)):
        made[f"slowapi-{name}"] = build(Door("mw"), kind)
        made[f"timed-slowapi-{name}"] = build(Door("mw", SHORT), kind)
    # It binds the functions that are there.
    container.wire(modules=[__name__])
    return made
