"""`Operations`: what runs, and how it is stopped from elsewhere. The part that users see."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar, cast

import anyio

from ..doors.at_start import check_at_start
from ..doors.marks import OPERATIONS
from ..kernel.cancelable import Cancelable
from ..kernel.errors import CancelationError
from ..kernel.log import logger
from ..kernel.options import checked_work, name_of_work, seconds
from .backend import Unavailable
from .background import WHEN_BUSY, Job
from .conditions import checked
from .errors import OperationsUnavailable, OperationUnknown
from .local import STATE_KEY
from .memory import MemoryBackend
from .model import Cancelation, Operation, OperationEvent, OperationList, OperationState, Worker
from .names import (
    ANYONE,
    checked_id,
    checked_key,
    checked_labels,
    checked_message,
    checked_name,
    checked_owner,
    checked_owners,
    is_id,
)
from .records import result_of
from .report import tell_cancel, tell_end, unavailable_told
from .running import RunningBlock
from .worker import OpenWorker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager
    from datetime import timedelta
    from types import TracebackType

    from starlette.types import Scope

    from ..kernel.token import Cause
    from .backend import OperationsBackend
    from .running import Running

App = TypeVar("App")
MOST_LISTED = 1000


class _Limits(NamedTuple):
    memory: float
    lease: float
    result_ttl: float
    max_result: int
    background_grace: float


class Operations:
    """What runs in an application, by ids: to list, to stop, to start work that outlives its request.

    ``FastAPI(lifespan=operations.lifespan(...))`` opens it, or ``async with operations:`` in any other program. It is
    open in one event loop at a time.

    An operation is a request or WebSocket under any door that has run for a moment (``listen_after`` of `configure`,
    5 ms); background work of `start`; or a block of `track`. ``owner`` says who may stop it and read of it.
    The default, ``ANYONE``, is the right of an operator: pass the user's id wherever a user asks. An operation of
    another owner is as unknown as one that does not exist.

    :param backend: what the workers share; the default is a `MemoryBackend`, for one process.
    :param memory: seconds for which a cancel of an unknown id is remembered, and the end of an operation.
    :param result_ttl: seconds for which the result or the error of background work is kept.
    :param max_result: the bytes of JSON that a result may have. Work with a larger one fails.
    :param background_grace: seconds for background work when the server shuts down, from the signal on; then it is
        cancelled with reason ``SIGNAL``, and its cleanup has its own grace.
    :param on_event: called with each `OperationEvent` of this process, in the event loop. Its exceptions are logged.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if a number is negative or NaN.
    """

    def __init__(
        self,
        backend: OperationsBackend | None = None,
        *,
        memory: float | timedelta = 60,
        result_ttl: float | timedelta = 900,
        max_result: int = 1 << 20,
        background_grace: float | timedelta = 10,
        on_event: Callable[[OperationEvent], object] | None = None,
    ) -> None:
        self._backend: OperationsBackend = MemoryBackend() if backend is None else backend
        if not hasattr(self._backend, "broadcast"):
            raise TypeError(f"backend must be a MemoryBackend, a RedisBackend or the like, not {backend!r}")
        if isinstance(max_result, bool) or not isinstance(max_result, int):
            raise TypeError(f"max_result takes a number of bytes, not {max_result!r}")
        if on_event is not None and not callable(on_event):
            raise TypeError(f"on_event takes a function of an OperationEvent, not {on_event!r}")
        self._limits = _Limits(
            seconds(memory, "memory"),
            float(getattr(self._backend, "lease", 15.0)),
            seconds(result_ttl, "result_ttl"),
            max_result,
            seconds(background_grace, "background_grace"),
        )
        self._on_event = on_event
        self._worker: OpenWorker | None = None
        self._stack = AsyncExitStack()

    # Opening and closing.

    @property
    def is_open(self) -> bool:
        """Whether the operations can be used: inside of `lifespan`, or of ``async with``."""
        return self._worker is not None

    @property
    def backend(self) -> OperationsBackend:
        """What the workers share."""
        return self._backend

    async def __aenter__(self) -> Self:
        """Open the operations in the running event loop.

        :raises RuntimeError: if they are open already.
        """
        if self._worker is not None:
            raise RuntimeError(
                "these operations are open already. One lifespan opens them: that of the application, and not of one "
                "that is mounted in it. For a second application in this process make another Operations()."
            )
        worker = OpenWorker(self, self._backend, self._limits)
        await self._stack.enter_async_context(worker.open(None if self._on_event is None else self._tell))
        self._worker = worker
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the operations: background work has ``background_grace`` seconds to end, then it is cancelled."""
        try:
            await self._stack.__aexit__(exc_type, exc, traceback)
        finally:
            self._worker = None
            self._stack = AsyncExitStack()

    def lifespan(
        self, lifespan: Callable[[App], AbstractAsyncContextManager[Any]] | None = None, /, *, check: bool = True
    ) -> Callable[[App], AbstractAsyncContextManager[dict[str, Any]]]:
        """Return a lifespan that opens the operations: ``FastAPI(lifespan=operations.lifespan())``.

        :param lifespan: your own lifespan, or that of `cancelation_lifespan`, whose state is passed on. It begins after
            the operations are open, and ends before they are closed.
        :param check: whether to look for what breaks or weakens cancellation when the application starts; the same as in
            `cancelation_lifespan`.
        :raises TypeError: if ``lifespan`` is not a lifespan.
        """
        if lifespan is not None and not callable(lifespan):
            raise TypeError(
                "a lifespan is a function of the application that returns an async context manager, as "
                f"@asynccontextmanager makes it, not {lifespan!r}"
            )

        @asynccontextmanager
        async def lifespan_with_operations(app: App) -> AsyncIterator[dict[str, Any]]:
            async with self, nullcontext() if lifespan is None else lifespan(app) as state:
                if check:
                    check_at_start(app)
                yield {**(state or {}), STATE_KEY: self}

        setattr(lifespan_with_operations, OPERATIONS, self)
        return lifespan_with_operations

    @property
    def worker(self) -> OpenWorker:
        """The parts of this worker, for the rest of the package.

        :raises RuntimeError: if the operations are not open.
        """
        if self._worker is None:
            raise RuntimeError(
                "these operations are not open: pass their lifespan to the application, "
                "FastAPI(lifespan=operations.lifespan()), and check that your server or test client runs lifespans; or "
                "use `async with operations:`"
            )
        return self._worker

    def _tell(self, running: Running, kind: str) -> None:
        try:
            assert self._on_event is not None
            self._on_event(OperationEvent(kind=cast("Any", kind), operation=running.view()))
        except Exception:
            logger.exception("on_event failed")

    def request_arrived(self, id: str, scope: Scope) -> Cause | None:
        """Note a request with an id, for doors; return the cause of an operator's cancel that has come before it."""
        return self.worker.local.arrive(id, scope)

    def request_left(self, id: str, scope: Scope) -> None:
        """Note that a request with an id has ended, for doors."""
        if self._worker is not None:
            self._worker.local.depart(id, scope)

    # Work.

    async def start(
        self,
        work: Callable[..., Awaitable[object]],
        *args: object,
        id: str | None = None,
        name: str | None = None,
        owner: object = None,
        key: object = None,
        when_busy: str = "run",
        labels: Mapping[str, str] | None = None,
        timeout: float | timedelta | None = None,
    ) -> Operation:
        """Start ``work(cancel, *args)`` in the background, and return its operation at once: it outlives the request.

        The work takes nothing from the request: neither its context variables, nor its end. It runs in this process, and
        is not started again elsewhere: if the process dies, the operation is ``lost``. Its result, which FastAPI must be
        able to encode as JSON, or its exception is kept for ``result_ttl`` seconds.

        The answer to the request is `Operation.accepted`: 202 with ``Location``.

        :param work: an async function. It gets the `Cancelable` of its block, which has been entered.
        :param id: an id of your own. If it is known, the work is not started: the operation that has it is returned, so
            that a repeated POST starts nothing twice.
        :param name: the default is the name of the function.
        :param owner: who may stop it and read of it; ``None``: operators only.
        :param key: the group that it belongs to. Keys of background work are one namespace.
        :param when_busy: what happens if other background work of the same key runs: ``"run"`` beside it; ``"refuse"``;
            ``"cancel_previous"``; ``"wait"`` for its end, in the order of the calls.
        :param labels: strings by which it can be listed and stopped.
        :param timeout: seconds that it may run, not counted while it waits for its turn.
        :raises OperationBusy: if the key is taken and ``when_busy`` is ``"refuse"`` (409).
        :raises OperationTaken: if ``id`` belongs to an operation of another owner (409).
        :raises OperationsUnavailable: if the store cannot be reached, or the server shuts down (503).
        :raises TypeError: if an argument has the wrong type.
        :raises ValueError: if one has a wrong value.
        """
        worker = self.worker
        checked_work_ = checked_work(work, len(args))
        if when_busy != "run" and when_busy not in WHEN_BUSY:
            raise ValueError(f"when_busy is 'run', 'refuse', 'cancel_previous' or 'wait', not {when_busy!r}")
        if when_busy != "run" and key is None:
            raise TypeError(f"when_busy={when_busy!r} needs a key: the name of the group that may be busy")
        job = Job(worker.local, Cancelable(timeout=timeout), checked_work_, args)
        job.name = name_of_work(work) if name is None else checked_name(name)
        job.owner = None if owner is None else checked_owner(owner)
        job.key = None if key is None else checked_key(key)
        job.labels = {} if labels is None else checked_labels(labels)
        return await worker.background.start(job, None if id is None else checked_id(id), when_busy)

    @asynccontextmanager
    async def track(
        self,
        *,
        id: str | None = None,
        name: str | None = None,
        owner: object = None,
        key: object = None,
        labels: Mapping[str, str] | None = None,
        timeout: float | timedelta | None = None,
    ) -> AsyncIterator[Cancelable]:
        """Make a block of any program an operation: ``async with operations.track(id=job_id) as cancel:``.

        For a job of a queue, a consumer of messages, a command. Stopping the operation stops the block, and raises its
        `CancelationError`. There is no record of it: when the block ends, so does the operation.

        :param id: an id of your own, such as that of the job. One that was cancelled before does not start.
        :raises CancelationError: the error of the reason, if the block was stopped.
        :raises TypeError: if an argument has the wrong type.
        :raises ValueError: if one has a wrong value.
        """
        local = self.worker.local
        running = RunningBlock(local, Cancelable(timeout=timeout, name=name), "tracked")
        running.name = None if name is None else checked_name(name)
        running.owner = None if owner is None else checked_owner(owner)
        running.key = None if key is None else checked_key(key)
        running.labels = {} if labels is None else checked_labels(labels)
        local.add(running, None if id is None else checked_id(id))
        running.begin()
        state = OperationState.FAILED
        error: BaseException | None = None
        try:
            async with running.cancelable as cancel:
                yield cancel
            state = OperationState.FINISHED
        except BaseException as exc:
            error = exc
            if _was_stopped(running.cancelable, exc):
                state = OperationState.CANCELLED
            raise
        finally:
            tell_end(running, state, error)
            del error  # Its traceback refers to this frame: a reference cycle otherwise.
            local.remove(running, state)

    # Stopping.

    async def cancel(
        self,
        id: str,
        *,
        owner: object = ANYONE,
        message: str | None = None,
        wait: float | timedelta = 2.0,
        grace: float | timedelta | None = None,
    ) -> Cancelation:
        """Stop the operation with reason ``MANUAL``, and return what has become of it.

        May be called again, and answers then as the first call would by now. The first reason and message stay. Work
        that ends in spite of it has finished. An id that a client has chosen may be cancelled before the operation has
        begun: it is remembered for ``memory`` seconds.

        :param owner: whose operation it has to be; anyone's by default.
        :param message: the ``detail`` of its response, at most 1,000 characters.
        :param wait: seconds to wait for its end; 0 to return at once.
        :param grace: seconds for its cleanup, if that are fewer than its own: call again with less to be firmer.
        :raises OperationsUnavailable: if it runs elsewhere, and the store cannot be reached (503). It may be stopped all
            the same.
        :raises TypeError: if an argument has the wrong type; ``owner=None`` is one.
        :raises ValueError: if ``id`` is none, or a number is negative or NaN.
        """
        limit = seconds(wait, "wait")
        firmness = None if grace is None else seconds(grace, "grace")
        asked_at = time.monotonic()
        call = self.worker.cancels.cancel(
            checked_id(id), checked_owners(owner), checked_message(message), limit, firmness
        )
        with unavailable_told(id, asked_at):
            cancelation: Cancelation = await _or_unavailable(call)
        tell_cancel(id, cancelation, asked_at)
        return cancelation

    async def cancel_all(
        self,
        *,
        key: object = None,
        owner: object = ANYONE,
        route: str | None = None,
        labels: Mapping[str, str] | None = None,
        older_than: float | timedelta | None = None,
        message: str | None = None,
    ) -> list[Cancelation]:
        """Stop all operations that fulfil every condition, and return what has become of them.

        Those that begin later are not stopped. At most 1,000 of each other worker are returned; all are stopped.

        :param key: the key of the operations.
        :param owner: whose operations.
        :param route: the path template of the route.
        :param labels: labels that they have.
        :param older_than: seconds that they have run at least.
        :raises ValueError: if there is no condition.
        :raises OperationsUnavailable: if the store cannot be reached; those of this worker are stopped all the same.
        """
        conditions = checked(owner=owner, key=key, route=route, labels=labels, older_than=older_than)
        if conditions.are_none:
            raise ValueError(
                "cancel_all needs a condition: key, owner, route, labels or older_than (0 stops everything)"
            )
        asked_at = time.monotonic()
        call = self.worker.cancels.cancel_all(conditions, checked_message(message), 1.0)
        with unavailable_told(None, asked_at):
            cancelations: list[Cancelation] = await _or_unavailable(call)
        for cancelation in cancelations:
            tell_cancel(None, cancelation, asked_at)
        return cancelations

    # Reading.

    async def get(self, id: str, *, owner: object = ANYONE) -> Operation | None:
        """Return the operation as it is now; ``None`` if there is none, or it belongs to somebody else.

        Requests are known until ``memory`` seconds after their end, background work for ``result_ttl`` seconds.
        """
        if not is_id(id):
            return None
        return await _or_unavailable(self.worker.watching.get(id, checked_owners(owner)))

    async def wait(self, id: str, *, timeout: float | timedelta, owner: object = ANYONE) -> Operation:
        """Wait until the operation ends, ``timeout`` seconds at most, and return it as it is then.

        :raises OperationUnknown: if there is no such operation (404).
        """
        limit = seconds(timeout, "timeout")
        last: Operation | None = None
        with anyio.move_on_after(limit):
            async with aclosing(self.events(id, owner=owner)) as events:
                async for event in events:
                    last = event.operation
        if last is None or not last.state.is_final:
            last = await self.get(id, owner=owner) or last
        if last is None:
            raise OperationUnknown
        return last

    async def result(self, id: str, *, owner: object = ANYONE) -> Any:
        """Wait for the end of background work, and return its result as JSON has it.

        :raises BaseException: what the work has raised, without its traceback; of work of another process, an
            ``HTTPException`` as itself, and any other as `OperationFailed`.
        :raises CancelationError: the error of the reason, if it was stopped.
        :raises OperationLost: if its process is gone (410).
        :raises OperationUnknown: if there is no such work, or its result is forgotten (404).
        """
        whose, worker = checked_owners(owner), self.worker
        fields = await _or_unavailable(worker.background.archive.fields(checked_id(id), whose))
        if fields is not None and fields.get("ended") is None:
            async for _ in self.events(id, owner=owner):
                pass
            fields = await _or_unavailable(worker.background.archive.fields(id, whose))
        if fields is None or fields.get("ended") is None:
            raise OperationUnknown
        error = worker.background.error_here(id)
        if error is not None:
            raise error
        return result_of(fields)

    async def events(self, id: str, *, owner: object = ANYONE) -> AsyncGenerator[OperationEvent]:
        """Iterate over the changes of an operation, first its present state and progress, until its end.

        A consumer that is slow misses changes in between, and never the last one. Leave a loop early by ``aclosing``.

        :raises OperationUnknown: if there is no such operation (404).
        """
        async with aclosing(self.worker.watching.events(checked_id(id), checked_owners(owner))) as events:
            while True:
                try:
                    event = await anext(events)
                except StopAsyncIteration:
                    return
                except Unavailable as exc:
                    raise OperationsUnavailable from exc
                yield event

    async def workers(self, *, timeout: float | timedelta = 1.0) -> list[Worker]:
        """Return the processes that run operations, the oldest first.

        :param timeout: seconds to wait for the others to answer; ``is_reachable`` is false for those that did not.
        :raises OperationsUnavailable: if the store cannot be reached (503).
        """
        return await _or_unavailable(self.worker.workers(seconds(timeout, "timeout")))

    async def list(
        self,
        *,
        state: str | None = None,
        kind: str | None = None,
        owner: object = ANYONE,
        key: object = None,
        route: str | None = None,
        labels: Mapping[str, str] | None = None,
        older_than: float | timedelta | None = None,
        limit: int = 100,
        timeout: float | timedelta = 1.0,
    ) -> OperationList:
        """Return the operations that run and fulfil every condition, the oldest first: a moment's view.

        With a final ``state``, it is background work that has ended, the newest first.

        :param state: the default is all that have not ended.
        :param kind: ``"request"``, ``"websocket"``, ``"background"``, ``"detached"`` or ``"tracked"``.
        :param limit: how many to return, at most 1,000; ``total`` counts them all.
        :param timeout: seconds to wait for the other workers; ``unreachable`` names those that did not answer.
        :raises OperationsUnavailable: if the store cannot be reached (503).
        """
        if isinstance(limit, bool) or not isinstance(limit, int):
            raise TypeError(f"limit takes a number of operations, not {limit!r}")
        if not 0 <= limit <= MOST_LISTED:
            raise ValueError(f"limit must be between 0 and {MOST_LISTED}, not {limit}")
        conditions = checked(
            owner=owner, kind=kind, key=key, route=route, labels=labels, older_than=older_than, state=state
        )
        if conditions.state is not None and OperationState(conditions.state).is_final:
            return await _or_unavailable(self.worker.background.archive.ended(conditions, limit))
        return await _or_unavailable(self.worker.listing.all(conditions, limit, seconds(timeout, "timeout")))


T = TypeVar("T")


def _was_stopped(cancelable: Cancelable, exc: BaseException) -> bool:
    """Return whether the block was cancelled, and ``exc`` leaves it for that reason."""
    if isinstance(exc, CancelationError):
        return exc.reason is cancelable.reason
    # What is around the block was cancelled as well, and its own error is raised there.
    return cancelable.is_cancelled and isinstance(exc, anyio.get_cancelled_exc_class())


async def _or_unavailable(call: Awaitable[T]) -> T:
    try:
        return await call
    except Unavailable as exc:
        raise OperationsUnavailable from exc
