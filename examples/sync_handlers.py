"""Stop plain `def` handlers: a thread cannot be interrupted, so the handler calls `check()` where it may stop.

    python -m examples.sync_handlers
    curl -m 1 http://127.0.0.1:8000/primes
    curl -i http://127.0.0.1:8000/primes/limited
    curl -i http://127.0.0.1:8000/legacy

The last one calls what never asks: its answer does not wait, but its thread stays taken until it has ended.
"""

import time

import uvicorn
from fastapi import FastAPI

from cancelable_deps import Cancelable, CancelationError, RequestCancelable, current_cancelable, with_cancelation

app = FastAPI()
LAST = 50_000_000


@app.get("/primes")
def primes(cancel: RequestCancelable) -> dict[str, int]:
    """Use a handle: the thread enters a block of its own by a plain `with`."""
    with cancel:
        return {"primes": count_primes(cancel)}


@app.get("/primes/limited")
@with_cancelation(timeout=0.5)
def limited_primes() -> dict[str, int]:
    """Use the decorator: every function that the handler calls finds the block by `current_cancelable()`."""
    cancel = current_cancelable()
    assert cancel is not None
    return {"primes": count_primes(cancel)}


@app.get("/legacy")
@with_cancelation(timeout=0.5, abandon_thread=True)
def legacy() -> str:
    time.sleep(2)
    return "a library that never asks"


def count_primes(cancel: Cancelable) -> int:
    found = 0
    try:
        for number in range(2, LAST):
            cancel.check()  # takes a fraction of a microsecond, so it may be in the innermost loop
            found += all(number % divisor for divisor in range(2, int(number**0.5) + 1))
    except CancelationError as exc:
        print(f"stopped after {found} primes: {exc.reason}", flush=True)
        raise
    return found


if __name__ == "__main__":
    uvicorn.run(app)
