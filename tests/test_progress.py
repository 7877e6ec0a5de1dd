from __future__ import annotations

import json
import logging
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from cancelable_deps import Cancelable, RequestCancelable, progress_response
from tests.calls import get, hang_up, running
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio


def events(body: bytes) -> list[tuple[str, Any]]:
    found = []
    for block in body.decode().strip().split("\n\n"):
        event, data = block.split("\n")
        found.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


class Report(BaseModel):
    pages: int


async def test_progress_and_result() -> None:
    async def work(cancel: Cancelable) -> Report:
        await cancel.report_progress("half", {"percent": 50})
        await cancel.report_progress()
        return Report(pages=3)

    async with nothing_left():
        call = await get(progress_response(work))
    assert events(call.body) == [
        ("progress", {"message": "half", "metadata": {"percent": 50}}),
        ("progress", {"message": None, "metadata": {}}),
        ("result", {"pages": 3}),
    ]
    assert (call.is_complete, call.headers["content-type"]) == (True, "text/event-stream; charset=utf-8")


async def test_work_that_is_stopped_says_why() -> None:
    async def work(cancel: Cancelable) -> None:
        await cancel.report_progress("started")
        await anyio.sleep_forever()

    async with nothing_left():
        call = await get(progress_response(work, timeout=0.05))
    assert [name for name, _ in events(call.body)] == ["progress", "cancelled"]
    assert events(call.body)[-1][1]["reason"] == "timeout"
    assert call.is_complete


async def test_work_that_fails_says_no_more_than_that(caplog: pytest.LogCaptureFixture) -> None:
    async def work(cancel: Cancelable) -> None:
        await cancel.report_progress("started")
        raise KeyError("secret")

    async with nothing_left():
        call = await get(progress_response(work))
    assert [name for name, _ in events(call.body)] == ["progress", "error"]
    assert b"secret" not in call.body
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.parametrize("given", [False, True])
async def test_a_client_that_leaves_stops_the_work(given: bool) -> None:
    journal: list[str] = []

    async def work(cancel: Cancelable) -> None:
        try:
            await cancel.report_progress("started")
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.01)
            journal.append("cleaned up")

    app = FastAPI()

    @app.get("/")
    async def start(cancel: RequestCancelable) -> Any:
        return progress_response(work, cancel if given else None)

    async with nothing_left():
        call = await hang_up(app)
    assert (journal, call.is_complete) == (["cleaned up"], False)


@pytest.mark.parametrize(("leaves", "told"), [(False, [b"event: cancelled"]), (True, [])])
async def test_work_may_report_in_its_cleanup_and_return_a_result_that_nobody_takes(
    leaves: bool, told: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    journal: list[str] = []
    started = anyio.Event()

    async def work(cancel: Cancelable) -> str:
        started.set()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            await cancel.report_progress("stopping")
            journal.append("cleaned up")
        return "half of it"

    async with nothing_left(), running(progress_response(work, timeout=None if leaves else 0.05)) as call:
        await started.wait()
        if leaves:
            await call.hang_up()
    assert journal == ["cleaned up"]
    assert [line for line in call.body.splitlines() if line.startswith(b"event")] == told
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_a_callback_may_report_when_the_work_is_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    app = FastAPI()
    told: list[Any] = []

    @app.get("/")
    async def start(cancel: RequestCancelable) -> Any:
        @cancel.on_cancel
        async def tell(cancel: Cancelable) -> None:
            await cancel.report_progress("stopped")
            told.append(cancel.reason)

        async def work(cancel: Cancelable) -> None:
            await anyio.sleep_forever()

        return progress_response(work, cancel)

    async with nothing_left():
        await hang_up(app)
    assert told == ["disconnect"]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_wrong_work_is_refused() -> None:
    with pytest.raises(TypeError, match="async function"):
        progress_response(3)  # type: ignore[arg-type]
