"""Stopping operations, wherever they run."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel

from ..kernel.reasons import CancelationReason
from ..kernel.token import Cause, telling_everybody
from .backend import Unavailable
from .conditions import Conditions
from .exchange import Answers
from .listing import MOST, as_running, everything_that, runs
from .model import Cancelation, Operation, OperationState
from .names import ANYONE, owner_as_data, owner_of_data, worker_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .background import Background
    from .entries import Entry
    from .exchange import Exchange
    from .local import Local
    from .model import Outcome
    from .names import Owner
    from .running import Running

_OUTCOMES: Final[dict[OperationState, Outcome]] = {
    OperationState.FINISHED: "finished",
    OperationState.FAILED: "finished",
    OperationState.CANCELLED: "cancelled",
    OperationState.LOST: "lost",
}
_PART: Final = 10
"""So many are stopped before the event loop does something else."""


def outcome_of(state: OperationState) -> Outcome:
    """Return the outcome of a cancel of an operation in this state."""
    return _OUTCOMES.get(state, "stopping")


class Cancels:
    """The cancels that this worker asks for, and those that it is asked for."""

    def __init__(self, local: Local, exchange: Exchange, background: Background) -> None:
        self._local = local
        self._exchange = exchange
        self._background = background

    async def cancel(self, id: str, owner: Owner, message: str | None, wait: float, grace: float | None) -> Cancelation:
        """Stop an operation; see `Operations.cancel`."""
        running = self._local.find(id, owner)
        cause = Cause(CancelationReason.MANUAL, message)
        self._remember(id, owner, cause)
        if running:
            stop_all(running, cause, grace)
            return await until_ended(running, wait)
        ended = self._local.find_ended(id, owner)
        if ended is not None:
            return Cancelation(outcome=outcome_of(ended.state), operation=ended.view())
        data = {
            "target": id,
            "owner": owner_as_data(owner),
            "message": message,
            "wait": wait,
            "grace": grace,
        }
        marked = await self._background.archive.mark_cancelled(id, owner, message)
        if marked is not None:
            return await self._cancel_recorded(marked, data)
        worker = worker_of(id)
        if worker is None:
            return _sum_of(await self._exchange.ask("cancel", data, to=None, timeout=wait))
        if worker == self._exchange.identity.name:
            return Cancelation(outcome="unknown")
        if worker not in self._exchange.alive:
            return _lost(owner)
        return await self._ask(data, worker, owner)

    def _remember(self, id: str, owner: Owner, cause: Cause) -> None:
        """Stop whatever gets an id of a client's choice later: it names one operation only."""
        if worker_of(id) is None:
            self._local.early.add(owner, id, cause)

    async def _cancel_recorded(self, operation: Operation, data: dict[str, Any]) -> Cancelation:
        """Stop background work of another worker, whose record says by now that it is to stop."""
        if operation.state.is_final:
            return Cancelation(outcome=outcome_of(operation.state), operation=operation)
        answered = await self._ask(data, operation.worker, ANYONE)
        if answered.outcome in ("unknown", "lost", "sent"):
            # Its worker is gone, or has just ended it, or its answer was lost. The record knows.
            try:
                now = await self._background.archive.recorded(operation.id, ANYONE)
            except Unavailable:
                if answered.outcome != "sent":
                    raise
                now = None
            if now is not None:
                outcome = outcome_of(now.state) if now.state.is_final else "sent"
                return Cancelation(outcome=outcome, operation=now)
        return answered if answered.operation is not None else answered.model_copy(update={"operation": operation})

    async def _ask(self, data: dict[str, Any], worker: str, owner: Owner) -> Cancelation:
        answers = await self._exchange.ask("cancel", data, to=[worker], timeout=data["wait"])
        is_dead = worker in answers.dead or worker not in self._exchange.alive
        # The goodbye of a worker counts as a "no", which is true of a worker that lives.
        is_found = any(not answer.get("no") for answer in answers.of.values())
        return _lost(owner) if is_dead and not is_found else _sum_of(answers)

    def asked(self, entry: Entry) -> Any:
        """Stop an operation for another worker, and answer it."""
        data = entry.data
        id = str(data["target"])
        owner = owner_of_data(data)
        cause = Cause(CancelationReason.MANUAL, data.get("message"))
        running = self._local.find(id, owner)
        self._remember(id, owner, cause)
        if running:
            stop_all(running, cause, data.get("grace"))
            self._exchange.answer(
                entry, {"more": True, **_as_data(Cancelation(outcome="stopping", operation=running[-1].view()))}
            )
            return self._answer_at_end(running, float(data.get("wait") or 0))
        ended = self._local.find_ended(id, owner)
        if ended is not None:
            return _as_data(Cancelation(outcome=outcome_of(ended.state), operation=ended.view()))
        return {"no": True}

    async def _answer_at_end(self, running: list[Running], wait: float) -> dict[str, Any]:
        return _as_data(await until_ended(running, wait))

    async def cancel_all(self, conditions: Conditions, message: str | None, timeout: float) -> list[Cancelation]:
        """Stop all that fulfil the conditions; see `Operations.cancel_all`."""
        data = {"conditions": conditions.as_data(), "message": message}
        results: list[Cancelation] = []
        answers = Answers({}, [], [])
        failure: Unavailable | None = None
        async with anyio.create_task_group() as tasks:
            # Beside each other: neither is to wait for the other.
            tasks.start_soon(self._stop_here, conditions, message, results)
            try:
                answers = await self._exchange.ask("cancel_all", data, to=None, timeout=timeout)
            except Unavailable as exc:
                # Not in the group, which would cancel the other.
                failure = exc
        if failure is not None:
            raise failure
        for answer in answers.of.values():
            results += [Cancelation.model_validate(each) for each in answer.get("stopped", ())]
        return results

    async def _stop_here(self, conditions: Conditions, message: str | None, results: list[Cancelation]) -> None:
        # The caller may be among those that are stopped, and all the others are to be stopped as well.
        with anyio.CancelScope(shield=True):
            await self._stop_those(conditions, message, results)

    async def _stop_those(self, conditions: Conditions, message: str | None, results: list[Cancelation]) -> None:
        cause = Cause(CancelationReason.MANUAL, message)
        stopped: deque[Running] = deque()
        async for part in everything_that(self._local, conditions):
            part.reverse()
            while part:
                running = [as_running(self._local, each) for each in reversed(part[-_PART:]) if runs(each)]
                del part[-_PART:]
                stop_all(running, cause, None)
                stopped += running
                await anyio.lowlevel.checkpoint()
        while stopped:
            each = stopped.popleft()
            results.append(Cancelation.model_construct(outcome=outcome_of(each.state), operation=each.view()))
            if len(results) % _PART == 0:
                await anyio.lowlevel.checkpoint()

    async def all_asked(self, entry: Entry) -> dict[str, Any] | None:
        """Stop all that fulfil the conditions of another worker's call, and have started before it."""
        try:
            conditions = Conditions.of_data(entry.data["conditions"])
        except (ValueError, TypeError):
            return None
        results: list[Cancelation] = []
        await self._stop_here(conditions._replace(before=entry.at), entry.data.get("message"), results)
        return {"stopped": [_as_data(each) for each in results[:MOST]], "total": len(results)}


