"""Rolling upgrades: a worker of today and one of a newer version, each in a process of its own, on one Redis."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis

from .redis_server import RedisServer
from .redis_workers import MARKS, WorkerProcess, worker_process

pytest_plugins = ["tests.redis_fixtures"]
pytestmark = [*MARKS, pytest.mark.real]


async def both_ways(asker: WorkerProcess, owner: WorkerProcess, name: str) -> None:
    """Whatever the one asks for that the other has."""
    late, endless, held = (f"{name}-{what}" for what in ("late", "endless", "held"))
    await owner.say("late", late)
    await owner.say("start", endless, "-")
    await owner.say("track", f"{name}-block")
    await owner.hears("started", late)
    await owner.hears("started", endless)
    await owner.hears("running", f"{name}-block")
    await asker.say("list", name)
    [listed] = await asker.hears("list", name)
    assert {late, endless} <= set(listed["answer"])
    # Events, a wait and a result.
    await asker.say("events", late)
    await asker.hears("event", late)
    await asker.say("wait", late)
    await owner.say("report", late, "half")
    await asker.hears("progress", "half")
    await owner.say("release", late)
    [waited] = await asker.hears("wait", late)
    assert waited["answer"] == "finished"
    [followed] = await asker.hears("events", late)
    assert (followed["answer"][0], followed["answer"][-1]) == ("state", "end")
    await asker.say("result", late)
    [result] = await asker.hears("result", late)
    assert result["answer"] == "finished late"
    # Cancels, by record and mail, and by the log.
    await asker.say("cancel", endless)
    [cancelled] = await asker.hears("cancel", endless)
    assert cancelled["answer"] == "cancelled"
    [ended] = await owner.hears("ended", endless)
    assert ended["message"] == "enough"
    # A place of a key, which one gives to the other.
    await owner.say("start", held, f"{name}-key")
    await owner.hears("started", held)
    await asker.say("start", f"{name}-waits", f"{name}-key")
    [waits] = await asker.hears("started", f"{name}-waits")
    assert waits["state"] == "waiting"
    await asker.say("cancel", held)
    await asker.hears("cancel", held)
    await owner.say("until", f"{name}-waits", "running")
    await owner.hears("until", f"{name}-waits")


async def test_a_newer_version_and_this_one_work_together(own_redis: RedisServer, anyio_backend: str) -> None:
    url = own_redis.url
    async with (
        worker_process(url, backend=anyio_backend) as today,
        worker_process(url, backend=anyio_backend, module="tests.operations_newer_worker") as newer,
    ):
        for each in (today, newer):
            await each.say("know", 2)
            await each.hears("knows")
        await newer.say("fly")
        await newer.hears("has_flown")
        await both_ways(today, newer, "theirs")
        await both_ways(newer, today, "ours")
        with redis.Redis(port=own_redis.port) as client:
            kept: Any = client
            assert {json.loads(fields[b"d"])["v"] for _, fields in kept.xrange("{app}:log")} == {1, 2}
            assert kept.hget("{app}:op:theirs-late", "priority") == b"7"
            assert [b"trace" in each for each in sorted(kept.hvals("{app}:identities"), key=len)] == [False, True]
        for each in (today, newer):
            log = "".join(each.log)
            assert "Traceback" not in log
            assert "WARNING" not in log
            assert "ERROR" not in log
