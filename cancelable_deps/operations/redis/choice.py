"""Which client library is used: the application's own, or the one that is installed and fits the event loop."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from ...kernel.loops.current import current_loop

if TYPE_CHECKING:
    from .client import Client

_LIBRARIES: Final = ("redis", "coredis")


def checked_client(url: object, client: Any) -> None:
    """Check the arguments of a store, and that a library is there.

    :raises ImportError: if there is none.
    :raises TypeError: if they are wrong.
    """
    if (url is None) == (client is None):
        raise TypeError('RedisBackend takes a URL, as RedisBackend("redis://localhost:6379"), or client=, and not both')
    if url is not None and not isinstance(url, str):
        raise TypeError(f"url is a string, not {url!r}; a client goes to RedisBackend(client=...)")
    if client is not None:
        _check_own(client)
    elif not any(map(_is_installed, _LIBRARIES)):
        raise ImportError(
            'RedisBackend needs redis-py or coredis: pip install "cancelable-deps[redis]" (asyncio), or '
            '"cancelable-deps[coredis]" (asyncio and trio)'
        )


def _check_own(client: Any) -> None:
    if library_of(client) == "redis" and "asyncio" not in type(client).__module__:
        asynchronous = any("asyncio" in each.__module__ for each in type(client).__mro__)
        if not asynchronous:
            raise TypeError(f"client must be one of redis.asyncio or coredis; this one blocks: {client!r}")
    if not hasattr(client, "evalsha"):
        raise TypeError(
            f"client must be a client for a server, not {client!r}; of a Sentinel that is `sentinel.master_for(name)`, and "
            "with coredis `sentinel.primary_for(name)`"
        )
    pool = getattr(client, "connection_pool", None)
    if not getattr(pool, "is_master", True) or not getattr(pool, "is_primary", True):
        raise TypeError(f"client must be one for the master, and this one reads of replicas: {client!r}")


def library_of(client: Any) -> str:
    """Return the name of the library that a client is from.

    :raises TypeError: if it is another one.
    """
    for each in type(client).__mro__:
        name = each.__module__.partition(".")[0]
        if name in _LIBRARIES:
            return name
    raise TypeError(f"client must be one of redis.asyncio or coredis, not {client!r}")


def client_for(url: str | None, own: Any, longest_read: float) -> Client:
    """Return what talks to Redis in the running event loop.

    :param longest_read: seconds after which a read that waits is given up.
    :raises ImportError: if the library that it needs is not installed.
    :raises TypeError: if the application's own client does not know this event loop.
    """
    is_trio = current_loop().is_trio
    if own is not None:
        library = library_of(own)
        if is_trio and library == "redis":
            raise TypeError("redis-py knows asyncio only: on trio, hand over a client of coredis, or a URL")
    else:
        library = "coredis" if is_trio or not _is_installed("redis") else "redis"
        if not _is_installed(library):
            raise ImportError('RedisBackend needs coredis on trio: pip install "cancelable-deps[coredis]"')
    if library == "redis":
        from .redis_py import RedisPyClient  # loads late

        return RedisPyClient(url, own, longest_read)
    from .core_redis import CoredisClient  # loads late

    return CoredisClient(url, own, longest_read)


def _is_installed(library: str) -> bool:
    return find_spec(library) is not None
