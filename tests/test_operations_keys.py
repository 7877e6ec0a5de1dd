"""Keys: the latest only, and a number at most."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any, cast

import anyio
import anyio.lowlevel
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Query
from fastapi.responses import StreamingResponse

from cancelable_deps import RequestCancelationMiddleware, cancelable_streaming_response
from cancelable_deps.operations import MemoryBackend, Operations, at_most, latest_only
from cancelable_deps.testing import Call, CancelableClient, OperationsHub, advance
from tests.calls import CEILING, movable_clock
from tests.operations import nothing_is_kept, until

pytestmark = [pytest.mark.anyio]


async def user(user: str = "ann") -> str:
    return user


async def strange(kind: Annotated[str, Query()] = "none") -> object:
    if kind == "raises":
        raise HTTPException(401, "who are you?")
    if kind == "breaks":
        raise ValueError("broken")
    return {"none": None, "long": "x" * 257, "empty": "", "control": "a\nb", "list": ["a"]}[kind]


class Searches:
    """An application whose searches wait until they are told to go on."""

    def __init__(self, *dependencies: Any, door: bool = True, operations: Operations | None = None) -> None:
        self.operations = operations or Operations()
        self.app = FastAPI(lifespan=self.operations.lifespan())
        if door:
            self.app.add_middleware(RequestCancelationMiddleware, operations=self.operations)
        self.go_on = anyio.Event()
        self.running: list[str] = []
        self.most: dict[str, int] = {}
        self.begun: list[str] = []
        self.cleanup: float = 0

        @self.app.get("/search", dependencies=[Depends(each) for each in dependencies])
        async def search(text: str, user: str = "ann") -> str:
            self.begun.append(text)
            self.running.append(user)
            self.most[user] = max(self.most.get(user, 0), self.running.count(user))
            try:
                await self.go_on.wait()
            finally:
                if self.cleanup:
                    await anyio.sleep(self.cleanup)
                self.running.remove(user)
            return text

    def client(self, **options: Any) -> CancelableClient:
        return CancelableClient(self.app, ceiling=CEILING, **options)


async def in_turn(stack: AsyncExitStack, client: CancelableClient, site: Searches, text: str, count: int) -> Call:
    """Start a search, and wait until it has taken its turn, so that the order is certain."""
    call = await stack.enter_async_context(client.start("GET", f"/search?text={text}"))
    await until(lambda: len(site.operations.worker.turns) >= count)
    return call


@pytest.mark.parametrize("door", [True, False])
async def test_the_latest_stops_those_before_it(door: bool) -> None:
    site = Searches(latest_only(user), door=door)
    async with site.client() as client:
        async with (
            client.start("GET", "/search?text=a") as first,
            client.start("GET", "/search?text=b&user=bob") as other,
        ):
            await until(lambda: len(site.begun) == 2)
            async with client.start("GET", "/search?text=ab") as second:
                await first.ended()
                assert (first.status, first.json()) == (499, {"detail": "superseded by a newer request"})
                await until(lambda: len(site.begun) == 3)
                site.go_on.set()
        assert (second.json(), other.json()) == ("ab", "b")
        nothing_is_kept(site.operations)


async def test_of_a_burst_the_newest_of_each_answers() -> None:
    arrived: dict[str, str] = {}

    async def of_user(text: str, user: str) -> str:
        arrived[user] = text  # Tasks that are started together begin in any order on trio.
        return user

    site = Searches(latest_only(of_user))
    answers: dict[str, tuple[int | None, Any]] = {}
    async with site.client() as client:

        async def search(number: int) -> None:
            async with client.start("GET", f"/search?text={number}&user=u{number % 10}") as call:
                await call.ended()
            answers[str(number)] = call.status, call.json()

        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(search, number)
            await until(lambda: len(answers) == 190)
            site.go_on.set()
        newest = set(arrived.values())
        assert len(newest) == 10
        assert {number for number, (status, _) in answers.items() if status == 200} == newest
        assert {status for status, _ in answers.values()} == {200, 499}
        nothing_is_kept(site.operations)


@pytest.mark.parametrize("door", [True, False])
async def test_what_follows_a_response_is_not_stopped_by_a_newer_request(door: bool) -> None:
    site = Searches(latest_only(user), door=door)
    begun: list[str] = []
    ended: list[str] = []

    async def later(text: str) -> None:
        begun.append(text)
        await site.go_on.wait()
        ended.append(text)

    @site.app.get("/saved", dependencies=[Depends(latest_only(user))])
    async def saved(text: str, background: BackgroundTasks) -> str:
        background.add_task(later, text)
        return text

    async with site.client() as client:
        async with client.start("GET", "/saved?text=a") as first:
            await until(lambda: begun == ["a"])
            async with client.start("GET", "/saved?text=b") as second:
                await until(lambda: begun == ["a", "b"])
                site.go_on.set()
        assert sorted(ended) == ["a", "b"]
        assert [(call.status, call.json()) for call in (first, second)] == [(200, "a"), (200, "b")]
        nothing_is_kept(site.operations)


@movable_clock
async def test_the_latest_waits_for_the_end_of_the_one_before() -> None:
    site = Searches(latest_only(user, wait_for_previous=10))
    site.cleanup = 1
    async with site.client() as client:
        async with client.start("GET", "/search?text=1") as first:
            await until(lambda: site.begun == ["1"])
            async with AsyncExitStack() as stack:
                second = await in_turn(stack, client, site, "2", 2)
                third = await stack.enter_async_context(client.start("GET", "/search?text=3"))
                await second.ended()
                assert second.status == 499
                await advance(0.9)
                assert site.begun == ["1"]
                await advance(0.2)
                await until(lambda: site.begun == ["1", "3"])
                site.go_on.set()
                await third.ended()
        assert (first.status, third.status) == (499, 200)
        assert site.most == {"ann": 1}
        nothing_is_kept(site.operations)


@movable_clock
async def test_the_latest_does_not_wait_for_ever() -> None:
    site = Searches(latest_only(user, wait_for_previous=2))
    site.cleanup = 4
    async with site.client() as client:
        async with client.start("GET", "/search?text=1") as first:
            await until(lambda: site.begun == ["1"])
            async with client.start("GET", "/search?text=2") as second:
                await until(lambda: site.operations.worker.turns and len(site.operations.worker.turns) == 2)
                await advance(2.1)
                await second.ended()
                assert (second.status, second.headers["retry-after"]) == (503, "1")
                await advance(3)
        assert first.status == 499
        nothing_is_kept(site.operations)


async def test_two_rules_of_one_key_do_not_stop_their_own_request() -> None:
    site = Searches(latest_only(user, scope="s"), latest_only(user, scope="s"))
    site.go_on.set()
    async with site.client() as client:
        assert (await client.get("/search?text=a")).json() == "a"
        nothing_is_kept(site.operations)


@pytest.mark.parametrize(("kind", "status"), [("raises", 401), ("long", 422), ("empty", 422), ("control", 422)])
async def test_a_key_that_is_none_is_an_answer(kind: str, status: int) -> None:
    site = Searches(latest_only(strange))
    async with site.client() as client:
        assert (await client.get(f"/search?text=a&kind={kind}")).status_code == status
        assert site.begun == []
        nothing_is_kept(site.operations)


@pytest.mark.parametrize(("kind", "error"), [("none", TypeError), ("list", TypeError), ("breaks", ValueError)])
async def test_a_key_dependency_that_is_wrong_is_an_error_of_the_application(kind: str, error: type[Exception]) -> None:
    site = Searches(latest_only(strange))
    async with site.client() as client:
        with pytest.raises(error):
            await client.get(f"/search?text=a&kind={kind}")
        nothing_is_kept(site.operations)


@pytest.mark.parametrize("response", [StreamingResponse, cancelable_streaming_response])
async def test_a_stream_keeps_its_key_until_its_end(response: Any) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    app.add_middleware(RequestCancelationMiddleware, operations=operations)

    @app.get("/stream", dependencies=[Depends(at_most(1, user))])
    async def stream() -> Any:
        async def parts() -> AsyncIterator[str]:
            yield "one"
            await go_on.wait()

        return response(parts())

    go_on = anyio.Event()
    async with CancelableClient(app, ceiling=CEILING) as client:
        async with client.start("GET", "/stream") as call:
            await call.response_started()
            assert (await client.get("/stream")).status_code == 409
            go_on.set()
        assert (await client.get("/stream")).status_code == 200
        nothing_is_kept(operations)


async def test_keys_are_those_of_a_route_or_of_a_scope() -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    begun: list[str] = []

    async def wait(path: str) -> str:
        begun.append(path)
        await go_on.wait()
        return path

    @app.get("/own", dependencies=[Depends(at_most(1, user))])
    async def own() -> str:
        return await wait("own")

    @app.get("/own/{id}", dependencies=[Depends(at_most(1, user))])
    async def of_id() -> str:
        return await wait("id")

    @app.get("/a", dependencies=[Depends(at_most(1, user, scope="both"))])
    async def a() -> str:
        return await wait("a")

    @app.get("/b", dependencies=[Depends(at_most(1, user, scope="both"))])
    async def b() -> str:
        return await wait("b")

    go_on = anyio.Event()
    async with CancelableClient(app, ceiling=CEILING) as client:
        async with (
            client.start("GET", "/own") as one,
            client.start("GET", "/own/1") as two,
            client.start("GET", "/a") as three,
        ):
            await until(lambda: len(begun) == 3)
            assert (await client.get("/own/2")).status_code == 409
            assert (await client.get("/b")).json() == {"detail": "An operation of the same key is running"}
            go_on.set()
        assert [call.status for call in (one, two, three)] == [200, 200, 200]
        nothing_is_kept(operations)


@pytest.mark.parametrize("door", [True, False])
async def test_a_router_that_is_included_twice_has_two_routes(door: bool) -> None:
    operations = Operations()
    app = FastAPI(lifespan=operations.lifespan())
    if door:
        app.add_middleware(RequestCancelationMiddleware, operations=operations)
    inner, outer = APIRouter(prefix="/{id}"), APIRouter(prefix="/outer")

    @inner.get("/wait", dependencies=[Depends(at_most(1, user))])
    async def wait() -> None:
        await anyio.sleep_forever()

    outer.include_router(inner, prefix="/inner")
    app.include_router(outer)
    app.include_router(inner, prefix="/again")
    async with CancelableClient(app, ceiling=CEILING) as client:
        async with client.start("GET", "/outer/inner/1/wait"), client.start("GET", "/again/1/wait"):
            routes = {"/outer/inner/{id}/wait", "/again/{id}/wait"}
            with anyio.fail_after(CEILING):
                while {each.route for each in (await operations.list()).items} != routes:
                    await anyio.lowlevel.checkpoint()
            assert (await client.get("/again/2/wait")).status_code == 409
            stopped = await operations.cancel_all(route="/again/{id}/wait")
            assert [each.operation.route for each in stopped if each.operation] == ["/again/{id}/wait"]
            await operations.cancel_all(older_than=0)
        nothing_is_kept(operations)


async def test_a_queue_keeps_its_order_and_gives_up_who_leaves() -> None:
    site = Searches(at_most(1, user, queue=3, retry_after=7))
    async with site.client() as client:
        async with AsyncExitStack() as stack:
            one, two, three, four = [await in_turn(stack, client, site, str(n), n) for n in range(1, 5)]
            for call in (two, three, four):
                await call.listened_to()
            waiting = await site.operations.list(state="waiting")
            assert [each.key for each in waiting.items] == ["ann"] * 3
            refused = await client.get("/search?text=5")
            assert (refused.status_code, refused.headers["retry-after"]) == (409, "7")
            await three.hang_up()
            await three.ended()
            # Who waits can be stopped as well.
            stopped = await site.operations.cancel(waiting.items[-1].id)
            assert stopped.outcome == "cancelled"
            site.go_on.set()
        assert site.begun == ["1", "2"]
        assert [call.status for call in (one, two, three, four)] == [200, 200, 499, 499]
        assert site.most == {"ann": 1}
        nothing_is_kept(site.operations)


@movable_clock
async def test_who_has_waited_for_too_long_is_refused() -> None:
    site = Searches(at_most(2, user, queue=1, queue_timeout=3, status_code=429))
    async with site.client() as client:
        async with AsyncExitStack() as stack:
            *_, three = [await in_turn(stack, client, site, str(n), n) for n in range(1, 4)]
            await advance(3.1)
            await three.ended()
            assert three.status == 429
            site.go_on.set()
        nothing_is_kept(site.operations)


@movable_clock
async def test_the_place_of_a_killed_holder_is_given_on() -> None:
    hub = OperationsHub()
    one = Searches(at_most(1, user, queue=5, queue_timeout=100), operations=hub.operations())
    two = Searches(at_most(1, user, queue=5, queue_timeout=100), operations=hub.operations())
    async with one.client() as first, two.client() as second:
        await advance(25)
        async with first.start("GET", "/search?text=1") as held:
            await until(lambda: one.begun)
            async with AsyncExitStack() as stack:
                a, b = [await in_turn(stack, second, two, text, n) for n, text in enumerate("23", 1)]
                hub.kill(one.operations)
                await advance(25)
                await until(lambda: two.begun == ["2"])
                two.go_on.set()
                await a.ended()
                await b.ended()
            assert two.begun == ["2", "3"]
            held.hang_up_nowait()
        nothing_is_kept(two.operations)


@movable_clock
async def test_the_latest_wins_over_workers_too() -> None:
    hub = OperationsHub()
    sites = [Searches(latest_only(user), operations=hub.operations()) for _ in range(2)]
    async with sites[0].client() as first, sites[1].client() as second:
        async with first.start("GET", "/search?text=1") as one:
            await until(lambda: sites[0].begun)
            async with second.start("GET", "/search?text=2") as two:
                await one.ended()
                assert one.json() == {"detail": "superseded by a newer request"}
                sites[1].go_on.set()
            assert two.status == 200
        nothing_is_kept(*(site.operations for site in sites))


@movable_clock
@pytest.mark.parametrize(("when_unavailable", "status"), [("run", 499), ("refuse", 503)])
async def test_when_the_store_is_away(when_unavailable: Any, status: int) -> None:
    hub = OperationsHub()
    site = Searches(latest_only(user, when_unavailable=when_unavailable), operations=hub.operations())
    async with site.client() as client:
        hub.cut(site.operations)
        async with client.start("GET", "/search?text=1") as one:
            if status == 499:
                await until(lambda: site.begun)
                async with client.start("GET", "/search?text=2") as two:
                    await one.ended()
                    await until(lambda: len(site.begun) == 2)
                    site.go_on.set()
                assert two.status == 200
        assert one.status == status
        hub.resume(site.operations)
        await advance(10)
        nothing_is_kept(site.operations)


@movable_clock
async def test_who_came_while_the_store_was_away_is_known_to_all_afterwards() -> None:
    hub = OperationsHub()
    sites = [Searches(latest_only(user), operations=hub.operations()) for _ in range(2)]
    async with sites[0].client() as first, sites[1].client() as second:
        hub.cut(sites[0].operations)
        async with first.start("GET", "/search?text=1") as one:
            await until(lambda: sites[0].begun)
            hub.resume(sites[0].operations)
            await advance(10)
            async with second.start("GET", "/search?text=2") as two:
                await one.ended()
                assert one.json() == {"detail": "superseded by a newer request"}
                sites[1].go_on.set()
            assert two.status == 200
        await advance(10)
        nothing_is_kept(*(site.operations for site in sites))


def in_flight(site: Searches) -> list[Any]:
    return site.operations.worker.local.everything()


@movable_clock
async def test_who_came_while_the_store_was_away_counts_afterwards_and_gives_its_places_back() -> None:
    hub = OperationsHub()
    sites = [Searches(at_most(1, user, queue=1), operations=hub.operations()) for _ in range(2)]
    async with sites[0].client() as first, sites[1].client() as second:
        hub.cut(sites[0].operations)
        async with first.start("GET", "/search?text=1") as one:
            await until(lambda: sites[0].begun)
            async with first.start("GET", "/search?text=2") as two:
                # In the order of this worker, too.
                await until(lambda: any(each.operation.is_waiting for each in in_flight(sites[0]) if each.operation))
                hub.resume(sites[0].operations)
                await advance(10)
                async with second.start("GET", "/search?text=3") as three:
                    await until(lambda: len(sites[1].operations.worker.turns) == 1)
                    assert sites[1].begun == []
                    sites[0].go_on.set()
                    await one.ended()
                    await two.ended()
                    sites[1].go_on.set()
                    await advance(10)
        assert (one.status, two.status, three.status) == (200, 200, 200)
        assert sites[0].most == {"ann": 1}
        assert (await second.get("/search?text=4")).status_code == 200
        await advance(10)
        nothing_is_kept(*(site.operations for site in sites))


class Recorder(MemoryBackend):
    """A store that notes who asks it for a place, in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    async def enter(self, key: str, id: str, **options: Any) -> Any:
        self.asked.append((key, id))
        await anyio.lowlevel.checkpoint()
        return await super().enter(key, id, **options)


