"""The defaults of the process, which every entry point uses."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

from .options import seconds


class Observer(Protocol):
    """An object that has acted on a setting, and is to act on its next value."""

    def settings_changed(self) -> None:
        """Called after each change, in any thread."""


class _Settings:
    def __init__(self) -> None:
        self.cleanup_grace = 5.0
        self.listen_after = 0.005
        self.timeouts_under_debugger = False
        self.observers: WeakSet[Observer] = WeakSet()


settings = _Settings()


def configure(
    *,
    cleanup_grace: float | None = None,
    listen_after: float | None = None,
    timeouts_under_debugger: bool | None = None,
) -> None:
    """Change the defaults of this process. Call it at import or when the application starts.

    An argument that is not given leaves its default unchanged. Requests that are already running keep their values.

    :param cleanup_grace: seconds in which the awaits of a cancelled block's cleanup are not interrupted. After that the
        cancellation is repeated at every ``await`` (default 5; with 0 it is repeated at once, with ``math.inf`` never).
    :param listen_after: seconds that a request runs before the package listens for the client's disconnect (default
        0.005). A request that ends sooner needs no task for that. Listening starts after one to two times this value.
    :param timeouts_under_debugger: whether timeouts of requests apply while a debugger is attached (default: no).
    :raises ValueError: if a number of seconds is negative or NaN.
    :raises TypeError: if an argument has the wrong type.
    """
    if timeouts_under_debugger is not None:
        if not isinstance(timeouts_under_debugger, bool):
            raise TypeError(f"timeouts_under_debugger takes True or False, not {timeouts_under_debugger!r}")
        settings.timeouts_under_debugger = timeouts_under_debugger
    given = {"cleanup_grace": cleanup_grace, "listen_after": listen_after}
    checked = {name: seconds(value, name) for name, value in given.items() if value is not None}
    for name, value in checked.items():
        setattr(settings, name, value)
    for observer in list(settings.observers):
        observer.settings_changed()
