"""`python -m examples.demo`, driven over real sockets: what it shows is what the server did."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.client import HTTPResponse
from pathlib import Path
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from .machine import scaled
from .ports import free_port
from .redis_server import redis_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Snapshot = dict[str, Any]

ROOT = Path(__file__).parent.parent
PATIENCE = scaled(40)
# Long enough to begin, and shorter than the work, which takes no longer because the machine was found to be slow.
LIMIT = min(scaled(0.1), 0.2)
WORKS = ["report", "words", "upload", "feed", "collatz"]
SIZE = 600_000


class Board:
    """What others tell us in their threads, and waiting for it."""

    def __init__(self) -> None:
        self._changed = Condition()

    def note(self, change: Callable[[], object]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    def wait(self, state: Callable[[], Any], what: str) -> Any:
        with self._changed:
            seen = self._changed.wait_for(state, PATIENCE)
        assert seen, f"waited in vain for {what}"
        return seen


class Demo:
    """A running demonstration: what it prints, and what its page would be told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.output: list[str] = []
        self.runs: dict[str, Snapshot] = {}
        self._board = Board()
        self._numbers = itertools.count()
        self._reader = Thread(target=self._read_output, daemon=True)
        self._reader.start()

    def start(self) -> None:
        self.address = self.printed(r"Open (http://\S+)/ ").group(1)
        self.port = int(self.address.rsplit(":", 1)[1])
        Thread(target=self._read_events, daemon=True).start()

    def end(self) -> None:
        workers: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            workers = psutil.Process(self.process.pid).children(recursive=True)
        with self.process:
            self.process.kill()
            for worker in psutil.wait_procs(workers, PATIENCE)[1]:
                worker.kill()
            # Before its output is closed.
            self._reader.join()

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._board.note(partial(self.output.append, line.rstrip()))

    def _read_events(self) -> None:
        with suppress(httpx.TransportError), httpx.stream("GET", f"{self.address}/events", timeout=None) as response:
            for line in response.iter_lines():
                if line:
                    changed = {run["id"]: run for run in json.loads(line.removeprefix("data: "))}
                    self._board.note(partial(self.runs.update, changed))

    def printed(self, pattern: str) -> re.Match[str]:
        """Wait for a line of the terminal."""

        def find() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.output)), None)

        found: re.Match[str] = self._board.wait(find, f"{pattern} in {self.output}")
        return found

    def saw(self, run_id: str, state: Callable[[Snapshot], bool]) -> Snapshot:
        """Wait until the live events show the run in this state."""

        def find() -> Snapshot | None:
            run = self.runs.get(run_id)
            return run if run is not None and state(run) else None

        found: Snapshot = self._board.wait(find, f"{run_id} in {self.runs}")
        return found

    def open(self, path: str, run_id: str) -> socket.socket:
        """Send a request on a socket of its own; an upload says that more is to come than it sends."""
        method, body = ("POST", b"u" * 100_000) if path.endswith("/upload") else ("GET", b"")
        length = f"content-length: {len(body) * 2}\r\n" if body else ""
        head = f"{method} {path} HTTP/1.1\r\nhost: test\r\nx-run: {run_id}\r\n{length}\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        connection.sendall(head.encode() + body)
        return connection

    def hang_up(self, path: str) -> tuple[Snapshot, Snapshot]:
        """Start a request, hang up while it works; how far it had come by then, and how it ended."""
        run_id = f"hang-up{path}-{next(self._numbers)}"
        with self.open(path, run_id):
            before = self.saw(run_id, lambda run: run["done"] > 0)
        return before, self.saw(run_id, has_ended)


def has_ended(run: Snapshot) -> bool:
    return bool(run["ended"])


