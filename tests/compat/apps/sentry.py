"""Sentry with the recipe of docs/observability.md, behind each door."""

from __future__ import annotations

from functools import partial
from typing import Any

import sentry_sdk
from sentry_sdk.integrations.fastapi import FastApiIntegration
from sentry_sdk.integrations.starlette import StarletteIntegration

from tests.compat.apps.observers import SaidEvents, build, sentry
from tests.compat.doors import KINDS, SHORT, Door
from tests.snippets import run


def apps() -> dict[str, Any]:
    sentry_sdk.init = partial(
        sentry_sdk.init,
        dsn="http://public@127.0.0.1/1",
        transport=SaidEvents,
        traces_sample_rate=1.0,
        auto_enabling_integrations=False,
        integrations=[StarletteIntegration(), FastApiIntegration()],
    )
    run("observability.md", "Sentry")
    made: dict[str, Any] = {}
    for kind in KINDS:
        made[kind] = build(sentry, Door(kind))
        made[f"timed-{kind}"] = build(sentry, Door(kind, SHORT))
    made["broken"] = broken = build(sentry, Door("mw"))

    @broken.get("/divide/{name}")
    async def divide(name: str) -> float:
        return 1 / 0

    return made
