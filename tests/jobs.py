"""What the tests give to worker processes; it imports little, as each new process imports it."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, ClassVar


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


class NoText(Exception):
    """Neither text nor pickle."""

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__

    def __reduce__(self) -> str:
        raise TypeError("not to be pickled")


class NoNotes(Exception):
    __notes__: Any = ()


class NotesThatFail(Exception):
    def add_note(self, note: str, /) -> None:
        raise SystemExit("of the notes")


class Elsewhere(Exception):
    """Unpickles to no exception."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (5,)


class Deadly(Exception):
    """Ends the process that pickles or unpickles it, if that lets it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (7,)


class DeadlyToPickle(Exception):
    def __reduce__(self) -> str:
        raise SystemExit(7)

    def __str__(self) -> str:
        raise KeyboardInterrupt


class TextOfOurs(str):
    """A text of a class that nobody else may have."""

    __slots__ = ()
    own: ClassVar[str] = "own"

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (8,)


class OddText(Exception):
    def __init__(self) -> None: ...

    def __str__(self) -> str:
        return TextOfOurs("a text of its own")

    def __reduce__(self) -> str:
        raise TypeError("not to be pickled")


class Own(BaseException):
    pass


def plugin() -> Any:
    """A module that only this process knows."""
    module = types.ModuleType("plugin_of_the_job")
    for name, base in (("PluginError", Exception), ("PluginGroup", ExceptionGroup), ("Result", object)):
        setattr(module, name, type(name, (base,), {"__module__": module.__name__}))
    sys.modules["plugin_of_the_job"] = module
    return module


def raise_one(name: str) -> None:
    if name == "PluginError":
        raise plugin().PluginError("the plugin's own")
    if name == "PluginGroup":
        raise plugin().PluginGroup("several", [ValueError("one")])
    if name == "CancelledError":
        import asyncio

        raise asyncio.CancelledError
    kinds = {
        kind.__name__: kind for kind in (NoText, NoNotes, NotesThatFail, Elsewhere, Deadly, DeadlyToPickle, OddText)
    }
    raise kinds[name]()


def raise_base(name: str) -> None:
    raise {
        "Own": Own,
        "KeyboardInterrupt": KeyboardInterrupt,
        "GeneratorExit": GeneratorExit,
        "SystemExit": SystemExit,
    }[name]


def raise_stop_iteration() -> None:
    next(iter(()))


def raise_group() -> None:
    raise ExceptionGroup(
        "several", [ValueError("one"), NoText(), ExceptionGroup("inner", [Deadly(), plugin().PluginError("two")])]
    )


def raise_base_group() -> None:
    raise BaseExceptionGroup("several", [ValueError("one"), KeyboardInterrupt()])


def raise_deep_group() -> None:
    error: Any = NoText()
    for _ in range(5000):
        error = ExceptionGroup("level", [error])
    raise error


class Result:
    def __init__(self, make: Any, *args: Any) -> None:
        self._made = make, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self._made


def return_one(name: str) -> Any:
    if name == "plugin":
        return plugin().Result()
    makers = {
        "raises": Result(divide, 1, 0),
        "leaves": Result(sys.exit, 9),
        "interrupts": Result(raise_base, "GeneratorExit"),
        "has no text": Result(raise_one, "DeadlyToPickle"),
    }
    return makers[name]


class UnpickledNowhere:
    def __reduce__(self) -> str:
        raise SystemExit(7)


def return_what_ends_its_pickling() -> Any:
    return UnpickledNowhere()
