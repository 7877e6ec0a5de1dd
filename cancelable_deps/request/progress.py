"""The progress of a response, and its effect on a cancellation that is due."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..kernel.settings import settings
from .client import Client
from .postponed import Postponed, Stoppable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..kernel.errors import CancelationError
    from ..kernel.members import Members
    from ..kernel.token import Cause


class ResponseProgress(Client):
    """The part of a request that concerns its response."""

    is_aborted = False
    """Whether the response is aborted: nothing more is sent, and it ends without its last chunk."""

    status = 0
    """The status of the response, if its length was known when it started."""

    response_has_started = False
    """Whether the response has started, as the innermost `ResponseWatch` sees it."""

    end_is_being_sent = False
    """Whether the server is sending the last part of the response."""

    response_is_out = False
    """Whether a response that is complete in itself has been passed on to the server."""

    body_has_begun = False
    response_is_starting = False
    """Whether the start of the response is being sent. After a cancellation now nobody could say if it was sent."""

    drops_response = False
    """Whether the application's response is dropped: it is made for a client that left, and ours is still there."""

    stream_was_cancelled = False
    """Whether the task that sent a stream was cancelled by other code."""

    aborted_by: CancelationError | None = None
    """The error that stopped a stream further in, whose response is to be aborted."""

    cannot_be_aborted = False
    """Whether `aborted_by` is to be raised into the server, which then closes the connection."""

    ends_by_itself = False
    """Whether the listeners inside the application have been told of a disconnect, and have time to end."""

    cleanup_grace: float | None = None
    grace_limit: float | None = None
    """The most that `shorten_grace` has left to any cleanup in the request."""

    _watchers: Members[Any]
    _postponed: Postponed | None = None
    _guard: Postponed | None = None
    _when_end_is_out: Postponed | None = None

    @property
    def doors(self) -> list[Any]:
        """The blocks around the whole handler, outermost first."""
        raise NotImplementedError

    @property
    def deadline(self) -> float:
        """The time at which the request times out, on the clock of the loop; ``math.inf`` if never."""
        return min((door.deadline for door in self.doors), default=math.inf)

    def is_work(self, task: object) -> bool:
        """Return whether a cancellation of the request reaches ``task`` first."""
        raise NotImplementedError

    def complete_response(self) -> None:
        """Note that the last part of the response is being sent."""
        raise NotImplementedError

    def tell_listeners(self) -> None:
        """Report a disconnect to the listeners inside the application, and give them time to end by themselves.

        They have the time of a cleanup, because they do one: also a stream's background and the callbacks of its
        framework. Work that is left after that is cancelled.
        """
        if self._postponed is None or not self.ends_by_itself:
            self.ends_by_itself = True
            earlier, self._postponed = self._postponed, Postponed(self.loop, self.grace)
            if earlier is not None:
                earlier.hand_on(self._postponed)
        self.reader.tell_listeners()

    @property
    def grace(self) -> float:
        return settings.cleanup_grace if self.cleanup_grace is None else self.cleanup_grace

    def shorten_grace(self, grace: float) -> None:
        """Give each cleanup in the request, and what is postponed until listeners have ended, ``grace`` seconds at most.

        This holds for the blocks that are open, as `Stoppable.shorten_grace` says, and for those that are entered later.
        May be called in any thread, before or after the request is cancelled. Never lengthens a grace.
        """
        if not self.loop.is_running_here():
            self.loop.call_from_thread(self.shorten_grace, grace)
            return
        self.cleanup_grace = min(self.grace, grace)
        self.grace_limit = grace if self.grace_limit is None else min(self.grace_limit, grace)
        if self._postponed is not None:
            self._postponed.shorten(grace)
        for watcher in list(self._watchers):
            watcher.shorten_grace(grace)

    def postpones(self, block: Stoppable, cause: Cause) -> bool:
        """Return whether ``block`` is stopped later than the request, or not at all."""
        if cause is not self.cause or self.is_closed or not self.loop.is_running_here():
            return False
        if self._guard is not None:
            self._guard.add(block, cause)
            return True
        if self._postponed is None:
            if self.response_is_starting or self.is_finished:
                self._postponed = Postponed(self.loop, self.grace)
            elif self.has_watchers:
                self.drops_response = not self.response_has_started
                self.tell_listeners()
        if self._postponed is None:
            return False
        if self._postponed.is_over:
            return self.is_finished and self._is_on_its_way()
        self._postponed.add(block, cause)
        return True

    def _is_on_its_way(self) -> bool:
        """Return whether a finished result is being sent, and not held back by a middleware inside of the door."""
        if self.response_is_out and not self.body_has_begun and self.has_watchers:
            # Its length is known, and its first chunk does not come: that can only be a stream.
            self.tell_listeners()
        return self.response_is_out

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Keep our cancellations from the request's tasks inside; deliver the one that is due at the end."""
        guard = self._guard = Postponed(self.loop, math.inf)
        doors = self.doors
        for door in doors:
            door.hold()
        try:
            yield
        finally:
            self._guard = None
            for door in doors:
                door.resume()
            guard.end()

    def start_response(self) -> None:
        """Note that the start of a response is being sent; `start_is_out` is to follow."""
        self.response_has_started = self.response_is_starting = True
        if self.cause is not None:
            for door in self.doors:
                door.hold()

    def start_is_out(self) -> None:
        """Note that the start of a response is sent: a stream can be stopped from here on."""
        self.response_is_starting = False
        if self.cause is None or self.is_finished:
            return
        if self._postponed is not None and not self.ends_by_itself:
            postponed, self._postponed = self._postponed, None
            postponed.end()
        for door in self.doors:
            door.resume()

    def end_is_out(self) -> None:
        """Note that the last part of the response is sent, and stop the background work if that was postponed."""
        self.end_is_being_sent = False
        if self._when_end_is_out is not None:
            postponed, self._when_end_is_out = self._when_end_is_out, None
            postponed.end()

    def postpone_until_end_is_out(self, stoppable: Stoppable, cause: Cause) -> bool:
        """Stop ``stoppable`` when the last part of the response is sent; return whether it is being sent.

        A server that is interrupted while it sends may not get its connection ready for the next request. It has the
        time of a cleanup, as the client may not read.
        """
        if self.end_is_being_sent and self._when_end_is_out is None:
            self._when_end_is_out = Postponed(self.loop, self.grace)
            self._when_end_is_out.add(stoppable, cause)
        return self.end_is_being_sent

    def finish(self) -> None:
        """Note that the handler's result is there, and drop a cancellation that is not delivered yet."""
        self.is_finished = True
        if self.cause is not None:
            for door in self.doors:
                door.finish()

    def note_sender(self) -> None:
        """Note that the running task sends a stream. If the application has started it, its cleanup gets its grace."""
        if not self.is_work(self.loop.current_task()):
            # Starlette and others send a stream from a child task, and cancel that task when the client has left. anyio
            # and trio repeat a cancellation at every `await`, also in the cleanup of the stream's generator.
            scope = self.loop.scopes.task_scope(self.loop, self.grace, lambda origin: self.cause is not None)
            scope.put_around(self._stream_ended)

    def _stream_ended(self, was_cancelled: bool) -> None:
        """Cancel nothing after a stream that has ended as it was told to: neither its background nor its framework."""
        self.stream_was_cancelled = was_cancelled and self.cause is None
        if self.ends_by_itself and not self.is_closed:
            self.complete_response()

    def forget_stops(self) -> None:
        """Drop the cancellations that have been postponed."""
        if self._postponed is not None:
            self._postponed.forget()
