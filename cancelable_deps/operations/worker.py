"""One worker of an application: the parts of its operations, from opening to closing."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio

from ..kernel.log import logger
from ..kernel.loops.current import current_loop
from ..kernel.reasons import CancelationReason
from ..kernel.settings import settings
from ..kernel.token import Cause
from ..kernel.unwrap import raise_as_it_is
from ..request.shutdown import running_shutdown
from .backend import Identity
from .background import Background
from .cancels import Cancels
from .clock import clock_of
from .exchange import Exchange
from .listing import Listing
from .local import Local
from .model import Worker
from .names import new_worker
from .turns import Turns
from .watching import Watching

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from .backend import Beat, OperationsBackend
    from .entries import Entry
    from .running import Running

_GOODBYE_SECONDS = 1.0


class OpenWorker:
    """The parts of one worker's operations while they are open."""

    def __init__(self, operations: object, backend: OperationsBackend, limits: Any) -> None:
        loop = current_loop()
        clock = clock_of(loop)
        self.started = clock.now()
        self._limits = limits
        identity = new_identity(self.started)
        self.local = Local(operations, identity.name, loop, limits.memory)
        self.exchange = Exchange(
            backend,
            identity,
            clock=clock,
            memory=limits.memory,
            lease=limits.lease,
            answering={
                "cancel": lambda entry: self.cancels.asked(entry),
                "cancel_all": lambda entry: self.cancels.all_asked(entry),
                "list": lambda entry: self.listing.answer(entry),
                "get": lambda entry: self.watching.get_asked(entry),
                "follow": lambda entry: self.watching.follow_asked(entry),
                "event": lambda entry: self.watching.event_told(entry),
                "granted": lambda entry: self.turns.granted(entry),
                "supersede": lambda entry: self.turns.superseded_elsewhere(entry),
                "worker": self._worker_asked,
            },
            on_beat=self._has_beaten,
        )
        self.turns = Turns(self.exchange)
        self.background = Background(
            self.local, self.exchange, self.turns, result_ttl=limits.result_ttl, max_result=limits.max_result
        )
        self.listing = Listing(self.local, self.exchange)
        self.cancels = Cancels(self.local, self.exchange, self.background)
        self.watching = Watching(self.local, self.exchange, self.background)
        self.local.observers.append(self.background.note_change)

    @asynccontextmanager
    async def open(self, on_event: Callable[[Running, str], object] | None) -> AsyncIterator[None]:
        """Take part in the exchange inside the ``async with``, and end the background work at its end."""
        limits = self._limits
        if on_event is not None:
            self.local.observers.append(on_event)
        async with self.exchange.backend.connect(self.exchange.identity, memory=limits.memory, lease=limits.lease):
            self.local.open()
            failure: BaseException | None = None
            try:
                async with anyio.create_task_group() as tasks:
                    await self.exchange.run(tasks)
                    tasks.start_soon(self.background.run, tasks)
                    tasks.start_soon(self._end_at_shutdown)
                    try:
                        yield
                    except BaseException as exc:
                        failure = exc
                        # A lifespan that is cancelled must end without waiting.
                        self.background.give_up()
                        raise
                    finally:
                        self.background.close()
                    await self._end_background()
                    tasks.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                if failure is None or group.exceptions != (failure,):
                    raise
                # Who uses an `async with` gets the own exception back.
                raise_as_it_is(failure)
            finally:
                del failure
                self.local.close()
                with anyio.move_on_after(_GOODBYE_SECONDS, shield=True):
                    await self.exchange.leave()

    async def _end_at_shutdown(self) -> None:
        """Stop background work when its grace is over, which begins with the signal."""
        await running_shutdown().token.wait()
        self.background.close()
        await anyio.sleep(self._limits.background_grace)
        self._stop_background()

    async def _end_background(self) -> None:
        background, grace = self.background, self._limits.background_grace
        signalled = running_shutdown().token.cancelled_at
        if signalled is not None:
            grace = max(0.0, grace - (datetime.now(UTC) - signalled).total_seconds())
        with anyio.move_on_after(grace):
            await background.wait_empty()
        self._stop_background()
        with anyio.move_on_after(settings.cleanup_grace + _GOODBYE_SECONDS):
            await background.wait_empty()
        background.give_up()

    def _stop_background(self) -> None:
        self.background.stop_everything(Cause(CancelationReason.SIGNAL, None))

    async def _has_beaten(self, beat: Beat, may_have_lost: bool) -> None:
        """Act on a sign of life: go on under a new name if this worker was given up, and tell whose turn has come."""
        self.local.forget()
        try:
            if beat.is_fenced:
                await self._go_on_as_another()
                await self.turns.enter_again(may_have_lost=True)
            else:
                if may_have_lost:
                    await self.background.write_again()
                await self.turns.enter_again(may_have_lost=may_have_lost)
            await self.turns.leave_again()
            await self.background.doubtful.delete_all()
        finally:
            await self.turns.tell(beat.granted)

    async def _go_on_as_another(self) -> None:
        logger.error(
            "this worker was given up by the others, as it did not answer for %g s: its background work is stopped",
            self._limits.lease,
        )
        self.background.stop_everything(Cause(CancelationReason.ERROR, "its worker was given up"))
        identity = new_identity(self.started)
        self.exchange.rename(identity)
        self.local.worker = identity.name
        await self.exchange.calling(self.exchange.backend.beat(may_reap=False))

    async def workers(self, timeout: float) -> list[Worker]:
        """Return the workers that are alive, with what they say of themselves."""
        exchange = self.exchange
        answers = await exchange.ask("worker", {}, to=None, timeout=timeout)
        found = [self._as_worker(exchange.identity, self._counts())]
        for name in answers.of.keys() | set(answers.silent):
            identity = exchange.alive.get(name)
            if identity is not None:
                found.append(self._as_worker(identity, answers.of.get(name)))
        return sorted(found, key=lambda worker: (worker.started, worker.name))

    def _counts(self) -> dict[str, Any]:
        return {"running": len(self.local.everything()), "ends": dict(self.local.ends)}

    def _worker_asked(self, entry: Entry) -> dict[str, Any]:
        return self._counts()

    def _as_worker(self, identity: Identity, counts: dict[str, Any] | None) -> Worker:
        return Worker(
            name=identity.name,
            host=identity.host,
            pid=identity.pid,
            version=identity.version,
            started=datetime.fromtimestamp(identity.started, UTC),
            running=None if counts is None else counts.get("running"),
            ends={} if counts is None else counts.get("ends", {}),
            is_reachable=counts is not None,
        )


def new_identity(started: float) -> Identity:
    """Return a new name for this process, with what others see of it."""
    package = sys.modules[__name__.partition(".")[0]]
    return Identity(new_worker(), socket.gethostname(), os.getpid(), package.__version__, started)
