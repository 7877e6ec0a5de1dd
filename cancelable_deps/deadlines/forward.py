"""The rest of the caller's time as a header of its calls to other services."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..kernel.loops.current import runs_in_this_thread
from ..kernel.options import seconds, takes
from ..kernel.remaining import Hidden, next_deadline
from ..request.durations import PREFER, checked_name, header_named, read_all, with_wait

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, MutableMapping
    from datetime import timedelta

_TIMEOUTS: Final = ("connect", "read", "write", "pool")
_BEHIND: Final = 0.1
"""Seconds by which httpx's timeouts are behind the deadline where that interrupts the call itself."""


class OutgoingRequest(Protocol):
    """A request of httpx or httpx2."""

    @property
    def headers(self) -> MutableMapping[str, str]: ...

    extensions: Any


class _Done:
    """An awaitable that has nothing to wait for."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


class DeadlineHook:
    """The hook that `forward_deadline` returns, for the requests of one or several clients."""

    def __init__(self, header: str, margin: float, write: Callable[[float], str] | None) -> None:
        self._header = header
        self._margin = margin
        self._write = write

    def __repr__(self) -> str:
        return f"<DeadlineHook {self._header}>"

    def __call__(self, request: OutgoingRequest) -> Awaitable[None]:
        """Set the header and the timeouts of an httpx request. Need not be awaited, so that ``httpx.Client`` can call it.

        :raises CancelationError: if the caller's time is up.
        """
        left = self.set_header(request.headers)
        if left is not None:
            known = request.extensions.get("timeout") or {}
            if runs_in_this_thread():
                # Of two that strike together, trio takes either: the handler would now and then fail with httpx's error.
                left += _BEHIND
            timeouts = {name: _smaller(known.get(name), left) for name in _TIMEOUTS}
            request.extensions = {**request.extensions, "timeout": timeouts}
        return _Done()

    async def on_request_start(self, session: Any, context: Any, params: Any) -> None:
        """Set the header of an aiohttp request: ``trace_config.on_request_start.append(hook.on_request_start)``.

        aiohttp has no way to set the timeouts here.

        :raises CancelationError: if the caller's time is up.
        """
        self.set_header(params.headers)

    def set_header(self, headers: MutableMapping[str, str]) -> float | None:
        """Set the header, for a client without a hook of its own.

        :param headers: the headers of a request.
        :return: the seconds until the caller's deadline; ``None`` if there is none.
        :raises CancelationError: if the caller's time is up, or less than the margin is left.
        """
        found = next_deadline()
        if found is None:
            return None
        block, left = found
        if left <= self._margin:
            block.check()
            if block.own_deadline == math.inf:
                # A debugger is attached, which switches timeouts off.
                return None
            raise block.timeout_cause().error()
        value = self._value(left - self._margin, headers.get(self._header))
        if value:
            headers[self._header] = value
        return left

    def _value(self, left: float, known: str | None) -> str:
        if self._write is not None:
            return self._write(left)
        header = header_named(self._header)
        if known is not None:
            with suppress(ValueError):
                given = read_all(self._header, header.read, [known])
                if given is not None and given <= left:
                    return known
                if self._header == PREFER:
                    return with_wait(known, left)
        return header.write(left)


def _smaller(known: float | None, left: float) -> float:
    return left if known is None else min(known, left)


def forward_deadline(
    *, header: str, margin: float | timedelta = 0.05, write: Callable[[float], str] | None = None
) -> DeadlineHook:
    """Return a hook for httpx that tells the called service how much time is left, and waits no longer itself.

    ```python
    httpx.AsyncClient(event_hooks={"request": [forward_deadline(header="grpc-timeout")]})
    ```

    The time is that until the next deadline around the caller: of the request (its timeout, its policy, the time that its
    client gives), or of a `Cancelable` around the call. httpx's own timeouts are shortened to it (in an event loop, where
    the deadline interrupts the call, to a little more). Without a deadline, the request is sent as it is. A smaller time
    that the request already has in the header is kept.

    If no more than ``margin`` is left, the call raises the `TimeoutCancelation` of that block at once, and nothing is sent.
    The cleanup of work that was cancelled has no deadline. In a worker thread, whose work nothing interrupts, a deadline
    that has passed is raised here.

    Not taken into account: ``asyncio.timeout`` and anyio's scopes. Not given on: what is within `no_deadline` or
    `Cancelable.shield`, and the background work that goes on after the request.

    The hook serves ``httpx.AsyncClient`` (on asyncio and trio), ``httpx.Client``, both of httpx2, and by its
    ``on_request_start`` an aiohttp ``TraceConfig``.

    :param header: the name of the header. Known ones are written in their own unit, as `ClientTimeout` reads them; any
        other has seconds, such as ``1.250``. Values are rounded down. ``prefer`` has whole seconds: below one it is left out.
    :param margin: the seconds that the called service gets less, for the way there and back.
    :param write: a function that returns the value of the header for some seconds, in place of the known unit.
    :raises TypeError: if ``margin`` is not a number, or ``write`` is not a function of one argument.
    :raises ValueError: if ``margin`` is negative or NaN, or ``header`` cannot be a name.
    """
    if write is not None and not takes(write, 1):
        raise TypeError(f"write must be a function of the seconds, not {write!r}")
    return DeadlineHook(checked_name(header), seconds(margin, "margin"), write)


def no_deadline() -> Hidden:
    """Return a section whose calls are not given the deadlines around it: ``with no_deadline():`` or ``async with``.

    For work that the request starts and does not wait for: a task of your own that is started in the section is outside
    of these deadlines, too. A `Cancelable` inside has a deadline that counts. It affects `forward_deadline` and
    `DeadlineTransport` only: work in the section is cancelled as ever, see `Cancelable.shield`.
    """
    return Hidden()
