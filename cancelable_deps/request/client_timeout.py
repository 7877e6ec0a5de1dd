"""The time that a client gives for its request, in a header."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, final

from starlette.exceptions import HTTPException
from starlette.requests import Request

from ..kernel.errors import TimeoutCancelation
from ..kernel.log import logger
from ..kernel.options import runs_only_when_awaited, seconds, takes
from ..kernel.reasons import CancelationReason
from ..kernel.token import Cause
from .durations import PREFER, checked_name, header_named, read_all
from .policies import log_exceeded

if TYPE_CHECKING:
    from datetime import timedelta

    from starlette.types import Scope

    from ..kernel.errors import CancelationError

Parser = Callable[[str], float | None]
Trust = Callable[[Request], object]

EXPIRED: Final = {"x-deadline-expired": "1"}
"""The header of a response to a request whose client has given too little time."""


class Budget:
    """The time of one request on behalf of its client.

    :param asked: the seconds that the client gives.
    :param maximum: the most that a client may give, if there is such a limit.
    :param wait: the preference ``wait`` of the client, if it has one.
    """

    __slots__ = ("_asked", "seconds", "wait")

    def __init__(self, asked: float, maximum: float | None, wait: float | None) -> None:
        self._asked = asked
        self.seconds = asked if maximum is None else min(asked, maximum)
        """The seconds that the request may take."""

        self.wait = wait

    def within(self, timeout: float | None) -> float:
        """Return the smaller of this and a timeout of ours."""
        return self.seconds if timeout is None else min(timeout, self.seconds)

    def cause(self) -> Cause:
        """Return the cause of a cancellation because this time is up."""
        message = f"Timed out after {self.seconds:g} seconds"
        if self.seconds < self._asked:
            return Cause(CancelationReason.TIMEOUT, message)
        return Cause(CancelationReason.TIMEOUT, f"{message}, the client's own limit", headers=EXPIRED)


@final
class ClientTimeout:
    """The headers by which a client may say how long it waits: ``client_timeout=`` of the middleware or route class.

    A request ends when the time of its client is up, or that of the route, whichever is first. So a client can shorten
    the time of its request and never lengthen it. A route may replace the default timeout of its door; it cannot replace
    the time of the client, which `Cancelable.extend`, `Cancelable.disable_timeout` and `no_timeout` leave as it is.
    The time counts from the request's arrival at the door. It does not apply to WebSockets.

    A request that has ended because its client's time was up is answered with 504 and ``X-Deadline-Expired: 1``: the
    client need not count it among the failures of the server. So is a request with less than ``minimum``, before any code
    of the application has run.

    These headers are known: ``prefer`` (``wait=5`` of RFC 7240; a response has ``Preference-Applied``), ``grpc-timeout``,
    ``connect-timeout-ms``, ``x-envoy-expected-rq-timeout-ms``. Any other has plain seconds, such as ``1.5``. Of several
    headers the smallest time counts.

    :param headers: the names of the headers that count, in any case.
    :param parsers: further headers by name, each with a function that returns the seconds of a value, or ``None`` for a
        value without a meaning; a ``ValueError`` says that it is malformed.
    :param maximum: the most seconds that a client may give; more is taken for so many.
    :param minimum: the seconds below which a request is refused. One with 0 seconds always is.
    :param trust: a function of the request that returns whether its headers count, for instance by its peer; not called
        for a request without such a header. By default they count for all.
    :param invalid: ``"ignore"`` malformed values, or ``"reject"`` the request with 400. A value of more than 100
        characters is malformed (``prefer``: 1,000), as are numbers of more than ten digits.
    :param advisory: stop and refuse nothing; log and count the requests that took longer than their client gives.
    :raises TypeError: if an argument has a wrong type.
    :raises ValueError: if there is no header, a name or ``invalid`` is wrong, or a limit is negative, NaN or below
        ``minimum``.
    """

    def __init__(
        self,
        headers: Iterable[str] = (),
        *,
        parsers: Mapping[str, Parser] | None = None,
        maximum: float | timedelta | None = None,
        minimum: float | timedelta = 0,
        trust: Trust | None = None,
        invalid: Literal["ignore", "reject"] = "ignore",
        advisory: bool = False,
    ) -> None:
        self._readers = _readers(headers, parsers or {})
        self._keys = {name.encode(): name for name in self._readers}
        self.minimum = seconds(minimum, "minimum")
        self.maximum = None if maximum is None else seconds(maximum, "maximum")
        if self.maximum is not None and self.maximum <= self.minimum:
            raise ValueError(f"maximum must be more than minimum, not {maximum!r}")
        if trust is not None and (not takes(trust, 1) or runs_only_when_awaited(trust)):
            raise TypeError(f"trust must be a plain function of the request, not {trust!r}")
        self._trust = trust
        if invalid not in ("ignore", "reject"):
            raise ValueError(f"invalid must be 'ignore' or 'reject', not {invalid!r}")
        self._rejects = invalid == "reject"
        self.advisory = advisory
        self.exceeded = 0
        """The number of requests of this process that took longer than their client gave; counted in advisory mode only."""

    def __repr__(self) -> str:
        return f"<ClientTimeout by {', '.join(self._readers)}{', advisory' if self.advisory else ''}>"

    def budget(self, scope: Scope) -> Budget | None:
        """Return the time that the client of a request gives; ``None`` if it gives none. The library calls this.

        :raises HTTPException: 400, if a value is malformed and such requests are rejected.
        """
        given: dict[str, list[str]] = {}
        for key, value in scope["headers"]:
            name = self._keys.get(key)
            if name is not None:
                given.setdefault(name, []).append(value.decode("latin-1"))
        if not given or (self._trust is not None and not self._trust(Request(scope))):
            return None
        times = {name: self._read(name, values) for name, values in given.items()}
        asked = min((time for time in times.values() if time is not None), default=None)
        return None if asked is None else Budget(asked, self.maximum, times.get(PREFER))

    def _read(self, name: str, values: list[str]) -> float | None:
        try:
            return read_all(name, self._readers[name], values)
        except ValueError as exc:
            if self._rejects and not self.advisory:
                raise HTTPException(400, f"The header {name} is malformed") from exc
        except Exception:
            logger.exception("the parser of the header %s failed", name)
        return None

    def refusal(self, budget: Budget) -> CancelationError | None:
        """Return the error of a request whose client gives too little; ``None`` if it is enough."""
        if budget.seconds and budget.seconds >= self.minimum:
            return None
        error = TimeoutCancelation(f"The client gives {budget.seconds:g} seconds, which is too little")
        error.headers = dict(EXPIRED)
        return error

    def judge(self, scope: Scope, budget: Budget, elapsed: float) -> None:
        """Count and log a request that has ended, if it took longer than its client gave. For advisory mode."""
        if elapsed > budget.seconds:
            self.exceeded += 1
            log_exceeded(scope, elapsed, budget.seconds, "the %g s of its client (advisory)")


def _readers(headers: Iterable[str], parsers: Mapping[str, Parser]) -> dict[str, Parser]:
    if isinstance(headers, str | bytes):
        raise TypeError(f"headers takes several names, such as [{headers!r}], not one string")
    readers: dict[str, Any] = {name: header_named(name).read for name in map(checked_name, headers)}
    for name, parser in parsers.items():
        if not takes(parser, 1) or runs_only_when_awaited(parser):
            raise TypeError(f"the parser of {name!r} must be a plain function of a string, not {parser!r}")
        readers[checked_name(name)] = parser
    if not readers:
        raise ValueError('ClientTimeout needs the names of headers, such as ["prefer", "grpc-timeout"]')
    return readers
