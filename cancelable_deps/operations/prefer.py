"""The header ``Prefer: wait=n`` of RFC 7240: how long a client wants to wait for an answer."""

import re
from typing import Annotated, Final, NamedTuple

from fastapi import Header
from starlette.requests import Request

MOST_SECONDS: Final = 30
"""The longest that a request waits; a client that wants longer gets this."""

_SECONDS: Final = re.compile(r'"?([0-9]{1,9})"?')


class Preference(NamedTuple):
    """What a client prefers."""

    wait: int | None
    """The seconds that it waits at most; ``None`` if it has not said so."""

    @property
    def headers(self) -> dict[str, str]:
        """The header that tells the client of it."""
        return {} if self.wait is None else {"preference-applied": f"wait={self.wait}"}


async def preference_of(
    request: Request,
    prefer: Annotated[
        str | None,
        Header(description=f"`wait=10` waits so many seconds for the end, at most {MOST_SECONDS} (RFC 7240)."),
    ] = None,
) -> Preference:
    """Provide the preference of a request. One that cannot be understood is ignored, as the RFC asks."""
    return Preference(_wait_of(request.headers.getlist("prefer")))


def _wait_of(headers: list[str]) -> int | None:
    for part in ",".join(headers).split(","):
        name, _, value = part.partition(";")[0].partition("=")
        if name.strip().lower() == "wait":
            # Only the first one counts.
            match = _SECONDS.fullmatch(value.strip())
            return None if match is None else min(int(match[1]), MOST_SECONDS)
    return None
