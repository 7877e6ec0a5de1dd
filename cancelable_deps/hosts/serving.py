"""The settings of the server that runs in this event loop, as far as its worker can see them.

No public API leads from an application to its server. But the server's objects are local variables of its tasks, and the
settings in them are named as its options are. `tests/test_check_servers.py` fails on the real servers when one changes.
What the master process alone knows (granian's timeouts) stays unknown.
"""

from __future__ import annotations

import math
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NAMES = ("self", "config")


class Serving(NamedTuple):
    """A server that runs in this event loop, and what it is told to do."""

    name: str
    grace: float | None = None
    """Seconds for which it waits for requests when it shuts down; ``math.inf`` without a limit, ``None`` if unknown."""

    grace_option: str = ""
    disconnect_grace: float | None = None
    """Seconds after which it cancels the task of a request whose client has left; ``None`` if it does not, or is unknown."""

    workers: int | None = None


def running_server() -> Serving | None:
    """Return the server of the running event loop; ``None`` if there is none that we know."""
    kinds = (_gunicorn, _uvicorn, _hypercorn, _granian)
    found = list(_objects_of_tasks())
    # gunicorn first: it may run a uvicorn, which it ends itself.
    return next((serving for kind in kinds for owner in found if (serving := _asked(kind, owner)) is not None), None)


def _asked(kind: Callable[[Any], Serving | None], owner: Any) -> Serving | None:
    with suppress(Exception):  # a proxy that raises, or a server that has changed
        return kind(owner)
    return None


def sigterm_kills() -> bool:
    """Return whether SIGTERM would end this process at once, as nobody handles it."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _objects_of_tasks() -> Iterator[Any]:
    for task in anyio.get_running_tasks():
        coro: Any = task.coro
        while coro is not None:
            frame = getattr(coro, "cr_frame", None)
            names = {} if frame is None else frame.f_locals
            yield from (names[name] for name in _NAMES if name in names)
            coro = getattr(coro, "cr_await", None)


def _is_of(owner: Any, package: str) -> bool:
    return type(owner).__module__.partition(".")[0] == package


def _gunicorn(owner: Any) -> Serving | None:
    # Its own worker is `gunicorn.workers.gasgi.ASGIWorker`; that of another package has a class of gunicorn above it.
    config = getattr(owner, "cfg", None)
    if config is None or not _is_of(config, "gunicorn"):
        return None
    own = any(each.__module__ == "gunicorn.workers.gasgi" for each in type(owner).__mro__)
    return Serving(
        "gunicorn",
        _seconds(config.graceful_timeout),
        "--graceful-timeout",
        getattr(config, "asgi_disconnect_grace_period", None) if own else None,
        config.workers,
    )


def _uvicorn(owner: Any) -> Serving | None:
    config = getattr(owner, "config", None)
    if config is None or not _is_of(config, "uvicorn") or not hasattr(config, "timeout_graceful_shutdown"):
        return None
    return Serving(
        "uvicorn",
        _seconds(config.timeout_graceful_shutdown),
        "--timeout-graceful-shutdown",
        workers=1 if config.reload else config.workers,
    )


def _hypercorn(owner: Any) -> Serving | None:
    if not _is_of(owner, "hypercorn") or not hasattr(owner, "graceful_timeout"):
        return None
    return Serving("hypercorn", _seconds(owner.graceful_timeout), "--graceful-timeout", workers=max(1, owner.workers))


def _granian(owner: Any) -> Serving | None:
    return Serving("granian") if _is_of(owner, "granian") else None


def _seconds(limit: float | None) -> float:
    return math.inf if limit is None else float(limit)
