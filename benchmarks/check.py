"""The cost of `check()` in the innermost loop of a worker thread: `python -m benchmarks.check`."""

import argparse
import timeit
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import anyio
import anyio.to_thread

from cancelable_deps import Cancelable


def _alone(stack: ExitStack) -> Callable[[], None]:
    return stack.enter_context(Cancelable()).check


def _timed(stack: ExitStack) -> Callable[[], None]:
    return stack.enter_context(Cancelable(timeout=3600)).check


def _nested(stack: ExitStack) -> Callable[[], None]:
    _timed(stack)
    return _timed(stack)


BLOCKS = {"no deadline": _alone, "a deadline": _timed, "two blocks with deadlines": _nested}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument("--calls", type=int, default=200_000)
    calls: int = parser.parse_args(arguments).calls
    print(f"check() in a thread of the event loop, best of 5 times {calls:,} calls")
    for name in BLOCKS:
        print(f"{name:28}{anyio.run(_measure, name, calls) * 1e9:8.0f} ns")


async def _measure(name: str, calls: int) -> float:
    async with Cancelable():
        return await anyio.to_thread.run_sync(_best, name, calls)


def _best(name: str, calls: int) -> float:
    with ExitStack() as stack:
        return min(timeit.repeat(BLOCKS[name](stack), number=calls, repeat=5)) / calls


if __name__ == "__main__":
    main()
