"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

Level = Literal["warning", "info"]

LEVELS: Final[dict[str, Level]] = {
    # What the application has asked for does not happen.
    "base-http-middleware": "warning",
    "def-never-checks": "warning",
    "evicting-redis": "warning",
    "false-disconnect": "warning",
    "handle-without-door": "warning",
    "hidden-disconnect": "warning",
    "memory-with-workers": "warning",
    "polling-in-vain": "warning",
    "server-grace": "warning",
    "shutdown-unheard": "warning",
    "stream-looks-complete": "warning",
    "stream-outlives-timeout": "warning",
    "websocket-not-covered": "warning",
    "wsgi-interrupted": "warning",
    # A limit that one should know.
    "background-not-covered": "info",
    "def-without-check": "info",
    "disconnect-grace": "info",
    "event-stream-grace": "info",
    "lifespan-in-mount": "info",
    "nothing-covered": "info",
    "proxy-timeout": "info",
    "store-unreachable": "info",
    "stream-cut-is-logged": "info",
    "task-group": "info",
    "unknown-anyio": "info",
    "wsgi-mount": "info",
}
"""The codes of all findings, with their levels; `docs/check.md` describes each."""

_MOST_NAMED: Final = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that breaks or weakens cancellation in an application.

    :param level: ``"warning"``: the application has asked for something that will not happen. ``"info"``: a limit that
        one should know.
    :param code: a short name, which stays the same from version to version.
    :param where: the route, middleware, mount or server.
    :param message: what breaks or is weakened, and what to do about it.
    """

    level: Level
    code: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.code} ({self.where}): {self.message}"


def found(code: str, where: str, message: str) -> Finding:
    """Return the finding of a code."""
    return Finding(LEVELS[code], code, where, message)


def some_of(paths: Iterable[str]) -> str:
    """Return the first of these paths, and the number of the others."""
    distinct = list(dict.fromkeys(paths))
    more = len(distinct) - _MOST_NAMED
    return ", ".join(distinct[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
