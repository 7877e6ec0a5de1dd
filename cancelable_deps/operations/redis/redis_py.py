"""redis-py, for asyncio. Importing this file imports the library."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from .client import CONNECT_SECONDS, MOST_AT_ONCE, Failures, Script, entries_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from .client import Call, Command, StreamEntries

_CALL_SECONDS: Final = 2.0
"""More than the exchange waits for a call, which is to give up first."""


class RedisPyClient:
    """A client of ours by its URL, or the application's own: ``Redis``, that of a Sentinel, or ``RedisCluster``."""

    def __init__(self, url: str | None, own: Any, longest_read: float) -> None:
        self._url = url
        self._client = own
        self._longest_read = longest_read
        self._reader: Any = own
        self.longest_block: float | None = None
        self.most_connections = getattr(getattr(own, "connection_pool", None), "max_connections", None)
        self.can_pipeline = url is not None or _has_pipelines_like_calls(own)
        self._failures = Failures(
            exceptions.RedisError,
            exceptions.RedisClusterException,
            answered=exceptions.ResponseError,
            unknown_script=exceptions.NoScriptError,
        )

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Hold the connections inside the ``async with``."""
        ours = []
        if self._url is not None:
            self._client = self._made(self._url, _CALL_SECONDS)
            self._reader = self._made(self._url, self._longest_read)
            ours = [self._client, self._reader]
        else:
            reader = self._reader_beside(self._client)
            if reader is not None:
                self._reader = reader
                ours = [reader]
            else:
                self.longest_block = _longest_block(self._client)
        try:
            yield
        finally:
            for client in ours:
                await client.aclose()
                await client.connection_pool.disconnect()

    def _made(self, url: str, timeout: float) -> Any:
        # Without the library's own repeats: the exchange knows better what may be repeated, and when.
        return redis.asyncio.Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=CONNECT_SECONDS,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
        )

    def _reader_beside(self, client: Any) -> Any:
        """Return a client for the read that waits, which the timeouts and the pool of the application's do not fit."""
        pool: Any = getattr(client, "connection_pool", None)
        if type(pool) not in (redis.asyncio.ConnectionPool, redis.asyncio.BlockingConnectionPool):
            return None
        options = {name: value for name, value in pool.connection_kwargs.items() if "maint" not in name}
        options.update(socket_timeout=self._longest_read, retry=Retry(NoBackoff(), 0))
        return redis.asyncio.Redis(
            connection_pool=redis.asyncio.ConnectionPool(connection_class=pool.connection_class, **options)
        )

    async def script(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """Run a script, and return what it returns."""
        rest = (len(keys), *keys, *args)
        with self._failures.translated():
            try:
                return await self._client.execute_command("EVALSHA", script.sha, *rest)
            except exceptions.NoScriptError:
                return await self._client.execute_command("EVAL", script.text, *rest)

    async def scripts(self, calls: Sequence[Call]) -> list[Any]:
        """Run scripts in this order, on one connection; return the result or the failure of each."""
        with self._failures.translated():
            return await self._failures.results(self._pipelined, calls)

    async def _pipelined(self, commands: Iterable[Command]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for name, script, (_, keys, args) in commands:
                pipeline.execute_command(name, script, len(keys), *keys, *args)
            results: list[Any] = await pipeline.execute(raise_on_error=False)
            return results

    async def xread(self, streams: Mapping[str, str], block: int) -> StreamEntries:
        """Return entries after these positions, or wait for some."""
        with self._failures.translated():
            return entries_of(await self._reader.xread(dict(streams), count=MOST_AT_ONCE, block=block))


def _has_pipelines_like_calls(client: Any) -> bool:
    """Return whether a pipeline of the application's client does to a command the same as the client."""
    if not isinstance(client, redis.asyncio.Redis) or client.single_connection_client:
        # Those of a cluster do not take scripts. Those of a client of one connection take another, which its pool may
        # not have.
        return False
    definitions = [vars(each) for each in type(client).__mro__]
    # A class that changes commands, such as by a prefix, has to change pipelines as well.
    first = next(each for each in definitions if "execute_command" in each or "pipeline" in each)
    return "pipeline" in first


def _longest_block(client: Any) -> float | None:
    """Return the seconds for which a read may wait on the application's own connections."""
    pool = getattr(client, "connection_pool", None)
    options = getattr(pool, "connection_kwargs", None) or getattr(client, "connection_kwargs", None) or {}
    timeout = options.get("socket_timeout")
    return None if timeout is None else timeout / 2
