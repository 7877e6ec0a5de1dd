"""The protocols of event loops and their scopes, as the kernel uses them, implemented for asyncio, trio and threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from contextvars import Context

    from anyio import CancelScope

    IsOurs = Callable[[object], bool]

    Late = tuple[Any, Any]
    """The place of a scope that is entered later: its task, and the `PoliteScope` directly around it, or ``None``."""


class Timer(Protocol):
    """A scheduled call by `EventLoop.call_at`."""

    def cancel(self) -> None:
        """Prevent the call."""


class Worker(Protocol):
    """A background task outside of all task groups."""

    def cancel(self) -> None:
        """Cancel the task, without waiting for its end."""

    @property
    def done(self) -> bool:
        """Whether the task has ended."""
        ...

    async def join(self) -> None:
        """Wait until the task has ended."""


class Event(Protocol):
    """An event of asyncio or trio."""

    def set(self) -> object: ...

    async def wait(self) -> object:
        """Wait until the event is set."""


class EventLoop(Protocol):
    """An event loop of asyncio or trio, or the substitute for one in a worker thread."""

    is_trio: bool
    home: EventLoop | None
    """The loop itself; for a block in a thread, the loop that has started the thread, or ``None``."""

    is_thread: bool
    scopes: ScopeFamily
    task_without_scope: Callable[[], object] | None
    """Returns the running task if scopes may be entered later in it, otherwise ``None``. It is itself ``None`` where
    scopes are always entered at once."""

    time: Callable[[], float]
    extras: dict[Any, Any]
    """The objects that other files keep for each loop."""

    in_flight: Any
    """The requests of the loop, if it has some: asked for each request, so no entry in `extras`."""

    shutdown: Any
    """The object that ends the loop's requests at shutdown, or ``None``. Not in `extras`, as each request reads it."""

    def is_running_here(self) -> bool:
        """Return whether the loop runs in the current thread."""
        ...

    def current_task(self) -> object:
        """Return the running task; ``None`` outside of a task."""
        ...

    def times_asked(self, task: object) -> int:
        """Return how often the running ``task`` has been cancelled, without a cancellation that is yet to be raised."""
        ...

    def is_cancelled_by(self, exc: BaseException, asked: int) -> bool:
        """Return whether ``exc`` cancels the running task, which had been cancelled ``asked`` times before."""
        ...

    def wake(self) -> None:
        """Wake the loop up, so that it runs callbacks that a signal handler has scheduled."""

    timeout_queues: dict[float, Any]
    """The queues of waiting deadlines, by their limits in seconds."""

    def make_event(self) -> Event:
        """Return an event of this loop: that of anyio costs each waiter a coroutine more."""
        ...

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        """Call ``callback`` at the time ``when`` of the loop's clock."""
        ...

    def call_from_thread(self, callback: Callable[..., object], *args: object) -> None:
        """Call ``callback`` soon in the loop; may be called in any thread. Without effect if the loop is closed."""

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]], context: Context) -> Worker:
        """Start a background task that runs ``work`` in ``context``."""
        ...


