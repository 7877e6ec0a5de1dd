"""What runs in this worker: requests that are known to the event loop, and work without a request."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from ..kernel.detached import all_detached
from ..kernel.errors import CancelationError
from ..kernel.reasons import CancelationReason
from ..kernel.token import Cause
from ..request.in_flight import in_flight_of
from ..request.naming import OPERATION_ID_KEY
from ..request.state import SCOPE_KEY
from .clock import clock_of
from .model import OperationState
from .names import ANYONE, MOST_NAME, new_id
from .remembered import EarlyCancels, EndedOperations
from .report import tell_end
from .running import RefusedRequest, Running, RunningBlock, RunningRequest, making

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from starlette.types import Scope

    from ..kernel.detached import Detached
    from ..kernel.loops.base import EventLoop
    from ..request.state import RequestState
    from .names import Owner

STATE_KEY: Final = "cancelable_deps.operations"
"""The key in the lifespan's state of the `Operations` of an application."""

_OPEN: Final = "cancelable_deps.operations"
"""The key in the loop's extras of the list of its `Local` objects."""


class Local:
    """The operations of this worker.

    Requests are those of the event loop that are old enough to be listened to. An object is made for one when somebody
    asks for its id, or its client has chosen one.

    :ivar ends: how many operations have ended, by the reason that has stopped them or their final state.
    """

    def __init__(self, operations: object, worker: str, loop: EventLoop, memory: float) -> None:
        self.worker = worker
        self.loop = loop
        self.clock = clock_of(loop)
        self.early = EarlyCancels(memory, loop)
        self.ended = EndedOperations(memory, loop)
        self.ends: Counter[str] = Counter()
        self.observers: list[Callable[[Running, str], object]] = []
        self._operations = operations
        self._by_id: dict[str, list[Running]] = {}
        self._young: dict[RunningRequest, None] = {}
        self._arrived: dict[str, list[Scope]] = {}
        self._blocks: dict[RunningBlock, None] = {}
        self._in_flight = in_flight_of(loop)
        self._all_detached = all_detached(loop)
        self._detached: dict[Detached[Any], RunningBlock] = {}

    def open(self) -> None:
        """Begin to observe the requests of the loop."""
        self._in_flight.observe(self)
        self._all_detached.observe(self)
        self.loop.extras.setdefault(_OPEN, []).append(self)

    def close(self) -> None:
        """Observe nothing any more."""
        self._in_flight.unobserve(self)
        self._all_detached.unobserve(self)
        self.loop.extras[_OPEN].remove(self)

    def has(self, scope: Scope) -> bool:
        """Return whether a request belongs to an application of these operations."""
        marked = (scope.get("state") or {}).get(STATE_KEY)
        if marked is None:
            # A server, or an application around this one, that does not pass the state of the lifespan on.
            return len(self.loop.extras[_OPEN]) == 1
        return marked is self._operations

    @property
    def operations(self) -> object:
        """The `Operations` that this is the worker of."""
        return self._operations

    def request_is_old(self, request: RequestState) -> None:
        """Find out whether a request is named, and cancelled by its name."""
        running: RunningRequest | None = request.operation
        if running is not None and running.has_ended:
            # Only its blocks are known, and another one has followed.
            request.operation = running = None
        if running is not None:
            self._young.pop(running, None)
        if OPERATION_ID_KEY in request.scope and self.has(request.scope):
            self.of_request(request)
            # From here on it is known otherwise.
            self.depart(request.scope[OPERATION_ID_KEY], request.scope)

    def request_ended(self, request: RequestState) -> None:
        """Note the end of a request."""
        running: RunningRequest | None = request.operation
        if running is None:
            if self.has(request.scope):
                self.ends[str(_end_of(request, None))] += 1
        elif running.home is self:
            end = _end_of(request, running)
            state = OperationState.FINISHED if end == OperationState.FINISHED else OperationState.CANCELLED
            self._end(running, state, end)

    def work_began(self, work: Detached[Any]) -> None:
        """Note work that a request of these operations has detached; work of no request belongs to the first."""
        request: RequestState | None = work.origin
        is_own = open_in(self.loop)[0] is self if request is None else self.has(request.scope)
        if not is_own:
            return
        running = self._detached[work] = RunningBlock(self, work.cancelable, "detached")
        running.name = work.name[:MOST_NAME]
        of_request: Running | None = None if request is None else request.operation
        running.owner = None if of_request is None else of_request.owner
        self.add(running, None)
        running.begin()

    def work_ended(self, work: Detached[Any]) -> None:
        """Note the end of detached work."""
        running = self._detached.pop(work, None)
        if running is None:
            return
        if work.error is None:
            state = OperationState.FINISHED
        else:
            stopped = isinstance(work.error, CancelationError) and work.error.reason is work.cancelable.reason
            state = OperationState.CANCELLED if stopped else OperationState.FAILED
        tell_end(running, state, work.error)
        self.remove(running, state)

    def of_request(self, request: RequestState) -> RunningRequest:
        """Return the operation of a request, which is made when it is first asked for."""
        running: RunningRequest | None = request.operation
        if running is None:
            # Two threads may come at the same time, which both log.
            with making:
                if request.operation is None:
                    self._make_operation(request)
            running = request.operation
            assert running is not None
            if OPERATION_ID_KEY in request.scope:
                self._stop_if_cancelled_early(running, ANYONE)
        return running

    def _make_operation(self, request: RequestState) -> None:
        running = RunningRequest(self, request)
        id: str | None = request.scope.get(OPERATION_ID_KEY)
        if id is not None:
            running.use_id(id)
        request.operation = running
        if not request.is_old:
            self._young[running] = None
            if request.is_old:
                # It has grown old meanwhile, if this is another thread than that of the loop.
                self._young.pop(running, None)

    def id_of(self, request: RequestState) -> str | None:
        """Return the id of a request, which is made when it is first asked for; ``None`` if the request is over.

        May be called in any thread.
        """
        running: RunningRequest | None = request.operation
        if running is None:
            if not request.is_in_flight:
                return None
            running = self.of_request(request)
        id = running.id
        if not request.is_in_flight and not running.has_ended:
            # It has ended meanwhile, in the loop, which has not known of its operation.
            self._young.pop(running, None)
            self._forget_id(running, id)
            running.end(OperationState.FINISHED)
        return id

    def add(self, running: RunningBlock, id: str | None) -> None:
        """Add work without a request."""
        self._blocks[running] = None
        if id is not None:
            running.use_id(id)
            self._stop_if_cancelled_early(running, ANYONE)
            if running.owner is not None:
                self._stop_if_cancelled_early(running, running.owner)

    def remove(self, running: RunningBlock, state: OperationState) -> None:
        """Note the end of work without a request."""
        self._blocks.pop(running, None)
        cause = running.cause
        stopped = state is OperationState.CANCELLED and cause is not None
        self._end(running, state, str(cause.reason) if cause is not None and stopped else str(state))

    def discard(self, running: RunningBlock) -> None:
        """Forget work that is not started after all."""
        self._blocks.pop(running, None)
        if running.known_id is not None:
            self._forget_id(running, running.known_id)

    def _end(self, running: Running, state: OperationState, end: str) -> None:
        if isinstance(running, RunningRequest):
            self._young.pop(running, None)
        self.ends[str(end)] += 1
        running.end(state)
        id = running.known_id
        if id is not None:
            self._forget_id(running, id)
            self.ended.add(running, id)
        self.changed(running, "end")

    def _forget_id(self, running: Running, id: str) -> None:
        # A thread may have forgotten it already.
        same = [other for other in self._by_id.pop(id, ()) if other is not running]
        if same:
            self._by_id[id] = same

    def name(self, running: Running) -> str:
        """Return a new id for an operation, by which it is found from now on."""
        id = new_id(self.worker)
        self.name_as(running, id)
        return id

    def name_as(self, running: Running, id: str) -> None:
        """Have an operation found by an id that its client has chosen."""
        self._by_id.setdefault(id, []).append(running)

    def claimed(self, running: Running) -> None:
        """Stop an operation that its owner has cancelled before."""
        if running.owner is not None and running.known_id is not None:
            self._stop_if_cancelled_early(running, running.owner)
        self.changed(running, "state")

    def changed(self, running: Running, kind: str) -> None:
        """Tell the observers, and those that listen to this operation. May be called in any thread."""
        if not self.loop.is_running_here():
            # A plain `def` handler has changed it.
            self.loop.call_from_thread(self.changed, running, kind)
            return
        for listener in [*running.listeners, *self.observers]:
            listener(running, kind)

    def _stop_if_cancelled_early(self, running: Running, owner: Owner) -> None:
        cause = self.early.find(owner, running.id) if self.early else None
        if cause is not None:
            running.stop(cause)

    def arrive(self, id: str, scope: Scope) -> Cause | None:
        """Note a request whose client has named it; return the cause if that was cancelled before, and is not to start."""
        cause = self.early.find(ANYONE, id) if self.early else None
        if cause is None:
            self._arrived.setdefault(id, []).append(scope)
            return None
        running = RefusedRequest(self, cause)
        running.use_id(id)
        self._end(running, OperationState.CANCELLED, cause.reason)
        return cause

    def depart(self, id: str, scope: Scope) -> None:
        """Note the end of a request whose client has named it."""
        same = [other for other in self._arrived.pop(id, ()) if other is not scope]
        if same:
            self._arrived[id] = same

    def forget(self) -> None:
        """Forget what is too old, also if nothing new comes."""
        self.early.forget()
        self.ended.forget()

    def find(self, id: str, owner: Owner) -> list[Running]:
        """Return the operations of an id that run, and belong to ``owner``."""
        self._know_of(self._arrived.get(id, ()))
        return [running for running in self._by_id.get(id, ()) if running.belongs_to(owner)]

    def _know_of(self, arrived: Iterable[Scope]) -> None:
        """Make the operations of requests that are named, and too young to be known otherwise."""
        for scope in list(arrived):
            request = scope.get(SCOPE_KEY)
            if request is not None:
                self.of_request(request.state)

    def find_ended(self, id: str, owner: Owner) -> Running | None:
        """Return the last operation of an id that has ended, if it belongs to ``owner``."""
        return self.ended.find(id, owner)

    def everything(self) -> list[RequestState | RunningBlock]:
        """Return all that runs here, in the order of its start; requests without an object of their own as they are."""
        shared = len(self.loop.extras[_OPEN]) > 1
        self._know_of(scope for same in self._arrived.values() for scope in same)
        requests = list(self._in_flight.requests)
        # Young ones too, if somebody has asked for them.
        requests += [running.request for running in list(self._young) if running.request is not None]
        if shared:
            requests = [request for request in requests if self.has(request.scope)]
        if not self._blocks and not self._young:
            return requests
        # All parts are nearly in order, which makes the sorting cheap.
        return sorted([*requests, *self._blocks], key=_started)

    def blocks(self) -> Iterator[RunningBlock]:
        """Yield the work without a request."""
        yield from list(self._blocks)


def _started(running: RequestState | RunningBlock) -> float:
    return running.started


def _end_of(request: RequestState, running: RunningRequest | None) -> str:
    """Return the reason that has stopped a request that has ended; ``"finished"`` if it ended by itself."""
    cause: Cause | None = request.cause
    if cause is None:
        return OperationState.FINISHED
    if running is not None and running.was_stopped_late:
        return cause.reason
    return cause.reason if request.has_ended_by_its_cause else OperationState.FINISHED


def open_in(loop: EventLoop) -> list[Local]:
    """Return what runs in each of the `Operations` that are open in ``loop``. May be called in any thread."""
    return list(loop.extras.get(_OPEN, ()))


def only_one_in(loop: EventLoop) -> object:
    """Return the `Operations` that are open in ``loop``, if they are the only ones."""
    known = open_in(loop)
    return known[0].operations if len(known) == 1 else None


def superseded() -> Cause:
    """Return the cause of an operation whose key a newer one has taken."""
    return Cause(CancelationReason.MANUAL, "superseded by a newer request")
