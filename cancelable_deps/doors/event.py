"""The event that is set when a request should stop, and its guard: some seconds between the event and the stop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self, final

import anyio

from ..kernel.reasons import CancelationReason
from ..kernel.remaining import next_deadline, seconds_left
from ..kernel.token import CancelationToken
from ..request.connection import new_block

if TYPE_CHECKING:
    from ..kernel.loops.base import Timer
    from ..kernel.token import Cause
    from ..request.state import RequestState


@final
class RequestCancellationEvent:
    """An event that is set when the request should stop, for a handler that chooses its own stopping point.

    It is set when the client leaves, and when the whole request is stopped (by the timeout of the decorator, route class
    or middleware). The normal end of a response does not set it. The event itself cancels nothing.

    One that `cancellation_event` provides is set some seconds before the timeout, too.
    """

    def __init__(self, state: RequestState, soft: float = 0) -> None:
        self._state = state
        self._soft = soft
        # One of its own is cancelled before the request is, or together with it.
        self._own: CancelationToken | None = None
        if soft:
            self._own = CancelationToken()
            self._of_request = new_block(state)
            state.token.listen(self)

    @property
    def _token(self) -> CancelationToken:
        return self._state.token if self._own is None else self._own

    @property
    def _cause(self) -> Cause | None:
        if self._own is None:
            return self._state.cause
        if self._own.cause is None and self.remaining() <= self._soft:
            # What has been set stays set, also if the timeout is moved later.
            self._own.cancel_nowait(CancelationReason.TIMEOUT, f"less than {self._soft:g} s are left")
        return self._own.cause

    def token_cancelled(self, token: CancelationToken, cause: Cause) -> None:
        """Be set for the cause of the whole request: this is called by its token."""
        assert self._own is not None
        self._own.cancel_because(cause)

    def is_set(self) -> bool:
        """Return whether the event is set. The call is cheap; the event loop must run in between to notice a disconnect."""
        return self._cause is not None

    def remaining(self) -> float:
        """Return the seconds until the request times out: the least of all limits that count; ``math.inf`` without one."""
        around = next_deadline()
        of_request = seconds_left(new_block(self._state) if self._own is None else self._of_request)
        return of_request if around is None else min(of_request, around[1])

    async def wait(self) -> CancelationReason:
        """Wait until the event is set, and return the reason.

        Listening ends when the handler returns. Call it in the handler: a timeout that is set or shortened while somebody
        waits is noticed when it is over.
        """
        while self._own is not None and self._cause is None and (left := self.remaining()) < math.inf:
            # The timeout may be moved meanwhile.
            with anyio.move_on_after(left - self._soft):
                return await self._own.wait()
        return await self._token.wait()

    @property
    def reason(self) -> CancelationReason | None:
        """The reason for which the request should stop; ``None`` while the event is not set."""
        cause = self._cause
        return None if cause is None else cause.reason

    @property
    def message(self) -> str | None:
        """The message of the cancellation: that given to ``cancel()``, or one that names the limit that was exceeded."""
        cause = self._cause
        return None if cause is None else cause.message

    def guard(self) -> StoppingGuard:
        """Return a context manager around work that stops at a safe point: the client's leaving gives it time, too.

        Inside, the client's leaving sets the event at once, and stops the request ``soft`` seconds later, or when the
        section is left. Without a guard a door around the handler stops it at once. Takes ``with`` and ``async with``.

        :raises RuntimeError: if the event is not one of `cancellation_event`.
        """
        if self._own is None:
            raise RuntimeError(
                "this event has no time between the client's leaving and the stop: use one of cancellation_event(soft=5)"
            )
        return StoppingGuard(self._state, self._own, self._soft)


class StoppingGuard:
    """A section in which the client's leaving cancels ``token`` at once, and the request ``soft`` seconds later."""

    def __init__(self, state: RequestState, token: CancelationToken, soft: float) -> None:
        self._state = state
        self._token = token
        self._soft = soft
        self._timer: Timer | None = None
        self._defers = False
        self._is_used = False

    def __enter__(self) -> Self:
        if self._is_used:
            raise RuntimeError("a guard is entered once: call event.guard() for each section")
        self._is_used = self._defers = True
        self._state.add_guard(self)
        return self

    def client_left(self) -> None:
        """Set the event, and let the request go on for some seconds."""
        if self._token.cancel_nowait(CancelationReason.DISCONNECT) or self._timer is None:
            self._state.loop.call_from_thread(self._wait)

    def _wait(self) -> None:
        if self._defers and self._timer is None:
            self._timer = self._state.loop.call_at(self._state.loop.time() + self._soft, self._end)

    def _end(self) -> None:
        defers, self._defers = self._defers, False
        if defers:
            self._state.remove_guard(self)
            self._state.defer_disconnect(-1)

    def __exit__(self, *exc_info: object) -> None:
        self._end()
        if self._timer is not None:
            self._state.loop.call_from_thread(self._timer.cancel)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        self.__exit__(*exc_info)
