"""Operations over HTTP: every route, every status, and nobody sees or stops what belongs to somebody else."""

from __future__ import annotations

import itertools
import json
import logging
import re
from contextlib import aclosing
from typing import Any
from uuid import UUID

import anyio
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException

from cancelable_deps.operations import (
    MemoryBackend,
    OperationLost,
    Operations,
    OperationsUnavailable,
    operations_router,
)
from cancelable_deps.operations import events_stream as stream_module
from cancelable_deps.testing import Call, CancelableClient, HangUp
from tests.calls import CEILING
from tests.operations_app import (
    ADMIN,
    ALICE,
    BOB,
    LONGEST,
    clean_up_until,
    current_user,
    opened,
    raise_it,
    report_and_wait,
    require_admin,
    return_it,
    wait_until_stopped,
)

pytestmark = pytest.mark.anyio

NO_IDS = ["x" * 129, "*", "a%0D%0Ab", "%7B", "a%20b", "%00", "%C3%A4", "a%0A"]
MINE, THEIRS = "/operations", "/admin/operations"


def events_of(body: bytes) -> list[tuple[str, Any]]:
    found = re.findall(r"event: (.*)\ndata: (.*)\n", body.decode())
    return [(name, json.loads(data)) for name, data in found]


async def until_body(call: Call, text: bytes) -> None:
    """Wait until a response has a text in its body."""
    async for _ in call.chunks():
        if text in call.body:
            return
    raise AssertionError(f"the response has ended without {text!r}")


# One operation


@pytest.mark.parametrize("router", [MINE, THEIRS])
async def test_an_operation_that_runs_is_shown_with_the_pace_at_which_to_ask(router: str) -> None:
    async with opened() as place:
        started = await place.operations.start(wait_until_stopped, owner="alice", key="k", labels={"stage": "render"})
        answer = await place.get(f"{router}/{started.id}", {**ALICE, **ADMIN})
    assert answer.status_code == 200
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["cache-control"] == "no-store"
    shown = answer.json()
    assert (shown["id"], shown["state"], shown["kind"], shown["name"]) == (
        started.id,
        "running",
        "background",
        "wait_until_stopped",
    )
    assert (shown["owner"], shown["key"], shown["labels"]) == ("alice", "k", {"stage": "render"})


async def test_an_operation_that_has_ended_is_not_to_be_asked_for_again() -> None:
    async with opened() as place:
        started = await place.operations.start(return_it, 1, owner="alice")
        answer = await place.get(f"/operations/{started.id}", prefer="wait=10")
    assert (answer.status_code, answer.json()["state"]) == (200, "finished")
    assert answer.headers["preference-applied"] == "wait=10"
    assert "retry-after" not in answer.headers


PREFERENCES: list[tuple[str, str | None]] = [
    ("wait=10", "wait=10"),
    ("wait=9999", "wait=30"),
    ('respond-async, wait="5"; x=y', "wait=5"),
    ("WAIT = 7", "wait=7"),
    ("wait=0", "wait=0"),
    ("wait=1, wait=2", "wait=1"),
    ("wait=-1", None),
    ("wait=nan", None),
    ("wait=1e3", None),
    ("wait=" + "9" * 5000, None),
    ("wait", None),
    ("respond-async", None),
    ("", None),
]


async def test_a_preference_is_applied_or_ignored() -> None:
    async with opened() as place:
        started = await place.operations.start(return_it, 1, owner="alice")
        await place.until(started.id, "finished")
        for prefer, applied in PREFERENCES:
            answer = await place.get(f"/operations/{started.id}", prefer=prefer)
            assert answer.status_code == 200
            assert answer.headers.get("preference-applied") == applied


async def test_a_preferred_wait_ends_when_its_time_is_up() -> None:
    async with opened() as place:
        started = await place.operations.start(wait_until_stopped, owner="alice")
        answer = await place.get(f"/operations/{started.id}", prefer="wait=1")
    assert (answer.json()["state"], answer.headers["retry-after"]) == ("running", "1")


async def test_a_client_that_leaves_does_not_wait_on() -> None:
    async with opened() as place:
        started = await place.operations.start(wait_until_stopped, owner="alice")
        headers = {**ALICE, "prefer": "wait=30"}
        async with place.client.start("GET", f"/operations/{started.id}", headers=headers) as call:
            await call.listened_to()
            await call.hang_up()
        assert call.status == 499


# Its result


async def test_the_result_is_returned() -> None:
    async with opened() as place:
        started = await place.operations.start(return_it, {"pages": [1, None]}, owner="alice")
        answer = await place.get(f"/operations/{started.id}/result", prefer="wait=10")
    assert (answer.status_code, answer.json()) == (200, {"pages": [1, None]})
    assert answer.headers["preference-applied"] == "wait=10"


