"""The state of a request: the one object that all its doors share."""

from __future__ import annotations

from contextvars import copy_context
from typing import TYPE_CHECKING, Protocol, cast

from ..kernel.log import logger
from ..kernel.loops.current import current_loop
from ..kernel.members import Members, with_one_more, without
from ..kernel.settings import settings
from ..kernel.token import CancelationToken, Cause
from .defaults import Defaults
from .in_flight import InFlight, in_flight_of
from .lifetime import Lifetime, Mortal
from .progress import ResponseProgress
from .watchers import WAITERS, Door, Watcher

if TYPE_CHECKING:
    from contextvars import Context

    from starlette.types import Receive, Scope

    from ..kernel.loops.base import EventLoop
    from .http_reader import Owner
    from .in_flight import Young

SCOPE_KEY = "cancelable_deps"
"""The key in the ASGI scope of the `RequestState`, or of the block of the first door, which makes one when needed."""

PROBE_KEY = "cancelable_deps.probe"
"""The key in the ASGI scope of a function that a test client wants to be called with each request state."""


class Shutdown(Protocol):
    """The shutdown of one event loop, which the loop knows once an application has asked for it."""

    refuses: bool

    def cause(self) -> Cause:
        """Return the cause for which requests are stopped or refused."""
        ...


class FirstBlock(Protocol):
    """The block of the door that a request came in by, before its state is made."""

    @property
    def loop_of_request(self) -> EventLoop: ...

    started: float
    context: Context

    @property
    def token(self) -> CancelationToken: ...

    @property
    def cause(self) -> Cause | None: ...


