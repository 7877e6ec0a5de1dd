"""What the server of a request can do beyond ASGI, told by the object whose ``receive()`` it has given us.

The only place where servers are told apart, and by what that object can do: names and modules change, and one class
may have a connection to itself and the next share it with other requests. Who can do none of this is a server that
knows nothing beyond ASGI. All that is private here has a test on the real server that fails when it changes.
"""

from __future__ import annotations

from http import HTTPStatus
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any

import anyio

from ..kernel.log import logger

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope

# In which a transport flushes what the client has not read yet, and is then closed all the same.
_FLUSH_SECONDS = 1.0

# Of HTTP/2: the stream is no longer needed. uvicorn says the same.
_CANCEL = 8

_unknown: set[str] = set()
"""What the log has been told of."""


class Server:
    """One that knows nothing beyond ASGI: it ends a response early only if the application raises, and logs that."""

    aborts_unfinished_responses = False
    """Whether it closes the connection, or resets the stream, of an application that returns early, without a word."""

    def __init__(self, owner: Any, scope: Scope) -> None:
        self._owner = owner
        self._shares_connection = not str(scope.get("http_version")).startswith("1.")

    async def abort(self, *, drop: bool) -> bool:
        """Close the connection, or reset the stream, of a response that has started; whether that could be done.

        What the application sends after that is lost, and what it leaves unfinished is no error.

        :param drop: what has been sent but not read yet.
        """
        return False

    def say_again(self, end: Message) -> None:
        """Let the next ``receive()`` have the disconnect that we have taken, where it would wait for ever."""


def server_of(receive: Receive, scope: Scope) -> Server:
    """The server whose ``receive()`` this is."""
    owner = getattr(receive, "__self__", None)
    kinds = (_OneStream, _WholeConnection, _AsyncioQueue, _TrioChannel, _Native)
    return next((kind(owner, scope) for kind in kinds if kind.is_behind(owner, scope)), Server(owner, scope))


def log_unknown(receive: Receive) -> None:
    """Say once of each kind of ``receive()`` that we cannot end its response without an error in the log."""
    owner = getattr(receive, "__self__", None)
    kind: Any = receive if owner is None else type(owner)
    name = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', type(kind).__qualname__)}"
    if name not in _unknown:
        _unknown.add(name)
        logger.debug("%s is no server that we can tell to cut a response: it is left by an exception", name)


def loses_what_is_cancelled(receive: Receive) -> bool:
    """Whether a pending ``receive()`` that is cancelled takes a message with it, and the next one is told a lie.

    So does granian's. It is written in Rust: a method of a native class.
    """
    return isinstance(receive, BuiltinMethodType)


def can_refuse_socket_with(receive: Receive, status_code: int) -> bool:
    """Whether the handshake of a WebSocket can be answered with this status, where the server can send a response."""
    # `process_request` is how the older `websockets` asks for a refusal, and takes it as an HTTPStatus alone: uvicorn on
    # it fails at a status that Python has no name for. 499 is nginx's.
    return status_code in set(HTTPStatus) or not _can(getattr(receive, "__self__", None), "process_request")


def _can(owner: Any, *methods: str) -> bool:
    return all(callable(getattr(owner, name, None)) for name in methods)


class _OneStream(Server):
    """uvicorn over HTTP/2, where the connection is shared: it resets one stream, and then takes it for disconnected."""

    @staticmethod
    def is_behind(owner: Any, scope: Scope) -> bool:
        return _can(owner, "abort_stream") and hasattr(owner, "disconnected")

    async def abort(self, *, drop: bool) -> bool:
        if not self._owner.disconnected:
            self._owner.abort_stream()
            # It does nothing where the whole connection is being closed, and then says so later.
            self._owner.disconnected = True
        return True


