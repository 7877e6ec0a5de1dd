"""Notify the application at once that its server shuts down, and end its requests in time."""

from __future__ import annotations

import inspect
import math
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ..hosts.signals import heard
from ..kernel.errors import RETRY_AFTER_SECONDS
from ..kernel.loops.current import current_loop
from ..kernel.options import seconds
from ..kernel.reasons import CancelationReason
from ..request.shutdown import Graces, Shutdown, running_shutdown
from .at_start import check_at_start
from .marks import GRACES

if TYPE_CHECKING:
    import signal
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from datetime import timedelta

    from ..kernel.token import CancelationToken

App = TypeVar("App")
State = TypeVar("State")


@overload
def cancelation_lifespan(
    lifespan: None = None,
    /,
    *,
    grace: float | timedelta = 10,
    background_grace: float | timedelta = 10,
    retry_after: float | timedelta = RETRY_AFTER_SECONDS,
    refuse_new: bool = False,
    check: bool = True,
) -> Callable[[Any], AbstractAsyncContextManager[None]]: ...


@overload
def cancelation_lifespan(
    lifespan: Callable[[App], AbstractAsyncContextManager[State]],
    /,
    *,
    grace: float | timedelta = 10,
    background_grace: float | timedelta = 10,
    retry_after: float | timedelta = RETRY_AFTER_SECONDS,
    refuse_new: bool = False,
    check: bool = True,
) -> Callable[[App], AbstractAsyncContextManager[State]]: ...


def cancelation_lifespan(
    lifespan: Any = None,
    /,
    *,
    grace: float | timedelta = 10,
    background_grace: float | timedelta = 10,
    retry_after: float | timedelta = RETRY_AFTER_SECONDS,
    refuse_new: bool = False,
    check: bool = True,
) -> Any:
    """Return a lifespan that ends the requests of an application in time when its server shuts down.

    Use ``FastAPI(lifespan=cancelation_lifespan(grace=10))``, or pass a lifespan of your own, whose state is passed on:
    ``FastAPI(lifespan=cancelation_lifespan(my_lifespan, grace=10))``.

    When SIGTERM or SIGINT arrives:

    1. `shutdown_token` is cancelled at once.
    2. Requests in flight may go on for ``grace`` seconds. Those that still run are then cancelled: they are answered with
       503 and ``Retry-After``, streams are aborted, WebSockets are closed with 1012.
    3. Work after a complete response (background tasks under the middleware or the route class) and detached work have
       another ``background_grace`` seconds, and are then cancelled too.

    Every cleanup has its own grace in addition. Give the server more time than all of these together: a server whose own
    timeout is shorter closes the connections first.

    The signal handlers that were installed before are still called. A signal without a handler is left alone, and so is
    every signal in a thread that cannot handle signals (that of a test client); `begin_shutdown` works everywhere. When
    the lifespan ends, it waits for the requests that the server has left running, within the same limits. Your own
    lifespan is left after that. Applications that share an event loop shut down together, by the longest of their limits.

    :param lifespan: your own lifespan: a function of the application that returns an async context manager.
    :param grace: seconds for requests in flight; 0 cancels them at once, ``math.inf`` never.
    :param background_grace: seconds for background tasks, counted from the end of ``grace``.
    :param retry_after: seconds for the ``Retry-After`` header; rounded up.
    :param refuse_new: answer requests that arrive after the signal with 503 at once; otherwise they are served until
        ``grace`` is over.
    :param check: whether to look, when the application starts, for what breaks or weakens cancellation in it, as
        `check_stack <cancelable_deps.checks.check_stack>` does, and to log each finding once.
    :raises TypeError: if a limit is not a number, or ``lifespan`` is not a lifespan.
    :raises ValueError: if a limit is negative or NaN, or ``retry_after`` is not finite.
    """
    graces = Graces(
        seconds(grace, "grace"),
        seconds(background_grace, "background_grace"),
        _whole_seconds(retry_after),
        refuse_new,
    )
    _refuse_what_is_no_lifespan(lifespan)

    def lifespan_with_shutdown(app: Any) -> AbstractAsyncContextManager[Any]:
        if inspect.isroutine(app):
            raise TypeError(
                "cancelation_lifespan takes your own lifespan as its first argument: "
                "cancelation_lifespan(my_lifespan, grace=10)"
            )
        return _run(app, lifespan, graces, check)

    setattr(lifespan_with_shutdown, GRACES, graces)
    return lifespan_with_shutdown


def shutdown_token() -> CancelationToken:
    """Return the token that is cancelled as soon as the server of the running event loop shuts down.

    Its reason is then `CancelationReason.SIGNAL`. Await it (``await shutdown_token().wait()``), read it (in a ``def``
    endpoint, too), or pass it to a block that should stop at once: ``Cancelable(token=shutdown_token())``. Without a
    `cancelation_lifespan` in this event loop nothing cancels it.

    :raises RuntimeError: in a thread that neither runs an event loop nor was started by one.
    """
    return running_shutdown().token


def begin_shutdown(message: str | None = None) -> bool:
    """Begin the shutdown as a signal does: for tests, servers inside other programs, and orders that come by HTTP.

    The server itself is not notified, and goes on.

    :param message: a text for the log.
    :return: whether this call has begun the shutdown; ``False`` if it had begun before.
    :raises RuntimeError: if no `cancelation_lifespan` runs in this event loop.
    """
    shutdown = running_shutdown()
    if not shutdown.is_joined:
        raise RuntimeError(
            "no cancelation_lifespan runs in this event loop. Pass one to the application, "
            "FastAPI(lifespan=cancelation_lifespan(grace=10)), and check that your server or test client runs lifespans."
        )
    return shutdown.token.cancel_nowait(CancelationReason.SIGNAL, message)


def _teller(shutdown: Shutdown) -> Callable[[signal.Signals], object]:
    def tell(number: signal.Signals) -> None:
        # By way of the loop, because a handler interrupts any code, the cancelling of this very token included.
        shutdown.begin_from_thread(number.name)

    return tell


def _whole_seconds(retry_after: float | timedelta) -> int:
    value = seconds(retry_after, "retry_after")
    if value == math.inf:
        raise ValueError("retry_after must be a finite number of seconds")
    return math.ceil(value)


def _refuse_what_is_no_lifespan(lifespan: Any) -> None:
    if lifespan is None:
        return
    if inspect.isasyncgenfunction(lifespan) or inspect.isgeneratorfunction(lifespan):
        raise TypeError(f"{lifespan.__qualname__}() is a bare generator: put @asynccontextmanager above it")
    if not callable(lifespan):
        raise TypeError(
            "a lifespan is a function of the application that returns an async context manager, as @asynccontextmanager "
            f"makes it, not {lifespan!r}"
        )


@asynccontextmanager
async def _run(app: Any, lifespan: Any, graces: Graces, check: bool) -> AsyncIterator[Any]:
    shutdown = Shutdown.joined(graces)
    try:
        with heard(_teller(shutdown), current_loop()):
            async with nullcontext() if lifespan is None else lifespan(app) as state:
                if check:
                    check_at_start(app)
                # Not in a `finally`, because a lifespan that is cancelled must end without waiting.
                yield state
                await shutdown.finish()
    finally:
        shutdown.leave(graces)
