"""Sections of a block that delay a cancellation, or only that by the client's disconnect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

import anyio

from .loops.current import current_loop

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import TracebackType


class Shield:
    """A shielded anyio scope for ``with`` and ``async with``.

    :param inner: a section that is entered and left with it.
    """

    _scope: anyio.CancelScope | None = None

    def __init__(self, inner: AbstractContextManager[object]) -> None:
        self._inner = inner

    def __enter__(self) -> Self:
        self._inner.__enter__()
        try:
            current_loop()
        except RuntimeError:
            # In a worker thread nothing interrupts work that does not call `check`.
            return self
        self._scope = anyio.CancelScope(shield=True)
        self._scope.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inner.__exit__(exc_type, exc, traceback)
        if self._scope is not None:
            self._scope.__exit__(exc_type, exc, traceback)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(exc_type, exc, traceback)


class OwnerOfClient(Protocol):
    """A request, as far as the kernel uses it, which does not know requests."""

    has_left: bool
    """Whether the client is known to have disconnected."""

    def defer_disconnect(self, by: int) -> None:
        """Add ``by`` to the number of open deferrals; at zero, a recorded disconnect cancels."""


class Deferral:
    """A section that counts as one open deferral of its request, for ``with`` and ``async with``."""

    def __init__(self, owner: OwnerOfClient | None) -> None:
        self._owner = owner

    def __enter__(self) -> Self:
        if self._owner is not None:
            self._owner.defer_disconnect(1)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._owner is not None:
            self._owner.defer_disconnect(-1)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        self.__exit__(*exc_info)
