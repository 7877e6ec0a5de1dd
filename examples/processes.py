"""Run work that never yields, as a C extension or a tight loop does, in a process, which is killed when the client leaves.

    python -m examples.processes
    curl -m 2 'http://127.0.0.1:8000/collatz?below=100000000'
    curl -i 'http://127.0.0.1:8000/collatz/limited?below=100000000'
    curl 'http://127.0.0.1:8000/collatz?below=1000'

Watch it with `top`: when the client leaves, the process is gone.
"""

import uvicorn
from fastapi import FastAPI

from cancelable_deps import RequestCancelable, current_cancelable, with_cancelation
from examples._collatz import longest

app = FastAPI()


@app.get("/collatz")
async def collatz(cancel: RequestCancelable, below: int) -> dict[str, int]:
    async with cancel:
        return await cancel.run_in_process(longest, below)


@app.get("/collatz/limited")
@with_cancelation(timeout=1)
async def limited_collatz(below: int) -> dict[str, int]:
    cancel = current_cancelable()
    assert cancel is not None
    return await cancel.run_in_process(longest, below)


if __name__ == "__main__":
    uvicorn.run(app)
