from __future__ import annotations

from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.kernel.sweep import Sweep, Sweepable, sweep_of

from .leftovers import nothing_left

pytestmark = pytest.mark.anyio


class Timers:
    """A loop whose clock is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[float, Callable[[], object]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object]) -> Timers:
        self.calls.append((when, callback))
        return self

    def advance(self) -> None:
        ((self.now, callback),) = self.calls
        self.calls = []
        callback()


class Item:
    def __init__(self, armed: Callable[[], object] = lambda: None) -> None:
        self.pen: dict[Sweepable, None] | None = None
        self.armed_times = 0
        self._armed = armed

    def arm(self) -> None:
        self.armed_times += 1
        self._armed()


def sweep_by_hand() -> tuple[Timers, Sweep]:
    timers = Timers()
    return timers, Sweep(timers, 2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_an_item_is_armed_once_after_one_to_two_intervals() -> None:
    timers, sweep = sweep_by_hand()
    early, late = Item(), Item()
    sweep.add(early)
    timers.now = 1.0
    sweep.add(late)
    timers.advance()
    assert (timers.now, early.armed_times, late.armed_times) == (2.0, 0, 0)
    timers.advance()
    assert (timers.now, early.armed_times, late.armed_times) == (4.0, 1, 1)


def test_the_timer_stops_when_nobody_waits_and_starts_again() -> None:
    timers, sweep = sweep_by_hand()
    sweep.add(Item())
    timers.advance()
    timers.advance()
    assert timers.calls == []
    item = Item()
    sweep.add(item)
    timers.advance()
    timers.advance()
    assert item.armed_times == 1
    assert timers.calls == []


def test_many_items_share_one_timer() -> None:
    timers, sweep = sweep_by_hand()
    items = [Item() for _ in range(100)]
    for item in items:
        sweep.add(item)
    assert len(timers.calls) == 1
    timers.advance()
    timers.advance()
    assert {item.armed_times for item in items} == {1}


@pytest.mark.parametrize("ticks", [0, 1])
def test_who_takes_itself_out_is_not_armed(ticks: int) -> None:
    timers, sweep = sweep_by_hand()
    item, other = Item(), Item()
    sweep.add(item)
    sweep.add(other)
    for _ in range(ticks):
        timers.advance()
    assert item.pen is not None
    item.pen.pop(item)
    while timers.calls:
        timers.advance()
    assert (item.armed_times, other.armed_times) == (0, 1)


def test_an_armed_item_is_in_no_pen() -> None:
    timers, sweep = sweep_by_hand()
    seen: list[object] = []
    item = Item(lambda: seen.append(item.pen))
    sweep.add(item)
    timers.advance()
    timers.advance()
    assert seen == [None]


def test_an_item_may_be_added_while_others_are_armed() -> None:
    timers, sweep = sweep_by_hand()
    added = Item()
    sweep.add(Item(lambda: sweep.add(added)))
    timers.advance()
    timers.advance()
    assert len(timers.calls) == 1
    timers.advance()
    timers.advance()
    assert added.armed_times == 1


def test_an_item_may_take_out_another_that_is_due() -> None:
    timers, sweep = sweep_by_hand()
    items: list[Item] = []

    def take_out_the_other() -> None:
        for item in items:
            if item.pen is not None:
                item.pen.pop(item)

    items.extend([Item(take_out_the_other), Item(take_out_the_other)])
    for item in items:
        sweep.add(item)
    timers.advance()
    timers.advance()
    assert sorted(item.armed_times for item in items) == [0, 1]


async def test_a_loop_has_one_sweep_for_each_interval() -> None:
    loop = current_loop()
    assert sweep_of(loop, 0.005) is sweep_of(loop, 0.005)
    assert sweep_of(loop, 0.005) is not sweep_of(loop, 0.006)


async def test_it_runs_in_the_loop_and_leaves_nothing() -> None:
    loop = current_loop()
    armed = anyio.Event()
    async with nothing_left():
        sweep_of(loop, 0.001).add(Item(armed.set))
        await armed.wait()


async def test_its_timer_may_outlive_the_last_item_and_is_not_counted() -> None:
    loop = current_loop()
    item = Item()
    async with nothing_left():
        sweep_of(loop, 10).add(item)
        await anyio.lowlevel.checkpoint()
        assert item.pen is not None
        item.pen.pop(item)
