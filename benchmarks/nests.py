"""Random nests of blocks, groups and scopes that are cancelled, ours against pure anyio: `python -m benchmarks.nests`.

A nest is a small program made from a seed. It is run twice on each backend, once with this package's blocks and task
groups and once with anyio's scopes and groups in their place, and cancelled in the same places. Then

* no code may have run after a scope, group or block that would not have run with anyio (a swallowed cancellation),
* the nest must end as it does with anyio, and no cancellation may leave it,
* no cleanup may have been interrupted, if a block of ours protects it.

If several cancellations come within a few passes of the loop, chance may decide which is first, so a fault in one of some
thousand nests may not be real. There is one known difference: a member of a plain group that stands in a shield or a
thread when the block is cancelled runs on after that, until the body of its group has cleaned up.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import trio
import trio.testing

from cancelable_deps import Cancelable, CancelationError
from cancelable_deps.kernel.loops.current import current_loop
from cancelable_deps.kernel.task_group import CancelableTaskGroup
from cancelable_deps.testing.clock import _clock

LEAVES = ["wait", "thread", "ask", "two threads"]
INNER = ["block", "block", "group", "our group", "scope", "timeout", "shield", "catch", "cleanup", "cleanup"]
# These times follow each other on the nest's clock; the grace is longer than all of them together.
EARLY, LATE, GRACE = 10.0, 20.0, 1000.0
# Passes of the event loop after which the nest has come to rest; the answer of a thread may take longer.
PASSES = 30
PATIENCE = 10.0


class Stopped(Exception):
    """The exception that leaves a stopped block of the pure anyio variant."""


@dataclass
class Node:
    """A part of a nest: its kind, and the parts inside it."""

    kind: str
    name: str
    deadline: float | None = None
    inside: list[Node] = field(default_factory=list)
    """The parts inside, which run one after the other; in a group the first is the body, the others are its children."""
    above: Node | None = None

    @property
    def by_block(self) -> bool:
        """Whether this is a group of ours that its block stops; a group that is stopped alone lets the work go on."""
        return int(self.name) % 2 == 1

    def __str__(self) -> str:
        deadline = "" if self.deadline is None else f"@{self.deadline:g}"
        inside = f"[{', '.join(map(str, self.inside))}]" if self.inside else ""
        return f"{self.kind.replace(' ', '-')}{self.name}{deadline}{inside}"

    def walk(self) -> Iterator[Node]:
        yield self
        for node in self.inside:
            yield from node.walk()


@dataclass
class Strike:
    """A cancellation of ``name``, or a move of the clock, after ``passes`` passes of the loop."""

    name: str
    jump: float
    passes: int

    def __str__(self) -> str:
        return f"{self.name or f'+{self.jump:g}'} after {self.passes}"


class Nest:
    """A random program, and the cancellations that strike it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._random = random.Random(seed)
        self._count = 0
        self.root = self._node("block" if self._random.random() < 0.7 else "our group", 4)
        self._link(self.root)
        self.strikes = self._choose_strikes()

    def __str__(self) -> str:
        return f"nest {self.seed}: {self.root}; {', '.join(map(str, self.strikes))}"

    def _node(self, kind: str, depth: int) -> Node:
        self._count += 1
        node = Node(kind, str(self._count))
        chance = self._random.random
        if kind in {"block", "our group", "scope", "timeout"} and chance() < 0.3:
            node.deadline = self._random.choice([EARLY, LATE])
        if kind in {"group", "our group"}:
            node.inside = [self._body(depth - 1) for _ in range(self._random.randint(1, 3))]
        elif kind not in LEAVES:
            node.inside = [self._any(depth - 1)]
            if kind == "catch" or chance() < 0.3:
                # After a cancellation has been caught, more work may follow, which may be stopped in turn.
                node.inside.append(self._node("wait", 0))
        return node

    def _body(self, depth: int) -> Node:
        return self._any(depth)

    def _any(self, depth: int) -> Node:
        leaf = depth <= 0 or self._random.random() < 0.1
        return self._node(self._random.choice(LEAVES if leaf else INNER), depth)

    def _link(self, node: Node) -> None:
        for inner in node.inside:
            inner.above = node
            self._link(inner)

    def _choose_strikes(self) -> list[Strike]:
        choose, number = self._random.choice, self._random.randint
        names = [n.name for n in self.root.walk() if n.kind in {"block", "group", "our group", "scope"}]
        strikes = []
        for index in range(number(1, 3)):
            passes = choose([0, 1, 2, 3]) if index else 0
            if self._random.random() < 0.3:
                strikes.append(Strike("", choose([EARLY, LATE]) + 1, passes))
            else:
                strikes.append(Strike(choose(names), 0, passes))
        return [*strikes, *(Strike(choose(names), 0, PASSES) for _ in range(number(0, 2)))]

    @property
    def is_simple(self) -> bool:
        """Whether only one part is cancelled, so that the run with our blocks and that with anyio must be equal."""
        has_threads = any("thread" in node.kind for node in self.root.walk())
        return len(self.strikes) == 1 and not self.strikes[0].jump and not has_threads

    @property
    def may_go_on(self) -> bool:
        """Whether a cancellation that lets the work go on comes after one of a block; anyio's cleanups never last so long."""
        nodes = {node.name: node for node in self.root.walk()}
        for strike in self.strikes[1:]:
            node = nodes.get(strike.name)
            if node is None:
                if any(other.kind in {"scope", "timeout"} and other.deadline is not None for other in nodes.values()):
                    return True
                continue
            if node.kind in {"scope", "group"} or (node.kind == "our group" and not node.by_block):
                return True
        return False

    @property
    def struck(self) -> set[str]:
        passed = sum(strike.jump for strike in self.strikes)
        late = {n.name for n in self.root.walk() if n.deadline is not None and n.deadline <= passed}
        return late | {strike.name for strike in self.strikes}

    def is_protected(self, cleanup: Node) -> bool:
        """Return whether no scope of anyio, nor a group whose member fails, may interrupt ``cleanup``."""
        struck = self.struck
        has_scope_of_ours = False
        groups = [group for group in cleanup.walk() if group.kind == "group"]
        if any(node.name in struck for group in groups for node in group.walk()):
            # A member's error has left a group of anyio's, which is not recorded.
            return False
        node = cleanup
        while node.above is not None:
            inner, node = node, node.above
            if node.kind in {"scope", "timeout"} and node.name in struck:
                return False
            if node.kind == "group":
                others = [n for other in node.inside if other is not inner for n in other.walk()]
                if node.name in struck or any(n.name in struck for n in others):
                    return False
                if not has_scope_of_ours and len(node.inside) > 1:
                    # Its members end it by their own cancellation, and only a scope inside it could be shielded.
                    return False
                if not has_scope_of_ours and inner is not node.inside[0]:
                    return False
            if node.kind in {"block", "our group"}:
                has_scope_of_ours = True
        return True


