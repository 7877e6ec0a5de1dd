"""A record of the work for each request: the page shows it live, the terminal prints a line for each request."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import anyio
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

from cancelable_deps import CancelationReason

from . import crunch
from .shared import SharedRuns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from cancelable_deps import Cancelable

TICK = 0.1
LISTED = "/operations"
"""The path of the table of what runs. The page asks for it again and again, and that is no work."""


class Run:
    """One request: the progress of its work, and how it ended."""

    def __init__(self, run_id: str, method: str, path: str, task: asyncio.Task[Any]) -> None:
        self.id, self.method, self.path = run_id, method, path
        self.worker = os.getpid()
        self.unit = ""
        self.total: int | None = None
        self.done = 0
        self.status: int | None = None
        self.reason: str | None = None
        self.left: dict[str, int] | None = None
        self.ended = False
        self.ms = 0
        self.process: int | None = None
        self.process_lives: bool | None = None
        self.cpu_ms = 0
        self._board: Path | None = None
        self._cancelable: Cancelable | None = None
        self._task = task
        self._started = time.perf_counter()
        self._lock = threading.Lock()

    def begin(self, unit: str, total: int | None, cancelable: Cancelable | None) -> None:
        """Note that the work starts, inside the block `cancelable`, if any."""
        self.unit, self.total = unit, total
        if cancelable is not None:
            self.follow(cancelable)

    def follow(self, cancelable: Cancelable) -> None:
        """Note when `cancelable` is cancelled; only the first one is followed, the outermost, which answers the request."""
        if self._cancelable is None:
            self._cancelable = cancelable
            cancelable.on_cancel(self._cancelled)

    def _cancelled(self, cancelable: Cancelable) -> None:
        if cancelable.reason is not None:
            self.stop(cancelable.reason.name)

    def shut_down(self) -> None:
        if self._cancelable is not None:
            self._cancelable.cancel_nowait(CancelationReason.SIGNAL)
        elif self.unit and not self.ended:
            self._task.cancel()

    def advance(self, amount: int) -> None:
        """Add to the work that was done; worker threads call this."""
        with self._lock:
            self.done += amount

    @contextmanager
    def board(self, folder: Path) -> Iterator[str]:
        """Provide the path of a file to which another process writes its progress."""
        with TemporaryDirectory(dir=folder) as own:
            self._board = Path(own, "board")
            self._board.touch()
            try:
                yield str(self._board)
            finally:
                self.look()
                self._board = None
                if self.process is not None:
                    self.process_lives = _lives(self.process)

    def look(self) -> None:
        found = None if self._board is None else crunch.read(self._board.read_bytes())
        if found is not None:
            self.process, self.done, self.cpu_ms = found

    def stop(self, reason: str) -> None:
        """Note why the run was cancelled, and its progress by then."""
        self.look()
        self.reason, self.left = reason, {"done": self.done, "ms": self.elapsed_ms()}

    def end(self) -> None:
        self.ms, self.ended = self.elapsed_ms(), True

    def elapsed_ms(self) -> int:
        return round((time.perf_counter() - self._started) * 1000)

    def snapshot(self) -> dict[str, Any]:
        self.look()
        shown = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return shown if self.ended else shown | {"ms": self.elapsed_ms()}

    def line(self) -> str:
        work = f"{self.done:,} {self.unit}" if self.unit else ""
        outcome = " ".join(filter(None, (self.reason, str(self.status or "no response"))))
        # A path may have control characters, which a terminal would obey.
        path = "".join(each if each.isprintable() else "?" for each in self.path)
        return f"{self.method:<5} {path:<16} {outcome:<18} {work:>18} {self.ms:>8,} ms{self._process_line()}"

    def _process_line(self) -> str:
        if self.process is None:
            return ""
        return f"  process {self.process} {'lives' if self.process_lives else 'is gone'}, {self.cpu_ms:,} ms of CPU"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


class Ledger:
    """The runs of this worker, newest last; with `folder`, those of all workers that share it."""

    def __init__(self, folder: Path | None = None, kept: int = 100) -> None:
        self.closed = False
        self._kept = kept
        self._runs: dict[str, Run] = {}
        self._numbers = itertools.count(1)
        self._all = None if folder is None else SharedRuns(folder)

    def open(self, run_id: str | None, method: str, path: str) -> Run:
        """Note a request that the current task serves."""
        task = asyncio.current_task()
        assert task is not None
        run = Run(run_id or f"run-{os.getpid()}-{next(self._numbers)}", method, path, task)
        self._runs[run.id] = run
        while len(self._runs) > self._kept:
            # The oldest that has ended: what runs is to be seen until its end.
            del self._runs[next((old.id for old in self._runs.values() if old.ended), next(iter(self._runs)))]
        return run

    def close(self) -> None:
        """End the live feeds and cancel the requests that can be cancelled, when the server stops."""
        self.closed = True
        for run in self._runs.values():
            run.shut_down()

    def snapshots(self) -> list[dict[str, Any]]:
        """Return the runs of this worker that have begun to work."""
        return [run.snapshot() for run in self._runs.values() if run.unit]

    @asynccontextmanager
    async def shared(self, app: object) -> AsyncIterator[None]:
        """Show the runs of this worker to the others, as the lifespan of the application."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._share)
            yield
            tasks.cancel_scope.cancel()

    async def _share(self) -> None:
        while self._all is not None:
            self._all.write(self.snapshots())
            await anyio.sleep(TICK)

    async def changes(self) -> AsyncIterator[str]:
        """Yield Server-Sent Events: first all runs, then at every tick those that have changed, until the server stops."""
        seen: dict[str, dict[str, Any]] = {}
        while not self.closed:
            everywhere = self.snapshots() + (self._all.of_others() if self._all else [])
            now = {run["id"]: run for run in everywhere}
            changed = [run for run_id, run in now.items() if seen.get(run_id) != run]
            yield f"data: {json.dumps(changed)}\n\n"
            seen = now
            await anyio.sleep(TICK)


class LedgerMiddleware:
    """A middleware that opens a run for each request and prints its line at the end; outermost, to see the final status.

    Every response says which worker it is from.
    """

    def __init__(self, app: ASGIApp, ledger: Ledger) -> None:
        self.app, self.ledger = app, ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].startswith(f"{LISTED}/"):
            return await self.app(scope, receive, _naming_worker(send))
        run_id = dict(scope["headers"]).get(b"x-run", b"").decode("latin-1")
        run = self.ledger.open(run_id, scope["method"], scope["path"])
        scope.setdefault("state", {})["run"] = run
        try:
            await self.app(scope, receive, _noting_status(run, send))
        except ClientDisconnect:
            # A handler without cancellation raises this if the upload breaks off. uvicorn would print a traceback.
            run.stop("ClientDisconnect")
        except asyncio.CancelledError:
            if not self.ledger.closed:
                raise
            # Ctrl-C while a handler without cancellation works. If it were raised, uvicorn would print a traceback.
            run.stop("killed")
            if run.status is None:
                await PlainTextResponse("The server stopped", 503)(scope, receive, _noting_status(run, send))
        finally:
            run.end()
            print(time.strftime("%H:%M:%S"), run.line(), flush=True)


def _naming_worker(send: Send) -> Send:
    async def name(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-worker", str(os.getpid()).encode())]
        await send(message)

    return name


def _noting_status(run: Run, send: Send) -> Send:
    send = _naming_worker(send)

    async def note(message: Message) -> None:
        if message["type"] == "http.response.start":
            run.status = message["status"]
        await send(message)

    return note
