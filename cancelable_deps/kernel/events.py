"""What the hooks of ``configure(on_event=...)`` are told, and how they are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, final

from .foreign import EXITS
from .log import logger
from .options import runs_only_when_awaited, takes
from .token import close_unawaited

if TYPE_CHECKING:
    from contextvars import Context

    from .reasons import CancelationReason

WorkKind = Literal["request", "websocket", "background", "detached", "tracked"]
What = Literal["started", "running", "cancelled", "ended", "exceeded", "cancel"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedEvent:
    """Something that has happened to a request, a WebSocket, or to work of `Operations`: ``configure(on_event=...)``.

    ``what`` it is:

    * ``"cancelled"``: the work was stopped. Once for each line of the log that says so: about a request when the error
      has left its innermost block, before its response; about background, detached and tracked work when it has ended.
    * ``"ended"``: a request that was cancelled is over, with its cleanup and background tasks; or background, detached or
      tracked work is over, however it has ended. Of detached work while `Operations` are open.
    * ``"started"``, ``"running"``: background work was accepted, where `Operations.start` was called; its turn has come,
      in the task that runs it.
    * ``"exceeded"``: a request took longer than an advisory limit, which stops nothing.
    * ``"cancel"``: somebody has asked for an operation to be stopped, by `Operations.cancel` or
      `Operations.cancel_all`; ``outcome`` is what has become of it.

    Do not keep an event: its ``scope`` and ``contexts`` keep the whole request in memory.
    """

    what: What
    kind: WorkKind | None = None
    """The kind of work; ``None`` for a cancel of something that is not known."""

    seconds: float = 0.0
    """The seconds from the start of the work until this moment; until the client had left, if that was the reason."""

    reason: CancelationReason | None = None
    """Why it was cancelled; ``None`` if it was not."""

    message: str | None = None
    """The text of the cancellation. With the reasons ``ERROR`` and ``PARENT`` it may show internals."""

    outcome: str | None = None
    """``"cancelled"``: it has ended, or is about to, because of the cancellation. ``"finished"``: it ended by itself.
    ``"failed"``: background, detached or tracked work has raised. ``"stopping"``: a WebSocket whose handler still runs. Of a
    ``"cancel"``: the outcome of its `Cancelation`, or ``"unavailable"`` if the store could not be reached."""

    cancel_seconds: float | None = None
    """The seconds from the cancellation until this moment, in ``"cancelled"`` and ``"ended"``; the seconds that the call
    of a ``"cancel"`` has taken."""

    cleanup_seconds: float | None = None
    """The seconds since the work itself has received the cancellation, which is later if a shield or a thread had to be
    waited for: these count against ``cleanup_grace``. ``None`` if it is not known, as in a thread."""

    limit: float | None = None
    """The limit in seconds that was ``"exceeded"``."""

    name: str | None = None
    """The name of background, detached or tracked work."""

    method: str | None = None
    """The HTTP method of a request."""

    route: str | None = None
    """The path template of the route, such as ``/reports/{id}``; ``None`` before one was found."""

    id: str | None = None
    """The id of the operation, if its client has chosen one or somebody has asked for it."""

    owner: str | None = None
    """The owner of the operation, if it has been claimed."""

    key: str | None = None
    """The key of the operation."""

    error: BaseException | None = field(default=None, repr=False, compare=False)
    """What background, detached or tracked work has raised."""

    scope: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    """The ASGI scope of a request."""

    contexts: tuple[Context, ...] = field(default=(), repr=False, compare=False)
    """The context variables of a request as they were at its first door, and at the inner side of the middleware in the
    application. The hook is called with those of the place where the error has left a block."""


@final
class Hook:
    """A function of the user that is told of events. Its exceptions change nothing; the first one is logged."""

    __slots__ = ("_function", "_has_failed")

    def __init__(self, function: Callable[[ObservedEvent], object]) -> None:
        self._function = function
        self._has_failed = False

    def __call__(self, event: ObservedEvent) -> None:
        try:
            result = self._function(event)
            if inspect.isawaitable(result):
                close_unawaited(result)
                raise TypeError(f"an on_event hook must be a plain function, as nothing would await {result!r}")
        except EXITS:
            raise
        except BaseException:
            if not self._has_failed:
                self._has_failed = True
                logger.exception("an on_event hook failed; this is logged once: %r", self._function)


def checked_hooks(given: Any) -> tuple[Hook, ...]:
    """Return the hooks for one function, or for several.

    :raises TypeError: if one is none, or nothing would run it.
    """
    functions = tuple(given) if isinstance(given, Iterable) and not callable(given) else (given,)
    for function in functions:
        if not takes(function, 1) or runs_only_when_awaited(function):
            raise TypeError(f"on_event takes a plain function of an ObservedEvent, or several, not {function!r}")
    return tuple(map(Hook, functions))
