"""Private parts of Starlette.

A private name is used where no public API serves; each says why. `tests/test_request.py`, `tests/test_socket.py` and
`tests/test_servers_streaming.py` fail when one changes.
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from .fastapi import route_as_included

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import HTTPConnection
    from starlette.types import Receive, Scope

RECEIVE: Final = "_receive"
"""The attribute of a ``Request`` or ``WebSocket`` with the ``receive()`` that it calls. Set it by ``setattr``.

Messages that have been read ahead can be given back to ``request.body()`` or ``websocket.receive()`` only here: the
framework passes the same object to all dependencies and to the handler.
"""

# An attrgetter and no function, because it runs in C, and every request pays for each call.
receive_of: Final[Callable[[HTTPConnection], Receive]] = attrgetter(RECEIVE)

TOO_LATE: Final = "Caught handled exception, but response already started."
"""The text of the error that Starlette raises for one that it can no longer answer, because the response has started."""

_NO_ASGI: Final[dict[str, Any]] = {"version": "3.0"}


def route_of(scope: Scope) -> str:
    """Return the route's path template, for the log; without a route the path, quoted because of line breaks."""
    return route_template(scope) or quote(scope.get("path", ""))


def route_template(scope: Scope) -> str | None:
    """Return the path template of the route; ``None`` before one has been found, and under other frameworks."""
    return getattr(route_as_included(scope), "path", None)


def streams_listen(scope: Scope) -> bool:
    """Return whether Starlette's ``StreamingResponse`` listens for the disconnect, as it does below ASGI 2.4."""
    return _is_before_2_4(scope.get("asgi", _NO_ASGI).get("spec_version", "2.0"))


@lru_cache(maxsize=16)
def _is_before_2_4(version: str) -> bool:
    return tuple(map(int, version.split("."))) < (2, 4)


def let_streams_listen(scope: Scope) -> None:
    """Make Starlette's streams listen for the disconnect.

    A stream that receives the disconnect still runs its background task; one that gets an error from ``send()`` does not.
    """
    _announce(scope, "2.3")


def spare_streams_listening(scope: Scope) -> None:
    """Make Starlette's streams not listen for the disconnect from here on, because we listen."""
    _announce(scope, "2.4")


def _announce(scope: Scope, version: str) -> None:
    scope["asgi"] = {**scope.get("asgi", _NO_ASGI), "spec_version": version}


def is_base_http_middleware(receive: Any) -> bool:
    """Return whether ``receive`` is the one that a ``BaseHTTPMiddleware`` passes to the application inside it."""
    return getattr(receive, "__module__", None) == "starlette.middleware.base"


def servers_own(receive: Any) -> Any:
    """Return the ``receive()`` outside every ``BaseHTTPMiddleware``.

    The ``receive()`` of each holds the next one further out in a variable of its closure.
    """
    while is_base_http_middleware(receive):
        names = dict(zip(receive.__code__.co_freevars, receive.__closure__ or (), strict=False))
        wrapped = names.get("wrapped_receive")
        request = None if wrapped is None else getattr(wrapped.cell_contents, "__self__", None)
        if request is None:
            break
        receive = request.receive
    return receive
