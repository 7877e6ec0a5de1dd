"""`limit_statements`: the server itself ends a statement of PostgreSQL, even if nobody is left to cancel it."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, Final, Protocol, overload

from ..kernel.options import not_a_dependency, seconds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import timedelta

    from ..kernel.cancelable import Cancelable

_MOST: Final = 2**31 - 1
"""The largest ``statement_timeout``, in milliseconds."""


class _Async(Protocol):
    @property
    def execute(self) -> Callable[..., Awaitable[Any]]: ...


class _Rows(Protocol):
    @property
    def fetchone(self) -> Callable[[], Any]: ...


class _Sync(Protocol):
    @property
    def execute(self) -> Callable[..., _Rows]: ...


@overload
def limit_statements(
    session_or_connection: _Async, cancel: Cancelable, margin: float | timedelta = 0.25
) -> Awaitable[None]: ...


@overload
def limit_statements(session_or_connection: _Sync, cancel: Cancelable, margin: float | timedelta = 0.25) -> None: ...


@not_a_dependency("limit_statements() is a function to call in a handler, with its session and its handle.")
def limit_statements(
    session_or_connection: Any, cancel: Cancelable, margin: float | timedelta = 0.25
) -> Awaitable[None] | None:
    """Tell PostgreSQL to end each statement of the transaction when the time of ``cancel`` is up. One round trip.

    Sets ``statement_timeout`` for the rest of the transaction to ``cancel.remaining()`` and ``margin`` seconds. As long
    as the process lives, ``cancel`` stops the query first, with its reason. The limit is for when nobody does that: the
    process was killed, or its event loop is blocked. The server then ends the statement with an error.

    The limit counts for each statement from its start: call the function again before a later, long one. Without a
    timeout around ``cancel`` this does nothing, and the server's own setting remains.

    Takes SQLAlchemy's ``AsyncSession`` and ``AsyncConnection``, ``Session`` and ``Connection``, and the connections of
    asyncpg and psycopg, also those of a pool. The call for an async one is to be awaited.

    :param margin: seconds that the server waits longer than ``cancel``.
    :raises CancelationError: if ``cancel`` is cancelled, or its time is up.
    :raises RuntimeError: if the connection is in autocommit mode and no transaction is open, where the setting would
        have no effect. An engine of SQLAlchemy that was made with ``isolation_level="AUTOCOMMIT"`` is not noticed.
    :raises TypeError: if it is a connection to another database, or ``margin`` is not a number.
    :raises ValueError: if ``margin`` is negative or NaN.
    """
    margin = seconds(margin, "margin")
    cancel.check()
    statement = _statement(cancel.remaining() + margin)
    if inspect.iscoroutinefunction(inspect.unwrap(type(session_or_connection).execute)):
        return _limit(session_or_connection, statement)
    if statement is not None:
        connection = session_or_connection
        if hasattr(connection, "get_bind"):
            connection = connection.connection()
        _run(connection, statement)
    return None


async def _limit(connection: Any, statement: str | None) -> None:
    if statement is not None:
        if hasattr(connection, "get_bind"):
            connection = await connection.connection()
        await _run(connection, statement)


def _statement(timeout: float) -> str | None:
    # No parameter, so that every driver takes it; 0 would mean no limit.
    milliseconds = min(max(1, math.ceil(timeout * 1000)), _MOST) if timeout < math.inf else None
    return None if milliseconds is None else f"select set_config('statement_timeout', '{milliseconds}', true)"


def _run(connection: Any, statement: str) -> Any:
    _refuse_what_has_no_effect(connection)
    run = getattr(connection, "exec_driver_sql", None) or connection.execute
    return run(statement)


def _refuse_what_has_no_effect(connection: Any) -> None:
    known = getattr(connection, "sync_connection", None) or connection
    dialect = getattr(known, "dialect", None)
    if dialect is not None:
        if dialect.name != "postgresql":
            raise TypeError(
                f"limit_statements() sets a limit of PostgreSQL, and this is a connection to {dialect.name}"
            )
        is_open = known.get_execution_options().get("isolation_level") != "AUTOCOMMIT"
    elif hasattr(known, "is_in_transaction"):
        is_open = known.is_in_transaction()
    else:
        is_open = not known.autocommit or known.info.transaction_status.name != "IDLE"
    if not is_open:
        raise RuntimeError("limit_statements() sets a limit for a transaction, and none is open: begin one before")
