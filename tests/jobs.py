"""What the tests give to worker processes; it imports little, as each new process imports it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def process_id() -> int:
    return os.getpid()


def divide(number: int, by: int) -> float:
    return number / by


def reverse(data: bytes) -> bytes:
    return data[::-1]


def spin(told: str) -> None:
    """Work that never yields; it writes down who works first."""
    tell(told, os.getpid())
    while True:
        pass


def spin_with_a_child(told: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    tell(told, os.getpid(), child.pid)
    while True:
        pass


def wait_for(told: str, path: str) -> int:
    tell(told, os.getpid())
    while not Path(path).exists():
        time.sleep(0.001)
    return os.getpid()


def tell(told: str, *numbers: int) -> None:
    # In one piece: whoever waits for the file reads it as soon as it is there.
    unfinished = Path(f"{told}.new")
    unfinished.write_text(" ".join(map(str, numbers)))
    unfinished.rename(told)


def fork() -> int:
    """Both return."""
    return os.fork()


def fork_and_die(told: str) -> None:
    child = os.fork()
    if not child:
        time.sleep(1000)
    tell(told, child)
    die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_without_a_name() -> None:
    os.kill(os.getpid(), signal.SIGRTMIN + 1)


def leave() -> None:
    sys.exit(3)


def print_and_read() -> str:
    print("printed by the job")
    return sys.stdin.read()


def return_a_lambda() -> Any:
    return lambda: None


class Odd(Exception):
    """Pickles, but does not unpickle."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_odd() -> None:
    raise Odd(1, 2)
