"""Several Redis servers: a cluster of three masters with a replica each, and a master with a replica and its sentinels."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import coredis
import redis.asyncio
import redis.asyncio.sentinel
from coredis.connection import TCPLocation

from .machine import scaled
from .redis_server import RedisServer

MASTER = "mymaster"


def eventually(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + scaled(30)
    while not condition():
        assert time.monotonic() < until, f"it does not come about: {what}"
        time.sleep(0.05)


def info(server: RedisServer, *command: str) -> str:
    return server.command(*command).decode()


# A cluster.


@contextmanager
def redis_cluster() -> Iterator[list[RedisServer]]:
    """Three masters, and then a replica of each."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--save", "")
    servers = [RedisServer(*options) for _ in range(6)]
    try:
        for server in servers:
            server.start()
        for number, server in enumerate(servers[:3]):
            slots = [number * 5462, min(16383, number * 5462 + 5461)]
            server.command("CLUSTER", "ADDSLOTSRANGE", *map(str, slots))
        eventually(lambda: _met(servers), "the nodes know each other")
        for master, replica in zip(servers[:3], servers[3:], strict=True):
            id = master.command("CLUSTER", "MYID").decode().split("\r\n")[1]
            eventually(partial(_knows, replica, id), "it knows its master")
            replica.command("CLUSTER", "REPLICATE", id)
        eventually(lambda: all(_says(each, "cluster_state:ok") for each in servers), "the cluster is complete")
        eventually(lambda: all(map(_follows, servers[3:])), "the replicas follow")
        yield servers
    finally:
        for server in servers:
            server.close()


def _met(servers: list[RedisServer]) -> bool:
    for each in servers[1:]:
        # It is alone at first, and again after a handshake that took longer than its node timeout.
        if _says(each, "cluster_known_nodes:1\r"):
            each.command("CLUSTER", "MEET", "127.0.0.1", str(servers[0].port))
    return all(_says(each, "cluster_known_nodes:6\r") for each in servers)


def _says(server: RedisServer, what: str) -> bool:
    return what in info(server, "CLUSTER", "INFO")


def _knows(server: RedisServer, id: str) -> bool:
    return id in info(server, "CLUSTER", "NODES")


def _follows(server: RedisServer) -> bool:
    return "master_link_status:up" in info(server, "INFO", "replication")


@asynccontextmanager
async def cluster_client(library: str, port: int) -> AsyncIterator[Any]:
    if library == "coredis":
        yield coredis.RedisCluster("127.0.0.1", port)
        return
    client = redis.asyncio.RedisCluster(host="127.0.0.1", port=port)
    try:
        yield client
    finally:
        await client.aclose()


# A master with a replica, and its sentinels.


class _SentinelServer(RedisServer):
    def __init__(self, master: int) -> None:
        super().__init__()
        self._master = master

    def arguments(self) -> list[str]:
        path = Path(self.folder) / "sentinel.conf"
        if not path.exists():
            lines = [
                f"port {self.port}",
                "bind 127.0.0.1",
                f"dir {self.folder}",
                f"sentinel monitor {MASTER} 127.0.0.1 {self._master} 2",
                f"sentinel down-after-milliseconds {MASTER} 700",
                f"sentinel failover-timeout {MASTER} 3000",
            ]
            path.write_text("\n".join(lines) + "\n")
        return [str(path), "--sentinel"]


class Sentinels:
    """Three sentinels that watch a master and a replica."""

    def __init__(self) -> None:
        self.master = RedisServer("--save", "", "--repl-diskless-sync-delay", "0")
        self.replica = RedisServer("--save", "", "--replicaof", "127.0.0.1", str(self.master.port))
        self.sentinels = [_SentinelServer(self.master.port) for _ in range(3)]

    @property
    def ports(self) -> list[int]:
        return [each.port for each in self.sentinels]

    def start(self) -> None:
        self.master.start()
        self.replica.start()
        eventually(lambda: _follows(self.replica), "the replica follows")
        for each in self.sentinels:
            each.start()
        for each in self.sentinels:
            eventually(partial(self._knows_all, each), "the sentinels know each other and the replica")

    def _knows_all(self, sentinel: RedisServer) -> bool:
        found = info(sentinel, "SENTINEL", "MASTER", MASTER).split("\r\n")
        values = dict(zip(found[2::4], found[4::4], strict=False))
        return (values.get("num-other-sentinels"), values.get("num-slaves")) == ("2", "1")

    def master_port(self) -> int:
        """The port of the master, as a sentinel says."""
        return int(info(self.sentinels[0], "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER).split("\r\n")[4])

    def close(self) -> None:
        for each in (*self.sentinels, self.replica, self.master):
            each.close()


@contextmanager
def redis_sentinels() -> Iterator[Sentinels]:
    sentinels = Sentinels()
    try:
        sentinels.start()
        yield sentinels
    finally:
        sentinels.close()


@asynccontextmanager
async def sentinel_client(library: str, ports: list[int]) -> AsyncIterator[Any]:
    """A client for the master, whichever that is, as an application makes it."""
    if library == "coredis":
        async with coredis.Sentinel([TCPLocation("127.0.0.1", port) for port in ports]) as sentinel:
            yield sentinel.primary_for(MASTER)
        return
    manager: Any = redis.asyncio.sentinel.Sentinel([("127.0.0.1", port) for port in ports])  # type: ignore[no-untyped-call]
    # Of two that ask at the same time, redis-py may lose one (8.1).
    clients = [manager.master_for(MASTER), *manager.sentinels]
    try:
        yield clients[0]
    finally:
        for each in clients:
            await each.aclose()