async def test_a_result_of_none_is_null() -> None:
    async with opened() as place:
        started = await place.operations.start(return_it, None, owner="alice")
        answer = await place.get(f"/operations/{started.id}/result", prefer="wait=10")
    assert (answer.status_code, answer.text) == (200, "null")


async def test_a_result_that_is_not_there_yet_refers_to_the_operation() -> None:
    async with opened() as place:
        started = await place.operations.start(wait_until_stopped, owner="alice")
        answer = await place.get(f"/operations/{started.id}/result")
        assert (answer.status_code, answer.headers["retry-after"]) == (202, "1")
        assert answer.headers["location"] == f"/operations/{started.id}"
        assert answer.json()["state"] == "running"
        assert (await place.get(answer.headers["location"])).status_code == 200


async def test_the_errors_of_work_have_their_own_status() -> None:
    error = HTTPException(402, {"need": "money"}, headers={"x-price": "3"})
    async with opened() as place:
        started = await place.operations.start(raise_it, error, owner="alice")
        answer = await place.get(f"/operations/{started.id}/result", prefer="wait=10")
    assert (answer.status_code, answer.json()) == (402, {"detail": {"need": "money"}})
    assert answer.headers["x-price"] == "3"


async def test_other_errors_of_work_show_no_internals() -> None:
    async with opened() as place:
        started = await place.operations.start(raise_it, ValueError("password"), owner="alice")
        answer = await place.get(f"/operations/{started.id}/result", prefer="wait=10")
    assert (answer.status_code, answer.json()) == (500, {"detail": "The work failed"})


async def test_a_result_that_was_stopped_answers_by_its_reason() -> None:
    async with opened() as place:
        stopped = await place.operations.start(wait_until_stopped, owner="alice")
        await place.until(stopped.id, "running")
        await place.operations.cancel(stopped.id, message="enough")
        answer = await place.get(f"/operations/{stopped.id}/result")
        assert (answer.status_code, answer.json()) == (499, {"detail": "enough"})

        late = await place.operations.start(wait_until_stopped, owner="alice", timeout=0)
        answer = await place.get(f"/operations/{late.id}/result", prefer="wait=10")
        assert (answer.status_code, answer.json()) == (504, {"detail": "Timed out after 0 seconds"})


async def test_a_result_whose_worker_is_gone_is_gone() -> None:
    backend = MemoryBackend()
    async with opened(backend=backend) as place:
        fields = {"kind": "background", "owner": "alice", "worker": "w", "created": 1.0, "state": "lost", "ended": 2.0}
        await backend.create("lost", fields, ttl=60)
        answer = await place.get("/operations/lost/result")
        assert (await place.get("/operations/lost")).json()["state"] == "lost"
        assert (await place.post("/operations/lost/cancel")).json()["outcome"] == "lost"
    assert (answer.status_code, answer.json()) == (410, {"detail": OperationLost().detail})


async def test_a_request_has_no_result_that_is_kept() -> None:
    async with opened() as place, place.client.start("GET", "/wait/1", headers={**ALICE, "operation-id": "r"}) as call:
        await call.running()
        answer = await place.get("/operations/r/result")
        await place.post("/operations/r/cancel")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Only background work has a result that is kept"})


# Stopping it


@pytest.mark.parametrize("router", [MINE, THEIRS])
async def test_a_cancel_stops_the_request_of_another_client(router: str) -> None:
    async with opened() as place, place.client.start("GET", "/wait/1", headers={**ALICE, "operation-id": "r"}) as call:
        await call.running()
        answer = await place.post(f"{router}/r/cancel", {**ALICE, **ADMIN}, json={"message": "enough"})
        again = await place.post(f"{router}/r/cancel", {**ALICE, **ADMIN}, json={"message": "later"})
    assert (call.status, call.json()) == (499, {"detail": "enough"})
    for each in (answer, again):
        assert (each.status_code, each.json()["outcome"]) == (200, "cancelled")
        assert each.json()["operation"]["message"] == "enough"
        assert "retry-after" not in each.headers


@pytest.mark.parametrize("body", [b"", b"{}", b"null", b'{"message": null}', b'{"other": 1}'])
async def test_a_cancel_needs_no_body(body: bytes) -> None:
    async with opened() as place:
        started = await place.operations.start(wait_until_stopped, owner="alice")
        await place.until(started.id, "running")
        headers = {**ALICE, "content-type": "application/json"}
        answer = await place.post(f"/operations/{started.id}/cancel", headers, content=body)
    assert (answer.status_code, answer.json()["outcome"]) == (200, "cancelled")


@pytest.mark.parametrize("router", [MINE, THEIRS])
async def test_a_cancel_whose_cleanup_runs_is_accepted(router: str) -> None:
    async with opened() as place:
        may_end = anyio.Event()
        started = await place.operations.start(clean_up_until, may_end, owner="alice")
        await place.until(started.id, "running")
        path = f"{router}/{started.id}"
        answer = await place.post(f"{path}/cancel", {**ALICE, **ADMIN, "prefer": "wait=0"})
        may_end.set()
    assert (answer.status_code, answer.json()["outcome"]) == (202, "stopping")
    assert answer.headers["preference-applied"] == "wait=0"
    assert (answer.headers["retry-after"], answer.headers["location"]) == ("1", path)