class Run:
    """One run of a nest, with our blocks or with anyio's scopes."""

    def __init__(self, nest: Nest, ours: bool) -> None:
        self.nest = nest
        self.ours = ours
        self.passed: set[str] = set()
        """The parts after which the work has gone on."""
        self.interrupted: set[str] = set()
        self.cleaned: set[str] = set()
        self.outcome = "nothing"
        self._switches: dict[str, Callable[[], object]] = {}
        self._may_clean = anyio.Event()
        self._may_end = anyio.Event()
        self._threads: dict[str, threading.Event] = {}
        self._busy: set[str] = set()
        self._started = anyio.current_time()
        self._ended = False

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._run)
            await _passes(PASSES)
            try:
                for strike in self.nest.strikes:
                    await _passes(strike.passes)
                    self._strike(strike)
                await _passes(PASSES)
                self._may_clean.set()
                await self._wait_until(lambda: not self._busy)
                self._may_end.set()
                await self._wait_until(lambda: not self._busy)
                # One after the other, because otherwise chance would decide which task is cancelled first.
                while self._threads:
                    await self._end_thread(*self._threads.popitem())
                if not await self._wait_until(lambda: self._ended):
                    self.outcome = "never ended"
            finally:
                for thread in self._threads.values():
                    thread.set()
            tasks.cancel_scope.cancel()

    async def _end_thread(self, name: str, thread: threading.Event) -> None:
        self._busy.add(name)
        thread.set()
        await self._wait_until(lambda: not self._busy)

    async def _wait_until(self, is_so: Callable[[], object]) -> bool:
        """Wait for the threads, which take real time, and until the nest has come to rest."""
        until = time.monotonic() + PATIENCE
        await _passes(PASSES)
        while not is_so():
            if time.monotonic() > until:
                return False
            await anyio.lowlevel.checkpoint()
            time.sleep(0.0001)  # noqa: ASYNC251 - for the worker threads
        await _passes(PASSES)
        return True

    def _strike(self, strike: Strike) -> None:
        if strike.jump:
            # In one step, as if the loop had been blocked.
            _clock().move(strike.jump)
        else:
            self._switches.get(strike.name, int)()

    async def _run(self) -> None:
        try:
            await self._node(self.nest.root)
            self.outcome = "finished"
        except BaseException as exc:
            kinds = {self._kind_of(leaf) for leaf in _leaves(exc)}
            self.outcome = " and ".join(sorted(kinds))
        finally:
            self._ended = True

    def _kind_of(self, exc: BaseException) -> str:
        if isinstance(exc, Stopped | CancelationError | TimeoutError):
            return "stopped"
        return f"{type(exc).__name__}({exc})" if isinstance(exc, Exception) else type(exc).__name__

    async def _node(self, node: Node) -> None:
        methods: dict[str, Callable[[Node], Awaitable[None]]] = {
            "block": self._block,
            "our group": self._our_group,
            "group": self._group,
            "scope": self._scope,
            "timeout": self._timeout,
            "shield": self._shield,
            "catch": self._catch,
            "cleanup": self._cleanup,
            "wait": self._wait,
            "thread": self._thread,
            "two threads": self._two_threads,
            "ask": self._ask,
        }
        await methods[node.kind](node)
        self.passed.add(node.name)

    async def _inside(self, node: Node) -> None:
        for inner in node.inside:
            await self._node(inner)

    def _deadline(self, node: Node) -> float:
        return math.inf if node.deadline is None else self._started + node.deadline

    def _block_of(self, node: Node) -> Any:
        block = Cancelable(timeout=node.deadline, cleanup_grace=GRACE) if self.ours else _Pure(self._deadline(node))
        self._switches[node.name] = block.cancel_nowait
        return block

    async def _block(self, node: Node) -> None:
        async with self._block_of(node):
            await self._inside(node)

    async def _our_group(self, node: Node) -> None:
        block = self._block_of(node)
        if self.ours:
            async with CancelableTaskGroup(block) as group:
                self._switches[node.name] = block.cancel_nowait if node.by_block else group.cancel_scope.cancel
                await self._members(node, group)
        else:
            async with block, anyio.create_task_group() as group:
                self._switches[node.name] = block.cancel_nowait if node.by_block else group.cancel_scope.cancel
                await self._members(node, group)

    async def _group(self, node: Node) -> None:
        async with anyio.create_task_group() as group:
            self._switches[node.name] = group.cancel_scope.cancel
            await self._members(node, group)

    async def _members(self, node: Node, group: Any) -> None:
        for child in node.inside[1:]:
            group.start_soon(self._node, child)
        await self._node(node.inside[0])

    async def _scope(self, node: Node) -> None:
        with anyio.CancelScope(deadline=self._deadline(node)) as scope:
            self._switches[node.name] = scope.cancel
            await self._inside(node)

    async def _timeout(self, node: Node) -> None:
        with anyio.fail_after(node.deadline):
            await self._inside(node)

    async def _shield(self, node: Node) -> None:
        with anyio.CancelScope(shield=True):
            await self._inside(node)

    async def _catch(self, node: Node) -> None:
        first, *others = node.inside
        try:
            await self._node(first)
        except BaseException as exc:
            if not all(isinstance(leaf, Stopped | CancelationError) for leaf in _leaves(exc)):
                raise
        for other in others:
            await self._node(other)

    async def _cleanup(self, node: Node) -> None:
        try:
            await self._inside(node)
        except BaseException as exc:
            told = (anyio.get_cancelled_exc_class(), Stopped, CancelationError)
            if all(isinstance(leaf, told) for leaf in _leaves(exc)):
                await self._clean_up(node)
            raise

    async def _clean_up(self, node: Node) -> None:
        self._busy.add(node.name)
        try:
            await anyio.lowlevel.checkpoint()
            with anyio.CancelScope() as scope:
                scope.cancel()
                await anyio.sleep_forever()
            await anyio.lowlevel.checkpoint_if_cancelled()
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.lowlevel.checkpoint)
            await self._may_clean.wait()
            with suppress(Stopped, CancelationError):
                async with self._block_of(Node("block", f"{node.name}*")):
                    self._switches[f"{node.name}*"]()
                    await anyio.sleep_forever()
            await anyio.to_thread.run_sync(int)
            self.cleaned.add(node.name)
        except anyio.get_cancelled_exc_class():
            self.interrupted.add(node.name)
            raise
        finally:
            self._busy.discard(node.name)

    async def _wait(self, node: Node) -> None:
        await self._may_end.wait()

    async def _thread(self, node: Node, may_be_left: bool = False) -> None:
        end = self._threads[node.name] = threading.Event()
        try:
            await anyio.to_thread.run_sync(end.wait, PATIENCE, abandon_on_cancel=may_be_left)
            if may_be_left:
                await anyio.to_thread.run_sync(int)
        finally:
            end.set()
            self._threads.pop(node.name, None)
            self._busy.discard(node.name)

    async def _two_threads(self, node: Node) -> None:
        await self._thread(node, may_be_left=True)

    async def _ask(self, node: Node) -> None:
        with anyio.CancelScope(shield=True):
            await self._may_clean.wait()
        await anyio.lowlevel.checkpoint_if_cancelled()
        await self._may_end.wait()


