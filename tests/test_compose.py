"""`examples/compose.yaml`, as far as it can be checked without containers: its form, its command lines, its nginx."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from cancelable_deps.kernel.settings import settings
from examples import several_workers

from .machine import scaled
from .ports import free_port
from .redis_server import RedisServer, redis_server

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "examples" / "compose.yaml").read_text()
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
PATIENCE = scaled(30)
ANN = {"user": "ann"}


def nginx_configuration() -> str:
    """The file that nginx gets: Compose makes a `$` of each `$$`."""
    content: str = FILE["configs"]["nginx"]["content"]
    assert re.search(r"(?<!\$)(\$\$)*\$(?!\$)", content) is None, "Compose would replace a variable"
    return content.replace("$$", "$")


def option_of(service: str, name: str) -> str:
    """The value of an option of a command line, which follows it or an equals sign."""
    words: list[str] = SERVICES[service]["command"]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name or word.startswith(f"{name}="):
            return following if word == name else word.partition("=")[2]
    raise AssertionError(f"{service} has no {name}")


def seconds(text: str) -> float:
    assert text.endswith("s")
    return float(text[:-1])


def test_says_what_it_is_and_that_it_was_not_run() -> None:
    head = TEXT.partition("\nservices:")[0]
    assert "docker compose -f examples/compose.yaml up" in head
    assert "never run as a whole" in head
    assert "tests/test_compose.py" in head


def test_has_two_workers_redis_and_nginx() -> None:
    assert SERVICES.keys() == {"worker", "redis", "nginx"}
    assert SERVICES["worker"]["deploy"]["replicas"] == 2
    # Words only: Compose would take a number or `yes` for something else.
    words = [word for service in SERVICES.values() for word in service.get("command", ())]
    assert [word for word in words if not isinstance(word, str)] == []
    # Nobody but nginx can be reached from outside.
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"nginx"}
    assert SERVICES["nginx"]["configs"] == [{"source": "nginx", "target": "/etc/nginx/conf.d/default.conf"}]
    assert {line.split(":")[0] for line in SERVICES["redis"]["volumes"]} == FILE["volumes"].keys()


def test_uvicorn_knows_its_options() -> None:
    program, app, *options = SERVICES["worker"]["command"]
    assert program == "uvicorn"
    assert app == f"{several_workers.__name__}:app"
    command = [sys.executable, "-m", "uvicorn", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    assert {option.partition("=")[0] for option in options} - set(re.findall(r"--[a-z0-9-]+", told)) == set()


def test_who_waits_for_another_waits_longer() -> None:
    source = inspect.getsource(several_workers)
    graces = re.search(r"cancelation_lifespan\(grace=(\d+), background_grace=(\d+)\)", source)
    background = re.search(r"Operations\(redis, background_grace=(\d+)\)", source)
    assert graces
    assert background
    uvicorns = float(option_of("worker", "--timeout-graceful-shutdown"))
    assert sum(map(int, graces.groups())) + settings.cleanup_grace < uvicorns
    assert max(uvicorns, int(background[1])) + settings.cleanup_grace < seconds(SERVICES["worker"]["stop_grace_period"])


def test_the_image_gets_all_that_it_needs() -> None:
    lines = [shlex.split(line) for line in SERVICES["worker"]["build"]["dockerfile_inline"].splitlines()]
    copied = {name for word, *names in lines if word == "COPY" for name in names[:-1]}
    assert (ROOT / "examples" / SERVICES["worker"]["build"]["context"]).resolve() == ROOT
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = (ROOT / "pyproject.toml").read_text()
    needed = {"pyproject.toml", "README.md", "LICENSE", "cancelable_deps", "cancelable_deps_pytest.py", "examples"}
    assert copied == needed
    assert 'only-include = ["cancelable_deps", "cancelable_deps_pytest.py"]' in project


# With the real programs


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def until(is_so: Callable[[], object], log: Path) -> Any:
    end = time.monotonic() + PATIENCE
    while True:
        with suppress(httpx.TransportError):
            if found := is_so():
                return found
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


class Site(NamedTuple):
    """What listens at nginx's port, and the workers behind it."""

    address: str
    workers: list[str]
    log: Path

    def total(self) -> int:
        """How many operations Ann has, as a worker says."""
        answer = httpx.get(f"{self.workers[0]}/operations/", headers=ANN, timeout=PATIENCE).json()
        assert answer["unreachable"] == []
        total: int = answer["total"]
        return total


@contextmanager
def redis_of_the_file() -> Iterator[RedisServer]:
    program, *options = SERVICES["redis"]["command"]
    assert program == "redis-server"
    with redis_server(*options) as server:
        yield server


def worker_command(port: int) -> list[str]:
    replaced = {"--host": "127.0.0.1", "--port": str(port)}
    _, app, *options = SERVICES["worker"]["command"]
    names = [option.partition("=")[0] for option in options]
    assert replaced.keys() < set(names)
    options = [
        f"{name}={replaced[name]}" if name in replaced else option for name, option in zip(names, options, strict=True)
    ]
    return [sys.executable, "-m", "uvicorn", app, *options]


@pytest.fixture(scope="module")
def nginx() -> str:
    path = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None and "CI" not in os.environ:
        pytest.skip("needs nginx: install it (Debian: apt-get install nginx-light) to try its configuration")
    assert path is not None, "CI has to install nginx"
    return path


