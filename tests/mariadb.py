"""The MariaDB or MySQL of this machine, for the tests that are skipped where there is none."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pymysql
import pytest
from sqlalchemy.engine import URL, make_url

if TYPE_CHECKING:
    from pymysql.connections import Connection

STANDARD_PORT = "mysql://root@127.0.0.1:3306/test"
CONNECT_TIMEOUT = 3


def url() -> URL:
    """Return the URL in `MYSQL_URL`, or that of the standard local port."""
    return make_url(os.environ.get("MYSQL_URL") or STANDARD_PORT)


def connected() -> Connection[Any]:
    at = url()
    return pymysql.connect(
        host=at.host or "127.0.0.1",
        port=at.port or 3306,
        user=at.username,
        password=at.password or "",
        database=at.database,
        autocommit=True,
        connect_timeout=CONNECT_TIMEOUT,
    )


def mariadb_or_skip() -> None:
    try:
        connected().close()
    except pymysql.Error as exc:
        pytest.skip(f"no MariaDB or MySQL lets us in at {url()!r}: {exc}")


def kill_query(connection: Connection[Any]) -> None:
    """Stop the query of `connection` by a second one."""
    with closing(connected()) as second, second.cursor() as cursor:
        cursor.execute("kill query %s", [connection.thread_id()])  # type: ignore[no-untyped-call]