@contextmanager
def running_demo(folder: Path, size: int = SIZE, *options: str, **environment: str) -> Iterator[Demo]:
    """A demonstration on a free port, with its files in `folder`."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "examples.demo",
            "--port",
            "0",
            "--rows",
            str(size),
            "--words",
            str(size),
            "--numbers",
            str(size // 10),
            *options,
        ],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    demo = Demo(process)
    try:
        demo.start()
        yield demo
    finally:
        demo.end()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with running_demo(tmp_path_factory.mktemp("demo"), DEMO_LIMIT=str(LIMIT)) as running:
        yield running


pytestmark = pytest.mark.real


def test_introduces_itself(demo: Demo) -> None:
    for work in WORKS:
        for prefix in ("", "/limited", "/plain"):
            demo.printed(rf"curl -.* {re.escape(demo.address)}{prefix}/{work}$")


def test_page_needs_nothing_else(demo: Demo) -> None:
    page = httpx.get(demo.address).text
    setup = re.search(r'<script type="application/json" id="setup">(.*)</script>', page)
    assert setup is not None
    assert [work["name"] for work in json.loads(setup[1])["works"]] == WORKS
    # Nothing is loaded; the link is to a page of the same server.
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*', page) == ['href="/operations/page']


@pytest.mark.parametrize("work", ["report", "words", "collatz"])
def test_same_answer_with_and_without(demo: Demo, work: str) -> None:
    answers = [httpx.get(f"{demo.address}{prefix}/{work}", timeout=PATIENCE) for prefix in ("", "/plain")]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()


def test_the_report_is_shop_by_shop(demo: Demo) -> None:
    largest = httpx.get(f"{demo.address}/report", timeout=PATIENCE).json()
    assert {f"shop {number}" for number in range(40)} == largest.keys()
    assert all(len(sales) == 3 and sales == sorted(sales, reverse=True) for sales in largest.values())


@pytest.mark.parametrize("path", ["/upload", "/plain/upload"])
def test_upload_is_hashed(demo: Demo, path: str) -> None:
    body = os.urandom(500_000)
    answer = httpx.post(demo.address + path, content=body, timeout=PATIENCE)
    assert answer.json()["sha256"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("path", ["/feed", "/plain/feed"])
def test_feed_ends_by_itself(demo: Demo, path: str) -> None:
    answer = httpx.get(f"{demo.address}{path}?events=2", timeout=PATIENCE)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [json.loads(line[6:])["sales"] for line in answer.text.split("\n\n") if line] == [20_000, 40_000]


@pytest.mark.parametrize(
    ("work", "status"), [("report", 499), ("words", 499), ("upload", 499), ("feed", 200), ("collatz", 499)]
)
def test_hang_up_stops_the_work(demo: Demo, work: str, status: int) -> None:
    before, after = demo.hang_up(f"/{work}")
    assert (after["reason"], after["status"]) == ("DISCONNECT", status)
    assert before["done"] <= after["left"]["done"] <= after["done"] < after["total"]


@pytest.mark.parametrize("work", ["report", "words", "collatz"])
def test_hang_up_goes_unnoticed_without(demo: Demo, work: str) -> None:
    before, after = demo.hang_up(f"/plain/{work}")
    assert before["done"] < after["done"] == after["total"]
    assert (after["reason"], after["status"], after["left"]) == (None, 200, None)


def test_hang_up_kills_the_process(demo: Demo) -> None:
    before, after = demo.hang_up("/collatz")
    assert before["process"] == after["process"]
    assert before["cpu_ms"] <= after["cpu_ms"]
    assert after["process_lives"] is False
    assert not psutil.pid_exists(after["process"])
    demo.printed(rf"/collatz +DISCONNECT 499 .* ms  process {after['process']} is gone, [\d,]+ ms of CPU$")


def test_process_works_on_without(demo: Demo) -> None:
    before, after = demo.hang_up("/plain/collatz")
    assert before["process"] == after["process"]
    assert before["cpu_ms"] < after["cpu_ms"]
    assert psutil.pid_exists(after["process"])
    demo.printed(rf"/plain/collatz +200 .* ms  process {after['process']} lives, [\d,]+ ms of CPU$")


def test_broken_upload_is_an_error_without(demo: Demo) -> None:
    _, after = demo.hang_up("/plain/upload")
    assert (after["reason"], after["status"]) == ("ClientDisconnect", 500)


@pytest.mark.parametrize("work", ["report", "words", "upload", "collatz"])
def test_limit(demo: Demo, work: str) -> None:
    run_id = f"limited-{work}"
    with demo.open(f"/limited/{work}", run_id) as connection, HTTPResponse(connection) as answer:
        answer.begin()
        assert json.load(answer) == {"detail": f"Timed out after {LIMIT:g} seconds"}
        assert answer.status == 504
    run = demo.saw(run_id, has_ended)
    assert (run["reason"], run["status"]) == ("TIMEOUT", 504)
    assert 1000 * LIMIT <= run["left"]["ms"] <= run["ms"]
    assert run["done"] < run["total"]


def test_limit_ends_the_feed_and_says_why(demo: Demo) -> None:
    feed = httpx.get(f"{demo.address}/limited/feed", headers={"x-run": "cut"}, timeout=PATIENCE).text
    assert '\n\nevent: cancelled\ndata: {"reason": "timeout", ' in feed
    run = demo.saw("cut", has_ended)
    assert (run["reason"], run["status"]) == ("TIMEOUT", 200)


def test_one_line_for_each_request(demo: Demo) -> None:
    demo.hang_up("/report")
    httpx.get(f"{demo.address}/plain/feed?events=1", timeout=PATIENCE)
    demo.printed(r"^[\d:]{8} GET   /report +DISCONNECT 499 +[\d,]+ rows +[\d,]+ ms$")
    demo.printed(r"^[\d:]{8} GET   /plain/feed +200 +20,000 rows +[\d,]+ ms$")
    served = demo.output[demo.output.index(demo.printed("^Open ").string) + 1 :]
    assert [line for line in served if line and not re.match(r"[\d:]{8} (GET|POST) ", line)] == []


def test_taken_port(demo: Demo) -> None:
    command = [sys.executable, "-m", "examples.demo", "--port", str(demo.port)]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert second.returncode == 1
    assert f"Cannot listen on 127.0.0.1 port {demo.port}: " in second.stderr
    assert "--port 0" in second.stderr
    assert "Traceback" not in second.stderr


def read_until(connection: socket.socket, text: bytes) -> bytes:
    read = b""
    while text not in read:
        part = connection.recv(65536)
        assert part, f"the server has closed after {read!r}"
        read += part
    return read


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_cleanly_in_the_middle_of_work(tmp_path: Path, number: signal.Signals) -> None:
    with running_demo(tmp_path, size=1_500_000) as demo:
        paths = ["/feed", "/plain/feed", "/report", "/plain/report", "/plain/words", "/upload", "/collatz"]
        paths.append("/plain/collatz")
        report = httpx.post(f"{demo.address}/reports").headers["location"]
        connections = [demo.open(path, path) for path in [*paths, f"{report}/events"]]
        read_until(connections[-1], b"event: progress")
        for path in paths:
            demo.saw(path, lambda run: run["done"] > 0)
        workers = [demo.runs[path]["process"] for path in paths if path.endswith("/collatz")]
        demo.process.send_signal(number)
        assert demo.process.wait(PATIENCE) == 0
        for connection in connections:
            connection.close()
        demo.printed(r"GET   /feed +SIGNAL 200")
        demo.printed(r"GET   /report +SIGNAL 503")
        demo.printed(r"GET   /plain/report +killed 503")
        assert [psutil.pid_exists(worker) for worker in workers] == [False, False]
    assert not re.search("Traceback|ERROR|WARN", "\n".join(demo.output))
    assert list(tmp_path.iterdir()) == []


# Several workers


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    options = ("--workers", "2", "--redis")
    folder = tmp_path_factory.mktemp("demo")
    with redis_server() as redis, running_demo(folder, SIZE, *options, redis.url, DEMO_PACE="0.2") as demo:
        yield demo


@contextmanager
def client_of_each_worker(demo: Demo) -> Iterator[dict[int, httpx.Client]]:
    """Two clients, by the worker that each is connected to."""
    with ExitStack() as stack:
        found: dict[int, httpx.Client] = {}
        until = time.monotonic() + PATIENCE
        while len(found) < 2:
            assert time.monotonic() < until, f"only {list(found)} answer"
            client = stack.enter_context(httpx.Client(base_url=demo.address, timeout=PATIENCE))
            answer = client.get("/operations/workers")
            if len(answer.json()["workers"]) == 2:  # They know each other.
                found.setdefault(int(answer.headers["x-worker"]), client)
        yield found


def test_a_request_of_one_worker_is_stopped_from_the_other(two_workers: Demo) -> None:
    with client_of_each_worker(two_workers) as clients:
        with two_workers.open("/upload", "stopped") as connection, HTTPResponse(connection) as answer:
            run = two_workers.saw("stopped", lambda run: run["done"] > 0)
            [(other, client)] = [each for each in clients.items() if each[0] != run["worker"]]
            names = {each["name"]: each["pid"] for each in client.get("/operations/workers").json()["workers"]}
            [listed] = client.get("/operations/?route=/upload").json()["operations"]
            assert names[listed["worker"]] == run["worker"]
            stopped = client.post(f"/operations/{listed['id']}/cancel", json={"message": "from the other"})
            assert (stopped.headers["x-worker"], stopped.json()["outcome"]) == (str(other), "cancelled")
            answer.begin()
            assert (answer.status, json.load(answer)) == (499, {"detail": "from the other"})
            assert answer.headers["x-worker"] == str(run["worker"])
        # The page is told of it, whichever worker it listens to.
        assert two_workers.saw("stopped", has_ended)["reason"] == "MANUAL"


def test_the_page_is_told_of_the_requests_of_every_worker(two_workers: Demo) -> None:
    with client_of_each_worker(two_workers) as clients:
        for worker, client in clients.items():
            client.get("/report", headers={"x-run": f"on-{worker}"})
            assert two_workers.saw(f"on-{worker}", has_ended)["worker"] == worker


def test_a_report_of_one_worker_is_followed_and_stopped_from_the_other(two_workers: Demo) -> None:
    with client_of_each_worker(two_workers) as clients:
        one, other = clients.values()
        accepted = one.post("/reports")
        path = accepted.headers["location"]
        with other.stream("GET", f"{path}/events") as stream:
            assert stream.headers["x-worker"] != accepted.headers["x-worker"]
            lines = stream.iter_lines()
            assert next(line for line in lines if line == "event: progress")
            stopped = httpx.post(f"{two_workers.address}{path}/cancel", timeout=PATIENCE)
            assert stopped.json()["outcome"] == "cancelled"
            assert '"state": "cancelled"' in "".join(lines)
        assert other.get(f"{path}/result").status_code == 499


def test_the_latest_search_wins_over_workers(two_workers: Demo) -> None:
    with client_of_each_worker(two_workers) as clients, ThreadPoolExecutor(1) as pool:
        one, other = clients.values()
        path, user = "/operations/?route=/search&key=ann", {"user": "ann"}
        while True:
            first = pool.submit(one.get, "/search?text=a", headers=user)
            while not first.done() and not other.get(path).json()["operations"]:
                pass
            newest = other.get("/search?text=ab", headers=user)
            assert newest.status_code == 200
            # A search ends by itself in a moment, also before a newer one comes.
            if first.result(PATIENCE).status_code != 200:
                break
        assert (first.result().status_code, first.result().json()["detail"]) == (499, "superseded by a newer request")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_is_left(tmp_path: Path, number: signal.Signals) -> None:
    with redis_server() as redis, running_demo(tmp_path, 1000, "--workers", "2", "--redis", redis.url) as demo:
        with client_of_each_worker(demo) as clients:
            workers = psutil.Process(demo.process.pid).children(recursive=True)
            assert {worker.pid for worker in workers} >= clients.keys()
        demo.process.send_signal(number)
        assert demo.process.wait(PATIENCE) == (0 if number != signal.SIGKILL else -number)
        left = psutil.wait_procs(workers, PATIENCE)[1]
        for worker in left:
            worker.kill()
        assert left == []
    assert not re.search("Traceback|ERROR|WARN", "\n".join(demo.output))
    if number != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_ends_the_others(tmp_path: Path) -> None:
    with redis_server() as redis, running_demo(tmp_path, 1000, "--workers", "2", "--redis", redis.url) as demo:
        with client_of_each_worker(demo) as clients:
            os.kill(next(iter(clients)), signal.SIGKILL)
        assert demo.process.wait(PATIENCE) == 1
        demo.printed("A worker has ended")


def test_no_redis_says_what_to_do(tmp_path: Path) -> None:
    nobody = f"redis://me:secret@127.0.0.1:{free_port()}/0"
    command = [sys.executable, "-m", "examples.demo", "--port", "0", "--workers", "2"]
    for options, environment in ((["--redis", nobody], {}), ([], {"REDIS_URL": nobody})):
        failed = subprocess.run(
            command + options,
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert failed.returncode == 1
        assert f"No Redis answers at {nobody.replace('me:secret@', '')}, and several workers" in failed.stderr
        assert "leave --workers out" in failed.stderr
        assert not re.search("secret|Traceback", failed.stdout + failed.stderr)


def test_redis_is_for_several_workers_only() -> None:
    command = [sys.executable, "-m", "examples.demo", "--redis", "redis://127.0.0.1"]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert failed.returncode == 2
    assert "add --workers 2" in failed.stderr
