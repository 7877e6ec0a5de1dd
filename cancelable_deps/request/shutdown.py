"""The shutdown of one event loop: the end of all its requests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.from_thread

from ..kernel.detached import all_detached
from ..kernel.log import logger
from ..kernel.loops.current import current_loop
from ..kernel.reasons import CancelationReason
from ..kernel.settings import settings
from ..kernel.token import CancelationToken, Cause, telling_everybody
from .in_flight import in_flight_of

if TYPE_CHECKING:
    from ..kernel.detached import Detached
    from ..kernel.loops.base import EventLoop, Timer

# Seconds that a request may take beyond all graces to end, and its response to leave the process.
_MARGIN = 1.0
_SETTLING = 0.1


class Graces(NamedTuple):
    """The limits that the lifespan of one application gives its requests when the server shuts down."""

    grace: float
    background_grace: float
    retry_after: int
    refuse_new: bool


class Shutdown:
    """The requests in flight that are older than some milliseconds, which it ends when its token is cancelled.

    The applications that share an event loop share one `Shutdown`. The longest of their limits apply.
    """

    refuses = False
    _began = math.inf
    _stopped_requests = False
    _stopped_background = False
    _timer: Timer | None = None

    def __init__(self, loop: EventLoop) -> None:
        self.token = CancelationToken()
        self.in_flight = in_flight_of(loop)
        self.in_flight.observe(self)
        self.detached = all_detached(loop)
        self.detached.observe(self)
        self._loop = loop
        self._graces: list[Graces] = []
        self.token.listen(self)

    @classmethod
    def joined(cls, graces: Graces) -> Shutdown:
        """Return the running loop's `Shutdown`, with the limits of one more application."""
        shutdown = running_shutdown()
        if shutdown.token.is_cancelled and not shutdown.is_joined:
            # Its token was cancelled while no lifespan ran.
            shutdown.forget()
            shutdown = shutdown._loop.shutdown = cls(shutdown._loop)
        shutdown._graces.append(graces)
        return shutdown

    def leave(self, graces: Graces) -> None:
        """Remove the limits of an application whose lifespan has ended."""
        self._graces.remove(graces)
        if not self._graces:
            self._stop_timer()
            self.forget()
            if self._loop.shutdown is self:
                self._loop.shutdown = None

    def forget(self) -> None:
        """Observe the requests of the loop no more."""
        self.in_flight.unobserve(self)
        self.detached.unobserve(self)

    @property
    def requests(self) -> dict[Any, None]:
        """The requests that have run for a while."""
        return self.in_flight.requests

    @property
    def _is_idle(self) -> bool:
        return not self.requests and not self.detached.running

    @property
    def is_joined(self) -> bool:
        """Whether the lifespan of an application runs."""
        return bool(self._graces)

    def begin_from_thread(self, message: str) -> None:
        """Begin the shutdown, from any thread or from a signal handler."""
        self._loop.call_from_thread(self.token.cancel_nowait, CancelationReason.SIGNAL, message)

    def request_is_old(self, request: Any) -> None:
        """Stop a request that has run for a while, if its grace is over."""
        if self._stopped_background:
            request.stop_all(self.cause())
        elif self._stopped_requests and not request.is_closed:
            request.stop(self.cause())

    def request_ended(self, request: Any) -> None:
        """Do nothing: who waits for the end of all waits for `InFlight` to be empty."""

    def work_began(self, work: Detached[Any]) -> None:
        """Stop detached work, if the grace of background work is over."""
        if self._stopped_background:
            work.cancel_nowait(CancelationReason.SIGNAL)

    def work_ended(self, work: Detached[Any]) -> None:
        """Do nothing, as `request_ended` does."""

    def cause(self) -> Cause:
        """Return the cause of the shutdown, which says when a client may come back."""
        retry_after = max(graces.retry_after for graces in self._graces)
        return Cause(CancelationReason.SIGNAL, None, headers={"retry-after": str(retry_after)})

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None:
        """Begin the shutdown: this is called by the token."""
        if self._loop.is_running_here():
            self._begin()
        else:
            self._loop.call_from_thread(self._begin)

    async def finish(self) -> None:
        """Wait, when a lifespan ends, for the requests that the server has left running, as long as their limits allow."""
        if not self.token.is_cancelled and (len(self._graces) > 1 or self._is_idle):
            return
        self.token.cancel_nowait(CancelationReason.SIGNAL)
        self._begin()  # The token may have been cancelled in a thread, whose call has not arrived yet.
        await self._know_the_youngest()
        if not self._is_idle:
            left = self._began + self._grace + self._background_grace + settings.cleanup_grace + _MARGIN
            with anyio.move_on_after(left - self._loop.time()):
                # A request may detach work, and such work may send requests.
                while not self._is_idle:
                    await self.in_flight.wait_empty()
                    await self.detached.wait_empty()
                await anyio.sleep(_SETTLING)

    async def _know_the_youngest(self) -> None:
        """Wait until the requests that arrived just before have been added."""
        await anyio.sleep(max(0.0, self._began + 2 * settings.listen_after - self._loop.time()))
        with anyio.move_on_after(_MARGIN):
            # On a busy loop timers are late.
            while self.in_flight.is_looked_after:  # noqa: ASYNC110
                await anyio.sleep(settings.listen_after)

    @property
    def _grace(self) -> float:
        return max(graces.grace for graces in self._graces)

    @property
    def _background_grace(self) -> float:
        return max(graces.background_grace for graces in self._graces)

    def _begin(self) -> None:
        if self._began < math.inf or not self.is_joined:
            return
        self._began = self._loop.time()
        self.refuses = any(graces.refuse_new for graces in self._graces)
        logger.info("shutdown begins (%s): requests have %g s to finish", self.token.cause, self._grace)
        self._wait(self._grace, self._stop_requests)

    def _stop_requests(self) -> None:
        self._stopped_requests = self.refuses = True
        with telling_everybody():
            for request in [request for request in self.requests if not request.is_closed]:
                request.stop(self.cause())
        self._wait(self._background_grace, self._stop_background)

    def _stop_background(self) -> None:
        self._stopped_background = True
        with telling_everybody():
            for request in list(self.requests):
                request.stop_all(self.cause())
            for work in list(self.detached.running):
                self.work_began(work)

    def _wait(self, seconds: float, then: Any) -> None:
        self._timer = None
        if seconds < math.inf:
            self._timer = self._loop.call_at(self._loop.time() + seconds, then)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def running_shutdown() -> Shutdown:
    """Return the running loop's `Shutdown`; in a worker thread, that of the loop which has started the thread."""
    try:
        loop = current_loop()
    except RuntimeError:
        return anyio.from_thread.run_sync(running_shutdown)
    shutdown: Shutdown | None = loop.shutdown
    if shutdown is None:
        shutdown = loop.shutdown = Shutdown(loop)
    return shutdown
