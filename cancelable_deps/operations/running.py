"""The operations that run in this worker."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from threading import RLock
from typing import TYPE_CHECKING, Any, Final, Protocol, final

from ..hosts.starlette import route_template
from ..kernel.cancelable import Cancelable, block_of
from ..kernel.reasons import CancelationReason
from .model import Kind, Operation, OperationState, Progress
from .names import ANYONE, checked_labels, checked_owner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..kernel.loops.base import EventLoop
    from ..kernel.token import Cause
    from ..request.state import RequestState
    from .clock import Clock
    from .names import Owner

# One that can be taken twice, because a signal handler may log while its own thread makes an id.
making: Final = RLock()
"""Held while an operation or its id is made, for which several threads may ask."""

_STOPPED: Final = (OperationState.STOPPING, OperationState.CANCELLED)


class Home(Protocol):
    """The worker of a running operation, as far as that uses it."""

    @property
    def worker(self) -> str:
        """The name of the worker."""
        ...

    @property
    def loop(self) -> EventLoop: ...

    @property
    def clock(self) -> Clock: ...

    def name(self, running: Running) -> str:
        """Return a new id for an operation, by which it is found from now on."""
        ...

    def name_as(self, running: Running, id: str) -> None:
        """Have an operation found by an id that its client has chosen."""

    def claimed(self, running: Running) -> None:
        """Note that the owner of an operation is known."""

    def changed(self, running: Running, kind: str) -> None:
        """Note that an operation has changed: its ``"state"``, or its ``"progress"``."""


class Running:
    """An operation that runs in this worker, or has ended here. It is found by its `id`.

    :ivar owner: who may stop it and read of it; ``None``: operators only.
    :ivar key: the group that it belongs to.
    :ivar labels: strings by which it is listed.
    """

    kind: Kind
    method: str | None = None
    name: str | None = None
    owner: str | None = None
    key: str | None = None
    labels: Mapping[str, str] = {}
    progress_so_far: Progress | None = None
    has_record = False
    """Whether the store has a record of it, as of background work."""

    is_waiting = False
    was_stopped_late = False
    """Whether it was cancelled when its response was complete, and background work was left."""

    ended_at: float | None = None
    end_state: OperationState | None = None
    failure: str | None = None
    _id: str | None = None

    def __init__(self, home: Home, started: float) -> None:
        self.home = home
        self.started = started
        self.started_at = home.clock.today() - timedelta(seconds=home.loop.time() - started)
        self.listeners: list[Any] = []
        """Called with the operation when it changes."""

    @property
    def id(self) -> str:
        """The id of the operation: its client's, or one that is made when it is first asked for."""
        if self._id is None:
            with making:
                if self._id is None:
                    self._id = self.home.name(self)
        return self._id

    @property
    def known_id(self) -> str | None:
        """The id, if somebody has asked for it: otherwise nobody can ask for the operation."""
        return self._id

    def use_id(self, id: str) -> None:
        """Use an id that a client has chosen."""
        self._id = id
        self.home.name_as(self, id)

    @property
    def route(self) -> str | None:
        """The path template of the route."""
        return None

    @property
    def cause(self) -> Cause | None:
        """The cause of its cancellation."""
        raise NotImplementedError

    @property
    def deadline(self) -> float:
        """When it times out, on the clock of the loop."""
        return math.inf

    @property
    def state(self) -> OperationState:
        """Its state at this moment."""
        if self.end_state is not None:
            return self.end_state
        if self.is_waiting:
            return OperationState.WAITING
        return OperationState.RUNNING if self.cause is None else OperationState.STOPPING

    @property
    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self.end_state is not None

    def stop(self, cause: Cause, grace: float | None = None) -> None:
        """Cancel it.

        :param grace: seconds for its cleanup, if they are fewer than its own.
        """
        raise NotImplementedError

    def supersede(self, cause: Cause) -> None:
        """Stop it for a newer one, unless its result is there."""
        self.stop(cause)

    def set_waiting(self, is_waiting: bool) -> None:
        """Note whether it waits for its turn."""
        self.is_waiting = is_waiting
        self.home.changed(self, "state")

    def belongs_to(self, owner: Owner) -> bool:
        """Return whether ``owner`` may stop it and read of it."""
        return owner is ANYONE or (self.owner is not None and self.owner == owner)

    def end(self, state: OperationState) -> None:
        """Note that it has ended."""
        self.ended_at = self.home.loop.time()
        self.end_state = state

    def report(self, message: str | None, metadata: Mapping[str, Any] | None) -> None:
        """Note its progress.

        :raises TypeError: if it is not what JSON can express.
        :raises ValueError: if it is a number that JSON does not have, such as NaN.
        """
        progress = Progress(message=message, metadata=dict(metadata or {}))
        # Now, and not when it is sent: by then nobody knows whose mistake it was.
        json.dumps([progress.message, progress.metadata], allow_nan=False)
        self.progress_so_far = progress
        self.home.changed(self, "progress")

    @property
    def elapsed(self) -> float:
        """Seconds since its start, or from its start to its end."""
        return (self.home.loop.time() if self.ended_at is None else self.ended_at) - self.started

    def view(self) -> Operation:
        """Return what it is at this moment."""
        now, clock = self.home.clock.today(), self.home.loop.time()
        state = self.state
        cause = self.cause if state in _STOPPED else None
        ended = None if self.ended_at is None else now - timedelta(seconds=clock - self.ended_at)
        deadline = self.deadline
        route = self.route  # It brings the name along.
        # Without pydantic's checks, as all of it comes from here: a list has many.
        return Operation.model_construct(
            id=self.id,
            kind=self.kind,
            name=self.name,
            owner=self.owner,
            key=self.key,
            labels=self.labels,
            method=self.method,
            route=route,
            worker=self.home.worker,
            state=state,
            started=self.started_at,
            ended=ended,
            elapsed=self.elapsed,
            deadline=None if deadline == math.inf or ended else now + timedelta(seconds=deadline - clock),
            reason=None if cause is None else cause.reason,
            message=self.failure or message_of(cause),
            progress=self.progress_so_far,
        )


