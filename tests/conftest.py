from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from cancelable_deps import configure

# A shell that starts the tests in the background ignores it for them, and every server would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def at_once() -> Iterator[None]:
    """Listen from the handler's first moment, so that a race can be driven without waiting."""
    configure(listen_after=0)
    yield
    configure(listen_after=0.005)
