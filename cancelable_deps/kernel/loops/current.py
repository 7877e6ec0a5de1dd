"""The event loop that runs in the current thread."""

from __future__ import annotations

import sys
import threading
from asyncio import get_running_loop
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .asyncio_loop import AsyncioLoop

if TYPE_CHECKING:
    import trio

    from .base import EventLoop
    from .trio_loop import TrioLoop


class _ThreadLocal(threading.local):
    # The last loop seen in this thread, because a server looks up the same one millions of times.
    asyncio: AsyncioLoop | None = None
    trio: TrioLoop | None = None


_seen = _ThreadLocal()


def _running_trio_token() -> trio.lowlevel.TrioToken | None:
    # trio first, because in its guest mode an asyncio loop runs in the same thread.
    loaded: Any = sys.modules.get("trio")
    if loaded is None or not loaded.lowlevel.in_trio_run():
        return None
    token: trio.lowlevel.TrioToken = loaded.lowlevel.current_trio_token()
    return token


def current_loop() -> EventLoop:
    """Return the loop that runs in this thread.

    :raises RuntimeError: if no loop runs in it.
    """
    if "trio" in sys.modules and (token := _running_trio_token()) is not None:
        seen_trio = _seen.trio
        if seen_trio is None or seen_trio.token is not token:
            seen_trio = _seen.trio = _of_trio(token)
        return seen_trio
    loop: Any = get_running_loop()
    try:
        known: AsyncioLoop = loop._cancelable_deps_loop
    except AttributeError:
        return _of_asyncio(loop)
    return known


def runs_in_this_thread() -> bool:
    """Return whether an event loop runs in this thread."""
    try:
        current_loop()
    except RuntimeError:
        return False
    return True


def _of_asyncio(loop: Any) -> AsyncioLoop:
    seen = _seen.asyncio
    if seen is None or seen.loop is not loop:
        seen = _seen.asyncio = AsyncioLoop(loop)
    # Stored on the loop itself, because several loops may alternate in one thread, as with the fixtures and tests of
    # pytest-asyncio. A loop that takes no attributes is the last that this thread has seen.
    with suppress(AttributeError):
        loop._cancelable_deps_loop = seen
    return seen


def _of_trio(token: trio.lowlevel.TrioToken) -> TrioLoop:
    from .trio_loop import TrioLoop  # loads late: trio is imported only where it runs

    return TrioLoop(token)
