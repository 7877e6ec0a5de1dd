"""How far the response of a request has come, and what that means for a stop that is due."""

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
    from ..kernel.token import Cause


class ResponseProgress(Client):
    """The part of a request that has to do with its response."""

    is_aborted = False
    """Nothing more of the response may be sent: it ends without its last chunk."""

    response_has_started = False
    """Whether anything of a response has left the innermost place where we watch."""

    response_is_out = False
    """Whether anything of a response has been sent to the server."""

    body_has_begun = False
    response_is_starting = False
    """The start of a response is on its way: whether it got out could not be told of one that is stopped now."""

    drops_response = False
    """What the application has yet to send tells of a client that left, and is no answer to one that is there."""

    stream_was_cancelled = False
    """The task that sent a stream was cancelled, and not by us."""

    is_finished = False
    """The handler's result is there: nothing of ours stops what sends it."""

    aborted_by: CancelationError | None = None
    """The error that stopped a stream further in; its response is to be aborted."""

    cannot_be_aborted = False
    """That error is to be raised into the server, which closes the connection then."""

    ends_by_itself = False
    """Whether what listens inside the application was told, and has time."""

    cleanup_grace: float | None = None
    _postponed: Postponed | None = None
    _guard: Postponed | None = None

    @property
    def doors(self) -> list[Any]:
        """The blocks around the whole handler, outermost first."""
        raise NotImplementedError

    def is_work(self, task: object) -> bool:
        """Return whether a cancellation of the request reaches ``task`` first."""
        raise NotImplementedError

    def complete_response(self) -> None:
        """Note that all of the response is on its way to the server."""
        raise NotImplementedError

    def tell_listeners(self) -> None:
        """Answer what inside the application listens for a disconnect, and give it the time to end by itself.

        As long as a cleanup may take: what it does then is one, a stream's background and the callbacks of its framework
        included. What is left after that is cancelled.
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

    def postpones(self, block: Stoppable, cause: Cause) -> bool:
        """Return whether ``block`` is stopped later, or not at all, although the request is."""
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
        """Return whether a finished result is being sent, and not kept by something between the handler and us."""
        if self.response_is_out and not self.body_has_begun and self.has_watchers:
            # It has told its length and never makes its first chunk; that can only be a stream.
            self.tell_listeners()
        return self.response_is_out

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Let nothing of ours reach the request's tasks inside; what is due then strikes at the end."""
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
        """Note that the start of a response is on its way; `start_is_out` is to follow."""
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

    def finish(self) -> None:
        """Note that the handler's result is there, and is the response: what of ours has not struck yet never will."""
        self.is_finished = True
        if self.cause is not None:
            for door in self.doors:
                door.finish()

    def note_sender(self) -> None:
        """Note that the calling task sends a stream. If it is one of the application's own, its cleanup has its grace."""
        if not self.is_work(self.loop.current_task()):
            # Starlette and others send a stream from a child task, and cancel that when they hear that the client has
            # left; anyio and trio repeat a cancellation at every `await`, also in the cleanup of the stream's generator.
            scope = self.loop.scopes.task_scope(self.loop, self.grace, lambda origin: self.cause is not None)
            scope.put_around(self._stream_ended)

    def _stream_ended(self, was_cancelled: bool) -> None:
        """Spare what comes after a stream that was told to end, and has: its background, the end of its framework."""
        self.stream_was_cancelled = was_cancelled and self.cause is None
        if self.ends_by_itself and not self.is_closed:
            self.complete_response()

    def forget_stops(self) -> None:
        """Stop nothing any more that has been postponed."""
        if self._postponed is not None:
            self._postponed.forget()
