"""The abilities of servers beyond ASGI, found by the object whose ``receive()`` the server has passed to us.

This is the only place where servers are distinguished. They are distinguished by the methods of that object, because
names and modules change, and because one class may own its connection and another share it with other requests. A server
that has none of these methods is taken to know nothing beyond ASGI. Each private name has a test on the real server that
fails when it changes.
"""

from __future__ import annotations

from http import HTTPStatus
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any

import anyio

from ..kernel.log import logger

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope

# For flushing what the client has not read yet; then the transport is closed all the same.
_FLUSH_SECONDS = 1.0

# The error code CANCEL of HTTP/2 (RFC 9113): the stream is no longer needed. uvicorn sends the same.
_CANCEL = 8

_unknown: set[str] = set()
"""The kinds of ``receive()`` that have been logged."""


class Server:
    """A server that knows nothing beyond ASGI: it aborts a response only if the application raises, and logs that."""

    aborts_unfinished_responses = False
    """Whether it closes the connection, or resets the stream, if the application returns early, and logs nothing."""

    def __init__(self, owner: Any, scope: Scope) -> None:
        self._owner = owner
        self._shares_connection = not str(scope.get("http_version")).startswith("1.")

    async def abort(self, *, drop: bool) -> bool:
        """Close the connection, or reset the stream, of a response that has started; return whether that was possible.

        What the application sends after that is lost, and a response that it leaves unfinished is no error.

        :param drop: discard what has been sent but not been read by the client yet.
        """
        return False

    def say_again(self, end: Message) -> None:
        """Put back the disconnect message ``end`` that we have taken, if the next ``receive()`` would wait for ever."""


def server_of(receive: Receive, scope: Scope) -> Server:
    """Return the server that ``receive`` belongs to."""
    owner = getattr(receive, "__self__", None)
    kinds = (_OneStream, _WholeConnection, _AsyncioQueue, _TrioChannel, _Native)
    return next((kind(owner, scope) for kind in kinds if kind.is_behind(owner, scope)), Server(owner, scope))


def log_unknown(receive: Receive) -> None:
    """Log, once for each kind of ``receive()``, that its response cannot be aborted without an error in the log."""
    owner = getattr(receive, "__self__", None)
    kind: Any = receive if owner is None else type(owner)
    name = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', type(kind).__qualname__)}"
    if name not in _unknown:
        _unknown.add(name)
        logger.debug("%s is not a server known to abort a response on request: an exception is raised instead", name)


def loses_what_is_cancelled(receive: Receive) -> bool:
    """Return whether cancelling a pending ``receive()`` loses a message, so that the next call returns a wrong one.

    That is so with granian, which is written in Rust: its ``receive`` is a method of a native class.
    """
    return isinstance(receive, BuiltinMethodType)


def can_refuse_socket_with(receive: Receive, status_code: int) -> bool:
    """Return whether a WebSocket's handshake can be refused with this status, if the server can send a response."""
    # The older `websockets` asks `process_request` for a refusal, and accepts only a member of HTTPStatus: uvicorn on it
    # fails with a status that Python has no name for, such as nginx's 499.
    return status_code in set(HTTPStatus) or not _can(getattr(receive, "__self__", None), "process_request")


def _can(owner: Any, *methods: str) -> bool:
    return all(callable(getattr(owner, name, None)) for name in methods)


class _OneStream(Server):
    """uvicorn over HTTP/2, where requests share the connection: it resets one stream, which then counts as disconnected."""

    @staticmethod
    def is_behind(owner: Any, scope: Scope) -> bool:
        return _can(owner, "abort_stream") and hasattr(owner, "disconnected")

    async def abort(self, *, drop: bool) -> bool:
        if not self._owner.disconnected:
            self._owner.abort_stream()
            # That does nothing if the whole connection is being closed; uvicorn then sets this later.
            self._owner.disconnected = True
        return True


class _WholeConnection(Server):
    """uvicorn over HTTP/1, where one response at a time owns the connection."""

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
                # If a client has sent several requests at once (pipelining), uvicorn sets this for the last one only.
                cycle.disconnected = True
        return True

    async def _gone(self) -> None:
        # A few passes of the loop. uvicorn has an event for this, but it serves one waiter, the reader.
        while not self._owner.disconnected:  # noqa: ASYNC110
            await anyio.sleep(0.005)


class _Queue(Server):
    """A server whose ``receive()`` reads from a queue: hypercorn or daphne.

    The disconnect is in the queue once, so a response that listens after us would wait for ever. hypercorn closes the
    connection of an unfinished response, but not over HTTP/2, where the client would wait for the rest. daphne does not
    close it at all. An exception would do no better with either.
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
                    # Reset the stream as a client does, and then do what hypercorn does when a client has done so.
                    connection.connection.reset_stream(stream.stream_id, error_code=_CANCEL)
                    await connection._close_stream(stream.stream_id)
                    await connection._window_updated(stream.stream_id)
                    await connection._flush()
        except Exception:
            # The connection has ended by itself, which serves as well.
            return False
        return True

    def _hypercorns_stream(self) -> Any:
        """Return the stream that sends the response of our request, or ``None`` if it is not found.

        The queue has no reference to it. Both are local variables of the function that hypercorn has started as a task:
        the current task, unless a middleware has started another one.
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
        # `_state` is private, but the sending end of the channel is the server's own.
        return _can(owner, "receive_nowait") and _can(getattr(getattr(owner, "_state", None), "data", None), "append")

    def say_again(self, end: Message) -> None:
        self._owner._state.data.append(end)


class _Native(Server):
    """granian: it knows whether a response has started, and aborts one that the application leaves unfinished."""

    aborts_unfinished_responses = True

    @staticmethod
    def is_behind(owner: Any, scope: Scope) -> bool:
        return _can(owner, "receive", "send") and hasattr(owner, "sent_response_code")