async def test_a_cancel_of_what_has_ended_says_that_it_has_finished() -> None:
    async with opened() as place:
        started = await place.operations.start(return_it, 1, owner="alice")
        await place.until(started.id, "finished")
        answer = await place.post(f"/operations/{started.id}/cancel")
    assert (answer.status_code, answer.json()["outcome"]) == (200, "finished")


async def test_a_cancel_that_comes_first_is_remembered() -> None:
    async with opened() as place:
        answer = await place.post("/operations/early/cancel", json={"message": "not this one"})
        assert (answer.status_code, answer.json()) == (404, {"detail": "There is no such operation"})
        late = await place.get("/wait/1", {**ALICE, "operation-id": "early"})
        assert (late.status_code, late.json()) == (499, {"detail": "not this one"})
        other = await place.operations.start(wait_until_stopped, id="early-bob", owner="bob")
        assert (await place.post("/operations/early-bob/cancel")).status_code == 404
        assert (await place.operations.get(other.id)) is not None


async def test_many_cancels_of_unknown_ids_leave_a_thousand_places() -> None:
    async with opened() as place:
        for number in range(10_000):
            # As the route does it; 10,000 requests would take long.
            await place.operations.cancel(f"unknown-{number}", owner="alice")
        for path in NO_IDS:
            await place.post(f"/operations/{path}/cancel")
        early = place.operations.worker.local.early
        assert len(early) == 1000
        await place.post("/operations/one-more/cancel")
        assert len(early) == 1000


async def test_a_store_that_is_away_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: Any, **__: Any) -> Any:
        raise OperationsUnavailable

    async with opened() as place:
        for name in ("list", "get", "cancel", "cancel_all", "workers"):
            monkeypatch.setattr(place.operations, name, away)
        answers = [
            await place.get("/operations/"),
            await place.get("/operations/x"),
            await place.get("/operations/x/events"),
            await place.get("/operations/x/result"),
            await place.post("/operations/x/cancel"),
            await place.post("/admin/operations/cancel", ADMIN, json={"owner": "x"}),
            await place.get("/admin/operations/workers", ADMIN),
        ]
    for answer in answers:
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert set(answer.json()) == {"detail"}


# Hostile messages


async def test_a_message_goes_on_one_line_and_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    message = "a\r\nINFO forged\x1b[31m\u2028" + "x" * 5000
    caplog.set_level(logging.INFO, "cancelable_deps")
    async with opened() as place, place.client.start("GET", "/wait/1", headers={**ALICE, "operation-id": "r"}) as call:
        await call.running()
        answer = await place.post("/operations/r/cancel", json={"message": message})
    assert answer.status_code == 200
    detail = call.json()["detail"]
    assert len(detail) == 1000
    assert detail.startswith("a  INFO forged [31m xxx")
    assert all("\n" not in record.getMessage() and "\r" not in record.getMessage() for record in caplog.records)


async def test_halves_of_surrogate_pairs_are_replaced() -> None:
    async with opened() as place:
        async with place.client.start("GET", "/wait/1", headers={**ALICE, "operation-id": "r"}) as call:
            await call.running()
            headers = {**ALICE, "content-type": "application/json; charset=utf-8"}
            body = rb'{"message": "half \ud83d whole \ud83d\ude00"}'
            answer = await place.post("/operations/r/cancel", headers, content=body)
        assert answer.json()["operation"]["message"] == call.json()["detail"] == "half ? whole \U0001f600"


WRONG_BODIES = [
    (b'{"message": "' + b"x" * 1_000_000 + b'"}', 413),
    (b"[" * 60_000, 422),
    (b'{"message": ' + b"9" * 50_000 + b"}", 422),
    (b'{"message": 3}', 422),
    (b'{"message": NaN}', 422),
    (b'{"message": ["\\ud800"]}', 422),
    (b"[]", 422),
    (b"\xff\xfe", 422),
    (b"{", 422),
]


@pytest.mark.parametrize("path", [f"{MINE}/r/cancel", f"{THEIRS}/cancel"])
async def test_a_body_that_is_wrong_is_refused(path: str) -> None:
    headers = {**ALICE, **ADMIN, "content-type": "application/json"}
    async with opened() as place:
        for body, status in WRONG_BODIES:
            answer = await place.post(path, headers, content=body)
            assert (body[:20], answer.status_code) == (body[:20], status)
            assert list(answer.json()) == ["detail"]
            assert len(answer.content) < 1000


