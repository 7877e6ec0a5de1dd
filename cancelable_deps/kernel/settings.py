"""The defaults that every door shares."""

from __future__ import annotations

from .options import seconds


class _Settings:
    cleanup_grace = 5.0
    listen_after = 0.005
    timeouts_under_debugger = False


settings = _Settings()


def configure(
    *,
    cleanup_grace: float | None = None,
    listen_after: float | None = None,
    timeouts_under_debugger: bool | None = None,
) -> None:
    """Change the defaults of this process, at import or app start; requests already running keep theirs.

    :param cleanup_grace: seconds that a cancelled block's cleanup may await undisturbed before the cancellation is
        repeated at every ``await`` (default 5; 0 repeats it at once, ``math.inf`` never).
    :param listen_after: seconds a request runs before we start to listen for its client's leaving (default 0.005). A
        request that is over by then costs no task. The listening starts between one and two of these later.
    :param timeouts_under_debugger: whether a request's timeouts strike while a debugger is attached (default: no).
    :raises ValueError: for a negative number or NaN, :exc:`TypeError` for something that is no number.
    """
    if timeouts_under_debugger is not None:
        if not isinstance(timeouts_under_debugger, bool):
            raise TypeError(f"timeouts_under_debugger takes True or False, not {timeouts_under_debugger!r}")
        settings.timeouts_under_debugger = timeouts_under_debugger
    given = {"cleanup_grace": cleanup_grace, "listen_after": listen_after}
    checked = {name: seconds(value, name) for name, value in given.items() if value is not None}
    for name, value in checked.items():
        setattr(settings, name, value)
