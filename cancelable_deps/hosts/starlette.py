"""What we know of Starlette that it does not promise.

The names are asked for where nothing public tells; each says why. `tests/test_request.py`, `tests/test_socket.py` and
`tests/test_servers_streaming.py` fail when they change.
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import HTTPConnection
    from starlette.types import Receive, Scope

RECEIVE: Final = "_receive"
"""The attribute of a ``Request`` or ``WebSocket`` with the ``receive()`` that it calls.

The only place where what has been read ahead can be given back to ``request.body()`` or ``websocket.receive()``: the
framework hands the same object to all dependencies and the handler. To be set by ``setattr``.
"""

# A request pays for each call; this one is in C.
receive_of: Final[Callable[[HTTPConnection], Receive]] = attrgetter(RECEIVE)

TOO_LATE: Final = "Caught handled exception, but response already started."
"""The text of the error that Starlette makes of one that it would answer, had the response not started."""

_NO_ASGI: Final[dict[str, Any]] = {"version": "3.0"}


def route_of(scope: Scope) -> str:
    """Return the route as it was written, for the log; where there is none the path, quoted: it may hold line breaks."""
    return getattr(scope.get("route"), "path", None) or quote(scope.get("path", ""))


def streams_listen(scope: Scope) -> bool:
    """Return whether Starlette's ``StreamingResponse`` listens for the disconnect, which it does before ASGI 2.4."""
    return _is_before_2_4(scope.get("asgi", _NO_ASGI).get("spec_version", "2.0"))


@lru_cache(maxsize=16)
def _is_before_2_4(version: str) -> bool:
    return tuple(map(int, version.split("."))) < (2, 4)


def let_streams_listen(scope: Scope) -> None:
    """See to it that Starlette's streams listen for the disconnect.

    What comes after a stream, its background above all, runs when the stream has heard that its client left, and not
    when it learns so by an error of ``send()``.
    """
    _announce(scope, "2.3")


def spare_streams_listening(scope: Scope) -> None:
    """Let Starlette's streams not listen from here on, beside us."""
    _announce(scope, "2.4")


def _announce(scope: Scope, version: str) -> None:
    scope["asgi"] = {**scope.get("asgi", _NO_ASGI), "spec_version": version}


def is_base_http_middleware(receive: Any) -> bool:
    """Return whether ``receive`` is the one that a ``BaseHTTPMiddleware`` gives to what is inside of it."""
    return getattr(receive, "__module__", None) == "starlette.middleware.base"


def servers_own(receive: Any) -> Any:
    """Return the ``receive()`` outside of every ``BaseHTTPMiddleware``.

    Each has a function that knows the one further out, as a variable of its closure.
    """
    while is_base_http_middleware(receive):
        names = dict(zip(receive.__code__.co_freevars, receive.__closure__ or (), strict=False))
        wrapped = names.get("wrapped_receive")
        request = None if wrapped is None else getattr(wrapped.cell_contents, "__self__", None)
        if request is None:
            break
        receive = request.receive
    return receive
