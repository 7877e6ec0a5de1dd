"""The jobs of arq, SAQ and Celery are operations of the application: the examples, with real workers of each queue.

arq and SAQ have a dependency group of their own: ``uv run --no-default-groups --group queues pytest -m compat`` and this
file.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psutil
import pytest

from tests.compat.job_queues import KINDS, LEASE, Site, site_of
from tests.redis_server import RedisServer
from tests.stores import until

pytest_plugins = ["tests.redis_fixtures"]
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]


def kinds(*names: str) -> pytest.MarkDecorator:
    """The queues that a test is about; those whose packages are not installed are skipped."""
    parameters = [
        pytest.param(
            name,
            marks=pytest.mark.skipif(find_spec(KINDS[name].package) is None, reason="its package is not installed"),
        )
        for name in names or KINDS
    ]
    return pytest.mark.parametrize("kind", parameters)


@pytest.fixture
async def site(kind: str, own_redis: RedisServer, tmp_path: Path) -> AsyncIterator[Site]:
    async with site_of(KINDS[kind], own_redis, tmp_path) as site:
        yield site


async def holds(condition: Callable[[], bool]) -> bool:
    return condition()


async def stays_stopped(site: Site, id: str) -> None:
    """The queue has a job as stopped, does not try it again, and goes on with the next one."""
    await site.has_record(id, site.kind.stopped)
    following = await site.order("/reports?pages=1")
    await until(lambda: holds(lambda: site.has(following, "txt")), "the next report is written")
    assert await site.get(f"/reports/{id}") == site.kind.stopped


@kinds()
async def test_a_job_is_listed_with_its_progress_and_stopped_by_its_id(site: Site) -> None:
    with site.worker() as worker:
        id = await site.order()
        operation = await site.progresses(id)
        assert operation["kind"] == "tracked"
        assert operation["name"].rpartition(".")[2] == "report"
        assert operation["owner"] == "ann"
        assert operation["progress"]["message"] == "page written"
        assert operation["progress"]["metadata"]["total"] == 600
        assert site.has(id, "draft")
        assert (await site.get(f"/reports/{id}"))["status"] == site.kind.running
        assert (await site.ask("POST", f"/operations/{id}/cancel", user="bob")).status_code == 404
        answer = await site.cancel(id)
        assert (answer.status_code, answer.json()["outcome"]) == (200, "cancelled")
        assert answer.json()["operation"]["message"] == "enough"
        assert not site.has(id, "draft")
        await stays_stopped(site, id)
        assert not site.has(id, "draft")
        assert (await site.get(f"/operations/{id}"))["state"] == "cancelled"
        assert worker.complaints() == []


@kinds()
async def test_a_cancel_that_comes_first_keeps_a_job_from_starting(site: Site) -> None:
    # One that has begun would be finished at once.
    id = await site.order("/reports?pages=0")
    answer = await site.cancel(id)
    assert answer.status_code == 404
    with site.worker() as worker:
        await site.has_record(id, site.kind.stopped)
        assert not site.has(id, "txt")
        assert worker.complaints() == []


@kinds()
async def test_a_job_whose_worker_is_killed_disappears(site: Site) -> None:
    with site.worker() as worker:
        id = await site.order()
        await site.progresses(id)
        worker.kill()
        # Nobody can know yet that it is gone.
        assert (await site.get("/operations/"))["unreachable"]

        async def is_gone() -> bool:
            listed = await site.get("/operations/")
            return listed["total"] == 0 and not listed["unreachable"]

        await until(is_gone, "the operation is gone", ceiling=3 * LEASE)
        assert (await site.ask("GET", f"/operations/{id}")).status_code == 404
        assert (await site.cancel(id)).status_code == 404
        # Its cleanup has not run.
        assert site.has(id, "draft")


@kinds("arq", "saq")
async def test_a_job_of_a_worker_that_is_told_to_stop_runs_again_in_the_next(site: Site) -> None:
    with site.worker() as worker:
        id = await site.order()
        first = await site.progresses(id)
        worker.terminate()
        await until(worker.has_ended, "the worker stops")
        assert worker.process.returncode == 0, worker.log()
        assert not site.has(id, "draft")
        # It has said goodbye: nobody waits for its lease.
        assert await site.get("/operations/") == {"operations": [], "total": 0, "unreachable": []}
        assert (await site.get(f"/reports/{id}"))["status"] == "queued"
        assert worker.complaints() == []
    with site.worker():
        second = await site.progresses(id)
        assert second["worker"] != first["worker"]
        assert (await site.cancel(id)).json()["outcome"] == "cancelled"
        await site.has_record(id, site.kind.stopped)


@kinds("celery-prefork", "celery-threads")
async def test_a_worker_of_celery_that_is_told_to_stop_finishes_its_task(site: Site) -> None:
    with site.worker() as worker:
        id = await site.order("/reports?pages=4")
        await site.progresses(id)
        worker.terminate()
        await until(worker.has_ended, "the worker stops")
        assert worker.process.returncode == 0, worker.log()
        assert site.has(id, "txt")
        assert await site.get(f"/reports/{id}") == {"status": "SUCCESS", "result": "{'pages': 4}"}
        assert await site.get("/operations/") == {"operations": [], "total": 0, "unreachable": []}
        assert worker.complaints() == []


async def abort_with_arq(url: str, id: str) -> None:
    from arq import create_pool
    from arq.connections import RedisSettings
    from arq.jobs import Job

    pool = await create_pool(RedisSettings.from_dsn(url))
    assert await Job(id, pool).abort(timeout=60)
    await pool.aclose()


async def abort_with_saq(url: str, id: str) -> None:
    from saq import Queue

    queue = Queue.from_url(url)
    await queue.connect()
    job = await queue.job(id)
    assert job is not None
    await job.abort("its own abort")
    await queue.disconnect()


ABORTS: dict[str, tuple[Callable[[str, str], Awaitable[None]], dict[str, str]]] = {
    "arq": (abort_with_arq, {"status": "complete", "result": "CancelledError()"}),
    "saq": (abort_with_saq, {"status": "aborted", "result": "its own abort"}),
}


@kinds("arq", "saq")
async def test_the_queues_own_abort_passes_through_the_block(kind: str, site: Site) -> None:
    abort, record = ABORTS[kind]
    with site.worker() as worker:
        id = await site.order()
        await site.progresses(id)
        await abort(site.redis.url, id)
        await site.has_record(id, record)
        assert not site.has(id, "draft")
        assert (await site.get(f"/operations/{id}"))["state"] == "failed"
        assert worker.complaints() == []


def celery_of(url: str) -> Any:
    from celery import Celery

    return Celery(broker=url, backend=url)


@kinds("celery-prefork", "celery-threads")
async def test_a_plain_function_is_stopped_where_it_asks(site: Site) -> None:
    with site.worker() as worker:
        id = await site.order("/checks?pages=600")
        assert (await site.progresses(id))["progress"]["message"] == "page checked"
        assert (await site.cancel(id)).json()["outcome"] == "cancelled"
        await stays_stopped(site, id)
        assert worker.complaints() == []


@kinds("celery-prefork", "celery-threads")
async def test_a_process_is_killed(site: Site) -> None:
    with site.worker() as worker:
        id = await site.order("/searches?below=1000000000")
        await site.runs(id)
        # It says so when it counts; nothing in it asks whether it is to stop.
        await until(lambda: holds(lambda: " counts" in worker.log()), "the process counts")
        number = int(worker.log().partition("process ")[2].partition(" counts")[0])
        assert (await site.cancel(id)).json()["outcome"] == "cancelled"
        await site.has_record(id, site.kind.stopped)
        assert not psutil.pid_exists(number)
        assert worker.complaints() == []


@kinds("celery-prefork")
async def test_the_soft_time_limit_of_celery_stops_the_work(site: Site) -> None:
    with site.worker():
        task = await anyio.to_thread.run_sync(
            lambda: celery_of(site.redis.url).send_task(
                "examples.queues.with_celery.report", ("ann", 600), soft_time_limit=2
            )
        )
        await site.progresses(task.id)
        await site.has_record(task.id, {"status": "FAILURE", "result": "SoftTimeLimitExceeded()"})
        assert not site.has(task.id, "draft")
        operation = await site.get(f"/operations/{task.id}")
        assert (operation["state"], operation["reason"]) == ("cancelled", "timeout")


@kinds("celery-prefork")
async def test_a_task_that_celery_terminates_has_no_cleanup(site: Site) -> None:
    with site.worker():
        id = await site.order()
        await site.progresses(id)
        await anyio.to_thread.run_sync(lambda: celery_of(site.redis.url).control.revoke(id, terminate=True))
        await site.has_record(id, {"status": "REVOKED", "result": "terminated"})
        assert site.has(id, "draft")

        async def is_gone() -> bool:
            listed = await site.get("/operations/")
            return listed["total"] == 0 and not listed["unreachable"]

        await until(is_gone, "the operation is gone", ceiling=3 * LEASE)
