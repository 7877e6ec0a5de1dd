"""Sections inside a block that a cancellation, or the client's leaving, has to wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

import anyio

from .loops.current import current_loop

if TYPE_CHECKING:
    from types import TracebackType


class Shield:
    """An anyio scope with ``shield=True`` that ``with`` and ``async with`` both take."""

    _scope: anyio.CancelScope | None = None

    def __enter__(self) -> Self:
        try:
            current_loop()
        except RuntimeError:
            # A worker thread, where nothing interrupts what does not ask.
            return self
        self._scope = anyio.CancelScope(shield=True)
        self._scope.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._scope is not None:
            self._scope.__exit__(exc_type, exc, traceback)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(exc_type, exc, traceback)


class OwnerOfClient(Protocol):
    """A request, to whoever must not know of requests."""

    has_left: bool

    def defer_disconnect(self, by: int) -> None: ...


class Deferral:
    """Counts itself in and out; ``with`` and ``async with`` both take it."""

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
