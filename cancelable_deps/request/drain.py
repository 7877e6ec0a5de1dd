"""The end of all requests of one event loop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.from_thread

from ..kernel.log import logger
from ..kernel.loops.current import current_loop
from ..kernel.reasons import CancelationReason
from ..kernel.settings import settings
from ..kernel.token import CancelationToken, Cause, telling_everybody
from .in_flight import in_flight_of

if TYPE_CHECKING:
    from ..kernel.loops.base import EventLoop, Timer

# What a request may take beyond all graces to end, and its response to leave the process.
_MARGIN = 1.0
_SETTLING = 0.1


class Graces(NamedTuple):
    """What the lifespan of one application allows its requests when the server shuts down."""

    grace: float
    background_grace: float
    retry_after: int
    refuse_new: bool


class Drain:
    """Knows the requests in flight that are older than some milliseconds, and ends them when the token is cancelled.

    The applications that share an event loop share one; of their limits the longest count.
    """

    refuses = False
    _began = math.inf
    _is_cut = False
    _is_background_cut = False
    _timer: Timer | None = None

    def __init__(self, loop: EventLoop) -> None:
        self.token = CancelationToken()
        self.in_flight = in_flight_of(loop)
        self.in_flight.observers += (self,)
        self._loop = loop
        self._graces: list[Graces] = []
        self.token.listen(self)

    @classmethod
    def joined(cls, graces: Graces) -> Drain:
        """The running loop's, with the limits of one more application."""
        drain = running_drain()
        if drain.token.is_cancelled and not drain.is_joined:
            # Somebody has used the token without a lifespan.
            drain.forget()
            drain = drain._loop.drain = cls(drain._loop)
        drain._graces.append(graces)
        return drain

    def leave(self, graces: Graces) -> None:
        self._graces.remove(graces)
        if not self._graces:
            self._stop_timer()
            self.forget()
            if self._loop.drain is self:
                self._loop.drain = None

    def forget(self) -> None:
        """Know of no more requests."""
        self.in_flight.observers = tuple(other for other in self.in_flight.observers if other is not self)

    @property
    def requests(self) -> dict[Any, None]:
        """The requests that have run for a while."""
        return self.in_flight.requests

    @property
    def is_joined(self) -> bool:
        return bool(self._graces)

    def begin_from_thread(self, message: str) -> None:
        """From any thread, or a signal handler."""
        self._loop.call_from_thread(self.token.cancel_nowait, CancelationReason.SIGNAL, message)

    def request_is_old(self, request: Any) -> None:
        """Stop a request that has run for a while, if it is too late for it."""
        if self._is_background_cut:
            request.stop_all(self.cause())
        elif self._is_cut and not request.is_closed:
            request.stop(self.cause())

    def cause(self) -> Cause:
        """Return the cause of the shutdown, which says when a client may come back."""
        retry_after = max(graces.retry_after for graces in self._graces)
        return Cause(CancelationReason.SIGNAL, None, headers={"retry-after": str(retry_after)})

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None:
        """Our token tells us that the shutdown begins."""
        if self._loop.is_running_here():
            self._begin()
        else:
            self._loop.call_from_thread(self._begin)

    async def finish(self) -> None:
        """A lifespan ends: wait for the requests that the server has left behind, as long as their limits allow."""
        if not self.token.is_cancelled and (len(self._graces) > 1 or not self.requests):
            return
        self.token.cancel_nowait(CancelationReason.SIGNAL)
        self._begin()  # Unless it is on its way from a thread.
        await self._know_the_youngest()
        if self.requests:
            left = self._began + self._grace + self._background_grace + settings.cleanup_grace + _MARGIN
            with anyio.move_on_after(left - self._loop.time()):
                await self.in_flight.wait_empty()
                await anyio.sleep(_SETTLING)

    async def _know_the_youngest(self) -> None:
        """Wait until a request that came just before is known to us."""
        await anyio.sleep(max(0.0, self._began + 2 * settings.listen_after - self._loop.time()))
        with anyio.move_on_after(_MARGIN):
            # Timers are late where much is to do.
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
        self._wait(self._grace, self._cut)

    def _cut(self) -> None:
        self._is_cut = self.refuses = True
        with telling_everybody():
            for request in [request for request in self.requests if not request.is_closed]:
                request.stop(self.cause())
        self._wait(self._background_grace, self._cut_background)

    def _cut_background(self) -> None:
        self._is_background_cut = True
        with telling_everybody():
            for request in list(self.requests):
                request.stop_all(self.cause())

    def _wait(self, seconds: float, then: Any) -> None:
        self._timer = None
        if seconds < math.inf:
            self._timer = self._loop.call_at(self._loop.time() + seconds, then)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def running_drain() -> Drain:
    """The running loop's own; in a worker thread, that of the loop which has started it."""
    try:
        loop = current_loop()
    except RuntimeError:
        return anyio.from_thread.run_sync(running_drain)
    drain: Drain | None = loop.drain
    if drain is None:
        drain = loop.drain = Drain(loop)
    return drain
