"""The default timeout of a request, which a route's own replaces, and the policies that a route chooses from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .watchers import Door


class Defaults:
    """The part of a request that concerns its default timeout."""

    policies: Mapping[str, Any] | None = None
    """The `TimeoutPolicy` objects of all doors so far, by name."""

    default: Door | None = None
    """The block with the default timeout, which a route's own timeout replaces."""

    outermost: Door | None = None
    """The block of the middleware or route class that has made this state."""

    def set_default(self, block: Door) -> None:
        """Take ``block`` for the one with the default timeout, which a route's own timeout replaces."""
        if self.default is not None:
            self.lift_default()
        self.default = block

    def add_policies(self, policies: Mapping[str, Any]) -> None:
        """Add the policies of one more door: a mounted application has those of the application around it, too."""
        self.policies = policies if self.policies is None else {**self.policies, **policies}

    def replace(self, block: Door, by: Door) -> None:
        """Put ``by`` in the place of ``block``."""
        if self.outermost is block:
            self.outermost = by
        if self.default is block:
            self.default = by

    def replace_default(self, policy: Any) -> None:
        """Apply the policy that the route has chosen."""
        if self.default is None:
            raise RuntimeError(
                "timeout_policy() replaces the default of RequestCancelationMiddleware or CancelableRoute, and this "
                "request has neither. Use @with_cancelation(policy=...), or cancelable_with_timeout()."
            )
        self.default.use_policy(policy)

    def lift_default(self) -> None:
        """Remove the default timeout: the route has a timeout of its own, or wants none."""
        if self.default is not None:
            self.default.drop_timeout()
            self.default = None
