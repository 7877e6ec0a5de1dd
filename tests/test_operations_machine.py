"""Three workers on one hub that are paused, cut off and killed, in any order: what is promised all the same."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cancelable_deps.operations import ANYONE, Operations, OperationsUnavailable
from cancelable_deps.testing import OperationsHub, advance
from tests.operations import Steps, nothing_is_kept, until

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "start",
                "start",
                "finish",
                "cancel",
                "cancel",
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
    ),
    max_size=25,
)


class Machine:
    def __init__(self, hub: OperationsHub, opened: list[Operations]) -> None:
        self.hub = hub
        self.opened = opened
        self.killed: set[int] = set()
        self.started: list[tuple[int, str, Steps]] = []
        self.acknowledged: dict[str, str] = {}
        self.finished_first: set[str] = set()
        self.final: dict[str, str] = {}
        self.generation = 0

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
                self.hub.lose_last(number)
            case "lose all":
                self.hub.lose_everything()
            case "advance":
                await advance([0.1, 1, 5, 10, 20, 40][number])
        await self.look()

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
        for worker, id, steps in self.started:
            if worker in self.killed:
                continue
            running = self.opened[worker].worker.local.find(id, ANYONE)
            if id in self.acknowledged:
                assert not running, f"a cancel that was {self.acknowledged[id]} had no effect"
            steps.go_on.set()
        await advance(60)
        assert len(keys) == 0, "a key is held by nobody"
        nothing_is_kept(*(each for _, each in self.living()))


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


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@given(steps=STEPS)
@settings(deadline=None, max_examples=40, suppress_health_check=ALL_HEALTH_CHECKS, derandomize=True, database=None)
def test_in_any_order(backend: str, steps: list[tuple[str, int, int]]) -> None:
    options: dict[str, Any] = {}
    if backend == "trio":
        import trio.testing

        options = {"clock": trio.testing.MockClock()}
    anyio.run(play, steps, backend=backend, backend_options=options)
