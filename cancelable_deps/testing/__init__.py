"""Test your own endpoints with a client that can hang up. Needs httpx: ``pip install "cancelable-deps[testing]"``.

No socket and no server: the client says to the application, in ASGI's messages, what a server would say. What only a
real server shows (its buffers, its limits, its log, when it notices that a client is gone) needs a real server.

The client and its checks are in `client`, the messages in `calls` and `websockets`, the clock in `clock`, the count of
tasks in `tasks`. It knows the whole package; nothing in the package knows it.
"""

from .calls import Call as Call
from .calls import HangUp as HangUp
from .calls import Outcome as Outcome
from .client import CancelableClient as CancelableClient
from .client import assert_cancelled as assert_cancelled
from .client import no_tasks_left as no_tasks_left
from .clock import advance as advance
from .tasks import Left as Left
from .websockets import SocketCall as SocketCall
from .websockets import SocketClosed as SocketClosed

__all__ = [
    "Call",
    "CancelableClient",
    "HangUp",
    "Left",
    "Outcome",
    "SocketCall",
    "SocketClosed",
    "advance",
    "assert_cancelled",
    "no_tasks_left",
]
