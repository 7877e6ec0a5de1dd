"""A client that can hang up, to test your own endpoints. Needs httpx: ``pip install "cancelable-deps[testing]"``.

There is no socket and no server: the client sends the application the ASGI messages that a server would send. The
behaviour of a server itself (its buffers, its limits, its log, the moment at which it notices a disconnect) can only be
tested on a real server.

The client and its checks are in `client`, the messages in `calls` and `websockets`, the clock in `clock`, the tasks in
`tasks`, the workers of operations in `hub`. This floor may use the whole package; nothing else in the package may use it.
"""

from .calls import Call as Call
from .calls import HangUp as HangUp
from .calls import Outcome as Outcome
from .client import CancelableClient as CancelableClient
from .client import assert_cancelled as assert_cancelled
from .client import no_tasks_left as no_tasks_left
from .clock import advance as advance
from .hub import OperationsHub as OperationsHub
from .tasks import Left as Left
from .websockets import SocketCall as SocketCall
from .websockets import SocketClosed as SocketClosed

__all__ = [
    "Call",
    "CancelableClient",
    "HangUp",
    "Left",
    "OperationsHub",
    "Outcome",
    "SocketCall",
    "SocketClosed",
    "advance",
    "assert_cancelled",
    "no_tasks_left",
]
