"""coredis, for asyncio and trio. Importing this file imports the library."""

from __future__ import annotations

from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final

import anyio
import coredis
from coredis import exceptions
from coredis.pool import ClusterConnectionPool, ConnectionPool, SentinelConnectionPool
from coredis.retry import NoRetryPolicy

from .client import CONNECT_SECONDS, MOST_AT_ONCE, Failures, Script, entries_of
from .held_client import HeldClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from .client import Call, Command, StreamEntries

_CALL_SECONDS: Final = 2.0
"""More than the exchange waits for a call, which is to give up first."""


class CoredisClient:
    """Connections of ours: by a URL, or like those of the application's ``Redis``, also one of a ``Sentinel``, or
    ``RedisCluster``.

    The read that waits has a client of its own, which is replaced when it fails: a connection that breaks in that
    moment takes a place of its pool along for ever.
    """

    def __init__(self, url: str | None, own: Any, longest_read: float) -> None:
        self._url = url
        self._own = own
        self._longest_read = longest_read
        self._caller: HeldClient | None = None
        self._reader: HeldClient | None = None
        self.longest_block: float | None = None
        # Of its pool's connections each takes several calls at the same time.
        self.most_connections: int | None = None
        # The pipelines of a cluster are another matter.
        self.can_pipeline = not isinstance(own, coredis.RedisCluster)
        self._failures = Failures(
            exceptions.RedisError,
            anyio.ClosedResourceError,
            anyio.BrokenResourceError,
            answered=exceptions.ResponseError,
            unknown_script=exceptions.NoScriptError,
        )

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Hold the connections inside the ``async with``."""
        self._context = copy_context()
        if self._own is not None and not _can_be_copied(self._own):
            timeout = self._own.connection_pool.connection_kwargs.get("stream_timeout")
            self.longest_block = None if timeout is None else timeout / 2
        try:
            yield
        finally:
            for held in (self._reader, self._caller):
                if held is not None:
                    await held.close()

    async def script(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """Run a script, and return what it returns."""
        with self._failures.translated():
            caller = self._calling()
            try:
                return await caller.call("evalsha", script.sha, keys, args)
            except exceptions.NoScriptError:
                return await caller.call("eval", script.text, keys, args)

    async def scripts(self, calls: Sequence[Call]) -> list[Any]:
        """Run scripts in this order, on one connection; return the result or the failure of each."""
        with self._failures.translated():
            return await self._failures.results(self._pipelined, calls)

    async def _pipelined(self, commands: Iterable[Command]) -> Sequence[Any]:
        results: Sequence[Any] = await self._calling().run(lambda client: _pipelined(client, commands))
        return results

    async def xread(self, streams: Mapping[str, str], block: int) -> StreamEntries:
        """Return entries after these positions, or wait for some."""
        with self._failures.translated():
            reader = self._reading()
            if not reader.is_connected:
                await reader.call("exists", list(streams))
            try:
                return entries_of(await reader.client.xread(dict(streams), count=MOST_AT_ONCE, block=block))
            except BaseException:
                if reader is not self._caller:
                    reader.drop()
                raise

    def _calling(self) -> HeldClient:
        if self._caller is None or not self._caller.is_usable:
            self._caller = HeldClient(self._made(_CALL_SECONDS), self._context)
        return self._caller

    def _reading(self) -> HeldClient:
        if self._own is not None and not _can_be_copied(self._own):
            return self._calling()
        if self._reader is None or not self._reader.is_usable:
            self._reader = HeldClient(self._made(self._longest_read), self._context)
        return self._reader

    def _made(self, timeout: float) -> Any:
        # Something is heard at each sign of life: without it the connection is gone, though nobody has closed it.
        limits: dict[str, Any] = {"stream_timeout": timeout, "max_idle_time": self._longest_read}
        if self._url is None:
            return _copied(self._own, limits) if _can_be_copied(self._own) else self._own
        # Without the library's own repeats: the exchange knows better what may be repeated, and when.
        return coredis.Redis.from_url(
            self._url, connect_timeout=CONNECT_SECONDS, retry_policy=NoRetryPolicy(), verify_version=False, **limits
        )


async def _pipelined(client: Any, commands: Iterable[Command]) -> Sequence[Any]:
    pipeline: Any
    async with client.pipeline(transaction=False, raise_on_error=False) as pipeline:
        for name, script, (_, keys, args) in commands:
            send = pipeline.eval if name == "EVAL" else pipeline.evalsha
            send(script, keys, args)
    results: Sequence[Any] = pipeline.results
    return results


def _can_be_copied(client: Any) -> bool:
    # Nobody knows what those that are derived from them need.
    return type(client.connection_pool) in (ConnectionPool, SentinelConnectionPool, ClusterConnectionPool)


def _copied(client: Any, limits: dict[str, Any]) -> Any:
    """Return a client with the options of the application's, whose pool is not burdened."""
    pool = client.connection_pool
    options: dict[str, Any] = {
        name: value for name, value in pool.connection_kwargs.items() if name != "processing_budget"
    }
    options.update(limits, connection_class=pool.connection_class)
    if isinstance(pool, ClusterConnectionPool):
        return coredis.RedisCluster(connection_pool=ClusterConnectionPool(pool.startup_nodes, **options))
    if isinstance(pool, SentinelConnectionPool):
        del options["connection_class"]
        copy: Any = SentinelConnectionPool(pool.service_name, pool.sentinel_manager, **options)
    else:
        copy = ConnectionPool(location=pool.location, **options)
    return coredis.Redis(connection_pool=copy, retry_policy=NoRetryPolicy(), verify_version=False)
