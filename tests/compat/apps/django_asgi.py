"""Django's ASGI application, mounted."""

from __future__ import annotations

import asyncio
from typing import Any

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.signals import request_finished
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path
from fastapi import FastAPI

from cancelable_deps import RequestCancelationMiddleware
from tests.compat.doors import SHORT, ends_with_its_server, say, watched, work


async def endless(request: HttpRequest) -> HttpResponse:
    key = request.META["HTTP_X_ID"]
    request_finished.connect(lambda **_: say(key, "request finished"), weak=False, dispatch_uid=key)
    await work(key)
    return HttpResponse(b"done")


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    key = request.META["HTTP_X_ID"]

    async def chunks() -> Any:
        async with watched(key, cleanup=None):
            for number in range(100_000):
                yield f"{number}\n"
                await asyncio.sleep(0.01)

    return StreamingHttpResponse(chunks())


async def ping(request: HttpRequest) -> HttpResponse:
    return HttpResponse(b"pong")


urlpatterns = [path("work", endless), path("stream", stream), path("ping", ping)]


def build(*, covered: bool = True, timeout: float | None = None) -> FastAPI:
    app = FastAPI(openapi_url=None, lifespan=ends_with_its_server())
    app.mount("/d", get_asgi_application())
    if covered:
        app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)
    return app


def apps() -> dict[str, Any]:
    settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="x", ALLOWED_HOSTS=["*"], MIDDLEWARE=[], LOGGING_CONFIG=None)
    django.setup()
    return {"bare": build(covered=False), "mw": build(), "timed-mw": build(timeout=SHORT)}
