"""Testing an endpoint: a client that hangs up in the middle, and a timeout of 30 seconds in milliseconds.

Run: python -m examples.testing
With pytest: the functions below are tests as they stand, with ``@pytest.mark.anyio``.
"""

import anyio
from fastapi import FastAPI

from cancelable_deps import CancelationReason, with_cancelation
from cancelable_deps.testing import CancelableClient, HangUp, advance, assert_cancelled

app = FastAPI()
released: list[str] = []


@app.post("/report")
@with_cancelation(timeout=30)
async def report() -> dict[str, int]:
    try:
        await anyio.sleep(3600)
    finally:
        await anyio.sleep(0.01)  # cleanup, such as returning a connection
        released.append("report")
    return {"rows": 1}


async def test_hang_up() -> None:
    async with CancelableClient(app) as client:
        async with client.start("POST", "/report", json={"year": 2026}) as call:
            await call.listened_to()
            await call.hang_up()
        assert_cancelled(call, reason=CancelationReason.DISCONNECT)
        assert (call.status, call.left_behind) == (499, [])
    assert released.pop() == "report"


async def test_hang_up_by_itself() -> None:
    async with CancelableClient(app, disconnect="once") as client:
        async with client.start("POST", "/report", content=b"x" * 1000, hang_up=HangUp.after_request(100)) as call:
            pass
        assert_cancelled(call, reason=CancelationReason.DISCONNECT)
    assert released.pop() == "report"


async def test_timeout() -> None:
    async with CancelableClient(app) as client:
        async with client.start("POST", "/report") as call:
            await call.running()
            await advance(31)  # seconds, which take milliseconds
        assert_cancelled(call, reason=CancelationReason.TIMEOUT)
        response = await call.response()
        assert (response.status_code, response.json()) == (504, {"detail": "Timed out after 30 seconds"})
    assert released.pop() == "report"


async def main() -> None:
    for test in (test_hang_up, test_hang_up_by_itself, test_timeout):
        await test()
        print("passed:", test.__name__)


if __name__ == "__main__":
    anyio.run(main)
