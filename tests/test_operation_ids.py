"""The id of the operation in each line of a log."""

from __future__ import annotations

import gc
import logging
import logging.config
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import anyio
import anyio.to_thread
import pytest
from fastapi import BackgroundTasks, FastAPI, WebSocket
from starlette.requests import Request

from cancelable_deps import (
    Cancelable,
    CancelableRoute,
    RequestCancelable,
    RequestCancelationMiddleware,
    RequestTaskGroup,
    configure,
    with_cancelation,
)
from cancelable_deps.observability import current_operation_id, operation_id_filter
from cancelable_deps.operations import Operations, RequestOperation
from cancelable_deps.testing import CancelableClient
from tests.calls import CEILING, get
from tests.operations import nothing_is_kept, until

pytestmark = pytest.mark.anyio

DOORS = ("middleware", "route class", "decorator", "handle", "task group", "operation", "middleware and decorator")
user_log = logging.getLogger("user")


@pytest.fixture
def lines() -> Iterator[list[tuple[str, str]]]:
    """The messages of a log, and the ids that the filter has given them."""
    lines: list[tuple[str, str]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append((record.getMessage(), vars(record)["operation_id"]))

    handler = Kept()
    handler.addFilter(operation_id_filter())
    for name in ("user", "cancelable_deps"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)
    yield lines
    for name in ("user", "cancelable_deps"):
        logging.getLogger(name).removeHandler(handler)
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture
def late() -> Iterator[None]:
    """No request grows old, however busy the machine is."""
    configure(listen_after=60)
    yield
    configure(listen_after=0.005)


class Site:
    """An application of one route behind one door, which logs at several places."""

    def __init__(self, door: str, operations: Operations | None) -> None:
        lifespan: Any = None if operations is None else operations.lifespan()
        self.app = FastAPI(lifespan=lifespan)
        if door.startswith("middleware"):
            options: Any = {} if operations is None else {"operations": operations, "operation_id": "operation-id"}
            self.app.add_middleware(RequestCancelationMiddleware, **options)
        if door == "route class":
            self.app.router.route_class = CancelableRoute
        self.pause: Callable[[], Any] | None = None
        self.app.get("/work")(self.handler(door))

    async def work(self) -> str | None:
        user_log.info("begun")
        if self.pause is not None:
            await self.pause()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.child)
        await anyio.to_thread.run_sync(user_log.info, "in a thread")
        user_log.info("done")
        return current_operation_id()

    async def child(self) -> None:
        user_log.info("in a child")

    def handler(self, door: str) -> Any:
        async def plain() -> str | None:
            return await self.work()

        async def with_handle(cancel: RequestCancelable) -> str | None:
            async with cancel:
                return await self.work()

        async def with_group(get_group: RequestTaskGroup) -> str | None:
            async with get_group():
                return await self.work()

        async def with_operation(operation: RequestOperation) -> str | None:
            assert current_operation_id() == operation.id
            return await self.work()

        if door.endswith("decorator"):
            return with_cancelation(plain)
        return {"handle": with_handle, "task group": with_group, "operation": with_operation}.get(door, plain)


PLACES = ["begun", "in a child", "in a thread", "done"]


@pytest.mark.parametrize("door", DOORS)
async def test_all_lines_of_a_request_have_one_id_and_it_is_stopped_by_that(
    door: str, lines: list[tuple[str, str]]
) -> None:
    operations = Operations()
    site = Site(door, operations)
    async with CancelableClient(site.app, ceiling=CEILING) as client:
        first, second = [(await client.get("/work")).json() for _ in range(2)]
        assert [place for place, _ in lines] == PLACES * 2
        assert {id for _, id in lines[:4]} == {first}
        assert {id for _, id in lines[4:]} == {second}
        assert first != second
        site.pause = anyio.sleep_forever
        async with client.start("GET", "/work") as call:
            await until(lambda: len(lines) == 9)
            assert (await operations.cancel(lines[-1][1])).outcome == "cancelled"
        assert call.status == 499
        assert lines[-1][0].startswith("GET /work cancelled after")
        assert lines[-1][1] == lines[-2][1]
        nothing_is_kept(operations)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("door", DOORS)