def stop_all(running: Iterable[Running], cause: Cause, grace: float | None) -> None:
    """Stop operations for one cause."""
    with telling_everybody():
        for each in running:
            each.stop(cause, grace)


async def until_ended(running: list[Running], wait: float) -> Cancelation:
    """Wait for the end of operations, ``wait`` seconds at most, and return what has become of the last one."""
    ended = anyio.Event()

    def look(each: Running, kind: str) -> None:
        if all(other.has_ended for other in running):
            ended.set()

    for each in running:
        each.listeners.append(look)
    try:
        with anyio.move_on_after(wait):
            if not all(each.has_ended for each in running):
                await ended.wait()
    finally:
        for each in running:
            each.listeners.remove(look)
    last = max(running, key=lambda each: (not each.has_ended, each.ended_at or 0.0))
    return Cancelation(outcome=outcome_of(last.state), operation=last.view())


def _lost(owner: Owner) -> Cancelation:
    """Return the outcome for the id of a dead worker; without a record nobody can say whose it was."""
    return Cancelation(outcome="lost" if owner is ANYONE else "unknown")


def _as_data(cancelation: Cancelation) -> dict[str, Any]:
    return cancelation.model_dump(mode="json")


def _sum_of(answers: Answers) -> Cancelation:
    """Return what has become of the operations that the workers have found."""
    found = [Cancelation.model_validate(answer) for answer in answers.of.values() if not answer.get("no")]
    if not found:
        return Cancelation(outcome="sent" if answers.silent else "unknown")
    unended = [each for each in found if each.outcome == "stopping"]
    return unended[-1] if unended else found[-1]