class _Pure:
    """The equivalent of a block in pure anyio: a scope, and an exception if it has stopped the work."""

    def __init__(self, deadline: float) -> None:
        self._scope = anyio.CancelScope()
        self.cancel_nowait = self._scope.cancel
        # A timer of ours, which may be a pass of the loop later than a scope's own.
        self._timer = current_loop().call_at(deadline, self._scope.cancel) if deadline < math.inf else None

    async def __aenter__(self) -> None:
        self._scope.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if self._timer is not None:
            self._timer.cancel()
        caught = bool(self._scope.__exit__(kind, exc, traceback))
        if self._scope.cancelled_caught:
            raise Stopped
        return caught


async def _passes(count: int) -> None:
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc


def faults_of(nest: Nest, ours: Run, pure: Sequence[Run]) -> list[str]:
    """Compare a run of ``nest`` with those in pure anyio, which may differ; return the faults, in words."""
    faults = []
    may_go_on = nest.may_go_on
    if not may_go_on and (swallowed := ours.passed.difference(*(run.passed for run in pure))):
        faults.append(f"the work went on behind {sorted(swallowed)}")
    if nest.is_simple and (lost := set.intersection(*(run.passed for run in pure)) - ours.passed):
        faults.append(f"the work did not go on behind {sorted(lost)}")
    outcomes = {run.outcome for run in pure}
    if ours.outcome not in ({"finished", "stopped"} & outcomes if nest.is_simple else {"finished", "stopped"}):
        faults.append(f"it has {ours.outcome}, and with anyio {outcomes}")
    elif ours.outcome == "finished" and "finished" not in outcomes and not may_go_on:
        faults.append("it has finished, and with anyio was stopped")
    cleanups = {node.name: node for node in nest.root.walk() if node.kind == "cleanup"}
    interrupted = [name for name in sorted(ours.interrupted) if nest.is_protected(cleanups[name])]
    return [*faults, *(f"the cleanup {name} was interrupted" for name in interrupted)]