@pytest.mark.parametrize("may_have_lost", [False, True])
async def test_those_that_wait_for_one_key_are_asked_for_in_their_order(may_have_lost: bool) -> None:
    store, keys = Recorder(), ("a", "b", "c")
    async with Operations(store) as operations, operations.track(), operations.track():
        [one, other] = operations.worker.local.everything()
        turns = operations.worker.turns
        for key in keys:
            await turns.enter(key, cast("Any", one))
        waiting = [await turns.enter(key, cast("Any", other), queue=9) for _ in range(6) for key in keys]
        assert {turn.status for turn in waiting} == {"waiting"}
        if may_have_lost:
            await turns.enter_again(may_have_lost=True)
        store.asked.clear()
        await turns.enter_again(may_have_lost=False)
        for key in keys:
            assert [id for asked, id in store.asked if asked == key] == [turn.id for turn in waiting if turn.key == key]


@movable_clock
async def test_a_key_that_could_not_be_given_back_is_given_back_later() -> None:
    hub = OperationsHub()
    sites = [Searches(at_most(1, user), operations=hub.operations()) for _ in range(2)]
    async with sites[0].client() as first, sites[1].client() as second:
        async with first.start("GET", "/search?text=1") as one:
            await until(lambda: sites[0].begun)
            hub.cut(sites[0].operations)
            sites[0].go_on.set()
        assert one.status == 200
        sites[1].go_on.set()
        assert (await second.get("/search?text=2")).status_code == 409
        hub.resume(sites[0].operations)
        await advance(10)
        assert (await second.get("/search?text=2")).status_code == 200
        nothing_is_kept(*(site.operations for site in sites))