def message_of(cause: Cause | None) -> str | None:
    """Return the text of a cause that others may read."""
    if cause is None:
        return None
    # The texts of these two may show internals; the client of the request does not see them either.
    return None if cause.reason in (CancelationReason.ERROR, CancelationReason.PARENT) else cause.message


@final
class RunningRequest(Running):
    """A request or WebSocket that runs in this worker."""

    is_listened_to = False
    """Whether the request is listened to for the sake of its operation."""

    def __init__(self, home: Home, request: RequestState) -> None:
        super().__init__(home, request.started)
        self.request: RequestState | None = request
        scope = request.scope
        self.kind = "websocket" if scope["type"] == "websocket" else "request"
        self.method = scope.get("method")
        self._cause: Cause | None = None
        self._route: str | None = None

    @property
    def route(self) -> str | None:
        if self.request is not None and self._route is None:
            # Found belatedly: a middleware may have run for long before the router.
            self._route = route_template(self.request.scope)
            self.name = getattr(self.request.scope.get("route"), "name", None)
        return self._route

    @property
    def cause(self) -> Cause | None:
        return self._cause if self.request is None else self.request.cause

    @property
    def deadline(self) -> float:
        request = self.request
        return math.inf if request is None else request.deadline

    def stop(self, cause: Cause, grace: float | None = None) -> None:
        request = self.request
        if request is None:
            return
        if grace is not None:
            request.shorten_grace(grace)
        if request.is_closed:
            self.was_stopped_late = True
            request.stop_background(cause)
        else:
            request.stop(cause)

    def supersede(self, cause: Cause) -> None:
        # What is left is the sending of the response, the end of its dependencies, and its background.
        if self.request is not None and not self.request.is_closed:
            self.stop(cause)

    def end(self, state: OperationState) -> None:
        """Note that it has ended, and forget the request."""
        _ = self.route
        self._cause = self.cause
        self.request = None
        super().end(state)


class RefusedRequest(Running):
    """A request that was cancelled before it came, and has not been started."""

    kind = "request"

    def __init__(self, home: Home, cause: Cause) -> None:
        super().__init__(home, home.loop.time())
        self._cause = cause

    @property
    def cause(self) -> Cause | None:
        return self._cause

    def stop(self, cause: Cause, grace: float | None = None) -> None:
        """Do nothing, because it has ended."""


class RunningBlock(Running):
    """Work in a `Cancelable` that runs in this worker, without a request."""

    def __init__(self, home: Home, cancelable: Cancelable, kind: Kind) -> None:
        super().__init__(home, home.loop.time())
        self.cancelable = cancelable
        self.kind = kind
        cancelable.on_progress(self.report)

    @property
    def cause(self) -> Cause | None:
        return self.cancelable.token.cause

    @property
    def deadline(self) -> float:
        return self.cancelable.deadline if self.cancelable.is_active else math.inf

    def begin(self) -> None:
        """Be the operation of whatever is logged in the block, which is about to be entered, until its end."""
        block_of(self.cancelable).operation = self

    def end(self, state: OperationState) -> None:
        super().end(state)
        block_of(self.cancelable).operation = None

    def stop(self, cause: Cause, grace: float | None = None) -> None:
        if grace is not None:
            block_of(self.cancelable).shorten_grace(grace)
        self.cancelable.token.cancel_because(cause)


@final
class RunningOperation:
    """A request as an operation, which its handler gets by `RequestOperation`."""

    def __init__(self, running: RunningRequest) -> None:
        self._running = running

    @property
    def id(self) -> str:
        """The id by which the request is stopped: its client's, or one that cannot be guessed."""
        return self._running.id

    @property
    def owner(self) -> str | None:
        """Who may stop it and read of it; ``None``: operators only."""
        return self._running.owner

    @property
    def key(self) -> str | None:
        """The key that `latest_only` or `at_most` has counted it under."""
        return self._running.key

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels by which it is listed."""
        return self._running.labels

    def view(self) -> Operation:
        """Return it as others see it at this moment."""
        return self._running.view()

    def claim(self, owner: object) -> None:
        """Make ``owner`` the one who may stop this request and read of it. A cancel that is waiting for it strikes now.

        :param owner: a string, a number or a UUID, such as the id of the user.
        :raises RuntimeError: if it has another owner already.
        :raises TypeError: if ``owner`` is something else, such as ``None``.
        :raises ValueError: if it is empty, longer than 256 characters, or has control characters.
        """
        running, claimed = self._running, checked_owner(owner)
        if running.owner not in (None, claimed):
            raise RuntimeError("this operation has another owner already, and can have one only")
        running.owner = claimed
        running.home.claimed(running)

    def label(self, **labels: str) -> None:
        """Add labels, by which it can be listed and stopped: ``operation.label(stage="render")``.

        :raises TypeError: if one is no string, number or boolean.
        :raises ValueError: if there are more than 16, or one is longer than 256 characters or has control characters.
        """
        running = self._running
        running.labels = checked_labels({**running.labels, **labels})
        running.home.changed(running, "state")

    def progress(self, message: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        """Note how far the request has come, for those who list it.

        :param metadata: what JSON can express; ``done`` and ``total`` make a progress bar of the page.
        :raises TypeError: if it is something else.
        :raises ValueError: if it has a number that JSON does not have, such as NaN.
        """
        self._running.report(message, metadata)
