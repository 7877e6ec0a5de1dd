"""Work that outlives its request: starting it, its record, and its end."""

from __future__ import annotations

import math
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import anyio
from starlette.exceptions import HTTPException

from ..kernel.cancelable import Cancelable
from ..kernel.errors import CancelationError
from ..kernel.foreign import ThisTask
from ..kernel.log import logger
from ..kernel.reasons import CancelationReason
from ..kernel.token import Cause
from ..kernel.unwrap import copied, without_frames
from .archive import MOST_AGE, Archive
from .backend import Unavailable
from .doubtful import DoubtfulRecords
from .errors import OperationBusy, OperationsUnavailable, OperationTaken
from .model import Operation, OperationState
from .names import ANYONE
from .records import (
    Outcome,
    TooLarge,
    cancelled,
    failed,
    finished,
    first_fields,
)
from .report import tell_end, tell_work
from .running import Running, RunningBlock
from .together import together
from .turns import ENDLESS, Turn, Turns, key_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

    from .backend import Record
    from .exchange import Exchange
    from .local import Local

    Work = Callable[..., Awaitable[object]]

_KEY_SCOPE: Final = "background"
_MOST_ERRORS: Final = 1000
_PROGRESS_SECONDS: Final = 0.25
_PAUSE: Final = 1.0

WHEN_BUSY: Final[dict[str, dict[str, Any]]] = {
    "refuse": {"queue": 0},
    "cancel_previous": {"latest": True},
    "wait": {"queue": ENDLESS},
}


class Job(RunningBlock):
    """Background work, with its turn under a key."""

    def __init__(self, home: Local, cancelable: Cancelable, work: Work, args: tuple[Any, ...]) -> None:
        super().__init__(home, cancelable, "background")
        self.work = work
        self.args = args
        self.turn: Turn | None = None
        self.error: BaseException | None = None


