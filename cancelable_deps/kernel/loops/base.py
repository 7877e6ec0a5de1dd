"""What the kernel needs of an event loop and of its scopes, as protocols: asyncio, trio and threads implement them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from contextvars import Context

    from anyio import CancelScope

    IsOurs = Callable[[object], bool]

    Late = tuple[Any, Any]
    """Where a scope is entered later: the task, and the scope of ours directly around it, if there is one."""


class Timer(Protocol):
    """Something that `EventLoop.call_at` will do."""

    def cancel(self) -> None: ...


class Worker(Protocol):
    """A task that belongs to nobody but its starter."""

    def cancel(self) -> None: ...

    @property
    def done(self) -> bool: ...

    async def join(self) -> None:
        """Wait until it has ended."""


class EventLoop(Protocol):
    """The running loop, asyncio's or trio's."""

    is_trio: bool
    home: EventLoop | None
    """The loop itself; for a block in a thread, the loop that has started the thread, if one has."""

    is_thread: bool
    scopes: ScopeFamily
    task_without_scope: Callable[[], object] | None
    """Returns the running task, if scopes may be entered later in it; is ``None`` where they are entered at once."""

    time: Callable[[], float]
    extras: dict[Any, Any]
    in_flight: Any
    """The requests of the loop, if it has some: asked for each request, so no entry in `extras`."""

    shutdown: Any
    """What ends the loop's requests at shutdown, if anything does: asked for each request, so no entry in `extras`."""

    def is_running_here(self) -> bool: ...

    def current_task(self) -> object: ...

    def times_asked(self, task: object) -> int:
        """How often ``task``, which runs, was asked to end, as far as it has been told."""
        ...

    def is_cancelled_by(self, exc: BaseException, asked: int) -> bool:
        """Whether ``exc`` is a cancellation of the running task, which had been asked to end ``asked`` times before."""
        ...

    def wake(self) -> None:
        """What has just been scheduled, perhaps by a signal handler, is not to wait until the loop wakes up by itself."""

    lines: dict[float, Any]
    """By their limits, those in which somebody waits for a deadline."""

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer: ...

    def call_from_thread(self, callback: Callable[..., object], *args: object) -> None: ...

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context) -> Worker: ...


class PoliteScope(Protocol):
    """The scope around one block, begun and ended in one task."""

    def begin(self, deadline: float, late: Late | None) -> None:
        """Enter the scope, now or belatedly at that place. ``deadline`` is told, and strikes nobody."""

    @property
    def task(self) -> object:
        """The task in which it was begun; ``None`` before and after."""
        ...

    def end(self, exc: BaseException | None) -> BaseException | None:
        """Leave the scope; what is left of ``exc`` once our own cancellation is taken out of it."""

    spares: Callable[..., bool] | None
    """Asked before a cancellation of this scope is delivered; if it says so, the scope is held and nothing is."""

    def cancel_politely(self, why: str) -> None: ...

    def reaches(self, inner: Any) -> bool:
        """Whether what this scope delivers arrives in ``inner``, another one of the same task: no shield stands between."""
        ...

    def take_for_delivered(self) -> None:
        """The task has been told by an exception, and cleans up."""

    @property
    def is_delivered(self) -> bool:
        """Whether the task has seen the cancellation, or that of a scope further out."""
        ...

    def hold(self) -> None:
        """Let no cancellation of ours through until `resume`; those of others pass."""

    def resume(self) -> None: ...

    def release(self) -> None:
        """Let no cancellation of ours through any more, nor the end of a grace; those of others pass."""

    def move_deadline(self, deadline: float) -> None: ...

    @property
    def is_lost(self) -> bool:
        """Whether a scope inside took our cancellation for its own, so that the work went on in error."""
        ...


class Gate(Protocol):
    """One scope around a task that is cancelled from a scope further out."""

    def begin(self) -> None: ...

    def end(self, exc: BaseException | None) -> BaseException | None: ...

    def take_for_delivered(self) -> None:
        """The task is told in another way: what it does now is its cleanup."""

    @property
    def is_delivered(self) -> bool:
        """As that of a `PoliteScope`."""
        ...

    @property
    def is_lost(self) -> bool:
        """As that of a `PoliteScope`."""
        ...

    def fire(self) -> None:
        """What is around it is cancelled, or about to be."""

    @property
    def is_passed_by(self) -> bool:
        """Whether what it was told came from further out than the group that it belongs to, and is to go on outwards."""
        ...

    def pass_on(self) -> None:
        """After its end: the group raises what is to go on outwards, so that the task has been told."""

    def expect(self, is_cancelled: Callable[[], bool]) -> None:
        """Let nothing through for two passes of the loop, after which what is around it may be cancelled."""

    def watch(self, coro: Awaitable[Any]) -> Awaitable[Any]:
        """What to await in place of ``coro``, so that the gate sees a cancellation arrive."""
        ...


class TaskGate(Protocol):
    """A gate around all that is left of a task that is not ours."""

    def put_around(self, ended: Callable[[bool], object]) -> None:
        """See to it that ``ended(was_cancelled)`` is called when the calling task has ended."""


class ScopeFamily(Protocol):
    """The scopes of one backend, by its hooks or by its public API; a module."""

    def polite_scope(self, loop: EventLoop, grace: float) -> PoliteScope: ...

    def polite_gate(self, loop: EventLoop, grace: float, is_ours: IsOurs) -> Gate:
        """A scope that makes a cancellation from further out polite, if ``is_ours(None)`` or a block of ours has struck."""
        ...

    def task_gate(self, loop: EventLoop, grace: float, is_ours: IsOurs) -> TaskGate: ...

    def tell(self, loop: EventLoop, error: BaseException) -> None:
        """``error`` has told the current task to stop, and is on its way through the scopes that are open in the task."""

    def told_scope(self, loop: EventLoop, scope: CancelScope, gates: dict[Any, Gate]) -> CancelScope:
        """``scope`` itself, or where no hook tells the ``gates`` inside of it, one in its place that does when cancelled."""
        ...

    def task_finder(self, loop: Any) -> Callable[[], object] | None:
        """What is to be the loop's `EventLoop.task_without_scope`."""
        ...