class RequestState(ResponseProgress, Defaults, Mortal):
    """The state of a request, which all its doors share.

    Its owner closes it, see `Lifetime`. Listening starts when the request has run for ``listen_after`` seconds and has
    a watcher.

    :param first: the block of the first door, if that makes the state.
    """

    # In slots, as each write to a dictionary of attributes costs three times as much.
    __slots__ = (
        "_watchers",
        "context",
        "handler_stack",
        "in_flight",
        "is_closed",
        "lifetime",
        "loop",
        "raw",
        "scope",
        "started",
        "young_entry",
    )

    main_tasks: tuple[object, ...] = ()
    """The tasks besides that of a door in which the handler runs, such as that of a ``BaseHTTPMiddleware``."""

    is_armed = False
    is_old = False
    """Whether the request has joined `InFlight.requests`."""

    young_entry: Young | None
    """The entry of the request in `InFlight.young`, if it has one: the state, or the block of the first door."""

    _watchers: Members[Watcher]
    root_token: CancelationToken | None = None
    """The root token, if it has been made."""

    _first: FirstBlock | None = None

    def __init__(
        self, scope: Scope, receive: Receive, *, lifetime: Lifetime = Lifetime.BLOCKS, first: FirstBlock | None = None
    ) -> None:
        self.scope = scope
        self.raw = receive
        self.lifetime = lifetime
        loop = self.loop = current_loop() if first is None else first.loop_of_request
        self.in_flight: InFlight = loop.in_flight or in_flight_of(loop)
        self.handler_stack = self.young_entry = None
        self._watchers = ()
        self.is_closed = False
        if first is None:
            self.started = loop.time()
            self.context = copy_context()
        else:
            self._first = first
            self.started, self.context = first.started, first.context
        scope[SCOPE_KEY] = self
        if PROBE_KEY in scope:
            scope[PROBE_KEY](self)
        shutdown: Shutdown | None = loop.shutdown
        if shutdown is not None and shutdown.refuses and first is None:
            self.token.cancel_because(shutdown.cause())

    @property
    def state(self) -> RequestState:
        """The state itself, so that each entry under `SCOPE_KEY` has a `state`: the block of a first door has one."""
        return self

    @property
    def token(self) -> CancelationToken:
        """The root token, which stops the whole request. Made when it is first asked for; most never are."""
        token = self.root_token
        if token is None:
            token = self.adopt(CancelationToken() if self._first is None else self._first.token)
        return token

    def adopt(self, token: CancelationToken) -> CancelationToken:
        """Make ``token`` the root token unless there is one, and return the root token."""
        # Two threads may come at the same time: `setdefault` is atomic.
        known: CancelationToken = vars(self).setdefault("root_token", token)
        for watcher in self._watchers:
            watcher.token_is_made(known)
        return known

    @property
    def cause(self) -> Cause | None:
        token = self.root_token
        if token is not None:
            return token.cause
        return None if self._first is None else self._first.cause

    def as_owner(self) -> Owner:
        return self

    def watch(self, watcher: Watcher) -> None:
        self._watchers = with_one_more(self._watchers, watcher) if self._watchers else (watcher,)
        if self.is_armed or self.is_closed:
            if not self.is_closed:
                self.reader.arm(self.loop)
            self._join_in_flight()
            watcher.listening_begins()
        elif self.young_entry is None:
            if settings.listen_after:
                self.young_entry = self
                self.in_flight.add_young(self)
            else:
                self.arm()
        if self.grace_limit is not None:
            watcher.shorten_grace(self.grace_limit)

    def arm(self) -> None:
        """Start listening, and tell the watchers."""
        self.is_armed = True
        if not self.is_closed:
            if self.handler_stack is not None:
                self.handler_stack.push_async_exit(self.handler_returned)
            self.reader.arm(self.loop)
            for watcher in list(self._watchers):
                _tell(watcher)
        self._join_in_flight()

    def grow_old(self) -> None:
        self.young_entry = None
        self.arm()

    @property
    def has_stopped_listening(self) -> bool:
        return self.is_armed and not self.is_listening

    async def settle(self) -> None:
        """Wait for a reader that has been stopped."""
        if self.has_stopped_listening:
            await self.join()

    def unwatch(self, watcher: Watcher) -> None:
        watchers = self._watchers
        if watchers == (watcher,):
            self._watchers = ()
        else:
            self._watchers = without(watchers, watcher)
        if not self._watchers:
            # An old request whose end is reported stays known until then: another block may follow.
            self._leave_young()
            if self.lifetime is Lifetime.BLOCKS:
                self._leave_in_flight()
                # Nothing reports the end of this request. A later block finds this state by `receive`, if that is ours.
                self.scope.pop(SCOPE_KEY, None)
                if self._reader is not None:
                    self._reader.stop()

    def watch_for_waiters(self) -> None:
        """Listen at once, for those that wait for the client to leave."""
        if WAITERS not in self._watchers:
            self.watch(WAITERS)
        self.arm_now()

    @property
    def is_in_flight(self) -> bool:
        return self.is_old or self.young_entry is not None

    def arm_now(self) -> None:
        """Start listening before ``listen_after`` has passed, because the caller needs the disconnect at once."""
        if not self.is_armed:
            self._leave_young()
            self.arm()

    def is_work(self, task: object) -> bool:
        """Return whether a cancellation of the request reaches ``task`` first."""
        if task in self.main_tasks or (self.outermost is not None and self.outermost.works_in(task)):
            return True
        return any(watcher.works_in(task) for watcher in self._watchers)

    @property
    def is_stopping(self) -> bool:
        """Whether a block of the request is being cancelled."""
        return any(watcher.is_cancelled for watcher in self._watchers)

    def close(self) -> None:
        """Do the same as `complete`, and drop the references to the doors. May be called more than once."""
        if not self.is_closed:
            if self._reader is None and self.root_token is None and not self._deferrals:
                # The usual case: nothing was read, listened to or stopped.
                self.is_closed = True
                self.scope.pop(SCOPE_KEY, None)
                self.handler_stack = None
            else:
                self.complete()
        self._leave_in_flight()
        # A door knows its state: the cycle would leave every request to the garbage collector.
        self.outermost = None
        if self._watchers:
            self._watchers = ()

    def stop(self, cause: Cause) -> None:
        """Cancel the request, unless its result is there already."""
        self.token.cancel_because(cause)

    def stop_all(self, cause: Cause) -> None:
        """Cancel the request; if its result is there, cancel the sending of it and the background work, too."""
        self.token.cancel_because(cause)
        if self.is_closed or self.is_finished:
            for innermost in self.doors[-1:]:
                innermost.stop_background(cause)

    def stop_background(self, cause: Cause) -> None:
        """Cancel the background work of a request whose result is there, but do not interrupt the sending of its end."""
        if not self.postpone_until_end_is_out(self, cause):
            self.stop_all(cause)

    def stop_now(self, cause: Cause) -> None:
        """Cancel what `stop_background` has postponed."""
        self.stop_all(cause)

    async def aclose(self) -> None:
        """Do the same as `close`, and wait for the reader to end."""
        self.close()
        await self.join()

    @property
    def doors(self) -> list[Door]:
        return [cast("Door", watcher) for watcher in self._watchers if watcher.is_door]

    def complete(self) -> None:
        """Note that the response is complete, or the handler has returned: a disconnect means nothing any more."""
        self.forget_client()
        self.forget_stops()
        self.scope.pop(SCOPE_KEY, None)
        if self.handler_stack is not None:
            self.handler_stack = None
        if self.default is not None:
            self.default = None

    def complete_response(self) -> None:
        """Note that the last part of the response is being sent: background work follows, and is not cancelled."""
        if self.outermost is not None:
            # A block that has not been entered is not among the watchers.
            self.outermost.release()
        if self._watchers:
            for door in self.doors:
                door.release()
        self.complete()

    def _join_in_flight(self) -> None:
        if self.young_entry is None and not self.is_old:
            self.is_old = True
            self.in_flight.add(self)

    def _leave_in_flight(self) -> None:
        self._leave_young()
        if self.report is not None:
            self.end_report()
        if self.is_old:
            self.is_old = False
            self.in_flight.remove(self)
        elif self.operation is not None and not self.operation.has_ended:
            self.in_flight.tell_end(self)

    def end_report(self) -> None:
        report, self.report = self.report, None
        if report is not None:
            report.end(self, "cancelled" if self.has_ended_by_its_cause else "finished")

    def _leave_young(self) -> None:
        if self.young_entry is not None:
            self.in_flight.young.pop(self.young_entry, None)
            self.young_entry = None


def _tell(watcher: Watcher) -> None:
    try:
        watcher.listening_begins()
    except Exception:
        # The watchers after this one must be told as well: they could never be stopped otherwise.
        logger.exception("a request could not be made cancelable")