@pytest.mark.parametrize("holder", [0, 1])
@movable_clock
async def test_who_waits_is_known_again_when_the_store_has_lost_everything_and_waits_on(holder: int) -> None:
    hub = OperationsHub()
    sites = [Searches(at_most(1, user, queue=9, queue_timeout=100), operations=hub.operations()) for _ in range(2)]
    held, waits = sites[holder], sites[1 - holder]
    async with AsyncExitStack() as stack:
        # Their signs of life come in this order.
        clients = [await stack.enter_async_context(site.client()) for site in sites]
        async with clients[holder].start("GET", "/search?text=1") as one:
            await until(lambda: held.begun)
            async with clients[1 - holder].start("GET", "/search?text=2") as two:
                while not (await waits.operations.list(state="waiting")).items:
                    await anyio.lowlevel.checkpoint()
                hub.lose_everything()
                await advance(20)
                assert waits.begun == []
                held.go_on.set()
                await one.ended()
                waits.go_on.set()
                await advance(10)
                await two.ended()
        assert (one.status, two.status) == (200, 200)
        nothing_is_kept(*(site.operations for site in sites))


async def test_wrong_use_says_how_to_do_it_right() -> None:
    with pytest.raises(TypeError, match="dependency"):
        latest_only("user")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dependency"):
        at_most(1, "user")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="number"):
        at_most(True, user)
    with pytest.raises(ValueError, match="1 or more"):
        at_most(0, user)
    with pytest.raises(ValueError, match="0 or more"):
        at_most(1, user, queue=-1)
    with pytest.raises(ValueError, match="'run' or 'refuse'"):
        latest_only(user, when_unavailable="wait")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scope"):
        latest_only(user, scope=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wait_for_previous"):
        latest_only(user, wait_for_previous=-1)
    with pytest.raises(ValueError, match="status"):
        at_most(1, user, status_code=200000)


async def test_nothing_of_a_key_is_an_input_of_the_route() -> None:
    site = Searches(latest_only(user), at_most(3, user))
    parameters = site.app.openapi()["paths"]["/search"]["get"]["parameters"]
    assert {each["name"] for each in parameters} == {"text", "user"}


async def test_without_operations_it_says_what_is_missing() -> None:
    app = FastAPI()

    @app.get("/search", dependencies=[Depends(latest_only(user))])
    async def search() -> None: ...

    async with CancelableClient(app, ceiling=CEILING) as client:
        with pytest.raises(RuntimeError, match=r"lifespan=operations\.lifespan"):
            await client.get("/search")
