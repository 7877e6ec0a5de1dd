"""The work of `examples.processes`, in a module of its own: a worker process imports this, and not the whole server."""

import os


def longest(below: int) -> dict[str, int]:
    """Return the number below `below` that takes the most steps down to 1, and the process that has found it."""
    print(f"process {os.getpid()} counts", flush=True)
    start, steps = max(((number, count_steps(number)) for number in range(1, below)), key=lambda found: found[1])
    return {"start": start, "steps": steps, "process": os.getpid()}


def count_steps(number: int) -> int:
    steps = 0
    while number > 1:
        number = number * 3 + 1 if number % 2 else number // 2
        steps += 1
    return steps
