"""The limits that a door sets for its requests."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

from ..kernel.options import seconds
from .client_timeout import ClientTimeout
from .policies import TimeoutPolicy, named

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import timedelta

    from .client_timeout import Budget


class Limits:
    """The timeout, policies and cleanup grace of a door, checked when the app is built."""

    budget: Budget | None = None
    """The time that the client of one request gives, which `timeout` does not exceed."""

    def __init__(
        self,
        default_timeout: float | timedelta | None,
        cleanup_grace: float | None,
        policies: Mapping[str, TimeoutPolicy] | None = None,
        default_policy: str | TimeoutPolicy | None = None,
        client_timeout: ClientTimeout | None = None,
    ) -> None:
        self.timeout = None if default_timeout is None else seconds(default_timeout, "default_timeout")
        self.policies = None if policies is None else _checked(policies)
        self.policy = named(default_policy, policies or {}) if isinstance(default_policy, str) else default_policy
        if self.policy is not None:
            if not isinstance(self.policy, TimeoutPolicy):
                raise TypeError(
                    f"default_policy must be a name in `policies` or a TimeoutPolicy, not {default_policy!r}"
                )
            if self.timeout is not None:
                raise TypeError("pass default_timeout or default_policy, not both: a policy has a timeout of its own")
            self.timeout = self.policy.enforced_timeout
        self.replaces_default = self.timeout is not None
        if client_timeout is not None and not isinstance(client_timeout, ClientTimeout):
            raise TypeError(f"client_timeout takes a ClientTimeout, not {client_timeout!r}")
        self.client_timeout = client_timeout
        """The headers in which a client may give a time; ``None`` once they have been read for one request."""

        self.cleanup_grace = None if cleanup_grace is None else seconds(cleanup_grace, "cleanup_grace")

    def admitted(self, budget: Budget | None) -> Limits:
        """Return the limits of one request, whose client gives ``budget``."""
        limits = copy(self)
        limits.client_timeout = None
        if budget is not None:
            limits.budget, limits.timeout = budget, budget.within(self.timeout)
        return limits


def _checked(policies: Mapping[str, TimeoutPolicy]) -> Mapping[str, TimeoutPolicy]:
    for name, policy in dict(policies).items():
        if not isinstance(policy, TimeoutPolicy):
            raise TypeError(f"policies must map names to TimeoutPolicy objects, but {name!r} is {policy!r}")
    return policies
