"""The Redis of a test, as fixtures: a test file says ``pytest_plugins = ["tests.redis_fixtures"]``."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import coredis
import pytest

from .redis_server import RedisServer, SharedRedis, redis_server, server_program
from .stores import MemoryStore, RedisStore, Store


@pytest.fixture
def collected() -> Iterator[None]:
    """Find the streams that coredis has left here, and not in another test."""
    yield
    gc.collect()


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A server of the test's own, which it may kill, stop and empty."""
    with redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The server that tests share: that of the variable ``REDIS_URL``, or one that is started for them."""
    if url := os.environ.get("REDIS_URL"):
        yield url
        return
    with redis_server() as server:
        yield server.url


@pytest.fixture
def shared_redis(redis_url: str) -> Iterator[SharedRedis]:
    """A place in the server that tests share."""
    shared = SharedRedis(redis_url)
    yield shared
    shared.forget()


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    with redis_server(program=server_program("valkey")) as server:
        yield server.url


@pytest.fixture
def store(store_kind: tuple[str, str], request: pytest.FixtureRequest) -> Iterator[Store]:
    """A store of the kind that the test file gives as ``store_kind``."""
    name = store_kind[0]
    if name == "memory":
        yield MemoryStore()
        return
    url = request.getfixturevalue("valkey_url" if name == "valkey" else "redis_url")
    store = RedisStore(url, coredis.Redis.from_url if name == "coredis" else None)
    yield store
    store.close()
