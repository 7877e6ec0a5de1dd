"""The soak of several workers with Redis: `python -m benchmarks.soak --workers 2`.

Clients hang up at random, name their requests and cancel them by id (before, during and after), send bursts of which the
latest wins, start background work, and run into timeouts and errors. When all is quiet, each worker and Redis are asked
for what they still hold.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import redis

from benchmarks._server import ServerProcess
from tests.ports import free_port
from tests.redis_server import RedisServer, redis_server

COMPLAINT = re.compile(r"Traceback|never retrieved|was never awaited|ERROR")
PATHS = ("work", "work", "work", "timed", "owned", "error", "latest", "latest", "few", "jobs", "detached", "cancel")
EXPECTED = {200, 409, 418, 499, 503, 504}
PATIENCE = 30.0
FORGOTTEN = ("old requests", "ids", "jobs", "ended", "early cancels", "seen entries", "lasting entries")
# As in `benchmarks.soak`: what an allocator keeps, once, and what each request may leave.
MEMORY_SLACK = 12 * 1024 * 1024


@dataclass
class Load:
    """What the clients have sent and seen."""

    goal: int
    until: float
    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.sent >= self.goal or time.monotonic() >= self.until


class Workers(ServerProcess):
    """A uvicorn with several workers."""

    patience = PATIENCE

    def __init__(self, count: int, redis_url: str, log: Path) -> None:
        port = free_port()
        command = ["uvicorn", "benchmarks._soak_workers_app:app", "--no-access-log"]
        command += ["--workers", str(count), "--port", str(port), "--timeout-keep-alive", "1"]
        super().__init__(port, command, log, REDIS_URL=redis_url)
        self.count = count
        self.held()

    def held(self) -> dict[int, dict[str, Any]]:
        """Return what each worker holds, by its process id."""
        found: dict[int, dict[str, Any]] = {}
        until = time.monotonic() + PATIENCE
        while len(found) < self.count:
            if time.monotonic() > until or self._process.poll() is not None:
                raise RuntimeError(f"the workers do not answer: {self._log.read_text()[-2000:]}")
            with suppress(httpx.TransportError):
                # Each on a connection of its own, which any worker may accept.
                told = httpx.get(f"http://127.0.0.1:{self.port}/held", timeout=PATIENCE).json()
                found[told["pid"]] = told
        return found

    def complaints(self) -> list[str]:
        return [line for line in self._log.read_text(errors="replace").splitlines() if COMPLAINT.search(line)]


class Client:
    """A client that does something else with each request."""

    def __init__(self, port: int, seed: str, load: Load) -> None:
        self._port = port
        self._random = random.Random(seed)
        self._seed = seed
        self._load = load
        self._named: list[str] = []

    async def run(self) -> None:
        while not self._load.is_over:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
                try:
                    await self._visit()
                finally:
                    self._writer.transport.abort() if self._random.random() < 0.5 else self._writer.close()

    async def _visit(self) -> None:
        for _ in range(self._random.randint(1, 30)):
            data, key = self._request()
            self._writer.write(data)
            if self._random.random() < 0.1:
                await asyncio.sleep(self._random.choice((0, 0.001, 0.004, 0.006, 0.02)))
                return
            await self._answer(key)

    def _request(self) -> tuple[bytes, str]:
        self._load.sent += 1
        key = f"{self._seed}-{self._load.sent}"
        path = self._random.choice(PATHS)
        seconds = self._random.choice((0, 0, 0.001, 0.004, 0.006, 0.02))
        query = f"key={key}&seconds={seconds}&user=u{self._random.randrange(5)}"
        if path == "cancel":
            # One that runs, has ended, or comes later.
            earlier = self._random.choice(self._named) if self._named else f"{key}-later"
            query += f"&id={earlier}"
        header = ""
        if self._random.random() < 0.2:
            header = f"operation-id: {key}\r\n"
            self._named = [*self._named[-20:], key, f"job-{key}"]
        return f"POST /{path}?{query} HTTP/1.1\r\nhost: soak\r\n{header}content-length: 0\r\n\r\n".encode(), key

    async def _answer(self, key: str) -> None:
        async with asyncio.timeout(PATIENCE):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = re.search(r"content-length: *(\d+)", head)
            body = await self._reader.readexactly(int(length[1]) if length else 0)
        status = int(head.split()[1])
        self._load.statuses[status] += 1
        if status not in EXPECTED or (status == 200 and body.decode() != key):
            self._load.wrong.append(f"{key}: {status} {body[:80]!r}")


async def _send(port: int, load: Load, clients: int, seed: int) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(Client(port, f"{seed}.{number}", load).run())


def _quiet(workers: Workers, server: RedisServer) -> tuple[dict[int, dict[str, Any]], dict[str, int]]:
    """Return what is held when all that is to be forgotten has been."""
    until = time.monotonic() + PATIENCE
    while True:
        held, keys = workers.held(), _redis(server)
        sizes = [worker["sizes"] for worker in held.values()]
        if not any(each[name] for each in sizes for name in FORGOTTEN):
            return held, keys
        if time.monotonic() > until:
            return held, keys
        time.sleep(1)


def _redis(server: RedisServer) -> dict[str, int]:
    """Return how many keys there are, the entries of all streams, and the bytes that Redis uses."""
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        names = list(client.scan_iter(count=1000))
        entries = sum(client.xlen(name) for name in names if client.type(name) == "stream")
        return {"keys": len(names), "entries of streams": entries, "bytes": client.info("memory")["used_memory"]}


def soak(count: int, requests: int, seconds: float, clients: int, seed: int, log: Path) -> bool:
    """Run the workers, print the table, and return whether nothing is left."""
    with redis_server() as server:
        workers = Workers(count, server.url, log)
        try:
            began = time.monotonic()
            warm = Load(max(200, requests // 10), began + seconds / 10)
            asyncio.run(_send(workers.port, warm, clients, seed))
            before, keys_before = _quiet(workers, server)
            load = Load(requests - warm.sent, began + seconds)
            asyncio.run(_send(workers.port, load, clients, seed + 1))
            took = time.monotonic() - began
            after, keys_after = _quiet(workers, server)
            complaints = workers.complaints()
        finally:
            workers.stop()
    print(f"{warm.sent + load.sent:,} requests in {took:.0f} s, {count} workers, {clients} clients")
    print(f"statuses {dict(sorted((warm.statuses + load.statuses).items()))}")
    return _told(before, after, keys_before, keys_after, warm.wrong + load.wrong, complaints)


def _told(
    before: dict[int, dict[str, Any]],
    after: dict[int, dict[str, Any]],
    keys_before: dict[str, int],
    keys_after: dict[str, int],
    wrong: list[str],
    complaints: list[str],
) -> bool:
    held = True
    print("| worker | what | at 10 % | at the end |\n| --- | --- | --- | --- |")
    for pid, then in before.items():
        now = after.get(pid)
        if now is None:
            print(f"FAILED: worker {pid} has died")
            held = False
            continue
        for name, size in then["sizes"].items():
            print(f"| {pid} | {name} | {size} | {now['sizes'][name]} |")
        print(f"| {pid} | requests | {then['served']:,} | {now['served']:,} |")
        print(f"| {pid} | objects of Python | {then['objects']:,} | {now['objects']:,} |")
        print(f"| {pid} | descriptors | {then['descriptors']} | {now['descriptors']} |")
        print(f"| {pid} | RSS in MiB | {then['memory'] / 2**20:.1f} | {now['memory'] / 2**20:.1f} |")
        held = held and now["memory"] - then["memory"] <= MEMORY_SLACK and now["sizes"]["jobs"] == 0
        held = held and now["sizes"]["tasks"] <= then["sizes"]["tasks"] and now["sizes"]["old requests"] == 0
    for name, size in keys_before.items():
        print(f"| Redis | {name} | {size:,} | {keys_after[name]:,} |")
    print(f"wrong answers: {len(wrong)} {wrong[:3]}")
    print(f"error lines: {len(complaints)} {complaints[:3]}")
    return held and not wrong and not complaints
