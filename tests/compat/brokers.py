"""A RabbitMQ and a MariaDB of the tests' own, in directories of their own and on ports of their own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.ports import free_port

STARTUP = 60
"""Seconds that either may take to start on a busy machine."""
# Debian's /usr/sbin/rabbitmq-server changes to a user of its own, who may not write into our directories.
PATH = f"/usr/lib/rabbitmq/bin:{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin"


def rabbitmq(folder: Path) -> Iterator[str]:
    command = shutil.which("rabbitmq-server", path=PATH)
    if command is None:
        pytest.skip("there is no rabbitmq-server on this machine")
    port, names = free_port(), str(free_port())
    settings = {
        "ERL_EPMD_PORT": names,
        "RABBITMQ_NODENAME": f"compat{port}@localhost",
        # Files of our own: those of the machine come before the port that the environment names.
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "HOME": str(folder),
    }
    (folder / "rabbitmq.conf").write_text(f"listeners.tcp.local = 127.0.0.1:{port}\n")
    (folder / "rabbitmq-env.conf").touch()
    try:
        with running([command], folder, os.environ | settings) as process:
            wait_until(lambda: accepts(("127.0.0.1", port)), process, folder)
            os.environ["AMQP_URL"] = url = f"amqp://guest:guest@127.0.0.1:{port}/"
            yield url
    finally:
        # It leaves Erlang's name server behind.
        subprocess.run(["epmd", "-port", names, "-kill"], stdout=subprocess.DEVNULL, check=False)


def mariadb(folder: Path) -> Iterator[str]:
    command, install = shutil.which("mariadbd", path=PATH), shutil.which("mariadb-install-db", path=PATH)
    if command is None or install is None:
        pytest.skip("there is no mariadbd on this machine")
    user = ["--user=root"] if os.geteuid() == 0 else []
    data, place = folder / "data", folder / "socket"
    options = ["--no-defaults", f"--datadir={data}", *user]
    subprocess.run(
        [install, *options, "--auth-root-authentication-method=normal", "--skip-test-db"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    with running([command, *options, f"--socket={place}", "--skip-networking"], folder, os.environ) as process:
        wait_until(lambda: accepts(str(place)), process, folder)
        os.environ["MYSQL_SOCKET"] = str(place)
        yield str(place)


@contextmanager
def running(command: list[str], folder: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (
        (folder / "output").open("wb") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()


def accepts(address: tuple[str, int] | str) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as probe, suppress(OSError):
        probe.connect(address)
        return True
    return False


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[bytes], folder: Path) -> None:
    end = time.monotonic() + STARTUP
    while not holds():
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"{process.args!r} does not start: {(folder / 'output').read_text()}")
        time.sleep(0.05)
