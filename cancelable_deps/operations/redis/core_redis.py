"""coredis, for asyncio and trio. Importing this file imports the library."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import coredis
from coredis import exceptions
from coredis.retry import NoRetryPolicy

from .client import CONNECT_SECONDS, MOST_AT_ONCE, Failures, Script, entries_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from .client import StreamEntries


class CoredisClient:
    """A client of ours by its URL, or the application's own: ``Redis``, that of a ``Sentinel``, or ``RedisCluster``."""

    def __init__(self, url: str | None, own: Any) -> None:
        self._url = url
        self._client = own
        self.longest_block: float | None = None
        self._failures = Failures(
            exceptions.RedisError, answered=exceptions.ResponseError, unknown_script=exceptions.NoScriptError
        )

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Hold the connections inside the ``async with``. A client of the application may be open already."""
        if self._url is not None:
            self._client = coredis.Redis.from_url(
                self._url, connect_timeout=CONNECT_SECONDS, retry_policy=NoRetryPolicy(), verify_version=False
            )
        else:
            timeout = self._client.connection_pool.connection_kwargs.get("stream_timeout")
            self.longest_block = None if timeout is None else timeout / 2
        async with self._client:
            yield

    async def script(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """Run a script, and return what it returns."""
        with self._failures.translated():
            try:
                return await self._client.evalsha(script.sha, keys, args)
            except exceptions.NoScriptError:
                return await self._client.eval(script.text, keys, args)

    async def xread(self, streams: Mapping[str, str], block: int) -> StreamEntries:
        """Return entries after these positions, or wait for some; coredis lets nobody else use the connection then."""
        with self._failures.translated():
            return entries_of(await self._client.xread(dict(streams), count=MOST_AT_ONCE, block=block))