class Background:
    """The background operations of this worker."""

    def __init__(self, local: Local, exchange: Exchange, turns: Turns, *, result_ttl: float, max_result: int) -> None:
        self._local = local
        self._exchange = exchange
        self._turns = turns
        self._result_ttl = result_ttl
        self._max_result = max_result
        self._jobs: dict[Job, None] = {}
        self._starting: dict[Job, None] = {}
        self._unwritten: dict[Job, None] = {}
        self.archive = Archive(local, exchange)
        self.doubtful = DoubtfulRecords(local, exchange)

        self._has_unwritten = anyio.Event()
        self._errors: OrderedDict[str, tuple[float, BaseException]] = OrderedDict()
        self._sender, self._receiver = anyio.create_memory_object_stream[Job](math.inf)
        self._empty = anyio.Event()
        self._is_closing = self._has_given_up = False

    async def run(self, tasks: TaskGroup) -> None:
        """Start the work that is handed over, in the context of this task: that of a request would be kept alive."""
        tasks.start_soon(self._keep_writing)
        with self._sender, self._receiver:
            try:
                async for job in self._receiver:
                    tasks.start_soon(self._run, job)
                    del job
                    self._begin_all(tasks)
            finally:
                with anyio.CancelScope(shield=True):
                    await self._end_unbegun()

    def _begin_all(self, tasks: TaskGroup) -> None:
        # One for each turn of the event loop would be too few for a burst, which would wait.
        with suppress(anyio.WouldBlock):
            while True:
                tasks.start_soon(self._run, self._receiver.receive_nowait())

    async def _end_unbegun(self) -> None:
        """End the work that was handed over and has not begun, so that its record says so."""
        with suppress(anyio.WouldBlock, anyio.EndOfStream):
            while True:
                await self._end(self._receiver.receive_nowait(), _stopped_at_shutdown())

    async def start(self, job: Job, id: str | None, when_busy: str) -> Operation:
        """Write the record of work, and start it. With an id that is known already, return what has it.

        :raises OperationBusy: if the key is taken, and ``when_busy`` is ``"refuse"``.
        :raises OperationTaken: if the id belongs to another owner's operation.
        :raises OperationsUnavailable: if the store cannot be reached.
        """
        if self._is_closing:
            raise OperationsUnavailable("The server is shutting down")
        self._starting[job] = None
        try:
            if id is not None and id in self.doubtful:
                await self.doubtful.delete(id)
            known = None if id is None else await self._join(id, job.owner)
            if known is not None:
                return known
            await self._take_turn(job, when_busy)
            return await self._create(job, id)
        except Unavailable:
            await self._give_turn_back(job)
            raise OperationsUnavailable from None
        except BaseException:
            await self._give_turn_back(job)
            raise
        finally:
            self._starting.pop(job, None)
            self._look_if_empty()

    async def _join(self, id: str, owner: str | None) -> Operation | None:
        [record] = await self._exchange.calling(self._exchange.backend.load([id]))
        job = self._known_here(id) if record is None else None
        if record is not None:
            known_owner, known = record.fields.get("owner"), self.archive.seen(id, record.fields)
        elif job is not None:
            known_owner, known = job.owner, job.view()
        else:
            return None
        if known_owner != owner:
            raise OperationTaken
        return known

    def _known_here(self, id: str) -> Job | None:
        """Return the work of this process with an id whose record the store has lost: two would share one record."""
        ended = self._local.find_ended(id, ANYONE)
        jobs = [job for job in (*self._local.find(id, ANYONE), ended) if isinstance(job, Job) and job.has_record]
        oldest = self._local.loop.time() - self._result_ttl
        return next((job for job in jobs if job.ended_at is None or job.ended_at > oldest), None)

    async def _take_turn(self, job: Job, when_busy: str) -> None:
        if job.key is None or when_busy == "run":
            return
        options = WHEN_BUSY[when_busy]
        job.turn = await self._turns.enter(key_name(_KEY_SCOPE, job.key), job, **options)
        if job.turn.status == "refused":
            job.turn = None
            raise OperationBusy
        job.is_waiting = job.turn.status == "waiting"

    async def _give_turn_back(self, job: Job) -> None:
        if job.turn is not None:
            await self._turns.leave(job.turn)

    async def _create(self, job: Job, id: str | None) -> Operation:
        # Known here before its record is: who reads of it may stop it at once.
        self._local.add(job, id)
        fields = first_fields(job, self._result_ttl)
        # Before the call: from now on nobody may delete it.
        self.doubtful.discard(job.id)
        try:
            record = await self._exchange.calling(self._exchange.backend.create(job.id, fields, ttl=MOST_AGE))
        except BaseException:
            # It may be there, or come yet, and nobody will work on it.
            self.doubtful.add(job.id)
            self._local.discard(job)
            raise
        if not record.is_new:
            # Another call of the same id was faster.
            self._local.discard(job)
            await self._give_turn_back(job)
            if record.fields.get("owner") != job.owner:
                raise OperationTaken
            return self.archive.seen(record.id, record.fields)
        self._jobs[job] = None
        job.has_record = True
        tell_work("started", job)
        self._sender.send_nowait(job)
        return job.view()

    async def _run(self, job: Job) -> None:
        outcome = _stopped_at_shutdown()
        try:
            outcome = await self._outcome(job)
        finally:
            # Also if the tasks of these operations are cancelled.
            with anyio.CancelScope(shield=True):
                await self._end(job, outcome)

    async def _outcome(self, job: Job) -> Outcome:
        this_task = ThisTask()
        try:
            if job.turn is not None and job.is_waiting:
                await self._wait_for_turn(job, job.turn)
            job.begin()
            tell_work("running", job)
            async with job.cancelable:
                result = await job.work(job.cancelable, *job.args)
            return finished(result, self._max_result)
        except TooLarge as exc:
            logger.error("the result of the operation %s (%s) is dropped: %s", job.id, job.name, exc)
            return Outcome(OperationState.FAILED, {"message": str(exc), "status": 500})
        except CancelationError as exc:
            if exc.reason is job.cancelable.reason:
                return cancelled(exc, job.cause)
            return failed(exc)
        except BaseException as exc:
            if this_task.is_ended_by(exc):
                raise
            if not isinstance(exc, HTTPException):
                logger.exception("the operation %s (%s) failed", job.id, job.name)
            return failed(exc)

    async def _wait_for_turn(self, job: Job, turn: Turn) -> None:
        async with Cancelable(token=job.cancelable.token):
            await turn.wait()
        job.set_waiting(False)

    async def _end(self, job: Job, outcome: Outcome) -> None:
        tell_end(job, outcome.state, outcome.error)
        self._unwritten.pop(job, None)
        if outcome.state is OperationState.FAILED:
            job.error = outcome.error
            job.failure = outcome.fields["message"]
        self._remember_error(job)
        fields = {**outcome.fields, "state": str(outcome.state), "ended": self._local.clock.now(), **_progress_of(job)}
        # First, so that the result is there when its end is noticed.
        is_written = await self._write_end(job, fields)
        self._local.remove(job, outcome.state)
        job.work, job.args = _nothing, ()
        if job.turn is not None:
            await self._turns.leave(job.turn)
        while not is_written and not self._has_given_up:
            await anyio.sleep(_PAUSE)
            is_written = await self._write_end(job, fields)
        if not is_written:
            logger.error("the end of the operation %s could not be written: the store is away", job.id)
        self._jobs.pop(job, None)
        self._look_if_empty()

    def _look_if_empty(self) -> None:
        if not self._jobs and not self._starting:
            self._empty.set()

    async def _write_end(self, job: Job, fields: dict[str, Any]) -> bool:
        """Write how work has ended; return ``False`` if the store cannot be reached."""
        backend = self._exchange.backend
        try:
            is_kept = await self._exchange.calling(backend.change(job.id, fields, end_ttl=self._result_ttl))
            if not is_kept and (await self._create_again(job)).is_new:
                # The store had lost it, and nobody has noticed yet.
                is_kept = await self._exchange.calling(backend.change(job.id, fields, end_ttl=self._result_ttl))
        except Unavailable:
            return False
        if not is_kept:
            logger.error("the result of the operation %s is refused: its worker was given up meanwhile", job.id)
        return True

    async def _create_again(self, job: Job) -> Record:
        fields = {**first_fields(job, self._result_ttl), **_progress_of(job)}
        record: Record = await self._exchange.calling(self._exchange.backend.create(job.id, fields, ttl=MOST_AGE))
        return record

    def _remember_error(self, job: Job) -> None:
        """Keep an error as it is, for callers in this process; without its frames, which hold all that the work had."""
        now = self._local.loop.time()
        while self._errors and (next(iter(self._errors.values()))[0] <= now or len(self._errors) >= _MOST_ERRORS):
            self._errors.popitem(last=False)
        if job.error is not None:
            self._errors[job.id] = (now + self._result_ttl, without_frames(job.error))
        job.error = None

    def error_here(self, id: str) -> BaseException | None:
        """Return a copy of the exception that work of this process has raised."""
        until, error = self._errors.get(id, (0.0, None))
        # A copy, because who raises it adds its own frames.
        return copied(error) if error is not None and until > self._local.loop.time() else None

    # Progress and signs of life.

    def note_change(self, running: Running, kind: str) -> None:
        """Have the progress of work written, for those who read of it in other workers."""
        if kind != "end" and isinstance(running, Job) and running in self._jobs:
            self._unwritten[running] = None
            self._has_unwritten.set()

    async def _keep_writing(self) -> None:
        while True:
            await self._has_unwritten.wait()
            await anyio.sleep(_PROGRESS_SECONDS)
            self._has_unwritten = anyio.Event()
            while self._unwritten:
                job = next(iter(self._unwritten))
                del self._unwritten[job]
                fields = {"state": str(job.state), "labels": dict(job.labels), **_progress_of(job)}
                try:
                    await self._exchange.calling(self._exchange.backend.change(job.id, fields))
                except Unavailable:
                    # Also what could not be written now.
                    self._unwritten[job] = None
                    self._has_unwritten.set()
                    break

    async def write_again(self) -> None:
        """Create the records once more that the store may have lost, and obey what they say meanwhile.

        :raises Unavailable: if the store cannot be reached.
        """
        await together(self._write_again, list(self._jobs))

    async def _write_again(self, job: Job) -> None:
        if job not in self._jobs:
            return
        mark = (await self._create_again(job)).fields.get("cancel")
        if mark is not None:
            job.stop(Cause(CancelationReason.MANUAL, mark.get("message")))

    def stop_everything(self, cause: Cause) -> None:
        """Stop all background work of this worker."""
        for job in list(self._jobs):
            job.stop(cause)

    def close(self) -> None:
        """Start nothing any more."""
        self._is_closing = True

    def give_up(self) -> None:
        """Do not wait any more for a store that cannot be reached."""
        self._has_given_up = True

    async def wait_empty(self) -> None:
        """Wait until no background work is left."""
        while self._jobs or self._starting:
            self._empty = anyio.Event()
            await self._empty.wait()


def _stopped_at_shutdown() -> Outcome:
    return cancelled(CancelationError.for_reason(CancelationReason.SIGNAL))


def _progress_of(job: Job) -> dict[str, Any]:
    progress = job.progress_so_far
    return {} if progress is None else {"progress": progress.model_dump(mode="json")}


async def _nothing(cancel: Cancelable) -> None: ...
