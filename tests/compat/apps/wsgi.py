"""WSGI applications: Flask through a2wsgi and through Starlette's own middleware, Django through a2wsgi."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import anyio
import django
from a2wsgi import WSGIMiddleware
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from fastapi import FastAPI
from flask import Flask, Response, request

from cancelable_deps import RequestCancelationMiddleware
from tests.compat.doors import SHORT, ends_with_its_server, say

WORKERS = 2
gates: dict[str, threading.Event] = {}


def wait_at_the_gate(key: str) -> None:
    gates[key] = threading.Event()
    say(key, "started")
    assert gates[key].wait(20)
    say(key, "finished")


flask = Flask(__name__)


@flask.route("/work")
def work() -> str:
    wait_at_the_gate(request.headers["x-id"])
    return "done"


@flask.route("/ping")
def ping() -> str:
    return "pong"


@flask.route("/upload", methods=["POST"])
def upload() -> str:
    return str(len(request.get_data()))


@flask.route("/stream")
def stream() -> Response:
    key = request.headers["x-id"]

    def body() -> Iterator[str]:
        say(key, "started")
        try:
            for number in range(100):
                yield f"{number}\n"
                time.sleep(0.003)
        finally:
            say(key, "closed")

    return Response(body())


def django_work(request: HttpRequest) -> HttpResponse:
    wait_at_the_gate(request.META["HTTP_X_ID"])
    return HttpResponse(b"done")


def django_ping(request: HttpRequest) -> HttpResponse:
    return HttpResponse(b"pong")


urlpatterns = [path("work", django_work), path("ping", django_ping)]


def build(mounted: Any, *, covered: bool = True, timeout: float | None = None) -> FastAPI:
    app = FastAPI(openapi_url=None, lifespan=ends_with_its_server())
    app.mount("/w", mounted)
    app.add_api_route("/gate/{key}", lambda key: gates[key].set(), methods=["POST"])
    app.add_api_route("/forever", anyio.sleep_forever)
    if covered:
        app.add_middleware(RequestCancelationMiddleware, default_timeout=timeout)
    return app


def starlettes_own(app: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from starlette.middleware.wsgi import WSGIMiddleware as Own
    return Own(app)


def open_gates_when_told() -> None:
    """Connections are no way to open them when the server stops: it takes none."""
    for _ in sys.stdin:
        for gate in list(gates.values()):
            gate.set()


def apps() -> dict[str, Any]:
    threading.Thread(target=open_gates_when_told, daemon=True).start()
    settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="x", ALLOWED_HOSTS=["*"], MIDDLEWARE=[], LOGGING_CONFIG=None)
    django.setup()
    made: dict[str, Any] = {}
    applications: dict[str, Any] = {"flask": flask, "django": get_wsgi_application()}
    for name, wsgi in applications.items():
        made[f"bare-{name}"] = build(WSGIMiddleware(wsgi, workers=WORKERS), covered=False)
        made[f"mw-{name}"] = build(WSGIMiddleware(wsgi, workers=WORKERS))
        made[f"timed-{name}"] = build(WSGIMiddleware(wsgi, workers=WORKERS), timeout=SHORT)
    made["bare-own"] = build(starlettes_own(flask), covered=False)
    made["mw-own"] = build(starlettes_own(flask))
    made["timed-own"] = build(starlettes_own(flask), timeout=SHORT)
    return made