class PoliteScope(Protocol):
    """The scope around one block, begun and ended in one task."""

    def begin(self, deadline: float, late: Late | None) -> None:
        """Enter the scope, now or later at the place ``late``. ``deadline`` is only reported, and cancels nothing."""

    @property
    def task(self) -> object:
        """The task in which the scope is open; ``None`` before and after."""
        ...

    def end(self, exc: BaseException | None) -> BaseException | None:
        """Leave the scope, and return the rest of ``exc`` without the cancellation of this scope."""

    spares: Callable[..., bool] | None
    """Called before a cancellation of this scope is delivered; if it returns true, nothing is delivered and the scope
    is held."""

    def cancel_politely(self, why: str) -> None:
        """Cancel the scope: deliver the cancellation once, and repeat it at every ``await`` when the grace is over."""

    def reaches(self, inner: Any) -> bool:
        """Return whether no shield is between this scope and ``inner``, another scope of the same task."""
        ...

    def take_for_delivered(self) -> None:
        """Note that the task cleans up already, because an exception has stopped it."""

    @property
    def is_delivered(self) -> bool:
        """Whether the task has received the cancellation of this scope, or of a scope further out."""
        ...

    @property
    def delivered_at(self) -> float:
        """When that was, on the clock of the loop. There is no such time before, and none for a block in a thread."""
        ...

    def hold(self) -> None:
        """Delay cancellations of this package until `resume`; others pass."""

    def resume(self) -> None:
        """End `hold`, and deliver a cancellation that it has delayed."""

    def release(self) -> None:
        """Stop all cancellations of this package, and the end of a grace, for good; others pass."""

    def move_deadline(self, deadline: float) -> None:
        """Change the deadline that is reported."""

    def shorten_grace(self, grace: float) -> None:
        """Give the cleanup in this scope, and in the scopes inside that no shield hides, at most ``grace`` seconds.

        A cleanup that runs now ends its grace at the present end or ``grace`` seconds from now, whichever is earlier.
        One that begins later has at most ``grace`` seconds. Never lengthens a grace.
        """

    @property
    def is_lost(self) -> bool:
        """Whether an inner scope has swallowed the cancellation as its own, so that the work continued by mistake."""
        ...


class MemberScope(Protocol):
    """The scope around one member of a task group (a child task or the body), which scopes further out cancel.

    It makes their cancellation polite: delivered once, and repeated only when the grace is over.
    """

    def begin(self) -> None:
        """Enter the scope."""

    def end(self, exc: BaseException | None) -> BaseException | None:
        """Leave the scope, and return the rest of ``exc`` without the cancellation of this scope."""

    def take_for_delivered(self) -> None:
        """Note that the task cleans up already, because it has been stopped in another way."""

    @property
    def is_delivered(self) -> bool:
        """The same as `PoliteScope.is_delivered`."""
        ...

    @property
    def is_lost(self) -> bool:
        """The same as `PoliteScope.is_lost`."""
        ...

    def fire(self) -> None:
        """Note that a scope further out is cancelled, or about to be."""

    @property
    def is_passed_by(self) -> bool:
        """Whether the cancellation came from further out than the task group, which must pass it on."""
        ...

    def shorten_grace(self, grace: float) -> None:
        """The same as `PoliteScope.shorten_grace`."""

    def pass_on(self) -> None:
        """Note, after `end`, that the group raises a cancellation from further out, which the task so receives."""

    def expect(self, is_cancelled: Callable[[], bool]) -> None:
        """Delay cancellations for two passes of the loop; the group may have been cancelled by then."""

    def watch(self, coro: Awaitable[Any]) -> Awaitable[Any]:
        """Return the awaitable to await in place of ``coro``, so that the scope notices a cancellation."""
        ...


class TaskScope(Protocol):
    """A scope around the rest of a running task of another author, which makes cancellations of it polite."""

    def put_around(self, ended: Callable[[bool], object]) -> None:
        """Enter the scope in the running task; ``ended(was_cancelled)`` is called when the task has ended."""


class ScopeFamily(Protocol):
    """A module with the scopes of one backend, made with private hooks or with public API."""

    def polite_scope(self, loop: EventLoop, grace: float) -> PoliteScope:
        """Return a new scope for a block."""
        ...

    def member_scope(self, loop: EventLoop, grace: float, is_ours: IsOurs) -> MemberScope:
        """Return a new scope for a member of a group. It is for cancellations by a block, or if ``is_ours(None)``."""
        ...

    def task_scope(self, loop: EventLoop, grace: float, is_ours: IsOurs) -> TaskScope:
        """Return a new scope for the rest of a running task."""
        ...

    def tell(self, loop: EventLoop, error: BaseException) -> None:
        """Note that ``error`` stops the current task, and unwinds the scopes that are open in it."""

    def told_scope(self, loop: EventLoop, scope: CancelScope, member_scopes: dict[Any, MemberScope]) -> CancelScope:
        """Return a scope that notifies ``member_scopes`` when cancelled; ``scope`` itself where a hook does that."""
        ...

    def task_finder(self, loop: Any) -> Callable[[], object] | None:
        """Return the function for `EventLoop.task_without_scope`; ``None`` where scopes are entered at once."""
        ...
