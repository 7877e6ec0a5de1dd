"""Notice a signal, and leave it to the handler that was there before.

A process has one Python handler for each signal, and the servers install theirs: uvicorn by ``signal.signal``, hypercorn,
granian and gunicorn by the loop's ``add_signal_handler``. So our handler calls the previous one. That also serves a loop's
handler: the loop reads the signal from its wakeup descriptor, which works whatever the Python handler is.
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
    """Call ``tell(signal)`` before the previous handler, in the main thread, between any two instructions.

    A signal that is ignored or has its default action is left alone: no server would shut down gracefully on it. Do
    nothing in a thread that cannot handle signals.
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
    """A signal handler of ours, which calls the one before it: a link in a chain.

    Links may end in any order. A link that is over is taken out of the chain by the next link that looks at it, so that
    it is not reinstalled as somebody's previous handler, and does not keep its event loop alive.
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
        # A handler that was installed on top of ours may still call us: then only the previous one is called.
        self._tell = self._loop = None
        _tidy(self._number)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        previous = _without_those_over(self._previous)
        if self.is_over:
            # A handler outside of our chain may have reinstalled us.
            _tidy(self._number)
        # A forked child inherits the handler, but the loop belongs to its parent.
        elif os.getpid() == self._process:
            assert self._tell is not None
            assert self._loop is not None
            self._tell(self._number)
            if _is_trios(previous) and not self._was_deferred:
                # It raises KeyboardInterrupt into the task that happens to run, which may be that of a connection or a
                # handler. Called from the loop, it raises in trio's main task. Only the first time: the second Ctrl-C
                # must reach a task that never yields.
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
    """Take out the links that are over, down to the first handler that is not ours, whose previous one is unknown."""
    there: Any = signal.getsignal(number)
    link = _without_those_over(there)
    if link is not there:
        signal.signal(number, link)
    while isinstance(link, _Link):
        link._previous = link = _without_those_over(link._previous)


def _is_trios(handler: object) -> bool:
    return getattr(handler, "__module__", None) == "trio._core._ki"
