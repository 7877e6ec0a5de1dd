"""What is asked of a client library: to run a script, and to wait for the entries of streams."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

from ...kernel.log import logger
from ..backend import Unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from ...kernel.loops.base import Event

    Send = Callable[[Iterable["Command"]], Awaitable[Iterable[Any]]]

CONNECT_SECONDS: Final = 1.0
"""The longest that a connection may take to be made."""

MOST_AT_ONCE: Final = 100
"""So many entries of a stream are read together."""

StreamEntries = list[tuple[str, str, bytes]]
"""Stream, position and data of each entry."""


class Script(NamedTuple):
    """A Lua script, with the name by which Redis has it in its cache."""

    text: str
    sha: str

    @classmethod
    def of(cls, text: str) -> Script:
        """Return the script of a text."""
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


class Call(NamedTuple):
    """A script with its arguments."""

    script: Script
    keys: Sequence[str]
    args: Sequence[str | bytes | int]


class Command(NamedTuple):
    """A call as it is sent."""

    name: Literal["EVAL", "EVALSHA"]
    script: str
    """The text of the script, or its name."""

    call: Call


class Pending:
    """A call that goes on when its caller is cancelled, and what becomes of it."""

    def __init__(self, has_ended: Event) -> None:
        self.is_abandoned = False
        self.has_ended = has_ended
        self.result: Any = None
        self.error: Exception | None = None

    async def outcome(self) -> Any:
        """Wait for its end, and return its result or raise its error."""
        try:
            await self.has_ended.wait()
        except BaseException:
            self.is_abandoned = True
            raise
        if self.error is not None:
            try:
                raise self.error
            finally:
                # Its traceback has this frame, and so this object.
                self.error = None
        return self.result


class Client(Protocol):
    """A client library, as far as the store uses it. Calls raise `Unavailable` when they fail."""

    can_pipeline: bool
    """Whether `scripts` may be used; clients of a cluster send commands one by one."""

    most_connections: int | None
    """So many connections its pool may have; ``None`` if it does not say."""

    longest_block: float | None
    """The seconds that a read may wait, if the client's own timeout allows no more."""

    def opened(self) -> AbstractAsyncContextManager[None]:
        """Hold the connections inside the ``async with``; closes those that are not the application's."""
        ...

    async def script(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """Run a script, and return what it returns."""
        ...

    async def scripts(self, calls: Sequence[Call]) -> list[Any]:
        """Run scripts in this order, on one connection; return the result or the `Unavailable` of each."""
        ...

    async def xread(self, streams: Mapping[str, str], block: int) -> StreamEntries:
        """Return entries after these positions, or wait for some, ``block`` ms at most. Uses a connection of its own."""
        ...


_PASSING: Final = frozenset(
    {
        "AskError",
        "BusyLoadingError",
        "ClusterDownError",
        "MasterDownError",
        "MovedError",
        "OutOfMemoryError",
        "ReadOnlyError",
        "TryAgainError",
        "UnblockedError",
    }
)
"""Errors of a server that starts, fails over or is full; by name, because both libraries have them."""


class Failures:
    """The errors of a client library, as `Unavailable`. One that does not pass by itself is logged, once each."""

    def __init__(self, *errors: type[Exception], answered: type[Exception], unknown_script: type[Exception]) -> None:
        self._errors = (*errors, OSError, TimeoutError)
        self._answered = answered
        self._unknown_script = unknown_script
        self._logged: set[str] = set()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise `Unavailable` for an error of the library, of a socket or of time; not for a script that is unknown."""
        try:
            yield
        except Exception as exc:
            if isinstance(exc, self._unknown_script) or not isinstance(exc, self._errors):
                raise
            self._log(exc)
            raise Unavailable(f"{type(exc).__name__}: {exc}") from exc

    async def results(self, send: Send, calls: Sequence[Call]) -> list[Any]:
        """Send calls, and those once more whose script the server does not know; return the result or failure of each.

        :param send: sends commands together, and returns a result or an error for each.
        """
        results = list(await send([Command("EVALSHA", call.script.sha, call) for call in calls]))
        unknown = [number for number, result in enumerate(results) if isinstance(result, self._unknown_script)]
        if unknown:
            # After a restart these are all, and one by one they would take longer than a batch may.
            again = await self._sent_again(send, [calls[number] for number in unknown])
            for number, result in zip(unknown, again, strict=True):
                results[number] = result
        return list(map(self._result_or_failure, results))

    async def _sent_again(self, send: Send, calls: Sequence[Call]) -> Iterable[Any]:
        try:
            with self.translated():
                return await send(_with_texts(calls))
        except Unavailable as exc:
            return [Unavailable(*exc.args) for _ in calls]

    def _result_or_failure(self, result: Any) -> Any:
        """Return a result of a pipeline as it is, and an error in its place as `Unavailable`.

        :raises Exception: one that is not the library's.
        """
        if isinstance(result, self._unknown_script):
            return Unavailable("the server forgets scripts at once")
        if isinstance(result, Exception):
            try:
                with self.translated():
                    raise result
            except Unavailable as exc:
                return exc
        return result

    def _log(self, exc: Exception) -> None:
        name = type(exc).__name__
        if isinstance(exc, self._answered) and name not in _PASSING and name not in self._logged:
            self._logged.add(name)
            logger.warning("the store of operations refuses a call: %s: %.300s", name, exc)


def _with_texts(calls: Iterable[Call]) -> Iterator[Command]:
    """Yield commands that need no script to be known: the first of each has its text, which the server remembers."""
    sent: set[str] = set()
    for call in calls:
        script = call.script
        yield Command("EVALSHA", script.sha, call) if script.sha in sent else Command("EVAL", script.text, call)
        sent.add(script.sha)


def entries_of(reply: Any) -> StreamEntries:
    """Return the entries of an answer to XREAD, in whatever shape the libraries and protocols give it."""
    entries: StreamEntries = []
    for stream, found in reply.items() if isinstance(reply, dict) else reply or ():
        # redis-py nests once more with RESP3.
        for entry in found[0] if found and isinstance(found[0], list) else found:
            position, fields = entry[:2]
            data = next((value for name, value in fields.items() if text(name) == "d"), b"")
            entries.append((text(stream), text(position), data.encode() if isinstance(data, str) else bytes(data)))
    return entries


def text(value: Any) -> str:
    """Return what a client has returned as a string, whether it decodes or not."""
    return value.decode() if isinstance(value, bytes) else str(value)
