"""The requests of a loop: those that have just come, and those that have run for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from cancelable_deps import configure
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.kernel.sweep import sweep_of
from cancelable_deps.request.in_flight import InFlight, in_flight_of

from .leftovers import nothing_left

pytestmark = pytest.mark.anyio

INTERVAL = 0.005


class Timers:
    """A loop whose clock is moved by hand."""

    in_flight = None

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[float, Callable[[], object]]] = []
        self.extras: dict[Any, Any] = {}

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object]) -> Timers:
        self.calls.append((when, callback))
        return self

    def advance(self) -> None:
        ((self.now, callback),) = self.calls
        self.calls = []
        callback()


class Request:
    def __init__(self, in_flight: InFlight, grown: Callable[[], object] = lambda: None) -> None:
        self.times = 0
        self._grown = grown
        self._in_flight = in_flight
        self.started = in_flight.loop.time()
        in_flight.add_young(self)

    def leave(self) -> None:
        self._in_flight.young.pop(self, None)

    def grow_old(self) -> None:
        self.times += 1
        self._grown()


def by_hand() -> tuple[Timers, InFlight]:
    timers = Timers()
    return timers, InFlight(timers)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_a_request_grows_old_once_after_one_to_two_intervals() -> None:
    timers, in_flight = by_hand()
    early = Request(in_flight)
    timers.now = INTERVAL / 2
    late = Request(in_flight)
    timers.advance()
    assert (timers.now, early.times, late.times) == (INTERVAL, 1, 0)
    timers.advance()
    assert (timers.now, early.times, late.times) == (2 * INTERVAL, 1, 1)


def test_the_timer_stops_when_nobody_is_young_and_starts_again() -> None:
    timers, in_flight = by_hand()
    Request(in_flight)
    timers.advance()
    assert (timers.calls, in_flight.is_looked_after) == ([], False)
    request = Request(in_flight)
    timers.advance()
    assert (request.times, timers.calls) == (1, [])


def test_many_requests_share_one_timer() -> None:
    timers, in_flight = by_hand()
    requests = [Request(in_flight) for _ in range(100)]
    assert len(timers.calls) == 1
    timers.advance()
    assert {request.times for request in requests} == {1}


def test_who_has_left_does_not_grow_old() -> None:
    timers, in_flight = by_hand()
    request, other = Request(in_flight), Request(in_flight)
    request.leave()
    timers.advance()
    assert (request.times, other.times) == (0, 1)


def test_a_request_that_grows_old_is_young_no_more() -> None:
    timers, in_flight = by_hand()
    seen: list[object] = []
    request = Request(in_flight, lambda: seen.append(request in in_flight.young))
    timers.advance()
    assert seen == [False]


def test_one_may_come_while_others_grow_old() -> None:
    timers, in_flight = by_hand()
    added: list[Request] = []
    Request(in_flight, lambda: added.append(Request(in_flight)))
    timers.advance()
    timers.advance()
    assert [request.times for request in added] == [1]
    assert not timers.calls


def test_one_may_end_another_that_is_due() -> None:
    timers, in_flight = by_hand()
    requests: list[Request] = []

    def end_the_others() -> None:
        for request in requests:
            request.leave()

    requests.extend([Request(in_flight, end_the_others), Request(in_flight, end_the_others)])
    timers.advance()
    assert sorted(request.times for request in requests) == [0, 1]


def test_one_that_fails_does_not_keep_the_others(caplog: pytest.LogCaptureFixture) -> None:
    timers, in_flight = by_hand()

    def fail() -> None:
        raise KeyError

    Request(in_flight, fail)
    whole = Request(in_flight)
    timers.advance()
    assert whole.times == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_an_observer_is_told_of_each_that_is_old() -> None:
    _, in_flight = by_hand()
    seen: list[object] = []

    class Observer:
        def request_ended(self, request: object) -> None: ...

        def request_is_old(self, request: object) -> None:
            seen.append(request)

    in_flight.observers += (Observer(),)
    in_flight.add("one")
    in_flight.add("other")
    in_flight.remove("one")
    assert (seen, list(in_flight.requests)) == (["one", "other"], ["other"])


async def test_the_end_of_the_last_can_be_awaited() -> None:
    in_flight = InFlight(current_loop())
    in_flight.add("one")
    in_flight.add("other")
    done: list[bool] = []

    async def wait() -> None:
        await in_flight.wait_empty()
        done.append(True)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            in_flight.remove("one")
            await anyio.wait_all_tasks_blocked()
            assert done == []
            in_flight.remove("other")
    assert done == [True, True]


async def test_a_loop_has_one_sweep_for_each_interval_and_knows_its_requests() -> None:
    loop = current_loop()
    assert sweep_of(loop, 0.005) is sweep_of(loop, 0.005)
    assert sweep_of(loop, 0.005) is not sweep_of(loop, 0.006)
    assert in_flight_of(loop) is in_flight_of(loop)


async def test_it_runs_in_the_loop_and_leaves_nothing() -> None:
    grown = anyio.Event()
    async with nothing_left():
        Request(in_flight_of(current_loop()), grown.set)
        await grown.wait()


async def test_its_timer_may_outlive_the_last_request_and_is_not_counted() -> None:
    configure(listen_after=10)
    try:
        async with nothing_left():
            request = Request(InFlight(current_loop()))
            await anyio.lowlevel.checkpoint()
            request.leave()
    finally:
        configure(listen_after=INTERVAL)


def test_another_interval_holds_for_the_next_request() -> None:
    timers, in_flight = by_hand()
    configure(listen_after=10)
    try:
        Request(in_flight)
    finally:
        configure(listen_after=INTERVAL)
    request = Request(in_flight)
    assert [when for when, _ in timers.calls] == [10, INTERVAL]
    (timers.now, look) = timers.calls[1]
    look()
    assert request.times == 1
