"""A transport of httpx that forwards the deadline, for clients whose event hooks are not yours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from ..kernel.block import current
from .forward import forward_deadline

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    import httpx

    class _Transport(httpx.AsyncBaseTransport, httpx.BaseTransport): ...
else:
    # httpx asks for the methods alone. Importing it would make it a dependency.
    _Transport = object


class DeadlineTransport(_Transport):
    """A transport for ``httpx.AsyncClient(transport=...)`` or ``httpx.Client`` that forwards the deadline of its caller.

    It does the same as `forward_deadline`. It is also the last to see a request, after the authentication and the event
    hooks; and a timeout of httpx that comes because the caller's time is up is raised as the `TimeoutCancelation` of that,
    until the response has begun. So a ``def`` handler that waits for another service is answered with 504.

    :param transport: the transport that sends the requests, such as ``httpx.AsyncHTTPTransport()``. This one closes it.
    :param header: the same as in `forward_deadline`.
    :param margin: the same as in `forward_deadline`.
    :param write: the same as in `forward_deadline`.
    :raises TypeError: if ``margin`` is not a number, or ``write`` is not a function of one argument.
    :raises ValueError: if ``margin`` is negative or NaN, or ``header`` cannot be a name.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | httpx.BaseTransport,
        *,
        header: str,
        margin: float | timedelta = 0.05,
        write: Callable[[float], str] | None = None,
    ) -> None:
        self._transport: Any = transport
        self._forward = forward_deadline(header=header, margin=margin, write=write)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, as httpx calls it."""
        self._forward(request)
        try:
            response: httpx.Response = self._transport.handle_request(request)
        except Exception as exc:
            _raise_if_time_is_up(exc)
            raise
        return response

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, as httpx calls it."""
        await self._forward(request)
        try:
            response: httpx.Response = await self._transport.handle_async_request(request)
        except Exception as exc:
            _raise_if_time_is_up(exc)
            raise
        return response

    def close(self) -> None:
        """Close the transport that sends the requests."""
        self._transport.close()

    async def aclose(self) -> None:
        """Close the transport that sends the requests."""
        await self._transport.aclose()

    def __enter__(self) -> Self:
        self._transport.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._transport.__exit__(*exc_info)

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._transport.__aexit__(*exc_info)


def _raise_if_time_is_up(exc: Exception) -> None:
    """Raise the error of the caller's deadline in place of a timeout that httpx has because of it."""
    block = current.get()
    # By name, because httpx need not be installed, and httpx2 has one of its own.
    if block is not None and any(cls.__name__ == "TimeoutException" for cls in type(exc).__mro__):
        block.check()