class _Order:
    """A random source for trio, which chooses the order of tasks due at the same time by chance; here both orders run."""

    def __init__(self, value: float) -> None:
        self._value = value

    def random(self) -> float:
        return self._value


async def _run_once(nest: Nest, ours: bool) -> Run:
    run = Run(nest, ours)
    await run.run()
    return run


def run_nest(seed: int, backend: str) -> list[str]:
    """Run the nest of ``seed`` on ``backend``; return the faults, in words."""
    run_loop: Any = trio._core._run
    by_chance = run_loop._r, run_loop._ALLOW_DETERMINISTIC_SCHEDULING

    def run(ours: bool, order: float) -> Run:
        nest = Nest(seed)
        if backend == "asyncio":
            return anyio.run(_run_once, nest, ours)
        # If another test has asked trio for a fixed order, trio shuffles by this.
        run_loop._r, run_loop._ALLOW_DETERMINISTIC_SCHEDULING = _Order(order), False
        return anyio.run(_run_once, nest, ours, backend="trio", backend_options={"clock": trio.testing.MockClock()})

    orders = [0.0] if backend == "asyncio" else [0.0, 1.0]
    try:
        pure = [run(False, order) for order in orders]
        found = [fault for order in orders for fault in faults_of(Nest(seed), run(True, order), pure)]
        return list(dict.fromkeys(found))
    finally:
        run_loop._r, run_loop._ALLOW_DETERMINISTIC_SCHEDULING = by_chance


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nests", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=2000, help="how many nests")
    parser.add_argument("--backend", choices=["asyncio", "trio"], action="append")
    chosen = parser.parse_args(arguments)
    failed = 0
    for seed in range(chosen.first, chosen.first + chosen.count):
        for backend in chosen.backend or ["asyncio", "trio"]:
            if faults := run_nest(seed, backend):
                failed += 1
                print(f"{backend}, {Nest(seed)}\n    {'; '.join(faults)}")
    print(f"{chosen.count} nests: {failed or 'no'} faults")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