async def test_a_body_that_is_not_json_is_refused() -> None:
    # A form on the page of another site can send these without being asked for its right to.
    async with opened() as place:
        for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
            headers = {**ADMIN, "content-type": media_type}
            answer = await place.post("/admin/operations/cancel", headers, content=b'{"older_than": 0}')
            assert answer.status_code == 415


async def test_a_client_that_leaves_within_its_body_is_no_error() -> None:
    async with opened() as place:
        leaves = HangUp.after_request(5)
        headers = {**ALICE, "content-type": "application/json"}
        content = b'{"message": "x"}'
        async with place.client.start(
            "POST", "/operations/r/cancel", headers=headers, content=content, hang_up=leaves
        ) as call:
            pass
    assert call.status in (400, 499, None)


# Several


async def test_the_list_shows_what_runs_the_oldest_first() -> None:
    async with opened() as place:
        ids = [(await place.operations.start(wait_until_stopped, owner="alice")).id for _ in range(3)]
        await place.operations.start(wait_until_stopped, owner="bob")
        mine = (await place.get("/operations/")).json()
        assert [each["id"] for each in mine["operations"]] == ids
        assert (mine["total"], mine["unreachable"]) == (3, [])
        every = (await place.get("/admin/operations/?kind=background", ADMIN)).json()
        assert every["total"] == 4
        bobs = (await place.get("/admin/operations/?owner=bob", ADMIN)).json()
        assert [each["owner"] for each in bobs["operations"]] == ["bob"]
        limited = (await place.get("/operations/?limit=2")).json()
        assert (len(limited["operations"]), limited["total"]) == (2, 3)
        assert (await place.get("/operations/?limit=0")).json()["operations"] == []


async def test_the_filter_for_owners_is_for_operators() -> None:
    async with opened() as place:
        await place.operations.start(wait_until_stopped, owner="bob")
        assert (await place.get("/operations/?owner=bob")).json()["total"] == 0


FILTERS = [
    ("key=k", 1),
    ("key=other", 0),
    ("label=stage:render", 1),
    ("label=stage:render&label=url:http://x", 1),
    ("label=stage:render&label=url:none", 0),
    ("kind=background", 2),
    ("kind=request", 0),
    ("route=/none", 0),
    ("state=running", 2),
    ("state=waiting", 0),
    ("older_than=0", 2),
    ("older_than=1000", 0),
]


async def test_filters() -> None:
    async with opened() as place:
        first = await place.operations.start(
            wait_until_stopped, owner="alice", key="k", labels={"stage": "render", "url": "http://x"}
        )
        second = await place.operations.start(wait_until_stopped, owner="alice")
        for each in (first, second):
            await place.until(each.id, "running")
        for query, count in FILTERS:
            assert (query, (await place.get(f"/operations/?{query}")).json()["total"]) == (query, count)


async def test_requests_are_found_by_their_route() -> None:
    async with opened() as place, place.client.start("GET", "/wait/1", headers={**ALICE, "operation-id": "r"}) as call:
        await call.running()
        found: list[Any] = []
        with anyio.fail_after(CEILING):
            while not found:  # It has a route once the router has found one.
                listed = await place.get("/admin/operations/?route=/wait/{number}&kind=request", ADMIN)
                found = listed.json()["operations"]
        assert [(each["id"], each["method"], each["name"]) for each in found] == [("r", "GET", "wait")]
        await place.post("/operations/r/cancel")


async def test_those_that_have_ended_are_found_by_their_state() -> None:
    async with opened() as place:
        started = await place.operations.start(return_it, 1, owner="alice")
        await place.until(started.id, "finished")
        assert [each["id"] for each in (await place.get("/operations/?state=finished")).json()["operations"]] == [
            started.id
        ]
        assert (await place.get("/operations/?state=finished", BOB)).json()["total"] == 0


WRONG_QUERIES = [
    "limit=1001",
    "limit=-1",
    "limit=x",
    "older_than=-1",
    "older_than=nan",
    "older_than=inf",
    "state=dead",
    "kind=cron",
    "key=",
    "key=" + "k" * 257,
    "key=a%0D%0Ab",
    "label=stage",
    "label=:x",
    "label=a:1&label=a:2",
    "label=" + "x" * 65 + ":1",
    "label=a:" + "x" * 257,
    "&".join(f"label=l{number}:x" for number in range(17)),
]


async def test_a_query_that_is_wrong_is_refused() -> None:
    async with opened() as place:
        for router, query in itertools.product((MINE, THEIRS), WRONG_QUERIES):
            answer = await place.get(f"{router}/?{query}", {**ALICE, **ADMIN})
            assert (query, answer.status_code) == (query, 422)
            [error] = answer.json()["detail"]
            assert error["loc"][0] == "query"
            assert {"loc", "msg", "type"} <= set(error)


