"""The defaults of the process, which every entry point uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol
from weakref import WeakSet

from .events import Hook, ObservedEvent, checked_hooks
from .options import seconds

OnEvent = Callable[[ObservedEvent], object]


class Observer(Protocol):
    """An object that has acted on a setting, and is to act on its next value."""

    def settings_changed(self) -> None:
        """Called after each change, in any thread."""


class _Settings:
    def __init__(self) -> None:
        self.cleanup_grace = 5.0
        self.listen_after = 0.005
        self.timeouts_under_debugger = False
        self.hooks: tuple[Hook, ...] = ()
        self.observers: WeakSet[Observer] = WeakSet()

    def tell(self, event: ObservedEvent) -> None:
        """Call the hooks. Whoever makes an event looks first whether there are any."""
        for hook in self.hooks:
            hook(event)


settings = _Settings()


def configure(
    *,
    cleanup_grace: float | None = None,
    listen_after: float | None = None,
    timeouts_under_debugger: bool | None = None,
    on_event: OnEvent | Iterable[OnEvent] | None = None,
) -> None:
    """Change the defaults of this process. Call it at import or when the application starts.

    An argument that is not given leaves its default unchanged. Requests that are already running keep their values.

    :param cleanup_grace: seconds in which the awaits of a cancelled block's cleanup are not interrupted. After that the
        cancellation is repeated at every ``await`` (default 5; with 0 it is repeated at once, with ``math.inf`` never).
    :param listen_after: seconds that a request runs before the package listens for the client's disconnect (default
        0.005). A request that ends sooner needs no task for that. Listening starts after one to two times this value.
    :param timeouts_under_debugger: whether timeouts of requests apply while a debugger is attached (default: no).
    :param on_event: a function that is called with each `ObservedEvent <cancelable_deps.observability.ObservedEvent>`
        of this process, or several such functions, in place of those so far; ``()`` for none. It is called where it
        happens, nearly always in an event loop, so it must not block. Its exceptions change nothing, and the first one is
        logged. Requests that are not cancelled cause no event.
    :raises ValueError: if a number of seconds is negative or NaN.
    :raises TypeError: if an argument has the wrong type.
    """
    hooks = None if on_event is None else checked_hooks(on_event)
    if timeouts_under_debugger is not None:
        if not isinstance(timeouts_under_debugger, bool):
            raise TypeError(f"timeouts_under_debugger takes True or False, not {timeouts_under_debugger!r}")
        settings.timeouts_under_debugger = timeouts_under_debugger
    given = {"cleanup_grace": cleanup_grace, "listen_after": listen_after}
    checked = {name: seconds(value, name) for name, value in given.items() if value is not None}
    for name, value in checked.items():
        setattr(settings, name, value)
    if hooks is not None:
        settings.hooks = hooks
    for observer in list(settings.observers):
        observer.settings_changed()
