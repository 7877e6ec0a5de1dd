"""Hear of a signal beside whoever handles it.

A Python handler stands for one signal in one process, and the servers have theirs there: uvicorn by ``signal.signal``,
hypercorn, granian and gunicorn by the loop's ``add_signal_handler``. So ours calls the one before it. That is enough for
a loop's as well: the loop is told through its wakeup descriptor, which every Python handler leaves as it is.
"""

from __future__ import annotations

import inspect
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from ..kernel.loops.base import EventLoop

SHUTDOWN_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))


@contextmanager
def heard(tell: Callable[[signal.Signals], object], loop: EventLoop) -> Iterator[None]:
    """Call ``tell(signal)``, in the main thread between any two instructions, before the handler that was there.

    A signal that is ignored, or whose default action nobody has changed, is left alone: no server would shut down
    gracefully on it. In a thread that cannot take signals nothing happens.
    """
    links = [_Link(number, tell, loop) for number in SHUTDOWN_SIGNALS] if _can_take_signals() else []
    try:
        for link in links:
            link.install()
        yield
    finally:
        for link in reversed(links):
            link.remove()


def _can_take_signals() -> bool:
    return threading.current_thread() is threading.main_thread()


class _Link:
    """Ours, which calls the one before it.

    Links may end in any order, and one that is over is taken out of the chain by whichever of them looks at it next:
    it is not to be what the last one puts back, nor to keep its event loop alive.
    """

    _previous: Any = None
    _was_deferred = False

    def __init__(self, number: signal.Signals, tell: Callable[[signal.Signals], object], loop: EventLoop) -> None:
        self._number = number
        self._loop: EventLoop | None = loop
        self._tell: Callable[[signal.Signals], object] | None = tell
        self._process = os.getpid()

    @property
    def is_over(self) -> bool:
        return self._tell is None

    def install(self) -> None:
        previous = _without_those_over(signal.getsignal(self._number))
        if callable(previous):
            self._previous = previous
            signal.signal(self._number, self)

    def remove(self) -> None:
        # Whoever has put another handler on top of ours still calls us: then only the one before is called.
        self._tell = self._loop = None
        _tidy(self._number)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        previous = _without_those_over(self._previous)
        if self.is_over:
            # Somebody may have put us back whom we could not see from here.
            _tidy(self._number)
        # A forked child inherits the handler, but the loop to tell is its parent's.
        elif os.getpid() == self._process:
            assert self._tell is not None
            assert self._loop is not None
            self._tell(self._number)
            if _is_trios(previous) and not self._was_deferred:
                # It raises KeyboardInterrupt into the task that happens to run, which may be that of a connection or a
                # handler. From the loop it goes to trio's main task. Once: a second one is for what never yields.
                self._was_deferred = True
                self._loop.call_from_thread(self._call, previous)
                return
        previous(number, frame)

    def _call(self, previous: Callable[[int, FrameType | None], object]) -> None:
        previous(self._number, inspect.currentframe())


def _without_those_over(handler: Any) -> Any:
    while isinstance(handler, _Link) and handler.is_over:
        handler = handler._previous
    return handler


def _tidy(number: signal.Signals) -> None:
    """Take out the links that are over, down to the first handler of somebody else: what that calls it does not say."""
    there: Any = signal.getsignal(number)
    link = _without_those_over(there)
    if link is not there:
        signal.signal(number, link)
    while isinstance(link, _Link):
        link._previous = link = _without_those_over(link._previous)


def _is_trios(handler: object) -> bool:
    return getattr(handler, "__module__", None) == "trio._core._ki"
