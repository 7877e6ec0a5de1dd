"""An application with everything that `CancelationTelemetry` measures, and a page for Prometheus."""

from __future__ import annotations

from typing import Annotated

import anyio
from fastapi import Depends, FastAPI, WebSocket
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import make_asgi_app

from cancelable_deps import (
    Cancelable,
    RequestCancelationMiddleware,
    TimeoutPolicy,
    cancelation_lifespan,
    configure,
    timeout_policy,
)
from cancelable_deps.observability import CancelationTelemetry
from cancelable_deps.operations import Operations

configure(on_event=CancelationTelemetry(meter_provider=MeterProvider([PrometheusMetricReader()])))
operations = Operations(background_grace=0.2)
app = FastAPI(lifespan=operations.lifespan(cancelation_lifespan(grace=0.2)))
app.add_middleware(
    RequestCancelationMiddleware,
    exclude=["/metrics*"],
    policies={"short": TimeoutPolicy(0.05), "advisory": TimeoutPolicy(0.001, advisory=True)},
    operations=operations,
    operation_id="operation-id",
)
app.mount("/metrics", make_asgi_app())


@app.get("/bare/work")
async def ready() -> str:
    return "done"


@app.get("/work/{name}")
async def work(name: str) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        await anyio.sleep(0.01)


@app.get("/short/{name}", dependencies=[Depends(timeout_policy("short"))])
async def short(name: str) -> None:
    await anyio.sleep_forever()


@app.get("/advised/{name}")
async def advised(name: str, cancel: Annotated[Cancelable, Depends(timeout_policy("advisory"))]) -> str:
    await anyio.sleep(0.02)
    return "done"


@app.websocket("/socket/{name}")
async def socket(websocket: WebSocket, name: str) -> None:
    await websocket.accept()
    await anyio.sleep_forever()


async def endless(cancel: Cancelable) -> None:
    await anyio.sleep_forever()


@app.post("/jobs")
async def start() -> str:
    return (await operations.start(endless)).id


@app.post("/stop/{id}")
async def stop(id: str) -> str:
    return (await operations.cancel(id)).outcome