async def test_all_that_fulfil_the_conditions_are_stopped() -> None:
    async with opened() as place:
        ids = [(await place.operations.start(wait_until_stopped, owner=name)).id for name in ("alice", "alice", "bob")]
        for id in ids:
            await place.until(id, "running")
        counted = await place.post("/admin/operations/cancel", ADMIN, json={"owner": "alice", "dry_run": True})
        assert (counted.status_code, counted.json()["total"], counted.json()["unreachable"]) == (200, 2, [])
        assert (await place.get("/operations/")).json()["total"] == 2

        answer = await place.post("/admin/operations/cancel", ADMIN, json={"owner": "alice", "message": "all out"})
        assert answer.json()["total"] == sum(answer.json()["outcomes"].values()) == 2
        assert {each["operation"]["id"] for each in answer.json()["cancelations"]} == set(ids[:2])
        for id in ids[:2]:
            ended = await place.get(f"/operations/{id}/result", prefer="wait=10")
            assert (ended.status_code, ended.json()) == (499, {"detail": "all out"})
        assert (await place.get(f"/operations/{ids[2]}", BOB)).json()["state"] == "running"


async def test_those_that_clean_up_are_accepted() -> None:
    async with opened() as place:
        may_end = anyio.Event()
        started = await place.operations.start(clean_up_until, may_end, owner="alice")
        await place.until(started.id, "running")
        answer = await place.post("/admin/operations/cancel", ADMIN, json={"labels": {}, "owner": "alice"})
        may_end.set()
    assert (answer.status_code, answer.json()["outcomes"]) == (202, {"stopping": 1})
    assert answer.headers["retry-after"] == "1"


@pytest.mark.usefixtures("at_once")
async def test_who_stops_everything_is_answered() -> None:
    async with opened() as place, place.client.start("GET", "/wait/1", headers={"operation-id": "r"}) as call:
        await call.running()
        answer = await place.post("/admin/operations/cancel", ADMIN, json={"older_than": 0})
    assert call.status == 499
    assert answer.status_code in (200, 202)
    assert answer.json()["total"] >= 1


WRONG_CONDITIONS: list[dict[str, Any]] = [
    {},
    {"message": "x"},
    {"dry_run": True},
    {"ownr": "alice"},
    {"owner": ""},
    {"owner": "a\r\nb"},
    {"owner": 3},
    {"key": "k" * 257},
    {"older_than": -1},
    {"older_than": "soon"},
    {"labels": {"x": 1}},
    {"labels": {f"l{number}": "x" for number in range(17)}},
]


async def test_conditions_that_are_wrong_stop_nothing() -> None:
    async with opened() as place:
        await place.operations.start(wait_until_stopped, owner="alice")
        for body in WRONG_CONDITIONS:
            answer = await place.post("/admin/operations/cancel", ADMIN, json=body)
            assert (body, answer.status_code) == (body, 422)
            assert answer.json()["detail"][0]["loc"][0] == "body"
        assert (await place.get("/operations/")).json()["total"] == 1


async def test_workers_say_how_many_have_ended_for_which_reason() -> None:
    async with opened() as place:
        started = await place.operations.start(wait_until_stopped, owner="alice")
        await place.until(started.id, "running")
        await place.operations.cancel(started.id)
        [worker] = (await place.get("/admin/operations/workers", ADMIN)).json()["workers"]
    assert worker["is_reachable"] is True
    assert worker["ends"]["manual"] == 1


# Its changes


async def test_changes_are_streamed_until_the_end() -> None:
    async with opened() as place:
        may_report = anyio.Event()
        started = await place.operations.start(report_and_wait, 1, 4, may_report, owner="alice")
        async with place.client.start("GET", f"/operations/{started.id}/events", headers=ALICE) as call:
            await until_body(call, b"event: state")
            may_report.set()
            await until_body(call, b"event: progress")
            await place.post(f"/operations/{started.id}/cancel")
    assert call.status == 200
    assert dict(call.headers)["content-type"].startswith("text/event-stream")
    found = events_of(call.body)
    names = [name for name, _ in found]
    assert (names[0], names[-1]) == ("state", "end")
    assert ("progress", {"message": "pages", "metadata": {"done": 1, "total": 4}}) in found
    assert (found[-1][1]["id"], found[-1][1]["state"]) == (started.id, "cancelled")


async def test_the_events_of_what_has_ended_are_its_end_and_a_browser_does_not_come_back() -> None:
    async with opened() as place:
        started = await place.operations.start(return_it, 1, owner="alice")
        await place.until(started.id, "finished")
        answer = await place.get(f"/operations/{started.id}/events")
        assert [name for name, _ in events_of(answer.content)] == ["end"]
        [last] = re.findall(r"^id: (.*)$", answer.text, re.MULTILINE)
        again = await place.get(f"/operations/{started.id}/events", {**ALICE, "last-event-id": last})
    assert again.status_code == 204


