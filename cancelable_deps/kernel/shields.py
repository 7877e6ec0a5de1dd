"""Sections of a block that delay a cancellation, or only that by the client's disconnect."""

from __future__ import annotations

from contextlib import suppress
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Protocol, Self

import anyio

from .loops.current import runs_in_this_thread

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import TracebackType


class Section(Protocol):
    """A section with a blocking call that another thread interrupts."""

    def hold(self) -> None:
        """Keep the call from being interrupted until `resume`."""

    def resume(self) -> None:
        """End `hold`, and interrupt the call if that is due."""


open_sections: ContextVar[tuple[Section, ...]] = ContextVar("cancelable_deps.open_sections", default=())
"""The sections around the caller, which a shield further in protects."""

_innermost: ContextVar[Shield | None] = ContextVar("cancelable_deps.innermost_shield", default=None)


def leave_shields() -> None:
    """Leave all shields and sections, in the context of work that has nothing around it."""
    open_sections.set(())
    _innermost.set(None)


class Shield:
    """A shielded anyio scope for ``with`` and ``async with``. In a worker thread it only holds `open_sections`.

    :param block: the innermost block around the shield, whose cancellations it delays.
    :param inner: a section that is entered and left with it.
    """

    _scope: anyio.CancelScope | None = None
    _sections: tuple[Section, ...] = ()
    _outer: Shield | None = None
    _outside: Token[Shield | None] | None = None

    def __init__(self, block: Any, inner: AbstractContextManager[object]) -> None:
        self._block = block
        self._inner = inner

    def __enter__(self) -> Self:
        self._inner.__enter__()
        self._sections = open_sections.get()
        for section in self._sections:
            section.hold()
        self._outer = _innermost.get()
        self._outside = _innermost.set(self)
        # In a worker thread nothing else interrupts work that does not call `check`.
        if runs_in_this_thread():
            self._scope = anyio.CancelScope(shield=True)
            self._scope.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inner.__exit__(exc_type, exc, traceback)
        try:
            if self._scope is not None:
                self._scope.__exit__(exc_type, exc, traceback)
        finally:
            self._reopen()

    def _reopen(self) -> None:
        outside, self._outside = self._outside, None
        if outside is not None:
            with suppress(ValueError):
                # A generator dependency is entered in one thread and left in another, each with its own context.
                _innermost.reset(outside)
        for section in self._sections:
            section.resume()
        self._sections, self._outer = (), None

    def protects_from(self, block: Any) -> bool:
        """Return whether an open shield, this one or one around it, delays the cancellations of ``block``."""
        around = self._block if self._outside is not None else None
        while around is not None and around is not block:
            around = around.parent
        return around is not None or (self._outer is not None and self._outer.protects_from(block))

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(exc_type, exc, traceback)


def is_shielded(block: object) -> bool:
    """Return whether the caller stands in a shield inside of ``block``."""
    shield = _innermost.get()
    return shield is not None and shield.protects_from(block)


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