async def test_a_young_request_has_one_as_well(door: str, lines: list[tuple[str, str]]) -> None:
    operations = Operations()
    async with CancelableClient(Site(door, operations).app, ceiling=CEILING) as client:
        id = (await client.get("/work")).json()
        assert lines == [(place, id) for place in PLACES]
        found = await operations.get(id)
        assert found is not None
        assert (found.state, found.route) == ("finished", "/work")
        nothing_is_kept(operations)


@pytest.mark.parametrize("door", ["middleware", "middleware and decorator"])
async def test_the_id_is_that_which_the_client_has_chosen(door: str, lines: list[tuple[str, str]]) -> None:
    operations = Operations()
    async with CancelableClient(Site(door, operations).app, ceiling=CEILING) as client:
        assert (await client.get("/work", headers={"operation-id": "mine"})).json() == "mine"
        nothing_is_kept(operations)
    assert lines == [(place, "mine") for place in PLACES]


@pytest.mark.parametrize("door", [door for door in DOORS if door != "operation"])
async def test_without_operations_there_is_no_id(door: str, lines: list[tuple[str, str]]) -> None:
    assert (await get(Site(door, None).app, "/work")).json() is None
    assert lines == [(place, "-") for place in PLACES]


async def test_who_logs_nothing_pays_nothing() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware)
    seen: list[Any] = []

    @app.get("/work")
    async def work(cancel: RequestCancelable) -> None:
        async with cancel:
            seen.extend(running for running in operations.worker.local.everything())

    async with CancelableClient(app, ceiling=CEILING) as client:
        assert (await client.get("/work")).status_code == 200
        assert seen == []
        assert len(operations.worker.local.ended) == 0


async def test_a_def_handler(lines: list[tuple[str, str]]) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware)

    @app.get("/work")
    def work() -> None:
        user_log.info("in a thread")

    async with CancelableClient(app, ceiling=CEILING) as client:
        assert (await client.get("/work")).status_code == 200
        [(_, id)] = lines
        found = await operations.get(id)
        assert found is not None
        assert found.state == "finished"
        nothing_is_kept(operations)


async def test_two_threads_that_ask_at_once_get_one_id() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware)

    @app.get("/work")
    async def work() -> list[str | None]:
        ids: list[str | None] = []
        gate = threading.Barrier(8)

        def ask() -> None:
            gate.wait(CEILING)
            ids.append(current_operation_id())

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(anyio.to_thread.run_sync, ask)
        return ids

    async with CancelableClient(app, ceiling=CEILING) as client:
        for _ in range(20):
            ids = (await client.get("/work")).json()
            assert len(ids) == 8
            assert len(set(ids)) == 1
        nothing_is_kept(operations)


async def test_the_lines_of_background_tasks(lines: list[tuple[str, str]]) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware)

    async def later() -> None:
        user_log.info("later")

    @app.get("/work")
    async def work(background: BackgroundTasks) -> str | None:
        background.add_task(later)
        return current_operation_id()

    async with CancelableClient(app, ceiling=CEILING) as client:
        id = (await client.get("/work")).json()
        await until(lambda: lines)
        assert lines == [("later", id)]
        nothing_is_kept(operations)


async def test_what_outlives_its_request(lines: list[tuple[str, str]]) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware)
    may_go_on = anyio.Event()

    async def survivor(request: Request) -> None:
        await may_go_on.wait()
        user_log.info("survived")

    async with anyio.create_task_group() as tasks:

        @app.get("/work")
        async def work(request: Request, cancel: RequestCancelable) -> None:
            # With the request it keeps all that is known of it.
            tasks.start_soon(survivor, request)

        async with CancelableClient(app, ceiling=CEILING) as client:
            assert (await client.get("/work")).status_code == 200
            may_go_on.set()
            await until(lambda: lines)
            nothing_is_kept(operations)
    assert lines == [("survived", "-")]


