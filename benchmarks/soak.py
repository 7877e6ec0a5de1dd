"""A soak test with many requests of ill-behaved clients: `python -m benchmarks.soak --server uvicorn`.

The clients hang up (with and without an RST), send garbage, pipeline, and break off uploads and streams at random. After
that, every piece of work that has begun must have ended, and no tasks, file descriptors or memory may be left in the
server. Print one line for each check; the exit status is 1 if one has failed.

With `--workers 2` the server is a uvicorn with so many workers, and the requests are operations over a Redis of its own:
they are cancelled by id, superseded, refused and started in the background. The table has what each worker and Redis hold
when a tenth of the requests is over, and at the end.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import struct
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import _soak_workers
from benchmarks._server import PATIENCE, ServerProcess
from tests.ports import free_port

COMMANDS = {
    "uvicorn": "uvicorn --port {port} --no-access-log --http h11 --timeout-keep-alive 1",
    "uvicorn-httptools": "uvicorn --port {port} --no-access-log --http httptools --timeout-keep-alive 1",
    "hypercorn": "hypercorn -b 127.0.0.1:{port} -w 0 --keep-alive 1",
    "hypercorn-trio": "hypercorn -b 127.0.0.1:{port} -w 0 -k trio --keep-alive 1",
    "granian": "granian --interface asgi --port {port}",
}
DOORS = ("route", "decorator", "timed", "middleware")
HANDLES = ("handle", "group", "event")
# Memory that an allocator keeps, and that grows once, with the first requests of each kind.
MEMORY_SLACK = 12 * 1024 * 1024
BYTES_PER_REQUEST = 256
COMPLAINT = re.compile(r"Traceback|never retrieved|was never awaited")


@dataclass
class Findings:
    """The observations of the clients."""

    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """The resources that a server holds at one moment."""

    counts: dict[str, int]
    tasks: int
    descriptors: int
    memory: int


class Client:
    """A client that does something else with each connection."""

    def __init__(self, port: int, seed: str, findings: Findings) -> None:
        self._port = port
        self._random = random.Random(seed)
        self._seed = seed
        self._findings = findings

    async def visit(self) -> None:
        """Open a connection, behave in a random way, and leave."""
        with suppress(ConnectionError):
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                ways = (self._ask, self._ask, self._pipeline, self._leave, self._leave, self._break_off, self._babble)
                await self._random.choice(ways)()
            finally:
                await self._end()

    async def _end(self) -> None:
        if self._random.random() < 0.5:
            linger = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._writer.transport.abort()
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    def _request(self) -> tuple[bytes, str]:
        self._findings.sent += 1
        key = f"{self._seed}-{self._findings.sent}"
        door = self._random.choice(DOORS + HANDLES)
        kind = self._random.choice(("work", "upload", "stream")) if door in DOORS else "work"
        body = self._random.randbytes(self._random.choice((1, 1000, 100_000))) if kind == "upload" else b""
        seconds = self._random.choice((0, 0.001, 0.005, 0.006, 0.03))
        head = f"POST /{door}/{kind}?key={key}&seconds={seconds} HTTP/1.1\r\nhost: soak\r\ncontent-length: {len(body)}"
        return f"{head}\r\n\r\n".encode() + body, key

    async def _ask(self) -> None:
        for _ in range(self._random.randint(1, 4)):
            data, key = self._request()
            self._writer.write(data)
            if not await self._answer(key):
                return

    async def _pipeline(self) -> None:
        requests = [self._request() for _ in range(self._random.randint(2, 4))]
        self._writer.write(b"".join(data for data, _ in requests))
        for _, key in requests:
            if not await self._answer(key):
                return

    async def _leave(self) -> None:
        """Hang up before the response, or at a random moment of it."""
        data, _ = self._request()
        self._writer.write(data)
        if self._random.random() < 0.3:
            await self._reader.read(self._random.choice((1, 200)))
        await asyncio.sleep(self._random.choice((0, 0.001, 0.004, 0.006, 0.02)))

    async def _break_off(self) -> None:
        """Hang up in the middle of the request."""
        data, _ = self._request()
        self._writer.write(data[: self._random.randrange(len(data))])
        await asyncio.sleep(self._random.choice((0, 0.005)))

    async def _babble(self) -> None:
        """Send bytes that are not a request, alone or after a request."""
        if self._random.random() < 0.5:
            self._writer.write(self._request()[0])
        self._writer.write(self._random.randbytes(200))
        await asyncio.sleep(self._random.choice((0, 0.005)))

    async def _answer(self, key: str) -> bool:
        """Read a response, and check that it belongs to the request; return whether another can follow."""
        try:
            async with asyncio.timeout(PATIENCE):
                status, body = await self._read()
        except TimeoutError:
            self._findings.wrong.append(f"{key} was not answered")
            return False
        except asyncio.IncompleteReadError:
            return False
        self._findings.statuses[status] += 1
        if status == 200 and not body.decode().startswith(key):
            self._findings.wrong.append(f"{key} was answered {body[:60]!r}")
        elif status not in (200, 504):
            self._findings.wrong.append(f"{key} was answered with {status}")
        return True

    async def _read(self) -> tuple[int, bytes]:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split()[1])
        length = re.search(r"content-length: *(\d+)", head)
        if length is not None:
            return status, await self._reader.readexactly(int(length[1]))
        body = b""
        while size := int((await self._reader.readuntil(b"\r\n")), 16):
            body += (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readexactly(2)
        return status, body


class Server(ServerProcess):
    """A server of the application of this benchmark."""

    def __init__(self, name: str, log: Path) -> None:
        port = free_port()
        super().__init__(port, [*COMMANDS[name].format(port=port).split(), "benchmarks._soak_app:app"], log)
        self._wait()

    def _wait(self) -> None:
        for _ in range(600):
            with suppress(OSError):
                self._told()
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"the server does not answer: {self._log.read_text()}")

    def _told(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/counts", timeout=PATIENCE) as response:
            told: dict[str, Any] = json.load(response)
        return told

    def read(self) -> Reading:
        told = self._told()
        parent = psutil.Process(self._process.pid)
        processes = [parent, *parent.children(recursive=True)]
        return Reading(
            told["counts"],
            told["tasks"],
            sum(process.num_fds() for process in processes),
            sum(process.memory_info().rss for process in processes),
        )

    def settled(self, before: Reading) -> Reading:
        """Return the resources that the server holds when it has released all that it will release."""
        until = time.monotonic() + PATIENCE
        while True:
            now = self.read()
            quiet = not unequal(now.counts) and now.tasks <= before.tasks and now.descriptors <= before.descriptors
            if quiet or time.monotonic() > until:
                return now
            time.sleep(0.1)

    def complaints(self) -> int:
        return len(COMPLAINT.findall(self._log.read_text(errors="replace")))


def unequal(counts: dict[str, int]) -> list[str]:
    """Return a line for each kind of work that has begun more often than it has ended."""
    names = {name.rsplit(" ", 1)[0] for name in counts}
    ends = {name: (counts.get(f"{name} begun", 0), counts.get(f"{name} ended", 0)) for name in sorted(names)}
    return [f"{name}: {begun} begun, {ended} ended" for name, (begun, ended) in ends.items() if begun != ended]


async def load(port: int, requests: int, clients: int, seed: int, findings: Findings, until: float) -> None:
    async def work(number: int) -> None:
        client = Client(port, f"{seed}.{number}", findings)
        while findings.sent < goal and time.monotonic() < until:
            await client.visit()

    goal = findings.sent + requests
    await asyncio.gather(*(work(number) for number in range(clients)))


def checks(before: Reading, after: Reading, findings: Findings, complaints: int) -> list[tuple[str, bool, str]]:
    """Return the name of each check, whether it passed, and the observation."""
    grown = after.memory - before.memory
    begun = sum(count for name, count in after.counts.items() if name.endswith("begun"))
    loose = unequal(after.counts)
    return [
        ("every response is its request's own", not findings.wrong, "; ".join(findings.wrong[:3]) or "yes"),
        ("what began has ended, cleanup included", begun > 0 and not loose, "; ".join(loose) or f"{begun} times"),
        ("no task is left", after.tasks <= before.tasks, f"{before.tasks} before, {after.tasks} after"),
        (
            "no file descriptor is left",
            after.descriptors <= before.descriptors,
            f"{before.descriptors} before, {after.descriptors} after",
        ),
        (
            "no memory is left",
            grown <= MEMORY_SLACK + BYTES_PER_REQUEST * findings.sent,
            f"{grown / 1024 / 1024:+.1f} MiB after {findings.sent} requests",
        ),
        ("nothing in the log", not complaints, f"{complaints} tracebacks and the like"),
    ]


def soak(name: str, requests: int, seconds: float, clients: int, seed: int, log: Path) -> bool:
    """Run one server, print the results, and return whether all checks have passed."""
    server = Server(name, log)
    try:
        findings = Findings()
        # The first requests are not counted, because objects that are made once are made then.
        until = time.monotonic() + seconds
        asyncio.run(load(server.port, max(50, requests // 10), clients, seed, findings, until))
        before = settled_soon(server)
        asyncio.run(load(server.port, requests, clients, seed + 1, findings, until))
        after = server.settled(before)
        results = checks(before, after, findings, server.complaints())
    finally:
        server.stop()
    print(f"{name}: {findings.sent} requests, statuses {dict(sorted(findings.statuses.items()))}")
    for check, held, seen in results:
        print(f"{'ok' if held else 'FAILED':8}{check}: {seen}")
    return all(held for _, held, _ in results)


def settled_soon(server: Server) -> Reading:
    """Return the resources of the server when all work of the warm-up has ended."""
    until = time.monotonic() + PATIENCE
    last = server.read()
    while True:
        time.sleep(0.3)
        now = server.read()
        is_quiet = not unequal(now.counts) and (now.tasks, now.descriptors) == (last.tasks, last.descriptors)
        if is_quiet or time.monotonic() > until:
            return now
        last = now


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=COMMANDS, default="uvicorn")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=32, help="connections at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="several workers with operations over a Redis instead")
    parser.add_argument("--seconds", type=float, default=3600.0, help="the longest time that the requests may take")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        if options.workers:
            held = _soak_workers.soak(
                options.workers, options.requests, options.seconds, options.clients, options.seed, log
            )
        else:
            held = soak(options.server, options.requests, options.seconds, options.clients, options.seed, log)
    sys.exit(not held)


if __name__ == "__main__":
    main()
