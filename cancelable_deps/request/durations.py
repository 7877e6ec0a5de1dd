"""The headers in which a client gives the time for its request: reading and writing them. All are durations.

A duration and not a time of day: the clocks of two machines differ.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONGEST: Final = 100
"""The characters of the longest value that is looked at."""

LONGEST_LIST: Final = 1000
"""The characters of the longest ``Prefer`` that is looked at; it may hold other preferences, too."""

PREFER: Final = "prefer"

_SECONDS = re.compile(r"[0-9]{1,10}(?:\.[0-9]{1,10})?")
_GRPC = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNITS: Final = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "S": 1.0, "M": 60.0, "H": 3600.0}
_ELEMENT = re.compile(r'((?:[^",]|"(?:[^"\\]|\\.)*")*)(?:,|$)', re.DOTALL)
_PREFERENCE = re.compile(r"[ \t]*([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*(?:=([^;]*))?(?:;.*)?", re.DOTALL)


class Header(NamedTuple):
    """The syntax of one header."""

    read: Callable[[str], float | None]
    """Returns the seconds of a value; ``None`` if it gives none. Raises ``ValueError`` if it is malformed."""

    write: Callable[[float], str]
    """Returns the value for some seconds, rounded down."""


def read_seconds(text: str) -> float:
    """Return the seconds of a number such as ``1.5``."""
    if _SECONDS.fullmatch(text) is None:
        raise ValueError("not a number of seconds")
    return float(text)


def write_seconds(seconds: float) -> str:
    """Return a number of seconds, down to milliseconds."""
    return f"{_whole(seconds, 1e3, 10**12) / 1e3:.3f}"


def _whole(seconds: float, per_second: float, limit: int) -> int:
    return min(math.floor(min(seconds * per_second, limit)), limit - 1)


def _read_grpc(text: str) -> float:
    match = _GRPC.fullmatch(text)
    if match is None:
        raise ValueError("not a grpc-timeout")
    return int(match[1]) * _UNITS[match[2]]


def _write_grpc(seconds: float) -> str:
    for unit, length in _UNITS.items():
        amount = _whole(seconds, 1 / length, 10**9)
        if amount < 10**8:
            return f"{amount}{unit}"
    return "99999999H"


def _read_milliseconds(text: str) -> float:
    if re.fullmatch(r"[0-9]{1,10}", text) is None:
        raise ValueError("not a number of milliseconds")
    return int(text) / 1000


def _write_milliseconds(seconds: float) -> str:
    # Not 0, which Envoy has for a route without a timeout.
    return str(max(1, _whole(seconds, 1e3, 10**10)))


def _read_envoy(text: str) -> float | None:
    # Envoy has 0 for a route without a timeout.
    return _read_milliseconds(text) or None


def read_wait(text: str) -> float | None:
    """Return the seconds of the preference ``wait`` of a ``Prefer`` (RFC 7240); ``None`` if it is not among them.

    It is none either if there is ``respond-async`` as well: the client wants 202 after that time, and does not give up.
    """
    waits = [value for name, value, _ in _preferences(text) if name == "wait"]
    is_async = any(name == "respond-async" for name, _, _ in _preferences(text))
    if not waits or is_async:
        return None
    # RFC 7240: of several only the first counts.
    if re.fullmatch(r"[0-9]{1,10}", waits[0]) is None:
        raise ValueError("`wait` is not a number of seconds")
    return float(waits[0])


def with_wait(text: str, seconds: float) -> str:
    """Return the ``Prefer`` ``text`` with ``wait`` in whole seconds, or without it if less than one is left."""
    others = [element for name, _, element in _preferences(text) if name != "wait"]
    wait = _whole(seconds, 1, 10**10)
    return ", ".join([*others, f"wait={wait}"] if wait else others)


def _preferences(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and text of each preference; the value without quotes."""
    place = 0
    while place < len(text):
        match = _ELEMENT.match(text, place)
        if match is None:
            raise ValueError("not a list of preferences")
        place = match.end()
        preference = _PREFERENCE.fullmatch(match[1])
        if preference is not None:
            value = (preference[2] or "").strip(" \t")
            if len(value) > 1 and value[0] == value[-1] == '"':
                value = re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.DOTALL)
            yield preference[1].lower(), value, match[1].strip(" \t")


_PLAIN: Final = Header(read_seconds, write_seconds)
_KNOWN: Final = {
    PREFER: Header(read_wait, lambda seconds: with_wait("", seconds)),
    "grpc-timeout": Header(_read_grpc, _write_grpc),
    "connect-timeout-ms": Header(_read_milliseconds, _write_milliseconds),
    "x-envoy-expected-rq-timeout-ms": Header(_read_envoy, _write_milliseconds),
}


def header_named(name: str) -> Header:
    """Return the syntax of the header ``name``, in lower case: a known one, or plain seconds."""
    return _KNOWN.get(name, _PLAIN)


def checked_name(name: object) -> str:
    """Return the name of a header in lower case; raise an error that says what is wrong with it."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a header must be a string, not {name!r}")
    if re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) is None:
        raise ValueError(f"{name!r} cannot be the name of a header")
    return name.lower()


def read_all(name: str, read: Callable[[str], float | None], values: list[str]) -> float | None:
    """Return the smallest time in the values of one header; ``None`` if none gives one.

    :raises ValueError: if one is malformed or too long.
    """
    if name == PREFER:
        # RFC 7240: several are one list.
        values = [", ".join(values)]
    longest = LONGEST_LIST if name == PREFER else LONGEST
    if any(len(value) > longest for value in values):
        raise ValueError("too long")
    found = [seconds for seconds in map(read, values) if seconds is not None]
    if any(isinstance(seconds, bool) or not 0 <= seconds < math.inf for seconds in found):
        raise ValueError("not a duration")
    return min(found, default=None)
