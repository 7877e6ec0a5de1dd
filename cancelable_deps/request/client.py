"""The client of a request: whether it has left, the waiters to be told, and the deferral of a disconnect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

import anyio

from ..hosts.frames import is_parsing_body
from ..hosts.starlette import route_of
from ..kernel.log import logger
from ..kernel.reasons import CancelationReason
from ..kernel.settings import settings
from ..kernel.token import CancelationToken, Cause, telling_everybody
from .http_reader import Owner, Reader
from .report import Report, Reported

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Message, Receive

    from ..kernel.loops.base import Event

# The number of waiters that share one event of asyncio's.
_WAITERS = 32

# The root tokens of requests whose client has left. A block that outlives its request still has the token, and no more.
_clients_left: WeakSet[CancelationToken] = WeakSet()


class PastRequest:
    """A stand-in for a request that no longer exists, for a block that still asks for the client."""

    def __init__(self, token: CancelationToken) -> None:
        self.has_left = token in _clients_left

    def defer_disconnect(self, by: int) -> None:
        """Do nothing, because the request has ended."""


class Guard(Protocol):
    """An object that defers the disconnect, and has to know of it at once."""

    def client_left(self) -> None:
        """Note that the client has left. Called once, or twice if the guard is made at that moment; in any thread."""


class Client(Reported):
    """The part of a request that concerns its client."""

    raw: Receive
    is_closed = False
    has_left = False
    reason: CancelationReason | None = None
    """The reason for which the request was stopped, if there is a line about it in the log."""

    is_finished = False
    """Whether the handler's result is there: the sending of it is not cancelled."""

    response_is_complete = False
    """Whether the application has sent the last part of its response, so that only background work is left."""

    was_stopped = False
    """Whether the error of a cancellation has left a block of this request."""

    _reader: Reader | None = None
    _deferrals = 0
    _deferred: anyio.Event | None = None
    _leaving: dict[Event, int] | None = None
    _left_after: float | None = None
    _guards: dict[Guard, None] | None = None

    def as_owner(self) -> Owner:
        """Return the request as the owner of its reader."""
        raise NotImplementedError

    @property
    def token(self) -> CancelationToken:
        """The root token, which stops the whole request."""
        raise NotImplementedError

    @property
    def cause(self) -> Cause | None:
        """The cause of the root token."""
        raise NotImplementedError

    def tell_listeners(self) -> None:
        """Report the disconnect to the code of the application that waits in ``receive()``."""
        raise NotImplementedError

    @property
    def reader(self) -> Reader:
        """The one reader of the request. Made when it is first asked for; most requests are over before that."""
        if self._reader is None:
            self._reader = Reader(self.scope, self.raw, None if self.is_closed else self.as_owner(), self.context)
        return self._reader

    def receive(self) -> Awaitable[Message]:
        """Return the next message, as the ``receive()`` of the application."""
        return self.reader.receive()

    def client_left(self) -> None:
        """Act on a disconnect; called by the reader."""
        if self.is_closed:
            return
        self.has_left = True
        _clients_left.add(self.token)
        for guard in list(self._guards or ()):
            guard.client_left()
        if not self._deferrals:
            self._disconnect()

    def add_guard(self, guard: Guard) -> None:
        """Defer the disconnect, and tell ``guard`` of it. For any thread."""
        # In this order, because the loop may report the client's leaving at any moment.
        self.defer_disconnect(1)
        self._guards = {**(self._guards or {}), guard: None}
        if self.has_left:
            guard.client_left()

    def remove_guard(self, guard: Guard) -> None:
        """Tell ``guard`` nothing any more; its deferral it ends itself."""
        self._guards = {other: None for other in self._guards or () if other is not guard} or None

    def defer_disconnect(self, by: int) -> None:
        """Count nested deferrals; a disconnect is reported when the count returns to zero. For any thread."""
        self._deferrals += by
        if not self._deferrals:
            if self.has_left and not self.is_closed:
                self._disconnect()
            self._call_in_loop(self._tell_those_deferred)

    @property
    def is_deferring(self) -> bool:
        return self._deferrals > 0 and not self.is_closed

    async def deferral_over(self) -> None:
        """Wait until a disconnect may be reported."""
        while self.is_deferring:
            if self._deferred is None:
                self._deferred = anyio.Event()
            await self._deferred.wait()

    def _tell_those_deferred(self) -> None:
        if self._deferred is not None:
            self._deferred.set()
            self._deferred = None

    def _disconnect(self) -> None:
        if self._left_after is None:
            self._left_after = self.loop.time() - self.started
        if self.has_listeners:
            self.tell_listeners()
        with telling_everybody():
            self.token.cancel_nowait(CancelationReason.DISCONNECT)
            if self._leaving is not None:
                self._call_in_loop(self._tell_those_who_wait)

    def _tell_those_who_wait(self) -> None:
        for event in self._leaving or ():
            event.set()

    def _call_in_loop(self, callback: Callable[[], object]) -> None:
        if self.loop.is_running_here():
            callback()
        else:
            self.loop.call_from_thread(callback)

    def join_waiters(self) -> Event:
        """Return the event that is set when the client leaves, for one more who waits; `leave_waiters` is to follow."""
        waiting = self._leaving = {} if self._leaving is None else self._leaving
        # Some waiters share an event, not all: asyncio's looks through all its waiters when one of them is cancelled.
        event = next(reversed(waiting), None)
        if event is None or waiting[event] >= _WAITERS:
            event = self.loop.make_event()
            if self.has_left:
                event.set()
        waiting[event] = waiting.get(event, 0) + 1
        return event

    def leave_waiters(self, event: Event) -> bool:
        """Take back `join_waiters`; return whether nobody waits any more."""
        waiting = self._leaving
        assert waiting is not None
        waiting[event] -= 1
        if not waiting[event]:
            del waiting[event]
        return not waiting

    def is_parsing_body(self, task: object) -> bool:
        return is_parsing_body(task)

    @property
    def has_listeners(self) -> bool:
        return self._reader is not None and self._reader.has_listeners

    @property
    def has_watchers(self) -> bool:
        return self._reader is not None and self._reader.has_watchers

    @property
    def is_reading(self) -> bool:
        """Whether the task of the reader still runs, so that it is to be joined."""
        return self._reader is not None and self._reader.is_reading

    async def join(self) -> None:
        if self._reader is not None:
            await self._reader.join()

    @property
    def is_listening(self) -> bool:
        return self._reader is not None and self._reader.is_armed

    def note_disconnect(self) -> None:
        """Log the disconnect, in the context of the caller, if no line about this request has been logged."""
        if self._left_after is not None and self.reason is None and self.cause is not None:
            outcome = "finished" if self.is_finished or self.response_is_complete else "cancelled"
            self.log_once(self.cause.reason, self.cause, self.cause.struck_at, outcome=outcome)

    def log(
        self,
        reason: CancelationReason,
        cause: object,
        struck_at: float | None = None,
        delivered_at: float | None = None,
    ) -> None:
        """Note that an error of ours has left a block, and log the one line about this request.

        :param struck_at: when it was cancelled, on the clock ``time.monotonic()``.
        :param delivered_at: when its work has received that, on the clock of the loop.
        """
        self.was_stopped = True
        if self.report is not None:
            self.report.note_delivery(delivered_at)
        self.log_once(reason, cause, struck_at, delivered_at)

    def log_once(
        self,
        reason: CancelationReason,
        cause: object,
        struck_at: float | None = None,
        delivered_at: float | None = None,
        *,
        outcome: str = "cancelled",
    ) -> None:
        """Log the one line about this request, and tell the hooks, unless that has been done."""
        if self.reason is not None:
            return
        self.reason = reason
        method = self.scope.get("method", "WEBSOCKET")
        route = route_of(self.scope)
        now, names = self.loop.time(), self.names
        elapsed = now - self.started if self._left_after is None else self._left_after
        extra = {"method": method, "route": route, "reason": str(reason), "elapsed": elapsed, "outcome": outcome}
        extra["cleanup"] = None if delivered_at is None else now - delivered_at
        extra |= {"operation_id": names["id"], "owner": names["owner"], "key": names["key"]}
        why = " ".join(str(cause).splitlines())
        logger.info("%s %s cancelled after %.3f s: %s", method, route, elapsed, why, extra=extra)
        if settings.hooks:
            message = cause.message if isinstance(cause, Cause) else None if cause is reason else str(cause)
            Report(reason, message, struck_at, delivered_at).begin(self, outcome, elapsed)

    def forget_client(self) -> None:
        """Stop listening: a disconnect is not acted on from here on."""
        self.note_disconnect()
        self.is_closed = True
        if self._deferred is not None:
            self._tell_those_deferred()
        if self._reader is not None:
            self._reader.stop()
            self._reader.owner = None
