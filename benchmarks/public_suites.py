"""Run other projects' own test suites without our doors and under each of them; print the tests whose outcome differs.

::

    uv run python -m benchmarks.public_suites                          # all suites, all doors: about 20 minutes on 2 cores
    uv run python -m benchmarks.public_suites starlette --doors stack endpoint
    uv run python -m benchmarks.public_suites fastapi --only tests/test_ws_router.py
    uv run python -m benchmarks.public_suites starlette --bounded      # streams, background tasks, middleware, WebSockets

It downloads the source distributions, which hold the tests, and makes an environment of their own for them, in ``--work``
(by default a temporary directory, which is removed; another directory is kept, and used again). The exit status is 1 if
any outcome differs.

The doors are added from outside by `benchmarks._suite_doors`, so that no test is changed:

========  ==============================================================================================================
client    the middleware around the application of each ``TestClient``
stack     the middleware as the outermost of every application, and around everything mounted
route     `CancelableRoute` as the default route class (FastAPI)
endpoint  ``@with_cancelation`` around every endpoint
all       all of these at once
========  ==============================================================================================================

A test that hangs is ended after ``--patience`` seconds with the process that runs it, and counts as failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLUGIN = Path(__file__).with_name("_suite_doors.py")

Outcomes = dict[str, Mapping[str, str]]


@dataclass(frozen=True)
class Suite:
    """A project whose source distribution holds its tests."""

    requirement: str
    needs: tuple[str, ...]
    """The requirements of its tests."""
    doors: tuple[str, ...]
    bounded: tuple[str, ...] = ()
    """The files whose tests concern our doors."""
    left_out: tuple[str, ...] = ()
    own_files: tuple[tuple[str, str], ...] = ()
    """The names and texts of files that the tests need, and that the distribution lacks."""

    @property
    def name(self) -> str:
        return self.requirement.partition("==")[0]


SSE_CONFTEST = '''
import pytest
from sse_starlette import sse


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def reset_shutdown_state():
    """Reset the signal that a test simulates, so that it does not end the streams of the next test."""
    sse.AppStatus.should_exit = False
    vars(sse._thread_state).clear()
    yield
    sse.AppStatus.should_exit = False
    vars(sse._thread_state).clear()
'''

SUITES = {
    "starlette": Suite(
        "starlette==1.10.0",
        ("starlette[full]", "httpx2[zstd]", "opentelemetry-sdk", "importlib-metadata"),
        ("client", "stack", "endpoint", "all"),
        bounded=(
            "tests/middleware/test_base.py",
            "tests/test_background.py",
            "tests/test_exceptions.py",
            "tests/test_responses.py",
            "tests/test_testclient.py",
            "tests/test_websockets.py",
        ),
    ),
    "fastapi": Suite(
        "fastapi==0.165.0",
        (
            "fastapi[all]",
            "a2wsgi",
            "coverage",
            "dirty-equals",
            "flask",
            "httpx2",
            "inline-snapshot",
            "logfire",
            "opentelemetry-instrumentation-fastapi",
            "pwdlib[argon2]",
            "pyjwt",
            "sentry-sdk",
            "sqlmodel",
            "strawberry-graphql",
            "orjson",
            "ujson",
        ),
        ("client", "stack", "route", "endpoint", "all"),
        bounded=(
            "tests/test_dependency_after_yield_raise.py",
            "tests/test_dependency_after_yield_streaming.py",
            "tests/test_dependency_after_yield_websockets.py",
            "tests/test_dependency_contextmanager.py",
            "tests/test_dependency_wrapped.py",
            "tests/test_async_dependency_cleanup.py",
            "tests/test_exception_handlers.py",
            "tests/test_request_body_limits.py",
            "tests/test_ws_router.py",
        ),
        left_out=(
            "tests/benchmarks",
            "tests/memory_benchmarks",
            "tests/test_prepare_release.py",
            # They run in processes of their own, which the plugin does not reach; some take too long on a busy machine.
            "tests/test_telemetry/test_environment_integrations.py",
            "tests/test_telemetry/test_runtime.py",
        ),
    ),
    "sse-starlette": Suite(
        "sse-starlette==3.7.0",
        ("httpx2", "pytest-asyncio", "asgi-lifespan", "uvicorn"),
        ("client", "stack", "endpoint", "all"),
        own_files=(
            ("tests/__init__.py", ""),
            ("tests/conftest.py", SSE_CONFTEST),
            ("tests/anyio_compat.py", "from sse_starlette._utils import collapse_excgroups as collapse_excgroups\n"),
        ),
    ),
}
COMMON = ("pytest<9.2", "pytest-timeout", "pytest-xdist[psutil]", "trio", "httpx")


class Workshop:
    """A directory with an environment and the sources of one suite."""

    def __init__(self, suite: Suite, folder: Path) -> None:
        self.suite = suite
        self.folder = folder / suite.name
        self.python = self.folder / "venv/bin/python"
        self.plugins = self.folder / "plugins"

    def prepare(self) -> None:
        self.plugins.mkdir(parents=True, exist_ok=True)
        shutil.copy(PLUGIN, self.plugins)
        if not self.python.exists():
            run("uv", "venv", "--quiet", "--python", sys.executable, self.folder / "venv")
            needed = (self.suite.requirement, *self.suite.needs, *COMMON)
            run("uv", "pip", "install", "--quiet", "--python", self.python, "pip", *needed, "-e", ROOT)
        if not list(self.folder.glob("sdist/*/tests")):
            self._unpack()

    def _unpack(self) -> None:
        sdist = self.folder / "sdist"
        options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:", "--dest", sdist)
        run(self.python, "-m", "pip", "download", *options, self.suite.requirement)
        for archive in sdist.glob("*.tar.gz"):
            with tarfile.open(archive) as packed:
                packed.extractall(sdist, filter="data")
        for name, text in self.suite.own_files:
            (self.sources / name).write_text(text)

    @property
    def sources(self) -> Path:
        return next(path for path in self.folder.glob("sdist/*") if path.is_dir())

    def outcomes(self, door: str, chosen: Sequence[str], jobs: int, patience: float) -> Outcomes:
        """Run the suite under ``door``, its files distributed to ``jobs`` processes."""
        with ThreadPoolExecutor(jobs) as pool:
            hands = [self._files(chosen)[number::jobs] for number in range(jobs)]
            parts = pool.map(lambda hand: self._run_to_the_end(door, hand, patience), [hand for hand in hands if hand])
            return {name: outcome for part in parts for name, outcome in part.items()}

    def _files(self, chosen: Sequence[str]) -> list[str]:
        found: set[str] = set()
        for path in (self.sources / name for name in chosen or ("tests",)):
            tests = path.rglob("test_*.py") if path.is_dir() else [path]
            found |= {str(test.relative_to(self.sources)) for test in tests}
        return sorted(file for file in found if not file.startswith(self.suite.left_out or ("/",)))

    def _run_to_the_end(self, door: str, files: Iterable[str], patience: float) -> Outcomes:
        """Return the outcomes of all tests; if a hanging test has ended a process, start another one for the rest."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            journal = Path(folder) / "outcomes"
            complete = journal.with_suffix(".complete")
            while not complete.exists():
                known = read(journal)
                self._run_once(door, files, journal, patience)
                if read(journal) == known and not complete.exists():
                    raise RuntimeError(f"{self.suite.name} does not run: {(Path(folder) / 'log').read_text()[-3000:]}")
            return read(journal)

    def _run_once(self, door: str, files: Iterable[str], journal: Path, patience: float) -> None:
        environment = os.environ | {
            "SUITE_DOOR": door,
            "SUITE_OUTCOMES": str(journal),
            "PYTHONPATH": str(self.plugins),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        options = ["-q", "-p", "_suite_doors", "-p", "no:cacheprovider", "-p", "no:logfire", "-o", "addopts="]
        limits = ["--timeout", str(patience), "--timeout-method", "thread"]
        with (journal.parent / "log").open("wb") as log:
            command = [str(self.python), "-m", "pytest", *options, *limits, *files]
            subprocess.run(command, cwd=self.sources, env=environment, stdout=log, stderr=log, check=False)


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


def read(journal: Path) -> Outcomes:
    """Return the outcomes so far; a test that has begun and not ended has hung."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return {record.pop("test"): record for record in map(json.loads, lines)}


def difference(bare: Outcomes, other: Outcomes) -> list[str]:
    """Return a line for each test whose outcomes differ, with both outcomes and the reason of the second."""
    missing = {"outcome": "missing", "why": ""}
    lines = []
    for name in sorted(bare.keys() | other.keys()):
        before, after = bare.get(name, missing), other.get(name, missing)
        if before["outcome"] != after["outcome"]:
            lines.append(f"  {name}: {before['outcome']} -> {after['outcome']}  {after['why']}")
    return lines


def compare(workshop: Workshop, doors: Iterable[str], chosen: Sequence[str], jobs: int, patience: float) -> int:
    """Print the tests that differ under each of ``doors``, and return their number."""
    bare = workshop.outcomes("bare", chosen, jobs, patience)
    failed = sum(outcome["outcome"] == "failed" for outcome in bare.values())
    print(f"{workshop.suite.requirement}: {len(bare)} tests, of which {failed} fail bare", flush=True)
    total = 0
    for door in doors:
        lines = difference(bare, workshop.outcomes(door, chosen, jobs, patience))
        print(f" {door}: {len(lines)} differ", *lines, sep="\n", flush=True)
        total += len(lines)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="all of them, if none is named")
    parser.add_argument("--doors", nargs="+", help="all that apply, if none is named")
    parser.add_argument("--only", nargs="+", default=[], help="files or folders of the suite")
    parser.add_argument("--bounded", action="store_true", help="only the files about what our doors touch")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--patience", type=float, default=60)
    parser.add_argument("--work", type=Path, help="a directory to keep and to use again")
    arguments = parser.parse_args()
    differ = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.suites or SUITES:
            workshop = Workshop(SUITES[name], arguments.work or Path(temporary))
            workshop.prepare()
            chosen = arguments.only or (workshop.suite.bounded if arguments.bounded else ())
            doors = arguments.doors or workshop.suite.doors
            differ += compare(workshop, doors, chosen, arguments.jobs, arguments.patience)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
