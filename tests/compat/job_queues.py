"""An application of `examples.queues` in processes of its own: its web server, and a worker of its queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.machine import scaled
from tests.ports import free_port
from tests.redis_server import RedisServer
from tests.servers import ROOT
from tests.stores import until

USER = {"user": "ann"}
LEASE = 6
"""Seconds, as the examples have it."""


class Kind(NamedTuple):
    """A queue, with the command of its worker."""

    package: str
    worker: str
    running: str
    """The state of a job that runs, as the queue has it."""

    stopped: Mapping[str, str]
    """The record of a job that was stopped."""

    noise: tuple[str, ...] = ()
    """Parts of what its worker may complain of."""


_CELERY = "celery -A examples.queues.with_celery:queue worker --loglevel info --without-mingle --without-gossip"
_ROOT = "SecurityWarning"

KINDS = {
    "arq": Kind(
        "arq",
        "arq examples.queues.with_arq.WorkerSettings",
        "in_progress",
        {"status": "complete", "result": "ManualCancelation(status_code=499, detail='enough')"},
        ("failed, ManualCancelation",),
    ),
    "saq": Kind(
        "saq",
        "saq examples.queues.with_saq.settings",
        "active",
        {"status": "aborted", "result": "enough"},
        ("did not finish within the shutdown grace period",),
    ),
    "celery-prefork": Kind(
        "celery", f"{_CELERY} --concurrency 2", "STARTED", {"status": "REVOKED", "result": "enough"}, (_ROOT,)
    ),
    "celery-threads": Kind(
        "celery",
        f"{_CELERY} --pool threads --concurrency 4",
        "STARTED",
        {"status": "REVOKED", "result": "enough"},
        (_ROOT,),
    ),
}


@dataclass
class Site:
    """The web server of an example, its Redis and the folder of its reports; workers come and go."""

    kind: Kind
    redis: RedisServer
    folder: Path
    client: httpx.AsyncClient
    workers: int = 0

    @property
    def reports(self) -> Path:
        return self.folder / "reports"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "REDIS_URL": self.redis.url, "REPORTS": str(self.reports)}

    @contextmanager
    def process(self, command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A program of this Python's environment, with all that it starts."""
        words = [sys.executable, "-m", *command.split()]
        with (
            log.open("wb") as output,
            subprocess.Popen(
                words,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                yield process
            finally:
                kill(process)

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """A worker of the queue, which has just been started."""
        self.workers += 1
        log = self.folder / f"worker-{self.workers}.log"
        with self.process(self.kind.worker, log) as process:
            yield Worker(process, log, self.kind.noise)

    async def ask(self, method: str, path: str, json: Any = None, **headers: str) -> httpx.Response:
        return await self.client.request(method, path, headers={**USER, **headers}, json=json)

    async def get(self, path: str) -> Any:
        return (await self.ask("GET", path)).json()

    async def order(self, what: str = "/reports?pages=600") -> str:
        """Order a job, and return its id."""
        id: str = (await self.ask("POST", what)).json()["id"]
        return id

    async def cancel(self, id: str) -> httpx.Response:
        return await self.ask("POST", f"/operations/{id}/cancel", {"message": "enough"}, prefer="wait=10")

    async def runs(self, id: str) -> dict[str, Any]:
        """Wait until a job is among the operations, and return that."""

        async def is_listed() -> dict[str, Any] | None:
            listed = (await self.get("/operations/"))["operations"]
            return next((each for each in listed if each["id"] == id), None)

        found: dict[str, Any] = await until(is_listed, f"{id} runs")
        return found

    async def progresses(self, id: str) -> dict[str, Any]:
        """Wait until a job has told of its progress, and return its operation."""

        async def has_progress() -> Any:
            operation = await self.runs(id)
            return operation if operation["progress"] else None

        found: dict[str, Any] = await until(has_progress, f"{id} tells of its progress")
        return found

    async def has_record(self, id: str, record: Mapping[str, str]) -> None:
        """Wait until the queue has this record of a job."""
        seen: list[Any] = []

        async def is_so() -> bool:
            seen[:] = [await self.get(f"/reports/{id}")]
            return bool(seen[0] == record)

        try:
            await until(is_so, f"the record is {record}")
        except AssertionError as exc:
            raise AssertionError(f"{exc}, but {seen}") from None

    def has(self, id: str, kind: str) -> bool:
        """Whether there is a file of a report: its ``"draft"``, or the finished ``"txt"``."""
        return (self.reports / f"{id}.{kind}").exists()


class Worker:
    """A process of the queue, with its children."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, noise: tuple[str, ...]) -> None:
        self.process = process
        self._log = log
        self._noise = noise

    def kill(self) -> None:
        """As the kernel does it that is out of memory."""
        kill(self.process)

    def terminate(self) -> None:
        """As an operator does it."""
        self.process.terminate()

    async def has_ended(self) -> bool:
        return self.process.poll() is not None

    def log(self) -> str:
        return self._log.read_text()

    def complaints(self) -> list[str]:
        """The lines of its log that an operator would have to look at."""
        words = ("ERROR", "CRITICAL", "WARN", " ! ", "never retrieved")
        lines = [line for line in self.log().splitlines() if any(word in line for word in words)]
        return [line for line in lines if not any(part in line for part in self._noise)]


@asynccontextmanager
async def site_of(kind: Kind, redis: RedisServer, folder: Path) -> AsyncIterator[Site]:
    """The web server of an example, which answers."""
    # The first sweep of a worker of SAQ takes a job that is being fetched at that moment for stuck, and aborts it: this
    # says that another worker sweeps.
    redis.command("SET", "saq:default:sweep", "1")
    port = free_port()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=scaled(20)) as client:
        site = Site(kind, redis, folder, client)
        site.reports.mkdir()
        log = folder / "web.log"
        command = f"uvicorn examples.queues.with_{kind.package}:app --port {port}"
        with site.process(command, log) as process:

            async def answers() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    return (await site.ask("GET", "/operations/")).status_code == 200
                except httpx.TransportError:
                    return False

            await until(answers, "the application answers")
            yield site


def kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
