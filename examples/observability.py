"""Metrics for Prometheus at /metrics, and the id of the operation in each line of the log, by which it is stopped.

    python -m examples.observability
    curl -m 1 http://127.0.0.1:8000/reports/7
    curl -i http://127.0.0.1:8000/reports/slow
    curl -sL http://127.0.0.1:8000/metrics | grep ^cancelable_deps
    curl http://127.0.0.1:8000/reports/8 & sleep 1 && curl -X POST http://127.0.0.1:8000/operations/ID/cancel

The first request ends when curl hangs up, the second after two seconds with a 504; /metrics has one of each, by reason
and route. The last one prints a line with its id on the server: put that in place of ID.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import uvicorn
from fastapi import FastAPI
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import make_asgi_app

from cancelable_deps import RequestCancelationMiddleware, configure
from cancelable_deps.observability import CancelationTelemetry, operation_id_filter
from cancelable_deps.operations import Operations, operations_router

log = logging.getLogger("reports")
telemetry = CancelationTelemetry(meter_provider=MeterProvider([PrometheusMetricReader()]))
operations = Operations()


def anybody() -> None:
    """Let everybody be an operator, as this is an example."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    configure(on_event=telemetry)
    yield
    configure(on_event=())


app = FastAPI(lifespan=operations.lifespan(lifespan))
app.add_middleware(RequestCancelationMiddleware, default_timeout=2, exclude=["/metrics*"], operations=operations)
app.include_router(operations_router(operations, operator=anybody), prefix="/operations")
app.mount("/metrics", make_asgi_app())


@app.get("/reports/{name}")
async def report(name: str) -> str:
    """Work for a minute."""
    log.info("rendering")
    await anyio.sleep(60)
    return name


if __name__ == "__main__":
    handler = logging.StreamHandler()
    handler.addFilter(operation_id_filter())
    handler.setFormatter(logging.Formatter("%(levelname)s [%(operation_id)s] %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    uvicorn.run(app)
