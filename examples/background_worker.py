"""The kernel without requests: a worker whose jobs have time limits, and which a token stops.

    python -m examples.background_worker

There is no HTTP, and no curl command: press Ctrl-C to see it stop in the middle of a job.
"""

from __future__ import annotations

import signal

import anyio

from cancelable_deps import Cancelable, CancelationReason, CancelationToken, SignalCancelation, TimeoutCancelation

JOBS = {"thumbnails": 3, "newsletter": 1000, "statistics": 5}


async def work_off(jobs: dict[str, int], stop: CancelationToken, limit: float = 1.0) -> dict[str, str]:
    """Do one job after another, each within `limit` seconds, until `stop` is cancelled; return how each ended."""
    outcomes: dict[str, str] = {}
    for name, steps in jobs.items():
        try:
            async with Cancelable(timeout=limit, token=stop, name=name) as block:
                block.on_progress(lambda message, _: print(f"  {message}", flush=True))
                await do_job(name, steps, block)
            outcomes[name] = "done"
        except TimeoutCancelation:
            outcomes[name] = "too slow"
        except SignalCancelation:
            outcomes[name] = "interrupted"
            break
    return outcomes


async def do_job(name: str, steps: int, block: Cancelable) -> None:
    for step in range(1, steps + 1):
        await anyio.sleep(0.1)
        await block.report_progress(f"{name}: step {step} of {steps}", {"step": step})
    with block.shield():
        await anyio.sleep(0.05)  # recording the end of the job is not interrupted


async def main() -> None:
    stop = CancelationToken()
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(stop_on_signal, stop)
        print(await work_off(JOBS, stop))
        task_group.cancel_scope.cancel()


async def stop_on_signal(stop: CancelationToken) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            stop.cancel_nowait(CancelationReason.SIGNAL, f"received {number.name}")


if __name__ == "__main__":
    anyio.run(main)
