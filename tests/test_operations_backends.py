"""What every store of operations does: in memory, and in Redis and Valkey by each client."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest

from cancelable_deps.operations.backend import Entered, Unavailable, Waiter

from .machine import scaled
from .stores import CEILING, LEASE, MemoryStore, Store, identity, kinds, until

pytest_plugins = ["tests.redis_fixtures"]
pytestmark = pytest.mark.anyio

A, B = identity("wa").name, identity("wb").name
TAKE = {"limit": 1, "queue": 0, "latest": False, "waits": False}
QUEUE = {**TAKE, "queue": 2}
LATEST = {**TAKE, "latest": True}


@pytest.fixture(params=kinds("coredis-asyncio", "valkey"))
def store_kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
def anyio_backend(store_kind: tuple[str, str]) -> str:
    return store_kind[1]


def fields(worker: str = A, **more: Any) -> dict[str, Any]:
    return {"worker": worker, "owner": "me", "created": time.time(), "state": "running", "result_ttl": 60.0, **more}


async def dies(backend: Any, store: Store, name: str) -> None:
    """Let the lease of a worker run out by leaving it without a sign of life, while ``backend`` goes on."""

    async def is_gone() -> bool:
        beat = await backend.beat(may_reap=False)
        return name not in [each.name for each in beat.alive]

    await until(is_gone, "the lease has run out")


async def reaped(backend: Any) -> tuple[list[str], list[Waiter]]:
    lost: list[str] = []
    granted: list[Waiter] = []

    async def is_done() -> bool:
        beat = await backend.beat(may_reap=True)
        lost.extend(beat.lost)
        granted.extend(beat.granted)
        return bool(lost or granted)

    await until(is_done, "a dead worker is reaped")
    return lost, granted


async def received(backend: Any, count: int) -> list[bytes]:
    entries: list[bytes] = []

    async def are_there() -> bool:
        entries.extend(data for _, data in await backend.receive())
        return len(entries) >= count

    await until(are_there, f"{count} entries")
    return entries


# The log and the mail.


async def test_an_entry_reaches_everybody_once_in_order_and_those_who_come_later(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        for number in range(250):
            await a.broadcast(f"entry {number}".encode(), str(number))
        expected = [f"entry {number}".encode() for number in range(250)]
        assert await received(a, 250) == await received(b, 250) == expected
        async with store.worker("wc") as c:
            assert await received(c, 250) == expected


async def test_positions_increase(store: Store) -> None:
    async with store.worker("wa") as a:
        positions = [await a.broadcast(b"entry", str(number)) for number in range(50)]
        ordered = sorted(positions, key=lambda position: [int(part) for part in position.split("-")])
        assert positions == ordered
        assert len(set(positions)) == 50


async def test_mail_reaches_one_worker_alone(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        assert await a.send(B, b"for b", "1")
        await a.broadcast(b"for all", "2")
        # In the same millisecond, the two sources have no order.
        assert sorted(await received(b, 2)) == [b"for all", b"for b"]
        assert await received(a, 1) == [b"for all"]


async def test_a_reader_that_waits_is_woken(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b), anyio.create_task_group() as tasks:
        got: list[bytes] = []

        async def read() -> None:
            got.extend(await received(b, 2))

        tasks.start_soon(read)
        await a.broadcast(b"one", "1")
        await a.send(B, b"two", "2")
        await until(lambda: _true(len(got) == 2), "both are read")


async def _true(value: bool) -> bool:
    return value


async def test_a_reader_without_entries_returns_within_a_third_of_the_lease(store: Store) -> None:
    async with store.worker("wa") as a:
        begin = time.monotonic()
        assert await a.receive() == []
        assert time.monotonic() - begin < LEASE * 3


async def test_an_interrupted_read_loses_nothing(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        for number in range(20):
            with anyio.move_on_after(0.005):
                await b.receive()
            await a.broadcast(b"%d" % number, str(number))
        assert set(await received(b, 1)) <= {b"%d" % number for number in range(20)}


async def test_bytes_come_as_they_were(store: Store) -> None:
    async with store.worker("wa") as a:
        data = '{"text":"äöü 🙂 \\u0000 \\r\\n"}'.encode()
        await a.broadcast(data, "1")
        assert await received(a, 1) == [data]


async def test_mail_for_nobody_is_refused(store: Store) -> None:
    async with store.worker("wa") as a:

        async def is_refused() -> bool:
            # In Redis, only a worker that has been there for a lease may say that another is dead.
            await a.beat(may_reap=False)
            return not await a.send("wnobody", b"entry", "1")

        await until(is_refused, "nobody has that name")


async def test_what_the_log_has_forgotten_is_missing(store: Store) -> None:
    async with store.worker("wa") as a:
        await a.broadcast(b"one", "1")
        assert await a.missing(["1", "2"]) == {"2"}
        store.lose_everything()
        assert await a.missing(["1"]) == {"1"}
        await a.broadcast(b"one", "1")
        assert await a.missing(["1"]) == set()


# Signs of life.


async def test_workers_know_each_other(store: Store) -> None:
    async with store.worker("wa") as a:
        async with store.worker("wb"):
            assert {each.name for each in (await a.beat(may_reap=False)).alive} == {A, B}
        beat = await a.beat(may_reap=False)
        assert [each.name for each in beat.alive] == [A]
        assert beat.alive[0][:4] == (A, "host", 1, "0")
        assert (beat.is_fenced, beat.has_forgotten) == (False, False)


async def test_a_store_that_has_forgotten_everything_says_so_once(store: Store) -> None:
    async with store.worker("wa") as a:
        await a.broadcast(b"entry", "1")
        assert await received(a, 1) == [b"entry"]
        store.lose_everything()
        assert (await a.beat(may_reap=False)).has_forgotten
        assert not (await a.beat(may_reap=False)).has_forgotten
        await a.broadcast(b"later", "2")
        assert await received(a, 1) == [b"later"]


async def test_mail_to_a_worker_that_a_store_has_forgotten_is_kept_for_it(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        store.lose_everything()
        await a.beat(may_reap=False)
        assert await a.send(B, b"mail", "1")
        await b.beat(may_reap=False)
        assert await received(b, 1) == [b"mail"]


async def test_records_and_places_of_a_dead_worker_are_given_up_and_it_is_told(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        await b.create("op", fields(B), ttl=60)
        await b.enter("key", "holder", **QUEUE)
        assert (await a.enter("key", "waiter", **QUEUE)).status == "waiting"
        await dies(a, store, B)
        lost: list[str] = []
        granted: list[Waiter] = []

        async def is_reaped() -> bool:
            beat = await a.beat(may_reap=True)
            lost.extend(beat.lost)
            granted.extend(beat.granted)
            return bool(lost and granted)

        await until(is_reaped, "the record is lost, and the waiter admitted")
        assert (lost, granted) == (["op"], [Waiter(A, "waiter")])
        [record] = await a.load(["op"])
        assert record is not None
        assert record.fields["state"] == "lost"
        assert record.fields["ended"] is not None
        assert (await b.beat(may_reap=False)).is_fenced
        assert not await b.change("op", {"state": "finished", "ended": 1.0}, end_ttl=60)
        b.rename(identity("wc"))
        assert not (await b.beat(may_reap=False)).is_fenced


@pytest.mark.parametrize("what", ["record", "place"])
async def test_what_a_worker_begins_after_a_loss_and_before_its_next_sign_of_life_is_given_up_if_it_dies(
    store: Store, what: str
) -> None:
    async with store.workers("wa", "wb") as (a, b):
        store.lose_everything()
        if what == "record":
            await b.create("op", fields(B), ttl=60)
        else:
            await b.enter("key", "holder", **QUEUE)
            assert (await a.enter("key", "waiter", **QUEUE)).status == "waiting"
        assert (await a.beat(may_reap=False)).has_forgotten
        lost, granted = await reaped(a)
        assert (lost, granted) == ((["op"], []) if what == "record" else ([], [Waiter(A, "waiter")]))
        assert (await b.beat(may_reap=False)).is_fenced


async def test_a_worker_notices_a_loss_after_which_it_has_begun_something(store: Store) -> None:
    async with store.worker("wa") as a:
        store.lose_everything()
        await a.create("op", fields(), ttl=60)
        assert (await a.beat(may_reap=False)).has_forgotten
        assert not (await a.beat(may_reap=False)).has_forgotten


async def test_a_worker_that_was_given_up_begins_nothing_until_it_has_another_name(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        await b.create("op", fields(B), ttl=60)
        await dies(a, store, B)
        await reaped(a)
        with pytest.raises(Unavailable):
            await b.create("late", fields(B), ttl=60)
        with pytest.raises(Unavailable):
            await b.enter("key", "late", **QUEUE)
        assert await a.load(["late"]) == [None]
        b.rename(identity("wc"))
        assert (await b.create("late", fields(B), ttl=60)).is_new


async def test_mail_after_a_loss_reaches_a_worker_that_has_given_no_sign_of_life_since(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        store.lose_everything()
        assert await a.send(B, b"cancel", "1")
        assert await received(b, 1) == [b"cancel"]


async def test_without_the_right_to_reap_nobody_is_reaped(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        await b.create("op", fields(B), ttl=60)
        await dies(a, store, B)
        assert (await a.beat(may_reap=False)).lost == []
        assert not (await b.beat(may_reap=False)).is_fenced
        assert await b.change("op", {"state": "stopping"})


async def test_more_than_a_hundred_records_are_given_up_in_parts(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        for number in range(130):
            await b.create(f"op{number}", fields(B), ttl=60)
        await dies(a, store, B)
        lost: set[str] = set()

        async def are_all() -> bool:
            lost.update((await a.beat(may_reap=True)).lost)
            return len(lost) == 130

        await until(are_all, "all are lost")
        assert {record.fields["state"] for record in await a.load(list(lost))} == {"lost"}


# What may befall a store.


async def works(call: Callable[[], Awaitable[Any]]) -> bool:
    try:
        with anyio.fail_after(1):
            await call()
    except (Unavailable, TimeoutError):
        return False
    return True


async def received_at_last(backend: Any, last: bytes) -> list[bytes]:
    """Read until an entry comes, through whatever fails; without what comes twice."""
    entries: dict[bytes, None] = {}

    async def is_there() -> bool:
        with suppress(Unavailable):
            entries.update(dict.fromkeys([data for _, data in await backend.receive()]))
        return last in entries

    await until(is_there, f"{last!r} comes")
    return list(entries)


async def test_a_store_that_stands_still_skips_nothing(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        await a.broadcast(b"before", "before")
        assert await received(b, 1) == [b"before"]
        store.pause()
        assert not await works(lambda: a.broadcast(b"during", "during"))
        store.resume()
        await until(lambda: works(lambda: a.broadcast(b"after", "after")), "it answers again")
        entries = await received_at_last(b, b"after")
        # The call that was given up may have been carried out.
        assert [entry for entry in entries if entry not in (b"before", b"during")] == [b"after"]


async def test_a_worker_that_is_cut_off_reads_later_what_it_has_missed(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        await a.broadcast(b"before", "before")
        assert await received(b, 1) == [b"before"]
        store.pause(b)
        for number in range(3):
            await a.broadcast(b"%d" % number, str(number))
        store.resume()
        entries = await received_at_last(b, b"2")
        assert [entry for entry in entries if entry != b"before"] == [b"0", b"1", b"2"]


async def test_a_slow_store_keeps_the_order(store: Store) -> None:
    store.delay(0.05)
    async with store.workers("wa", "wb") as (a, b):
        for number in range(5):
            await a.broadcast(b"%d" % number, str(number))
            await a.send(B, b"mail %d" % number, f"mail {number}")
        entries = await received(b, 10)
        assert [entry for entry in entries if b"mail" not in entry] == [b"%d" % number for number in range(5)]
        assert [entry for entry in entries if b"mail" in entry] == [b"mail %d" % number for number in range(5)]
        # All this may have taken longer than a lease.
        await a.beat(may_reap=False)
        assert (await a.enter("key", "1", **TAKE)).status == "admitted"
        assert (await b.enter("key", "2", **TAKE)).status == "refused"


async def test_the_loss_of_the_last_entries_is_seen_and_mended(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        for number in range(3):
            await a.broadcast(b"%d" % number, str(number))
        await received(b, 3)
        await anyio.sleep(0.6)
        for number in (3, 4):
            await a.broadcast(b"%d" % number, str(number))
        store.lose_last(0.5)
        ids = [str(number) for number in range(5)]

        async def lost() -> set[str]:
            with suppress(Unavailable):
                return set(await a.missing(ids))
            return set()

        assert await until(lost, "the loss is seen") == {"3", "4"}
        for number in (3, 4):
            await a.broadcast(b"%d" % number, str(number))
        assert await a.missing(ids) == set()
        with anyio.fail_after(scaled(CEILING)):
            entries = await received_at_last(b, b"4")
        assert [entry for entry in entries if entry in (b"3", b"4")] == [b"3", b"4"]


# Records.


async def test_a_record_is_created_once(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        mine = fields(labels={"a": "ä b"}, key=None, number=1.5, flag=True)
        created = await a.create("op", mine, ttl=60)
        assert created.is_new
        other = await b.create("op", fields(B), ttl=60)
        assert not other.is_new
        assert other.fields["worker"] == A
        assert other.fields["labels"] == {"a": "ä b"}
        assert other.fields.get("key") is None
        assert (other.fields["number"], other.fields["flag"]) == (1.5, True)


async def test_a_repeated_creation_has_created_it(store: Store) -> None:
    async with store.worker("wa") as a:
        mine = fields()
        assert (await a.create("op", mine, ttl=60)).is_new
        assert (await a.create("op", mine, ttl=60)).is_new
        assert not (await a.create("op", {**mine, "created": 1.0}, ttl=60)).is_new


async def test_only_its_worker_changes_a_record_until_its_end(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        await a.create("op", fields(), ttl=60)
        assert await a.change("op", {"progress": {"message": "half"}})
        assert not await b.change("op", {"state": "stolen"})
        assert await a.change("op", {"state": "finished", "ended": 5.25, "result": "[1]"}, end_ttl=60)
        assert not await a.change("op", {"state": "running"})
        assert not await a.change("op", {"state": "failed", "ended": 6.0}, end_ttl=60)
        # A repeated end, whose first answer was lost.
        assert await a.change("op", {"state": "finished", "ended": 5.25, "result": "[1]"}, end_ttl=60)
        assert not await a.change("unknown", {"state": "finished"})
        [record, nothing] = await b.load(["op", "unknown"])
        assert nothing is None
        assert record.fields["state"] == "finished"
        assert record.fields["progress"] == {"message": "half"}
        assert "result" not in record.fields
        [record] = await b.load(["op"], with_result=True)
        assert record.fields["result"] == "[1]"
        assert await b.load([]) == []


async def test_a_mark_keeps_what_is_set(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        await a.create("op", fields(cancel=None), ttl=60)
        first = await b.mark("op", {"cancel": {"message": "first"}})
        second = await a.mark("op", {"cancel": {"message": "second"}})
        assert first.fields["cancel"] == second.fields["cancel"] == {"message": "first"}
        assert await b.mark("unknown", {"cancel": {}}) is None
        await a.change("op", {"state": "finished", "ended": 1.0, "result": "1"}, end_ttl=60)
        ended = await b.mark("op", {"other": 1})
        assert "other" not in ended.fields
        assert "result" not in ended.fields


async def test_a_record_that_has_ended_is_forgotten(store: Store) -> None:
    async with store.worker("wa") as a:
        await a.create("op", fields(), ttl=60)
        await a.create("gone", fields(), ttl=60)
        await a.change("op", {"state": "finished", "ended": 1.0, "result": "1"}, end_ttl=0.1)
        assert await a.change("gone", {"state": "failed", "ended": 1.0}, end_ttl=0)

        async def is_forgotten() -> bool:
            return bool(await a.load(["op", "gone"], with_result=True) == [None, None])

        await until(is_forgotten, "both are forgotten")
        assert await a.history("me", before=time.time() + 60, limit=10) == []


async def test_history_has_the_newest_first_and_those_of_the_owner_alone(store: Store) -> None:
    async with store.worker("wa") as a:
        await a.create("nobody's", fields(owner=None, created=999.0), ttl=60)
        for number in range(5):
            await a.create(f"op{number}", fields(owner="me" if number % 2 else "you", created=1000.0 + number), ttl=60)

        async def ids(owner: str | None, **limits: Any) -> list[str]:
            options = {"before": time.time(), "limit": 10, **limits}
            return [record.id for record in await a.history(owner, **options)]

        assert await ids("me") == ["op3", "op1"]
        assert await ids(None) == ["op4", "op3", "op2", "op1", "op0", "nobody's"]
        assert await ids(None, before=1003.0, limit=2) == ["op2", "op1"]
        assert await ids("nobody") == []


async def test_names_with_separators_are_different(store: Store) -> None:
    async with store.worker("wa") as a:
        odd = ["a:b", "a", "b:a", "{a}", "a}", "a b", "*", "ä", "a\\", '"', "until", "x" * 256]
        for number, owner in enumerate(odd):
            await a.create(f"op{number}", fields(owner=owner), ttl=60)
            assert (await a.enter(owner, f"turn{number}", **TAKE)).status == "admitted"
        for number, owner in enumerate(odd):
            assert [each.id for each in await a.history(owner, before=time.time() + 60, limit=10)] == [f"op{number}"]
            assert (await a.enter(owner, "other", **TAKE)).status == "refused"


# Keys.


async def test_places_are_limited_and_handed_over_in_order(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        assert (await a.enter("key", "1", **QUEUE)).status == "admitted"
        assert (await b.enter("key", "2", **QUEUE)).status == "waiting"
        assert (await a.enter("key", "3", **QUEUE)).status == "waiting"
        assert (await b.enter("key", "4", **QUEUE)).status == "refused"
        assert (await b.enter("other", "5", **QUEUE)).status == "admitted"
        assert list(await a.leave("key", "1")) == [Waiter(B, "2")]
        assert list(await a.leave("key", "1")) == []
        assert list(await a.leave("key", "3")) == []
        assert list(await b.leave("key", "2")) == []
        assert (await a.enter("key", "6", **TAKE)).status == "admitted"


async def test_generations_increase_also_after_a_loss(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        found = [await each.enter(key, f"{key}{each is a}", **LATEST) for key in ("x", "y") for each in (a, b)]
        if not isinstance(store, MemoryStore):
            store.lose_everything()
        found.append(await a.enter("x", "z", **LATEST))
        generations = [each.generation for each in found]
        assert generations == sorted(set(generations))


async def test_the_latest_supersedes_those_before(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        await a.enter("key", "1", **QUEUE)
        await b.enter("key", "2", **QUEUE)
        entered = await b.enter("key", "3", **LATEST)
        assert entered.status == "admitted"
        assert [tuple(each) for each in entered.earlier] == [(A, "1"), (B, "2")]
        # The one that waited has no place any more; the others leave when they have ended.
        assert list(await a.leave("key", "1")) == []
        assert (await a.enter("key", "4", **TAKE)).status == "refused"


async def test_the_latest_may_wait_for_those_before(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        waits = {**LATEST, "waits": True}
        assert (await a.enter("key", "1", **waits)).status == "admitted"
        assert (await b.enter("key", "2", **waits)).status == "waiting"
        third = await b.enter("key", "3", **waits)
        assert (third.status, [each.id for each in third.earlier]) == ("waiting", ["1", "2"])
        assert list(await a.leave("key", "1")) == [Waiter(B, "3")]


async def test_a_repeated_entry_changes_nothing(store: Store) -> None:
    async with store.worker("wa") as a:
        assert (await a.enter("key", "1", **QUEUE)).status == "admitted"
        assert (await a.enter("key", "1", **QUEUE)).status == "admitted"
        assert (await a.enter("key", "2", **QUEUE)).status == "waiting"
        assert (await a.enter("key", "3", **QUEUE)).status == "waiting"
        assert (await a.enter("key", "2", **QUEUE)).status == "waiting"
        await a.leave("key", "1")
        assert (await a.enter("key", "2", **QUEUE)).status == "admitted"
        assert (await a.enter("key", "3", **QUEUE)).status == "waiting"


async def test_after_a_loss_a_holder_takes_its_place_again(store: Store) -> None:
    async with store.worker("wa") as a:
        await a.enter("key", "1", **TAKE)
        store.lose_everything()
        await a.beat(may_reap=False)
        assert (await a.enter("key", "2", **TAKE)).status == "admitted"
        assert (await a.enter("key", "1", **TAKE, again=True)).status == "admitted"
        await a.leave("key", "2")
        assert (await a.enter("key", "3", **TAKE)).status == "refused"


async def test_the_place_of_a_dead_worker_is_free_for_who_comes(store: Store) -> None:
    async with store.workers("wa", "wb") as (a, b):
        await b.enter("key", "1", **QUEUE)
        await b.enter("key", "2", **QUEUE)

        async def is_free() -> Entered | None:
            await a.beat(may_reap=False)
            entered = await a.enter("key", "3", **TAKE)
            return entered if entered.status == "admitted" else None

        await until(is_free, "the dead hold nothing")
