"""Timeout policies: limits with a name, a status and a body, for the middleware and for single routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, final

from starlette.requests import Request
from starlette.responses import Response

from ..hosts.starlette import route_of
from ..kernel.errors import CancelationError
from ..kernel.log import logger
from ..kernel.options import checked_status, seconds, takes

if TYPE_CHECKING:
    from datetime import timedelta

    from starlette.types import Scope

ResponseWriter = Callable[[Request, CancelationError], Response | Awaitable[Response]]

POLICY_ATTRIBUTE = "cancelable_deps_policy"
"""The attribute of a dependency or endpoint that names its policy, so that a wrong name is found at start."""


@final
class TimeoutPolicy:
    """How long a request may take, and what is answered when it takes longer. Several routes may share one.

    :param timeout: seconds, or a ``timedelta``.
    :param status_code: of the response when the time is up.
    :param response: writes that response: a function of the request and the error, which may be ``async``. It is asked
        where a door answers: the middleware, the decorator, the route class. An error that leaves a handle's block in
        the handler is answered by the application's own exception handlers, with this status.
    :param advisory: cancel nothing; log and count the requests that took longer, to see what enforcing it would do.
    :raises ValueError: for a timeout that is negative or NaN, or a status outside 400 to 599.
    """

    def __init__(
        self,
        timeout: float | timedelta,
        *,
        status_code: int = 504,
        response: ResponseWriter | None = None,
        advisory: bool = False,
    ) -> None:
        self.timeout = seconds(timeout, "timeout")
        self.status_code = checked_status(status_code, "a timeout")
        if response is not None and not takes(response, 2):
            raise TypeError(f"response must be a function of the request and the error, not {response!r}")
        self.response = response
        self.advisory = advisory
        self.exceeded = 0
        """How many requests of this process took longer; counted in advisory mode."""

    def __repr__(self) -> str:
        return f"<TimeoutPolicy {self.timeout:g} s{', advisory' if self.advisory else ''}>"

    @property
    def enforced_timeout(self) -> float | None:
        return None if self.advisory else self.timeout

    def judge(self, scope: Scope, elapsed: float) -> None:
        """In advisory mode count and log a request, which has ended, if it took longer than the timeout."""
        if not self.advisory or elapsed <= self.timeout:
            return
        self.exceeded += 1
        method = scope.get("method", "")
        route = route_of(scope)
        extra = {"method": method, "route": route, "limit": self.timeout, "elapsed": elapsed}
        logger.info(
            "%s %s took %.3f s, longer than its advisory limit of %g s",
            method,
            route,
            elapsed,
            self.timeout,
            extra=extra,
        )


def found(policy: str | TimeoutPolicy, known: Mapping[str, TimeoutPolicy] | None) -> TimeoutPolicy:
    """Return ``policy``, or the one of that name among the ``known``."""
    return named(policy, known or {}) if isinstance(policy, str) else policy


def named(name: str, policies: Mapping[str, TimeoutPolicy], where: str = "") -> TimeoutPolicy:
    """Return the policy of that name, or raise an error that says which are known."""
    policy = policies.get(name)
    if policy is None:
        known = ", ".join(map(repr, policies)) or "none: give RequestCancelationMiddleware its `policies={...}`"
        raise LookupError(f"there is no timeout policy {name!r}{where}; known are {known}")
    return policy