async def test_a_client_that_leaves_ends_the_stream_and_not_the_operation() -> None:
    async with opened() as place:
        started = await place.operations.start(wait_until_stopped, owner="alice")
        async with place.client.start("GET", f"/operations/{started.id}/events", headers=ALICE) as call:
            await until_body(call, b"event: state")
            await call.hang_up()
        assert (await place.get(f"/operations/{started.id}")).json()["state"] == "running"
        [running] = place.operations.worker.local.find(started.id, "alice")
        assert running.listeners == []


async def test_a_stream_on_which_nothing_happens_has_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "HEARTBEAT_SECONDS", 0.01)
    async with opened() as place:
        started = await place.operations.start(wait_until_stopped, owner="alice")
        async with place.client.start("GET", f"/operations/{started.id}/events", headers=ALICE) as call:
            await until_body(call, b": waiting\n\n: waiting\n\n")
            await call.hang_up()


# Who may do what


ROUTES = [
    ("GET", "/{id}"),
    ("GET", "/{id}/result"),
    ("GET", "/{id}/events"),
    ("POST", "/{id}/cancel"),
]
OPERATORS = [("GET", "/"), ("GET", "/workers"), ("GET", "/page"), ("POST", "/cancel"), *ROUTES]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("owner", ["alice", None])
async def test_what_is_not_mine_is_unknown(method: str, path: str, owner: str | None) -> None:
    async with opened() as place:
        started = await place.operations.start(wait_until_stopped, owner=owner)
        await place.until(started.id, "running")
        there = await place.client.request(method, MINE + path.format(id=started.id), headers=BOB)
        nowhere = await place.client.request(method, MINE + path.format(id="nowhere"), headers=BOB)
        for answer in (there, nowhere):
            assert (answer.status_code, answer.json()) == (404, {"detail": "There is no such operation"})
        assert (await place.operations.get(started.id)).state == "running"  # type: ignore[union-attr]


@pytest.mark.parametrize("router", [MINE, THEIRS])
async def test_what_is_no_id_is_unknown(router: str) -> None:
    async with opened() as place:
        for id, (method, path) in itertools.product(NO_IDS, ROUTES):
            answer = await place.client.request(method, router + path.format(id=id), headers={**ALICE, **ADMIN})
            assert (answer.status_code, answer.json()) == (404, {"detail": "There is no such operation"})
        assert len(place.operations.worker.local.early) == 0


@pytest.mark.parametrize("id", [".", ".."])
async def test_segments_of_a_path_that_are_left_out_are_no_ids(id: str) -> None:
    async with opened() as place:
        refused = await place.get("/wait/1", {**ALICE, "operation-id": id})
        assert refused.status_code == 422
        assert await place.operations.get(id) is None
        with pytest.raises(ValueError, match=re.escape("not . or .. alone")):
            await place.operations.start(wait_until_stopped, id=id)


async def test_what_an_operators_dependency_raises_is_the_answer() -> None:
    async with opened() as place:
        started = await place.operations.start(wait_until_stopped, owner="alice")
        for method, path in OPERATORS:
            answer = await place.client.request(
                method, THEIRS + path.format(id=started.id), headers=ALICE, content=b'{"older_than": 0}'
            )
            assert (answer.status_code, answer.json()) == (401, {"detail": "Who are you?"})
        assert (await place.get(f"/operations/{started.id}")).json()["state"] == "running"


async def test_an_owners_router_has_no_route_for_operators() -> None:
    async with opened() as place:
        for method, path in OPERATORS:
            answer = await place.client.request(method, MINE + path.format(id="nowhere"), headers={**ALICE, **ADMIN})
            assert answer.status_code == (200 if path == "/" else 405 if path == "/cancel" else 404)


async def nobody_is_an_operator() -> bool:
    return False


async def test_an_operators_dependency_that_only_answers_lets_nobody_in() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.include_router(operations_router(operations, operator=nobody_is_an_operator, page=True), prefix="/o")
    async with CancelableClient(app) as client:
        for method, path in OPERATORS:
            answer = await client.request(method, "/o" + path.format(id="x"))
            assert (answer.status_code, answer.json()) == (403, {"detail": "Only operators may do this"})


def owned_by(value: Any) -> tuple[Operations, FastAPI]:
    operations = Operations(background_grace=0)
    app = FastAPI(lifespan=operations.lifespan())

    async def user() -> Any:
        return value

    app.include_router(operations_router(operations, owner=user), prefix="/o")
    return operations, app


@pytest.mark.parametrize("value", [None, "", True, 1.5, b"alice", ["alice"], "a\r\nb", "x" * 257, object()])
async def test_an_owner_that_is_none_sees_nothing(value: Any) -> None:
    operations, app = owned_by(value)
    async with CancelableClient(app) as client:
        started = await operations.start(wait_until_stopped)
        for method, path in [("GET", "/"), *ROUTES]:
            answer = await client.request(method, "/o" + path.format(id=started.id))
            assert answer.status_code == 403
            assert f"has returned {type(value).__name__}" in answer.json()["detail"]