@pytest.fixture(scope="module")
def site(nginx: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("compose")
    port, *ports = (free_port() for _ in range(3))
    workers = [f"127.0.0.1:{each}" for each in ports]
    file = folder / "nginx.conf"
    file.write_text(nginx_file(folder, port, workers))
    command = [nginx, "-c", str(file), "-p", str(folder), "-e", "stderr"]
    tried = subprocess.run([*command, "-t"], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert tried.returncode == 0, tried.stderr
    with ExitStack() as stack:
        redis = stack.enter_context(redis_of_the_file())
        for number, each in enumerate(ports):
            stack.enter_context(running(worker_command(each), folder / f"worker-{number}", REDIS_URL=redis.url))
        log = folder / "nginx.log"
        stack.enter_context(running([*command, "-g", "daemon off;"], log))
        site = Site(f"http://127.0.0.1:{port}", [f"http://{each}" for each in workers], log)
        for address in (*site.workers, site.address):
            until(partial(is_healthy, address), log)
        until(lambda: are_known_to_each_other(site), log)
        yield site


def is_healthy(address: str) -> bool:
    return httpx.get(f"{address}/health", timeout=PATIENCE).status_code == 200


def are_known_to_each_other(site: Site) -> bool:
    """Whether what the one worker does is listed by the other."""
    started = httpx.post(f"{site.workers[1]}/reports", headers=ANN, timeout=PATIENCE)
    is_listed = site.total() == 1
    path = started.headers["location"]
    httpx.post(f"{site.workers[1]}{path}/cancel", headers=ANN, timeout=PATIENCE).raise_for_status()
    return is_listed


def nginx_file(folder: Path, port: int, workers: list[str]) -> str:
    """A whole configuration around that of the file, whose hosts and port are those of this machine."""
    text = nginx_configuration()
    servers = "".join(f"server {each};" for each in workers)
    for old, new in (("server worker:8000;", servers), ("listen 80;", f"listen 127.0.0.1:{port};")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {folder / kind};\n" for kind in kinds)
    return f"pid {folder / 'pid'};\nevents {{}}\nhttp {{\naccess_log off;\n{folders}{text}\n}}\n"


@pytest.mark.real
def test_redis_takes_its_options() -> None:
    with redis_of_the_file() as server:
        for name, value in (("maxmemory-policy", "noeviction"), ("appendonly", "yes"), ("maxmemory", "268435456")):
            assert value in server.command("CONFIG", "GET", name).decode().split()


@pytest.mark.real
def test_both_workers_are_asked(site: Site) -> None:
    pids = {httpx.get(f"{site.address}/health").json()["worker"] for _ in range(20)}
    assert pids == {httpx.get(f"{worker}/health").json()["worker"] for worker in site.workers}


@contextmanager
def reporting(site: Site, **headers: str) -> Iterator[socket.socket]:
    """A client of nginx whose report runs in one of the workers."""
    fields = "".join(f"{name}: {value}\r\n" for name, value in {"host": "test", **ANN, **headers}.items())
    with socket.create_connection(("127.0.0.1", httpx.URL(site.address).port or 80), timeout=PATIENCE) as connection:
        connection.sendall(f"GET /report HTTP/1.1\r\n{fields}\r\n".encode())
        until(lambda: site.total() == 1, site.log)
        yield connection


@pytest.mark.real
def test_a_hang_up_reaches_the_worker_through_nginx(site: Site) -> None:
    with reporting(site, **{"operation-id": "left"}):
        pass
    until(lambda: site.total() == 0, site.log)
    ended = httpx.get(f"{site.address}/operations/left", headers=ANN, timeout=PATIENCE).json()
    assert (ended["state"], ended["reason"]) == ("cancelled", "disconnect")


@pytest.mark.real
def test_a_request_is_stopped_by_its_id_through_nginx(site: Site) -> None:
    with reporting(site, **{"operation-id": "mine"}) as connection:
        stopped = httpx.post(f"{site.address}/operations/mine/cancel", headers=ANN, timeout=PATIENCE)
        assert stopped.json()["outcome"] == "cancelled"
        assert connection.recv(10_000).startswith(b"HTTP/1.1 499 ")


@pytest.mark.real
def test_events_pass_through_nginx_as_they_come(site: Site) -> None:
    path = httpx.post(f"{site.address}/reports", headers=ANN, timeout=PATIENCE).headers["location"]
    with httpx.stream("GET", f"{site.address}{path}/events", headers=ANN, timeout=PATIENCE) as events:
        lines = events.iter_lines()
        assert next(line for line in lines if line == "event: progress")
        assert httpx.get(f"{site.address}{path}", headers=ANN, timeout=PATIENCE).json()["state"] == "running"
        httpx.post(f"{site.address}{path}/cancel", headers=ANN, timeout=PATIENCE)
        assert "event: end" in list(lines)


@pytest.mark.real
def test_nginx_lets_websockets_upgrade(site: Site) -> None:
    upgrade = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    # There is none here: 403 is the refusal of a WebSocket, where a request would have been answered.
    assert httpx.get(f"{site.address}/health", headers=upgrade, timeout=PATIENCE).status_code == 403
