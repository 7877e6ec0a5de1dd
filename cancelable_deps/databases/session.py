"""`cancelable_session`: a session of SQLAlchemy that is committed, rolled back, or thrown away with its connection."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

import anyio

from ..kernel.block import current
from ..kernel.log import logger
from ..kernel.options import not_a_dependency, seconds
from ..kernel.settings import settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator
    from datetime import timedelta


class AsyncSessionLike(Protocol):
    """A session as SQLAlchemy's ``AsyncSession``, which this module does not import."""

    async def commit(self) -> None: ...
    async def rollback(self) -> None: ...
    async def close(self) -> None: ...
    async def invalidate(self) -> None: ...


class SessionLike(Protocol):
    """A session as SQLAlchemy's ``Session``, which this module does not import."""

    def commit(self) -> None: ...
    def rollback(self) -> None: ...
    def close(self) -> None: ...
    def invalidate(self) -> None: ...


A = TypeVar("A", bound=AsyncSessionLike)
S = TypeVar("S", bound=SessionLike)


@overload
def cancelable_session(
    maker: Callable[[], A], *, cleanup_grace: float | timedelta | None = None
) -> Callable[[], AsyncGenerator[A]]: ...


@overload
def cancelable_session(
    maker: Callable[[], S], *, cleanup_grace: float | timedelta | None = None
) -> Callable[[], Generator[S]]: ...


@not_a_dependency(
    "Depends(cancelable_session) lacks the maker of the sessions. Write "
    'Annotated[AsyncSession, Depends(cancelable_session(maker), scope="function")].'
)
def cancelable_session(
    maker: Callable[[], Any], *, cleanup_grace: float | timedelta | None = None
) -> Callable[[], Any]:
    """Return a dependency that gives a handler a session of SQLAlchemy, and ends the session in any case.

    Declare it as ``Annotated[AsyncSession, Depends(cancelable_session(maker), scope="function")]``: with that scope it
    commits before the response is sent, so that a commit that fails is an error that the client sees. Outside of
    FastAPI, ``asynccontextmanager(cancelable_session(maker))()`` is a context manager.

    If the handler returns, the session is committed. The commit is shielded: a cancellation waits for it, however long
    it takes. If anything is raised, a cancellation or an exception of the handler or of the commit, the session is
    rolled back, and the exception is raised again.

    Rolling back and closing are shielded for ``cleanup_grace`` seconds together. If they take longer, fail or are
    interrupted, the session is invalidated, with a warning in the log: its connection is closed, and never returns to
    the pool. (SQLAlchemy itself replaces a connection whose query was cancelled.)

    With a maker of plain sessions, for ``def`` handlers, the same is done in threads, where nothing is interrupted. Put
    `Cancelable.interrupting` around the queries. The session must not be used by a thread that is abandoned.

    :param maker: an ``async_sessionmaker`` or a ``sessionmaker``, or a class of sessions, also in a ``partial``.
    :param cleanup_grace: seconds; the default is that of the block around the dependency, or of `configure`.
    :raises TypeError: if ``maker`` is none of these, or ``cleanup_grace`` is not a number.
    :raises ValueError: if ``cleanup_grace`` is negative or NaN.
    """
    grace = None if cleanup_grace is None else seconds(cleanup_grace, "cleanup_grace")
    if inspect.iscoroutinefunction(_class_of(maker).commit):

        async def async_session() -> AsyncGenerator[Any]:
            session: AsyncSessionLike = maker()
            try:
                yield session
                with anyio.CancelScope(shield=True):
                    await session.commit()
            except BaseException:
                await _end(session, grace, session.rollback, session.close)
                raise
            await _end(session, grace, session.close)

        return async_session

    def session() -> Generator[Any]:
        session: SessionLike = maker()
        try:
            yield session
            session.commit()
        except BaseException:
            _end_in_thread(session, session.rollback, session.close)
            raise
        _end_in_thread(session, session.close)

    return session


def _class_of(maker: Any) -> Any:
    """Return the class of the sessions that ``maker`` makes."""
    while isinstance(maker, partial):
        maker = maker.func
    made = getattr(maker, "class_", maker)
    if not isinstance(made, type) or not hasattr(made, "commit"):
        raise TypeError(f"cancelable_session() takes an async_sessionmaker, a sessionmaker or a class, not {maker!r}")
    return made


async def _end(session: AsyncSessionLike, grace: float | None, *steps: Callable[[], Any]) -> None:
    if grace is None:
        block = current.get()
        grace = settings.cleanup_grace if block is None else block.cleanup_grace
    try:
        with anyio.move_on_after(grace, shield=True) as scope:
            for step in steps:
                await step()
        if not scope.cancelled_caught:
            return
        _warn(session, f"has not ended within {grace:g} seconds")
    except Exception as exc:
        _warn(session, f"could not be ended: {exc!r}")
    except BaseException:
        # A cancellation of the task passes the shield on asyncio.
        _warn(session, "was interrupted while it ended")
        await _invalidate(session, grace)
        raise
    await _invalidate(session, grace)


async def _invalidate(session: AsyncSessionLike, grace: float) -> None:
    try:
        with anyio.move_on_after(grace, shield=True) as scope:
            await session.invalidate()
        if scope.cancelled_caught:
            logger.error("the connection of %r could not be closed within %g seconds", session, grace)
    except Exception:
        logger.exception("the connection of %r could not be closed", session)


def _end_in_thread(session: SessionLike, *steps: Callable[[], Any]) -> None:
    try:
        for step in steps:
            step()
    except Exception as exc:
        _warn(session, f"could not be ended: {exc!r}")
        try:
            session.invalidate()
        except Exception:
            logger.exception("the connection of %r could not be closed", session)


def _warn(session: object, why: str) -> None:
    logger.warning("%r %s; its connection is closed, and does not return to the pool", session, why)
