"""The operations of the demonstration over plain HTTP: its table, its report in the background and its searches."""

from __future__ import annotations

import json
import re
import socket
import time
from contextlib import closing, contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

from cancelable_deps.operations import Operations
from examples.demo import ledger as demo_ledger
from examples.demo import operations as demo_operations
from examples.demo import work
from examples.demo.app import create_app
from examples.demo.ledger import Ledger, Run
from examples.demo.materials import Materials

from .machine import scaled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = scaled(20)
JSON = {"content-type": "application/json"}


class Waiting:
    """A client in a thread of its own."""

    def __init__(self, method: str, url: str, **options: Any) -> None:
        self.response: httpx.Response | None = None
        self._thread = Thread(target=self._run, args=(method, url, options), daemon=True)
        self._thread.start()

    def _run(self, method: str, url: str, options: dict[str, Any]) -> None:
        self.response = httpx.request(method, url, timeout=PATIENCE, **options)

    def answer(self) -> httpx.Response:
        self._thread.join(PATIENCE)
        assert self.response is not None, "the request still runs"
        return self.response


class Site:
    """The demonstration with little data, and its client."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.client = httpx.Client(base_url=address, timeout=PATIENCE)

    def running(self, is_there: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
        """Return the operations of the table, but for the table itself, once they are those that a test waits for."""
        until = time.monotonic() + PATIENCE
        while True:
            listed: list[dict[str, Any]] = self.client.get("/operations/").json()["operations"]
            found = [each for each in listed if each["route"] != "/operations/"]
            if is_there(found):
                return found
            assert time.monotonic() < until, f"waited in vain, with {found}"

    def setup(self) -> dict[str, Any]:
        """Return what the page is told."""
        found = re.search(r'id="setup">(.*)</script>', self.client.get("/").text)
        assert found is not None
        setup: dict[str, Any] = json.loads(found[1])
        return setup

    def stop(self, path: str) -> httpx.Response:
        return self.client.post(f"{path}/cancel", json={"message": "enough"})

    @contextmanager
    def uploading(self, path: str) -> Iterator[socket.socket]:
        """An upload that says that more is to come than it sends."""
        head = f"POST {path} HTTP/1.1\r\nhost: test\r\nx-run: {path}\r\ncontent-length: 9\r\n\r\nbegin"
        url = httpx.URL(self.address)
        with socket.create_connection((url.host, url.port or 80), timeout=PATIENCE) as connection:
            connection.sendall(head.encode())
            yield connection


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("demo")
    table = work.make_table(folder / "sales.db", 40_000, lambda done: None)
    corpus = work.make_corpus(folder, 20_000, lambda done: None)
    ledger = Ledger()
    silence = pytest.MonkeyPatch()
    silence.setattr(demo_ledger, "print", lambda *args, **options: None, raising=False)
    app = create_app(Materials(table, corpus, 100, folder), ledger, Operations(background_grace=0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        site = Site(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with site.client:
            yield site
        server.should_exit = True
        thread.join(PATIENCE)
    silence.undo()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """Searches do not end until this is set; they can be stopped all the time."""
    end, piece = Event(), work._find_in_piece

    def find(book: Any, *args: Any) -> bool:
        if end.wait(0.005):
            return piece(book, *args)
        return True

    monkeypatch.setattr(work, "_find_in_piece", find)
    yield end
    end.set()


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and the data of Server-Sent Events."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" in fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_the_page_asks_no_other_host_and_takes_texts_as_texts(site: Site) -> None:
    page = site.client.get("/").text
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "https://",
        "/*OPERATIONS*/",
    ):
        assert forbidden not in page


def test_a_request_of_another_client_is_stopped_by_its_row(site: Site) -> None:
    with site.uploading("/upload") as upload, site.uploading("/plain/upload"):
        [row] = site.running(lambda found: [each for each in found if each["route"] == "/upload"])
        assert (row["kind"], row["state"]) == ("request", "running")
        stopped = site.stop(f"/operations/{row['id']}")
        assert (stopped.status_code, stopped.json()["outcome"]) == (200, "cancelled")
        [worker] = site.client.get("/operations/workers").json()["workers"]
        assert (row["worker"], stopped.headers["x-worker"]) == (worker["name"], str(worker["pid"]))
        answer = upload.recv(10_000).decode()
        assert answer.startswith("HTTP/1.1 499 ")
        assert answer.endswith('{"detail":"enough"}')
        site.running(lambda found: not found)


def test_a_report_in_the_background_runs_to_its_result(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_operations, "PACE", 0)
    accepted = site.client.post("/reports")
    assert (accepted.status_code, accepted.json()["kind"]) == (202, "background")
    path = accepted.headers["location"]
    assert path == f"/operations/{accepted.json()['id']}"
    events = events_of(site.client.get(f"{path}/events").text)
    assert [name for name, _ in events][-1] == "end"
    assert events[-1][1]["state"] == "finished"
    assert events[-1][1]["progress"] == {"message": "rows read", "metadata": {"done": 40_000, "total": 40_000}}
    assert site.client.get(f"{path}/result").json() == site.client.get("/report").json()


def test_a_report_in_the_background_is_stopped(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_operations, "PACE", PATIENCE)
    path = site.client.post("/reports").headers["location"]
    with site.client.stream("GET", f"{path}/events") as stream:
        lines = stream.iter_lines()
        assert next(line for line in lines if "20000" in line).startswith("data: ")
        assert httpx.post(f"{site.address}{path}/cancel", headers=JSON, content=b"{}").json()["outcome"] == "cancelled"
        assert '"state": "cancelled"' in "".join(lines)
    result = site.client.get(f"{path}/result")
    assert result.status_code == 499


def test_only_the_latest_search_of_a_user_is_worked_on(site: Site, endless: Event) -> None:
    word = site.setup()["word"]
    url, ann, bob = f"{site.address}/search", {"user": "ann"}, {"user": "bob"}

    def search(text: str, user: dict[str, str], path: str = url) -> Waiting:
        return Waiting("GET", path, params={"text": text}, headers=user)

    other = search(word, bob)
    first = search(word[:1], ann)
    plain = [search(text, ann, f"{site.address}/plain/search") for text in (word[:1], word)]
    site.running(lambda found: {each["key"] for each in found} == {"ann", "bob"})
    newest = search(word, ann)
    superseded = first.answer()
    assert (superseded.status_code, superseded.json()) == (499, {"detail": "superseded by a newer request"})
    assert [each.response for each in (other, newest, *plain)] == [None] * 4
    endless.set()
    answers = [each.answer() for each in (other, newest, *plain)]
    assert [each.status_code for each in answers] == [200] * 4
    assert set(answers[1].json()) == {word}
    assert all(found.startswith(word[:1]) for found in answers[2].json())


@pytest.mark.parametrize(
    ("text", "user"), [("", "ann"), ("x" * 41, "ann"), ("x", ""), ("x", "x" * 65)], ids=["no", "long", "nobody", "whom"]
)
def test_what_is_no_search_is_refused(site: Site, text: str, user: str) -> None:
    answer = site.client.get("/search", params={"text": text}, headers={"user": user})
    assert answer.status_code == 422


def test_a_search_for_what_is_in_no_book_finds_nothing(site: Site) -> None:
    for text in ("<img src=x>", ".*", "\N{SNOWMAN}", "\0"):
        answer = site.client.get("/search", params={"text": text}, headers={"user": "ann"})
        assert (answer.status_code, answer.json()) == (200, {})


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_runs_is_kept_in_the_ledger_until_its_end() -> None:
    ledger = Ledger(kept=3)
    running = ledger.open("first", "GET", "/report")
    for number in range(10):
        ended = ledger.open(None, "GET", f"/{number}")
        for each in (running, ended):
            each.begin("rows", 1, None)
        ended.end()
    assert [run["path"] for run in ledger.snapshots()] == ["/report", "/8", "/9"]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_path_does_not_reach_the_terminal_as_it_is() -> None:
    run: Run = Ledger().open(None, "GET", "/\x1b[2J\nGET /forged")
    assert run.line().startswith("GET   /?[2J?GET /forged ")


def test_the_table_is_no_work(site: Site) -> None:
    with closing(site.client.send(site.client.build_request("GET", "/events"), stream=True)) as stream:
        site.client.get("/report")
        shown: set[str] = set()
        for line in stream.iter_lines():
            shown |= {run["path"] for run in json.loads(line.removeprefix("data: "))} if line else set()
            if "/report" in shown:
                break
    assert {path for path in shown if path.startswith("/operations")} == set()