async def test_a_websocket(lines: list[tuple[str, str]]) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware)

    @app.websocket("/talk")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        user_log.info("talking")
        await anyio.sleep_forever()

    async with CancelableClient(app, ceiling=CEILING) as client:
        async with client.websocket("/talk"):
            await until(lambda: lines)
            assert (await operations.cancel(lines[0][1])).outcome == "cancelled"
        nothing_is_kept(operations)


async def test_background_and_tracked_work(lines: list[tuple[str, str]]) -> None:
    async def work(cancel: Cancelable) -> None:
        user_log.info("in the background")
        await cancel.run_in_thread(user_log.info, "in a thread")

    async with Operations() as operations:
        job = await operations.start(work)
        await operations.result(job.id)
        assert lines == [("in the background", job.id), ("in a thread", job.id)]
        async with operations.track(id="job-1") as cancel:
            user_log.info("tracked")
            async with Cancelable():
                user_log.info("further in")
        user_log.info("outside")
        assert lines[2:] == [("tracked", "job-1"), ("further in", "job-1"), ("outside", "-")]
        assert cancel.is_active is False
        nothing_is_kept(operations)


async def test_work_that_has_ended_is_freed_at_once() -> None:
    async with Operations() as operations:
        gc.disable()
        try:
            async with operations.track() as cancel:
                kept = ref(cancel)
            del cancel
            assert kept() is None
        finally:
            gc.enable()


async def test_work_that_a_request_has_started_is_not_the_request(lines: list[tuple[str, str]]) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware)

    async def export(cancel: Cancelable) -> None:
        user_log.info("exporting")

    @app.post("/exports")
    async def start() -> list[str | None]:
        job = await operations.start(export)
        await operations.result(job.id)
        return [job.id, current_operation_id()]

    async with CancelableClient(app, ceiling=CEILING) as client:
        job, request = (await client.post("/exports")).json()
    assert lines == [("exporting", job)]
    assert request not in (None, job)


def test_a_dict_config(capsys: pytest.CaptureFixture[str]) -> None:
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"id": {"()": "cancelable_deps.observability.operation_id_filter", "default": "none"}},
            "formatters": {"line": {"format": "%(message)s [%(operation_id)s]"}},
            "handlers": {"out": {"class": "logging.StreamHandler", "filters": ["id"], "formatter": "line"}},
            "loggers": {"configured": {"handlers": ["out"], "propagate": False}},
        }
    )
    logging.getLogger("configured").error("hello")
    logging.getLogger("configured").error("hello", extra={"operation_id": "own"})
    assert capsys.readouterr().err == "hello [none]\nhello [own]\n"
    logging.getLogger("configured").handlers.clear()


async def test_a_failure_does_not_reach_who_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Operations() as operations, operations.track():
        assert current_operation_id() is not None
        monkeypatch.setattr("cancelable_deps.observability.operation_ids._id_of", None)
        assert current_operation_id() is None


async def test_detached_work_has_an_id_of_its_own() -> None:
    seen: list[str | None] = []

    async def work(cancel: Cancelable) -> None:
        seen.append(current_operation_id())
        await anyio.sleep_forever()

    async def handler() -> None:
        seen.append(current_operation_id())
        Cancelable().detach(work)

    app = FastAPI()
    async with Operations() as operations:
        app.add_middleware(RequestCancelationMiddleware, operations=operations, operation_id="operation-id")
        app.get("/")(handler)
        await get(app, headers={"operation-id": "mine"})
        [listed] = (await operations.list(kind="detached")).items
        await until(lambda: len(seen) == 2)
        assert seen == ["mine", listed.id]
        await operations.cancel(listed.id, wait=CEILING)
    assert current_operation_id() is None