class _WholeConnection(Server):
    """uvicorn over HTTP/1, where one response at a time has the connection to itself."""

    @staticmethod
    def is_behind(owner: Any, scope: Scope) -> bool:
        is_alone = str(scope.get("http_version")).startswith("1.")
        return is_alone and hasattr(owner, "disconnected") and _can(getattr(owner, "transport", None), "close", "abort")

    async def abort(self, *, drop: bool) -> bool:
        cycle, transport = self._owner, self._owner.transport
        if not drop:
            transport.close()
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(0 if drop else _FLUSH_SECONDS):
                await self._gone()
            if not cycle.disconnected:
                transport.abort()
                with anyio.move_on_after(_FLUSH_SECONDS):
                    await self._gone()
                # Of requests that a client has sent in one go (pipelining) uvicorn tells only the last.
                cycle.disconnected = True
        return True

    async def _gone(self) -> None:
        # A few passes of the loop; its event for this is for the one reader.
        while not self._owner.disconnected:  # noqa: ASYNC110
            await anyio.sleep(0.005)


class _Queue(Server):
    """A queue of the server's: it says the disconnect once, and a response that listens after us would wait for ever.

    So have it hypercorn, and daphne. hypercorn closes what an application leaves unfinished, but not over HTTP/2, where
    the client would wait for the rest. Nor does daphne. An exception would do no better with either.
    """

    aborts_unfinished_responses = True

    async def abort(self, *, drop: bool) -> bool:
        stream = self._hypercorns_stream() if self._shares_connection else None
        if stream is None:
            return False
        connection = stream.send.__self__
        try:
            with anyio.move_on_after(_FLUSH_SECONDS, shield=True):
                if not stream.closed:
                    # What a client does, and then what hypercorn does when one has done it.
                    connection.connection.reset_stream(stream.stream_id, error_code=_CANCEL)
                    await connection._close_stream(stream.stream_id)
                    await connection._window_updated(stream.stream_id)
                    await connection._flush()
        except Exception:
            # The connection is at its end, which is as good.
            return False
        return True

    def _hypercorns_stream(self) -> Any:
        """What sends the response of our request.

        The queue knows nothing of it. Both are at hand in the function that hypercorn has made a task of: this one, if
        no middleware has started another for what is inside of it.
        """
        return self._stream_of(anyio.get_current_task()) or next(
            filter(None, map(self._stream_of, anyio.get_running_tasks())), None
        )

    def _stream_of(self, task: anyio.TaskInfo) -> Any:
        frame = getattr(task.coro, "cr_frame", None)
        names = {} if frame is None else frame.f_locals
        if getattr(names.get("receive"), "__self__", None) is not self._owner:
            return None
        stream = getattr(names.get("send"), "__self__", None)
        connection = getattr(getattr(stream, "send", None), "__self__", None)
        is_known = hasattr(stream, "stream_id") and hasattr(stream, "closed")
        is_known = is_known and _can(connection, "_close_stream", "_window_updated", "_flush")
        return stream if is_known and _can(getattr(connection, "connection", None), "reset_stream") else None


class _AsyncioQueue(_Queue):
    @staticmethod
    def is_behind(owner: Any, scope: Scope) -> bool:
        return _can(owner, "get", "get_nowait", "put_nowait")

    def say_again(self, end: Message) -> None:
        self._owner.put_nowait(end)


class _TrioChannel(_Queue):
    @staticmethod
    def is_behind(owner: Any, scope: Scope) -> bool:
        # Private, as the channel's other end is the server's.
        return _can(owner, "receive_nowait") and _can(getattr(getattr(owner, "_state", None), "data", None), "append")

    def say_again(self, end: Message) -> None:
        self._owner._state.data.append(end)


class _Native(Server):
    """granian: it knows whether a response has been started, and breaks off what is left unfinished."""

    aborts_unfinished_responses = True

    @staticmethod
    def is_behind(owner: Any, scope: Scope) -> bool:
        return _can(owner, "receive", "send") and hasattr(owner, "sent_response_code")
