"""Following one operation, wherever it runs."""

from __future__ import annotations

import math
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import anyio

from .backend import Unavailable
from .entries import new_entry_id
from .errors import OperationUnknown
from .model import Operation, OperationEvent, OperationState
from .names import ANYONE, owner_as_data, owner_of_data, worker_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from .background import Background
    from .entries import Entry
    from .exchange import Exchange
    from .local import Local
    from .names import Owner
    from .running import Running

_RENEWED_AFTER: Final = 5.0
"""Seconds after which a worker that follows an operation of another one says so again."""

_LEASE: Final = 3 * _RENEWED_AFTER
_ASK_SECONDS: Final = 1.0
_MOST_FOLLOWED: Final = 10_000


class _Changes:
    """The changes of an operation that have not been looked at yet. Of several, the last one counts."""

    def __init__(self) -> None:
        self.state: Operation | None = None
        self.progress: Operation | None = None
        self.end: Operation | None = None
        self.is_gone = False
        """Whether its worker has just said that it does not know it any more."""

        self.is_known_as_gone = False

        self.has_some = anyio.Event()

    def note(self, kind: str, operation: Operation) -> None:
        if kind == "end":
            self.end = operation
        elif kind == "progress":
            self.progress = operation
        else:
            self.state = operation
        self.has_some.set()

    def take(self) -> list[OperationEvent]:
        self.has_some = anyio.Event()
        found: list[tuple[Any, Operation | None]] = [
            ("state", self.state),
            ("progress", self.progress),
            ("end", self.end),
        ]
        self.state = self.progress = None
        return [OperationEvent(kind=kind, operation=operation) for kind, operation in found if operation is not None]


class Watching:
    """The operations of other workers that this one follows, and those of its own that others follow."""

    def __init__(self, local: Local, exchange: Exchange, background: Background) -> None:
        self._local = local
        self._exchange = exchange
        self._background = background
        self._followed: dict[str, _Changes] = {}
        self._followers: dict[str, float] = {}

    async def get(self, id: str, owner: Owner) -> Operation | None:
        """Return an operation as it is now; see `Operations.get`."""
        for running in reversed(self._local.find(id, owner)):
            return running.view()
        ended = self._local.find_ended(id, owner)
        if ended is not None:
            return ended.view()
        known = await self._background.archive.recorded(id, owner)
        if known is not None or not self._exchange.others:
            return known
        worker = worker_of(id)
        if worker is not None and worker not in self._exchange.others:
            return None
        data = {"target": id, "owner": owner_as_data(owner)}
        answers = await self._exchange.ask("get", data, to=None if worker is None else [worker], timeout=_ASK_SECONDS)
        found = [Operation.model_validate(each["operation"]) for each in answers.of.values() if "operation" in each]
        return max(found, key=lambda operation: operation.started, default=None)

    def get_asked(self, entry: Entry) -> dict[str, Any]:
        """Answer another worker that looks for an operation."""
        running = self._found(entry)
        return {"no": True} if running is None else {"operation": running.view().model_dump(mode="json")}

    def _found(self, entry: Entry) -> Running | None:
        id = str(entry.data["target"])
        owner = owner_of_data(entry.data)
        running = self._local.find(id, owner)
        return running[-1] if running else self._local.find_ended(id, owner)

    async def events(self, id: str, owner: Owner) -> AsyncGenerator[OperationEvent]:
        """Yield the state of an operation, its changes and its end; see `Operations.events`."""
        running = self._local.find(id, owner)
        if running:
            async with aclosing(self._events_here(running[-1])) as events:
                async for event in events:
                    yield event
            return
        known = await self.get(id, owner)
        if known is None:
            raise OperationUnknown
        if known.state.is_final:
            yield OperationEvent(kind="end", operation=known)
            return
        async with aclosing(self._events_elsewhere(known)) as events:
            async for event in events:
                yield event

    async def _events_here(self, running: Running) -> AsyncGenerator[OperationEvent]:
        changes = _Changes()

        def note(each: Running, kind: str) -> None:
            changes.note(kind, each.view())

        running.listeners.append(note)
        try:
            note(running, "end" if running.has_ended else "state")
            if running.progress_so_far is not None and not running.has_ended:
                # Work may have reported before anybody could listen.
                note(running, "progress")
            async with aclosing(_until_end(changes)) as events:
                async for event in events:
                    yield event
        finally:
            running.listeners.remove(note)

    async def _events_elsewhere(self, known: Operation) -> AsyncGenerator[OperationEvent]:
        follower = new_entry_id()
        changes = self._followed[follower] = _Changes()
        changes.note("state", known)
        if known.progress is not None:
            changes.note("progress", known)
        try:
            async with aclosing(_until_end(changes, lambda: self._follow(follower, known))) as events:
                async for event in events:
                    yield event
        finally:
            del self._followed[follower]

    async def _follow(self, follower: str, known: Operation) -> None:
        """Say that an operation is followed still. If it is gone, note its end."""
        data = {"target": known.id, "follower": follower}
        try:
            is_there = known.worker in self._exchange.alive and not self._followed[follower].is_known_as_gone
            if is_there and await self._exchange.send(known.worker, "follow", data):
                return
            now = await self._background.archive.recorded(known.id, ANYONE)
        except Unavailable:
            return
        if now is None:
            now = known.model_copy(update={"state": OperationState.LOST})
        if now.state.is_final:
            self._followed[follower].note("end", now)

    def follow_asked(self, entry: Entry) -> None:
        """Tell another worker of the changes of an operation, for some seconds."""
        running, follower = self._found(entry), str(entry.data["follower"])
        now = self._local.loop.time()
        if running is None:
            # It has ended so long ago that only its record knows, which the other worker reads.
            self._exchange.tell(entry.sender, "event", {"follower": follower})
            return
        is_new = self._followers.get(follower, 0.0) < now
        if len(self._followers) < _MOST_FOLLOWED or not is_new:
            self._followers[follower] = now + _LEASE
        if not is_new:
            return

        def tell(each: Running, kind: str) -> None:
            if self._followers.get(follower, 0.0) < self._local.loop.time() or kind == "end":
                self._followers.pop(follower, None)
                if tell in each.listeners:
                    each.listeners.remove(tell)
                if kind != "end":
                    return
            event = {"follower": follower, "kind": kind, "operation": each.view().model_dump(mode="json")}
            self._exchange.tell(entry.sender, "event", event)

        if running.has_ended:
            tell(running, "end")
        else:
            running.listeners.append(tell)
            tell(running, "state")

    def event_told(self, entry: Entry) -> None:
        """Note a change of an operation that this worker follows."""
        changes = self._followed.get(str(entry.data["follower"]))
        if changes is None:
            return
        if "operation" in entry.data:
            changes.note(str(entry.data["kind"]), Operation.model_validate(entry.data["operation"]))
        else:
            changes.is_gone = changes.is_known_as_gone = True
            changes.has_some.set()


async def _until_end(
    changes: _Changes, renew: Callable[[], Awaitable[None]] | None = None
) -> AsyncGenerator[OperationEvent]:
    """Yield changes until the end.

    :param renew: called at the start, at intervals and when the worker says that the operation is gone.
    """
    if renew is not None:
        await renew()
    while True:
        with anyio.move_on_after(math.inf if renew is None else _RENEWED_AFTER) as waiting:
            await changes.has_some.wait()
        is_due = waiting.cancelled_caught or (changes.is_gone and changes.end is None)
        if renew is not None and is_due:
            changes.is_gone = False
            await renew()
        for event in changes.take():
            yield event
            if event.kind == "end":
                return
