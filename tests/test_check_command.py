"""`python -m cancelable_deps check`: what it prints, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cancelable_deps.__main__ import main
from cancelable_deps.checks.findings import LEVELS
from tests.ports import free_port
from tests.redis_server import redis_server

APPLICATION = """
from fastapi import FastAPI
from starlette.middleware.base import BaseHTTPMiddleware
from cancelable_deps import RequestCancelationMiddleware, cancelation_lifespan, with_cancelation
from cancelable_deps.operations import Operations, RedisBackend

app = FastAPI()
plain = FastAPI()
plain.add_middleware(RequestCancelationMiddleware)


@app.get("/report")
@with_cancelation(timeout=120)
def report() -> int:
    return 1


class Holder:
    app = plain
    number = 3


def create_app():
    return app


def fail():
    raise RuntimeError("no settings")


operations = Operations()
shared = FastAPI(lifespan=operations.lifespan(cancelation_lifespan()))
redis = FastAPI(lifespan=Operations(RedisBackend("REDIS")).lifespan())
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module in the current folder."""
    name = f"application_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(APPLICATION.replace("REDIS", f"redis://127.0.0.1:{free_port()}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    return name


@pytest.fixture(autouse=True)
def known_anyio(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this is also run as on an anyio that we do not know, which is a finding."""
    monkeypatch.setattr("cancelable_deps.checks.outside.hooks_are_known", lambda is_trio: True)


def test_warnings_are_printed_and_make_it_fail(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{module}:app"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "warning: def-never-checks (/report)"
    assert printed[1].startswith("    This `def` handler has a timeout")
    assert "info: proxy-timeout (/report)" in printed
    assert printed[-1] == f"{module}:app: 1 warning, 1 note"
    assert max(map(len, printed)) <= 100


def test_without_warnings(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{module}:plain"]) == 0
    assert capsys.readouterr().out == f"{module}:plain: no warnings, no notes\n"


@pytest.mark.parametrize(
    "target", ["{}:create_app()", "{}:create_app --factory", "{}:create_app() --factory", "{}:app"], ids=str
)
def test_targets(module: str, target: str) -> None:
    assert main(["check", *target.format(module).split()]) == 1


def test_a_path_of_attributes(module: str) -> None:
    assert main(["check", f"{module}:Holder.app"]) == 0


def test_codes_can_be_ignored(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{module}:app", "--ignore", "def-never-checks"]) == 0
    assert "def-never-checks" not in capsys.readouterr().out
    assert main(["check", f"{module}:app", "--ignore", "def-never-checks", "--ignore", "proxy-timeout"]) == 0
    assert "proxy-timeout" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as raised:
        main(["check", f"{module}:app", "--ignore", "no-such-code"])
    assert raised.value.code == 2
    assert "invalid choice: 'no-such-code'" in capsys.readouterr().err


def test_json(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{module}:app", "--json"]) == 1
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert printed["target"] == f"{module}:app"
    assert [(each["level"], each["code"], each["where"]) for each in printed["findings"]] == [
        ("warning", "def-never-checks", "/report"),
        ("info", "proxy-timeout", "/report"),
    ]
    assert all(each["message"] for each in printed["findings"])
    assert main(["check", f"{module}:plain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"target": f"{module}:plain", "findings": []}


def test_what_the_server_will_do(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = f"{module}:shared"
    assert main(["check", target]) == 0
    assert main(["check", target, "--workers", "4"]) == 1
    assert main(["check", target, "--server-grace", "10"]) == 1
    assert main(["check", target, "--server-grace", "30", "--workers", "1"]) == 0
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    assert main(["check", target]) == 1
    monkeypatch.setenv("WEB_CONCURRENCY", "many")
    assert main(["check", target]) == 0


@pytest.mark.parametrize("options", [["--workers", "0"], ["--server-grace", "-1"], ["--workers", "two"]])
def test_wrong_numbers(module: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["check", f"{module}:plain", *options])
    assert raised.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_the_redis_of_operations(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{module}:redis"]) == 0
    assert "info: store-unreachable (operations)" in capsys.readouterr().out
    options = ("--save", "", "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with redis_server(*options) as server:
        source = Path(f"{module}.py")
        Path(f"{module}_again.py").write_text(
            source.read_text().replace('RedisBackend("', f'RedisBackend("{server.url}" or "')
        )
        assert main(["check", f"{module}_again:redis"]) == 1
    assert "warning: evicting-redis (operations)" in capsys.readouterr().out


WRONG = [
    ("{}", "names no application"),
    ("{}:", "names no application"),
    (":app", "names no application"),
    ("no_such_module:app", "there is no module 'no_such_module' in "),
    ("{}.inner:app", "there is no module"),
    ("{}:no_such_name", "has no attribute 'no_such_name'"),
    ("{}:Holder.wrong", "has no attribute 'wrong'"),
    ("{}:Holder.number", "is 3, and no ASGI application"),
    ("{}:fail()", "calling it has failed: RuntimeError: no settings"),
    ("{}:Holder.number()", "calling it has failed: TypeError"),
    ("broken:app", "importing broken has failed: ModuleNotFoundError: No module named 'not_installed'"),
    ("ends:app", "importing ends has failed: SystemExit: no settings"),
    ("broken_too:app", "importing broken_too has failed: ZeroDivisionError"),
]


@pytest.mark.parametrize(("target", "message"), WRONG)
def test_a_wrong_target(module: str, target: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.py").write_text("import not_installed")
    Path("broken_too.py").write_text("1 / 0")
    Path("ends.py").write_text("raise SystemExit('no settings')")
    assert main(["check", target.format(module)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert "failed" in message or "main:app" in printed.err


def test_a_fault_of_the_check_is_no_warning(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("cancelable_deps.__main__.check_stack", fail)
    assert main(["check", f"{module}:plain"]) == 2
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_every_code_can_be_named_on_the_command_line(module: str) -> None:
    for code in LEVELS:
        assert main(["check", f"{module}:plain", "--ignore", code]) == 0


@pytest.mark.real
@pytest.mark.parametrize(("target", "expected"), [("app", 1), ("plain", 0), ("wrong", 2)])
def test_as_a_program(module: str, target: str, expected: int) -> None:
    command = [sys.executable, "-m", "cancelable_deps", "check", f"{module}:{target}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.real
def test_help() -> None:
    command = [sys.executable, "-m", "cancelable_deps", "check", "--help"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m cancelable_deps check")
