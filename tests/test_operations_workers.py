"""Operations over several workers of uvicorn and gunicorn, and over servers that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import pytest

from .machine import scaled
from .ports import free_port
from .redis_server import SharedRedis
from .redis_workers import MARKS
from .stores import until

pytest_plugins = ["tests.redis_fixtures"]
pytestmark = [*MARKS, pytest.mark.real, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

APP = "tests.operations_workers_app:app"
UVICORN = f"uvicorn {APP} --log-level warning --port {{port}}"
SERVERS = {
    "uvicorn": f"{UVICORN} --workers 4 --timeout-worker-healthcheck 60",
    "gunicorn": f"gunicorn {APP} -b 127.0.0.1:{{port}} -w 4 -k uvicorn_worker.UvicornWorker --log-level warning "
    "--no-control-socket",
}


class Answer(NamedTuple):
    status: int
    body: Any


async def ask(port: int, method: str, path: str, **headers: str) -> Answer:
    """Send a request on a connection of its own, so that the workers share them."""
    lines = [f"{method} {path} HTTP/1.1", "host: test", "connection: close", "content-length: 0"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    answer = b""
    async with await anyio.connect_tcp("127.0.0.1", port) as connection:
        await connection.send("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
        while True:
            try:
                answer += await connection.receive()
            except anyio.EndOfStream:
                break
    head, _, body = answer.partition(b"\r\n\r\n")
    return Answer(int(head.split()[1]), json.loads(body))


class Site:
    """A server with an application, and what that has written."""

    def __init__(self, command: str, redis: SharedRedis, folder: Path, lease: float) -> None:
        self.port = free_port()
        self.folder = folder
        environment = {
            "REDIS_URL_OF_TEST": redis.url,
            "PREFIX_OF_TEST": redis.prefix,
            "FOLDER_OF_TEST": str(folder),
            "LEASE_OF_TEST": str(lease),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command.format(port=self.port).split()],
            env={**os.environ, **environment},
            start_new_session=True,
        )

    async def ask(self, method: str, path: str, **headers: str) -> Answer:
        return await ask(self.port, method, path, **headers)

    async def knows(self, count: int) -> bool:
        try:
            answer = await self.ask("GET", "/worker")
        except OSError:
            return False
        return answer.status == 200 and len(answer.body) == count + 1

    async def running(self, route: str) -> list[dict[str, Any]] | None:
        """Return what runs; ``None`` if a worker does not say."""
        answer = await self.ask("GET", f"/running?route={route}")
        found: list[dict[str, Any]] = answer.body
        return found if answer.status == 200 else None

    def release(self, name: str) -> None:
        (self.folder / f"release-{name}").touch()

    def journal(self) -> list[str]:
        path = self.folder / "journal"
        return path.read_text().splitlines() if path.exists() else []

    async def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            await anyio.to_thread.run_sync(self.process.wait, scaled(20))
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@asynccontextmanager
async def site(command: str, redis: SharedRedis, folder: Path, lease: float = 3) -> AsyncIterator[Site]:
    site = Site(command, redis, folder, lease)
    try:
        yield site
    finally:
        with anyio.CancelScope(shield=True):
            await site.close()


@pytest.mark.parametrize("server", SERVERS)
async def test_each_worker_stops_the_requests_of_each(server: str, shared_redis: SharedRedis, tmp_path: Path) -> None:
    count = 400
    statuses: Counter[int] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    times: list[float] = []
    # A lease that does not end while the machine is busy.
    async with site(SERVERS[server], shared_redis, tmp_path, lease=15) as app:
        await until(lambda: app.knows(4), "four workers know each other", ceiling=60)

        async def wait(number: int) -> None:
            # Half of them with an id of the client's choice.
            headers = {"operation_id": f"r{number}"} if number % 2 else {}
            statuses[(await app.ask("GET", "/wait", **headers)).status] += 1

        async def all_run() -> list[dict[str, Any]] | None:
            found = await app.running("/wait")
            return found if found is not None and len(found) == count else None

        async with anyio.create_task_group() as tasks:
            for number in range(count):
                tasks.start_soon(wait, number)
            for each in await until(all_run, "all requests run"):
                begin = time.perf_counter()
                by, outcome = (await app.ask("POST", f"/stop/{each['id']}")).body
                times.append(time.perf_counter() - begin)
                assert outcome == "cancelled"
                pairs[each["worker"], by] += 1
        assert statuses == {499: count}
        times.sort()
        middle, slowest = times[count // 2] * 1000, times[-count // 100] * 1000
        print(
            f"\n{server}: POST to cancelled: p50 {middle:.1f} ms, p99 {slowest:.1f} ms; {len(pairs)} pairs of workers"
        )
        # Which worker takes a connection, the kernel decides.
        await until(lambda: is_each_reached_by_each(app, pairs), "each has stopped something of each", ceiling=60)


async def is_each_reached_by_each(app: Site, pairs: Counter[tuple[str, str]]) -> bool:
    """Stop one more request, and return whether by now each of the workers has stopped one of each."""
    if len(pairs) < 16:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app.ask, "GET", "/wait")

            [each] = await until(lambda: app.running("/wait"), "it runs")
            by, outcome = (await app.ask("POST", f"/stop/{each['id']}")).body
            assert outcome == "cancelled"
            pairs[each["worker"], by] += 1
    return len(pairs) == 16


async def test_of_what_users_type_the_newest_is_answered(shared_redis: SharedRedis, tmp_path: Path) -> None:
    users, rate, seconds = 50, 200, 5
    answers: dict[str, Answer] = {}
    async with site(SERVERS["uvicorn"], shared_redis, tmp_path, lease=15) as app:
        await until(lambda: app.knows(4), "four workers know each other", ceiling=60)

        async def search(user: int, text: str) -> None:
            answers[text] = await app.ask("GET", f"/search?user=u{user}&text={text}")

        async def have_come(count: int) -> bool:
            return len(answers) >= count

        async def running() -> dict[str, list[str]]:
            found: dict[str, list[str]] = {}
            for each in await app.running("/search") or ():
                found.setdefault(each["key"], []).append(each["text"])
            return found

        async def is_settled(count: int) -> dict[str, list[str]] | None:
            found = await running()
            is_so = len(found) == users and all(len(each) == 1 for each in found.values()) and len(answers) == count
            return found if is_so else None

        async with anyio.create_task_group() as tasks:
            begin = time.perf_counter()
            for number in range(rate * seconds):
                tasks.start_soon(search, number % users, str(number))
                await anyio.sleep(max(0.0, begin + (number + 1) / rate - time.perf_counter()))
                # Not more than the machine can do: a call that takes longer than a second counts as failed.
                await until(lambda: have_come(number - 2 * users), "those before are answered")  # noqa: B023
            sent_in = time.perf_counter() - begin
            begin = time.perf_counter()
            await until(lambda: is_settled(rate * seconds - users), "one of each user is left")
            settled_in = time.perf_counter() - begin
            assert {answer.status for answer in answers.values()} == {499}
            # The last ones, whose order is certain.
            for user in range(users):
                tasks.start_soon(search, user, f"last-{user}")
            found = await until(lambda: is_settled(rate * seconds), "the last one of each user is left")
            assert found == {f"u{user}": [f"last-{user}"] for user in range(users)}
            app.release("search")
        print(f"\n{rate * seconds} requests of {users} users in {sent_in:.1f} s; settled {settled_in:.2f} s later")  # pyright: ignore[reportPossiblyUnboundVariable]
    answered = {text for text, answer in answers.items() if answer.status == 200}
    assert answered == {f"last-{user}" for user in range(users)}
    assert Counter(answer.status for answer in answers.values()) == {200: users, 499: rate * seconds}


@asynccontextmanager
async def three_sites(redis: SharedRedis, folder: Path) -> AsyncIterator[list[Site]]:
    """Three servers with one worker each, the first of which may be killed."""
    async with AsyncExitStack() as stack:
        sites = [await stack.enter_async_context(site(UVICORN, redis, folder, lease=2)) for _ in range(3)]
        for each in sites:
            await until(lambda each=each: each.knows(3), "three servers know each other", ceiling=60)  # type: ignore[misc]
        yield sites


class Asked:
    """Requests that go on, each of which has its place before the next one is sent."""

    def __init__(self, tasks: Any, route: str, sites: list[Site]) -> None:
        self.answers: dict[str, Answer] = {}
        self._tasks = tasks
        self._route = route
        self._sites = sites
        self._count = 0

    async def ask(self, number: int, text: str) -> None:
        self._count += 1
        self._tasks.start_soon(self._ask, self._sites[number], text)
        await until(self._are_there, f"{text} has its place")

    async def _ask(self, site: Site, text: str) -> None:
        try:
            self.answers[text] = await site.ask("GET", f"{self._route}?user=ann&text={text}")
        except (OSError, anyio.BrokenResourceError, IndexError):
            self.answers[text] = Answer(0, None)  # Its server was killed.

    async def _are_there(self) -> bool:
        found = await self._sites[1].running(self._route)
        return found is not None and len([each for each in found if each["key"]]) + len(self.answers) == self._count


async def begun(site: Site, lines: list[str]) -> bool:
    return site.journal() == lines


async def test_those_that_wait_run_in_order_when_the_holder_is_killed(
    shared_redis: SharedRedis, tmp_path: Path
) -> None:
    async with three_sites(shared_redis, tmp_path) as sites, anyio.create_task_group() as tasks:
        asked = Asked(tasks, "/turn", sites)
        for number, text in ((0, "a"), (1, "b"), (0, "c"), (2, "d"), (1, "e")):
            await asked.ask(number, text)
        assert sites[0].journal() == ["a begins"]
        sites[0].process.kill()
        killed = time.monotonic()
        await until(lambda: begun(sites[0], ["a begins", "b begins"]), "the first of the living runs")
        print(f"\nruns {time.monotonic() - killed:.1f} s after the holder was killed, with a lease of 2 s")
        for last, next_ in (("b", "d"), ("d", "e")):
            sites[1].release(last)
            await until(lambda text=next_: is_last(sites[1], f"{text} begins"), f"{next_} runs")  # type: ignore[misc]
        assert sites[1].journal() == [f"{text} begins" for text in "abde"]
        sites[1].release("e")
    answers = asked.answers  # pyright: ignore[reportPossiblyUnboundVariable]
    assert {text: answer.status for text, answer in answers.items()} == {
        "a": 0,
        "b": 200,
        "c": 0,
        "d": 200,
        "e": 200,
    }


async def is_last(site: Site, line: str) -> bool:
    return site.journal()[-1:] == [line]


async def test_the_latest_runs_when_the_one_before_it_is_killed(shared_redis: SharedRedis, tmp_path: Path) -> None:
    async with three_sites(shared_redis, tmp_path) as sites, anyio.create_task_group() as tasks:
        asked = Asked(tasks, "/document", sites)
        await asked.ask(0, "a")
        await until(lambda: is_last(sites[0], "a begins"), "the first one runs")
        # It waits for the cleanup of the first one, which its server does not survive.
        await asked.ask(1, "b")
        await asked.ask(2, "c")
        await until(lambda: is_answered(asked, "b"), "the one in between is superseded")
        assert sites[0].journal() == ["a begins"]
        sites[0].process.kill()
        await until(lambda: is_last(sites[1], "c begins"), "the latest one runs")
        for name in ("c", "cleanup-c"):
            sites[1].release(name)
    answers = asked.answers  # pyright: ignore[reportPossiblyUnboundVariable]
    assert {text: answer.status for text, answer in answers.items()} == {"a": 0, "b": 499, "c": 200}


async def is_answered(asked: Asked, text: str) -> bool:
    return text in asked.answers