@pytest.mark.parametrize("value", [7, UUID(int=7), "siebenunddreißig"])
async def test_owners_are_strings_numbers_and_uuids(value: Any) -> None:
    operations, app = owned_by(value)
    async with CancelableClient(app) as client:
        await operations.start(wait_until_stopped, owner=value)
        found = (await client.get("/o/")).json()["operations"]
        assert [each["owner"] for each in found] == [str(value)]


# At build time


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither owner= nor operator= was given"),
        ({"owner": current_user, "operator": require_admin}, "both owner= and operator= were given"),
        ({"owner": "alice"}, "owner takes a dependency, such as a function, not 'alice'"),
        ({"operator": Depends(require_admin)}, r"operator=function, not operator=Depends\(function\)"),
        ({"owner": current_user, "page": True}, "page=True needs operator="),
    ],
)
def test_a_router_that_would_let_everybody_in_is_not_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        operations_router(Operations(), **options)


def test_the_error_shows_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"operations_router\(operations, owner=current_user_id\)"):
        operations_router(Operations())
    with pytest.raises(TypeError, match="takes the Operations of the application"):
        operations_router(Operations, owner=current_user)  # type: ignore[arg-type]


# Places: prefixes, mounts, proxies, several applications


async def test_the_202_of_a_start_refers_to_the_owners_router() -> None:
    async with opened() as place:
        answer = await place.post("/start")
        assert answer.status_code == 202
        assert answer.headers["location"] == f"/operations/{answer.json()['id']}"
        assert (await place.get(answer.headers["location"])).json()["state"] in ("running", "waiting")


@pytest.mark.parametrize("root_path", ["", "/proxy"])
async def test_locations_of_a_mounted_application_behind_a_proxy(root_path: str) -> None:
    operations = Operations(background_grace=0)
    inner = FastAPI()
    nested = APIRouter(prefix="/v1")
    nested.include_router(operations_router(operations, owner=current_user), prefix="/jobs")
    inner.include_router(nested)
    app = FastAPI(lifespan=operations.lifespan())
    app.mount("/inner", inner)
    async with CancelableClient(app, root_path=root_path, ceiling=LONGEST) as client:
        started = await operations.start(wait_until_stopped, owner="alice")
        answer = await client.get(f"{root_path}/inner/v1/jobs/{started.id}/result", headers=ALICE)
        assert (answer.status_code, answer.headers["location"]) == (202, f"{root_path}/inner/v1/jobs/{started.id}")


async def test_locations_behind_a_proxy_that_cuts_the_path() -> None:
    async with opened() as place:
        started = await place.operations.start(wait_until_stopped, owner="alice")
        async with CancelableClient(place.app, lifespan=False, root_path="/proxy", ceiling=LONGEST) as client:
            answer = await client.get(f"/operations/{started.id}/result", headers=ALICE)
            assert answer.headers["location"] == f"/proxy/operations/{started.id}"


async def test_a_router_without_a_prefix_in_a_mounted_application() -> None:
    operations = Operations(background_grace=0)
    inner = FastAPI()
    inner.include_router(operations_router(operations, operator=require_admin, page=True))
    app = FastAPI(lifespan=operations.lifespan())
    app.mount("/ops", inner)
    async with CancelableClient(app, ceiling=LONGEST) as client:
        for path in ("/ops/", "/ops/workers", "/ops/page"):
            assert (await client.get(path, headers=ADMIN)).status_code == 200


async def test_a_prefix_with_a_parameter_does_not_get_into_headers() -> None:
    operations = Operations(background_grace=0)
    app = FastAPI(lifespan=operations.lifespan())
    app.include_router(operations_router(operations, owner=current_user), prefix="/{tenant}/operations")
    async with CancelableClient(app, ceiling=LONGEST) as client:
        started = await operations.start(wait_until_stopped, owner="alice")
        answer = await client.get(f"/a%0D%0AX-Bad:%201%C3%A4/operations/{started.id}/result", headers=ALICE)
    assert answer.headers["location"] == f"/a%0D%0AX-Bad:%201%C3%A4/operations/{started.id}"
    assert "x-bad" not in answer.headers


async def test_two_applications_with_operations_of_their_own() -> None:
    first, one = owned_by("alice")
    second, two = owned_by("alice")
    async with CancelableClient(one) as client_one, CancelableClient(two) as client_two:
        started = await first.start(wait_until_stopped, owner="alice")
        assert (await client_one.get(f"/o/{started.id}")).status_code == 200
        assert (await client_two.get(f"/o/{started.id}")).status_code == 404
    assert first is not second


