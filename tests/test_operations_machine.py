"""Three workers on one hub that are paused, cut off and killed, in any order: what is promised all the same."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cancelable_deps.operations import ANYONE, Operations, OperationsUnavailable, OperationTaken
from cancelable_deps.testing import OperationsHub, advance
from tests.operations import Steps, nothing_is_kept, until

STEP = st.tuples(
    st.sampled_from(
        [
            "start",
            "start",
            "finish",
            "cancel",
            "cancel",
            "cancel early",
            "come",
            "cancel key",
            "supersede",
            "pause",
            "cut",
            "resume",
            "kill",
            "lose",
            "lose all",
            "advance",
        ]
    ),
    st.integers(0, 2),
    st.integers(0, 5),
)
STEPS = st.lists(STEP, max_size=25)
LONGER_STEPS = st.lists(STEP, min_size=10, max_size=60)
LONG_RUN = int(os.environ.get("MACHINE_EXAMPLES", "100"))


class Machine:
    def __init__(self, hub: OperationsHub, opened: list[Operations]) -> None:
        self.hub = hub
        self.opened = opened
        self.killed: set[int] = set()
        self.started: list[tuple[int, str, Steps]] = []
        self.acknowledged: dict[str, str] = {}
        self.finished_first: set[str] = set()
        self.final: dict[str, str] = {}
        self.early: set[str] = set()
        self.has_lost = False

    async def step(self, what: str, worker: int, number: int) -> None:
        operations = self.opened[worker]
        match what:
            case "start" if worker not in self.killed:
                steps = Steps()
                key = f"k{number % 2}" if number % 3 else None
                try:
                    operation = await operations.start(steps, key=key, when_busy="wait" if key else "run")
                except OperationsUnavailable:
                    return
                self.started.append((worker, operation.id, steps))
            case "finish" if self.started:
                _, id, steps = self.started[number % len(self.started)]
                if id not in self.acknowledged:
                    self.finished_first.add(id)
                steps.go_on.set()
            case "cancel" if self.started and worker not in self.killed:
                _, id, _ = self.started[number % len(self.started)]
                try:
                    answer = await operations.cancel(id, wait=0)
                except OperationsUnavailable:
                    return
                if answer.outcome in ("sent", "stopping", "cancelled"):
                    self.acknowledged.setdefault(id, answer.outcome)
            case "cancel early" if worker not in self.killed:
                id = f"chosen-{number}"
                with suppress(OperationsUnavailable):
                    if (await operations.cancel(id, wait=0)).outcome not in ("lost", "finished"):
                        self.early.add(id)
            case "come" if worker not in self.killed:
                await self.come(operations, worker, f"chosen-{number}")
            case "cancel key" if worker not in self.killed:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(cancel_key, operations, f"k{number % 2}")
                    await advance(3)
            case "supersede" if worker not in self.killed:
                await self.supersede(operations, worker, f"latest-{number % 2}")
            case "pause":
                self.hub.pause(operations)
            case "cut":
                self.hub.cut(operations)
            case "resume":
                self.hub.resume(operations)
            case "kill" if len(self.killed) < 2:
                self.killed.add(worker)
                self.hub.kill(operations)
            case "lose":
                self.has_lost = True
                self.hub.lose_last(number)
            case "lose all":
                self.has_lost = True
                self.hub.lose_everything()
            case "advance":
                await advance([0.1, 1, 5, 10, 20, 40][number])
        await self.look()

    async def come(self, operations: Operations, worker: int, id: str) -> None:
        """Start work with an id that a client has chosen, and that it may have cancelled."""
        if self.has_lost and any(id == each for _, each, _ in self.started):
            return  # The store may not know yet that it runs elsewhere.
        steps = Steps()
        with suppress(OperationsUnavailable, OperationTaken):
            operation = await operations.start(steps, id=id)
            if operation.worker == operations.worker.exchange.identity.name and all(
                id != each for _, each, _ in self.started
            ):
                self.started.append((worker, id, steps))

    async def supersede(self, operations: Operations, worker: int, key: str) -> None:
        """Start work that stops what runs under its key."""
        steps = Steps()
        with suppress(OperationsUnavailable):
            operation = await operations.start(steps, key=key, when_busy="cancel_previous")
            self.started.append((worker, operation.id, steps))

    async def look(self) -> None:
        """Fail if something has ended twice."""
        for id, state in [(id, await self.state_of(id)) for _, id, _ in self.started]:
            if state is not None:
                known = self.final.setdefault(id, state)
                # The record of a worker that was taken for dead says "lost", whatever it has done.
                assert known == state or "lost" in (known, state)

    async def state_of(self, id: str) -> str | None:
        known: Any = None
        for _, operations in self.living():
            found = operations.worker.local.find_ended(id, ANYONE)
            if found is not None:
                known = found.state
        return None if known is None else str(known)

    def living(self) -> list[tuple[int, Operations]]:
        return [(number, each) for number, each in enumerate(self.opened) if number not in self.killed]

    async def settle(self) -> None:
        """Let everything come back, and look whether all that was promised has happened."""
        for _, operations in self.living():
            self.hub.resume(operations)
        await advance(60)
        keys = self.opened[0].backend.hub.keys  # type: ignore[attr-defined]
        # What is lost can be written again only by those who have seen it.
        is_kept = not (self.has_lost and self.killed)
        for worker, id, steps in self.started:
            if worker in self.killed:
                continue
            running = self.opened[worker].worker.local.find(id, ANYONE)
            if is_kept and id in self.acknowledged:
                assert not running, f"a cancel that was {self.acknowledged[id]} had no effect"
            if is_kept and id in self.early:
                assert not running, "a cancel that came before its operation had no effect"
            steps.go_on.set()
        await advance(60)
        assert len(keys) == 0, "a key is held by nobody"
        nothing_is_kept(*(each for _, each in self.living()))


async def cancel_key(operations: Operations, key: str) -> None:
    with suppress(OperationsUnavailable):
        await operations.cancel_all(key=key)


async def play(steps: list[tuple[str, int, int]]) -> None:
    hub = OperationsHub()
    opened = [hub.operations(background_grace=0, memory=300) for _ in range(3)]
    async with opened[0], opened[1], opened[2]:
        await until(lambda: all(len(each.worker.exchange.alive) == 3 for each in opened))
        machine = Machine(hub, opened)
        for step in steps:
            await machine.step(*step)
        await machine.settle()


ALL_HEALTH_CHECKS: list[Any] = list(HealthCheck)


in_short = settings(
    deadline=None, max_examples=40, suppress_health_check=ALL_HEALTH_CHECKS, derandomize=True, database=None
)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@given(steps=STEPS)
@in_short
def test_in_any_order(backend: str, steps: list[tuple[str, int, int]]) -> None:
    run(backend, steps)


@pytest.mark.real
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@given(steps=LONGER_STEPS)
@settings(in_short, max_examples=LONG_RUN)
def test_in_any_order_for_long(backend: str, steps: list[tuple[str, int, int]]) -> None:
    run(backend, steps)


def run(backend: str, steps: list[tuple[str, int, int]]) -> None:
    options: dict[str, Any] = {}
    if backend == "trio":
        import trio.testing

        options = {"clock": trio.testing.MockClock()}
    anyio.run(play, steps, backend=backend, backend_options=options)
