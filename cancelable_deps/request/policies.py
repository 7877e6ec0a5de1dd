"""Timeout policies: timeouts with a name, a status and a body, for the middleware and for single routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, final

from starlette.requests import Request
from starlette.responses import Response

from ..hosts.starlette import route_of
from ..kernel.errors import CancelationError
from ..kernel.log import logger
from ..kernel.options import checked_status, seconds, takes
from .report import tell_exceeded

if TYPE_CHECKING:
    from datetime import timedelta

    from starlette.types import Scope

ResponseWriter = Callable[[Request, CancelationError], Response | Awaitable[Response]]

POLICY_ATTRIBUTE = "cancelable_deps_policy"
"""The attribute of a dependency or endpoint that names its policy, so that a wrong name is found at start."""


@final
class TimeoutPolicy:
    """A time limit for requests, and the response to those that exceed it. Several routes may share one policy.

    When the limit has passed, the request is cancelled as by any other timeout.

    :param timeout: the limit in seconds, or a ``timedelta``.
    :param status_code: the status of the response to a request that exceeds the limit.
    :param response: a function of the request and the error that returns the response; it may be ``async``. The
        middleware, the decorator and the route class call it. An error that leaves the block of a handle inside the
        handler is answered by the application's own exception handlers, with ``status_code``.
    :param advisory: cancel nothing; log and count the requests that exceed the limit, to see what enforcing it would do.
    :raises TypeError: if ``timeout`` is not a number, or ``response`` is not a function of two arguments.
    :raises ValueError: if ``timeout`` is negative or NaN, or ``status_code`` is outside 400 to 599.
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
        """The number of requests of this process that exceeded the limit; counted in advisory mode only."""

    def __repr__(self) -> str:
        return f"<TimeoutPolicy {self.timeout:g} s{', advisory' if self.advisory else ''}>"

    @property
    def enforced_timeout(self) -> float | None:
        """The limit in seconds; ``None`` in advisory mode, which enforces none."""
        return None if self.advisory else self.timeout

    def judge(self, scope: Scope, elapsed: float) -> None:
        """Count and log a request that has ended, if it took longer than the timeout; do so in advisory mode only.

        The library calls this.

        :param scope: the ASGI scope of the request, for the log line.
        :param elapsed: the seconds that the request took.
        """
        if not self.advisory or elapsed <= self.timeout:
            return
        self.exceeded += 1
        log_exceeded(scope, elapsed, self.timeout, "its advisory limit of %g s")


def log_exceeded(scope: Scope, elapsed: float, limit: float, what: str) -> None:
    """Log a request that took longer than a ``limit`` that is not enforced.

    :param what: the name of the limit, with a place for its seconds.
    """
    method = scope.get("method", "")
    route = route_of(scope)
    extra = {"method": method, "route": route, "limit": limit, "elapsed": elapsed}
    logger.info(f"%s %s took %.3f s, longer than {what}", method, route, elapsed, limit, extra=extra)
    tell_exceeded(scope, elapsed, limit)


def found(policy: str | TimeoutPolicy, known: Mapping[str, TimeoutPolicy] | None) -> TimeoutPolicy:
    """Return ``policy``, or the policy of that name in ``known``."""
    return named(policy, known or {}) if isinstance(policy, str) else policy


def named(name: str, policies: Mapping[str, TimeoutPolicy], where: str = "") -> TimeoutPolicy:
    """Return the policy of that name; raise a ``LookupError`` that lists the known names if there is none."""
    policy = policies.get(name)
    if policy is None:
        known = ", ".join(map(repr, policies)) or "none: pass `policies={...}` to RequestCancelationMiddleware"
        raise LookupError(f"there is no timeout policy {name!r}{where}; known are {known}")
    return policy