async def test_the_applications_own_handler_writes_the_problems() -> None:
    operations, app = owned_by("alice")

    @app.exception_handler(StarletteHTTPException)
    async def problem(request: Any, exc: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"title": exc.detail, "status": exc.status_code}, exc.status_code)

    async with CancelableClient(app) as client:
        started = await operations.start(wait_until_stopped, owner="alice", timeout=0)
        answer = await client.get(f"/o/{started.id}/result", headers={"prefer": "wait=10"})
    assert answer.json() == {"title": "Timed out after 0 seconds", "status": 504}


async def test_texts_that_cannot_be_encoded_spoil_no_list() -> None:
    async with opened() as place:
        odd = await place.operations.start(report_and_wait, "\ud800", 1, owner="alice")
        plain = await place.operations.start(wait_until_stopped, owner="alice")
        async with aclosing(place.operations.events(odd.id)) as events:
            async for event in events:
                if event.operation.progress is not None:
                    break
        found = await place.get("/operations/")
        assert [each["id"] for each in found.json()["operations"]] == [odd.id, plain.id]


# OpenAPI


def schema_of(**options: Any) -> dict[str, Any]:
    app = FastAPI()
    app.include_router(operations_router(Operations(), **options), prefix="/o")
    return app.openapi()


def test_the_owners_openapi_is_complete() -> None:
    bearer = HTTPBearer()

    async def user(token: Any = Depends(bearer)) -> str:
        return str(token.credentials)

    schema = schema_of(owner=user)
    routes = {
        (method.upper(), path): (sorted(p["name"] for p in route.get("parameters", [])), sorted(route["responses"]))
        for path, methods in schema["paths"].items()
        for method, route in methods.items()
    }
    assert routes == {
        ("GET", "/o/"): (
            ["key", "kind", "label", "limit", "older_than", "route", "state"],
            ["200", "403", "422", "503"],
        ),
        ("GET", "/o/{id}"): (["id", "prefer"], ["200", "403", "404", "422", "503"]),
        ("GET", "/o/{id}/result"): (
            ["id", "prefer"],
            ["200", "202", "403", "404", "410", "499", "503", "504", "default"],
        ),
        ("GET", "/o/{id}/events"): (["id"], ["200", "204", "403", "404", "422", "503"]),
        ("POST", "/o/{id}/cancel"): (
            ["id", "prefer"],
            ["200", "202", "403", "404", "413", "415", "422", "503"],
        ),
    }
    for methods in schema["paths"].values():
        for route in methods.values():
            assert route["security"] == [{"HTTPBearer": []}]
            assert all("description" in answer for answer in route["responses"].values())
            assert route["summary"]


def test_the_operators_openapi_is_complete() -> None:
    schema = schema_of(operator=require_admin, page=True)
    assert {(method.upper(), path) for path, methods in schema["paths"].items() for method in methods} == {
        (method, f"/o{path}") for method, path in OPERATORS
    }
    listing = schema["paths"]["/o/"]["get"]
    assert "owner" in [parameter["name"] for parameter in listing["parameters"]]
    body = schema["paths"]["/o/cancel"]["post"]["requestBody"]
    assert body["required"] is True
    assert sorted(body["content"]["application/json"]["schema"]["properties"]) == [
        "dry_run",
        "key",
        "labels",
        "message",
        "older_than",
        "owner",
        "route",
    ]
    assert list(schema["paths"]["/o/page"]["get"]["responses"]["200"]["content"]) == ["text/html"]


def test_the_schemas_are_those_of_the_values() -> None:
    schema = schema_of(owner=current_user)
    listed = schema["paths"]["/o/"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert listed == {"$ref": "#/components/schemas/ListedOperations"}
    properties = schema["components"]["schemas"]["Operation"]["properties"]
    assert set(properties) >= {"id", "kind", "state", "progress", "deadline", "reason", "labels", "route", "elapsed"}
    cancel = schema["paths"]["/o/{id}/cancel"]["post"]
    assert cancel["requestBody"]["required"] is False
    for status in ("200", "202"):
        assert cancel["responses"][status]["content"]["application/json"]["schema"] == {
            "$ref": "#/components/schemas/Cancelation"
        }
    assert list(schema["paths"]["/o/{id}/events"]["get"]["responses"]["200"]["content"]) == ["text/event-stream"]
    parameters = {each["name"]: each for each in cancel["parameters"]}
    id, prefer = parameters["id"], parameters["prefer"]
    assert (id["in"], id["schema"]["maxLength"], prefer["in"], prefer["required"]) == ("path", 128, "header", False)


def test_both_routers_in_one_application_have_operation_ids_of_their_own() -> None:
    app = FastAPI()
    operations = Operations()
    app.include_router(operations_router(operations, owner=current_user), prefix="/a")
    app.include_router(operations_router(operations, operator=require_admin, page=True), prefix="/b")
    ids = [route["operationId"] for methods in app.openapi()["paths"].values() for route in methods.values()]
    assert len(ids) == len(set(ids)) == 13
