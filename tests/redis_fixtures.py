"""The Redis of a test, as fixtures: a test file says ``pytest_plugins = ["tests.redis_fixtures"]``."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from .redis_server import RedisServer, SharedRedis, redis_server


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
