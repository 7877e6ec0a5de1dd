"""Tasks of Celery that any web worker lists, follows and stops. It needs a Redis: REDIS_URL, or one on this machine.

uvicorn examples.queues.with_celery:app &
celery -A examples.queues.with_celery:queue worker &
curl -X POST 'http://127.0.0.1:8000/reports?pages=60' -H 'user: ann'
curl -X POST 'http://127.0.0.1:8000/checks?pages=60' -H 'user: ann'
curl -X POST 'http://127.0.0.1:8000/searches?below=100000000' -H 'user: ann'
curl http://127.0.0.1:8000/operations/ -H 'user: ann'
curl -X POST http://127.0.0.1:8000/operations/ID/cancel -H 'user: ann'
curl http://127.0.0.1:8000/reports/ID -H 'user: ann'
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import wait
from contextlib import ExitStack
from typing import Annotated, Any

from anyio import from_thread
from anyio.abc import TaskStatus
from celery import Celery, Task
from celery.exceptions import Ignore, SoftTimeLimitExceeded
from celery.signals import worker_process_init, worker_process_shutdown, worker_shutdown
from fastapi import Depends, FastAPI

from cancelable_deps import Cancelable, CancelationError, CancelationReason, current_cancelable
from cancelable_deps.operations import operations_router

from .._collatz import longest
from .reports import REDIS, operations, user, write_report

queue = Celery("reports", broker=REDIS, backend=REDIS)
queue.conf.update(task_track_started=True, broker_connection_retry_on_startup=True)

# The worker: `celery -A examples.queues.with_celery:queue worker`.


class Loop:
    """The event loop in a thread of this process, in which the operations are open: one for all of its tasks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._resources = ExitStack()
        self._portal: from_thread.BlockingPortal | None = None

    def portal(self) -> from_thread.BlockingPortal:
        """Return the way into the loop, which is started by the first call."""
        with self._lock:
            if self._portal is None:
                portal = self._resources.enter_context(from_thread.start_blocking_portal())
                self._resources.enter_context(portal.wrap_async_context_manager(operations))
                self._portal = portal
            return self._portal

    def close(self) -> None:
        """Close the operations, and end the loop."""
        with self._lock:
            self._portal = None
            self._resources.close()


loop = Loop()


@worker_process_init.connect
def open_operations(**_: Any) -> None:
    """Open the operations in a child process: no thread of its parent would live in it."""
    loop.portal()


@worker_process_shutdown.connect
@worker_shutdown.connect  # of the pool `threads`, which has no child processes, and opens them at its first task
def close_operations(**_: Any) -> None:
    loop.close()


def tracked(task: Task, owner: str, work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Run ``work(cancel, *args)`` in the loop as the operation of a task, and return its result to Celery.

    A task that is stopped is ``REVOKED``, as one of `AsyncResult.revoke`, and is not tried again.
    """
    id, name = task.request.id, task.name  # A task knows its request in its own thread alone.

    async def run(*, task_status: TaskStatus[Cancelable]) -> Any:
        async with operations.track(id=id, name=name, owner=owner) as cancel:
            task_status.started(cancel)
            return await work(cancel, *args)

    try:
        future, cancel = loop.portal().start_task(run)
        try:
            return future.result()
        except SoftTimeLimitExceeded:
            cancel.cancel_nowait(CancelationReason.TIMEOUT, "soft time limit")
            wait([future])  # for its cleanup, until the hard limit
            raise
    except CancelationError as stopped:
        task.backend.mark_as_revoked(id, stopped.detail, task.request)
        raise Ignore from stopped


@queue.task(bind=True)
def report(self: Task, user: str, pages: int) -> Any:
    """Write a report: async code, which is stopped at each ``await``."""
    return tracked(self, user, write_report, self.request.id, pages)


@queue.task(bind=True, autoretry_for=(Exception,))
def check(self: Task, user: str, pages: int) -> Any:
    """Check pages: plain code in a thread, which is stopped where it asks, and then not tried again."""
    return tracked(self, user, in_thread, check_pages, pages)


@queue.task(bind=True)
def search(self: Task, user: str, below: int) -> Any:
    """Search for a number: plain code in a process, which is killed."""
    return tracked(self, user, in_process, longest, below)


async def in_thread(cancel: Cancelable, work: Callable[..., Any], *args: Any) -> Any:
    return await cancel.run_in_thread(work, *args)


async def in_process(cancel: Cancelable, work: Callable[..., Any], *args: Any) -> Any:
    return await cancel.run_in_process(work, *args)


def check_pages(pages: int) -> dict[str, int]:
    cancel = current_cancelable()
    assert cancel is not None
    for page in range(1, pages + 1):
        cancel.check()
        from_thread.run(cancel.report_progress, "page checked", {"done": page, "total": pages})
        time.sleep(1)
    return {"pages": pages}


# The application: `uvicorn examples.queues.with_celery:app`.

app = FastAPI(lifespan=operations.lifespan())
app.include_router(operations_router(operations, owner=user), prefix="/operations")


# Celery's client blocks, so these are plain functions.
@app.post("/reports", status_code=202)
def order(user: Annotated[str, Depends(user)], pages: int) -> dict[str, str]:
    """Order a report; its id is that of its operation as well."""
    return {"id": report.delay(user, pages).id}


@app.post("/checks", status_code=202)
def order_check(user: Annotated[str, Depends(user)], pages: int) -> dict[str, str]:
    return {"id": check.delay(user, pages).id}


@app.post("/searches", status_code=202)
def order_search(user: Annotated[str, Depends(user)], below: int) -> dict[str, str]:
    return {"id": search.delay(user, below).id}


@app.get("/reports/{id}")
def outcome(id: str) -> dict[str, str]:
    """Say what the queue knows of a report, or of another task."""
    result = queue.AsyncResult(id)
    return {"status": result.state, "result": str(result.result)}
