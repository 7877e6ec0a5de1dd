"""The objects for which a request is listened to: blocks, those of doors, and handles that only ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from ..kernel.token import CancelationToken, Cause


class Watcher(Protocol):
    """An object for which a request listens to its client, such as a block."""

    def listening_begins(self) -> None:
        """Note that the request is listened to, so that it may be cancelled at any time from now on."""

    def token_is_made(self, token: CancelationToken) -> None:
        """Note that the root token has been made. May be called in any thread."""

    @property
    def is_cancelled(self) -> bool:
        """Whether this is a block that is being cancelled."""
        ...

    @property
    def is_door(self) -> bool:
        """Whether this is a `Door`."""
        ...

    def works_in(self, task: object) -> bool:
        """Return whether a cancellation of the request reaches ``task`` through this watcher."""
        ...

    def shorten_grace(self, grace: float) -> None:
        """Give the cleanup of a block at most ``grace`` seconds."""


class Door(Watcher, Protocol):
    """A block around the whole handler."""

    def hold(self) -> None:
        """Keep every cancellation of the block from its task until `resume`."""

    def resume(self) -> None:
        """Deliver a cancellation that `hold` has kept back."""

    def finish(self) -> None:
        """Note that the result is there: a cancellation that is not delivered yet never will be."""

    def release(self) -> None:
        """Keep everything from stopping the block from here on."""

    def stop_background(self, cause: Cause) -> None:
        """Stop the work that is left after `release` all the same."""

    def use_policy(self, policy: Any) -> None:
        """Replace the timeout of the block by that of a `TimeoutPolicy`."""

    def drop_timeout(self) -> None:
        """Remove the deadline of the block, but for that of the client."""

    own_deadline: float
    """When the block itself times out, on the clock of the loop."""

    @property
    def deadline(self) -> float:
        """When the block times out, on the clock of the loop."""
        ...


class Listening:
    """The `Watcher` of a handle that only asks for a cancellation, and runs no work."""

    __slots__ = ()
    is_cancelled = is_door = False

    def works_in(self, task: object) -> bool:
        return False

    def listening_begins(self) -> None:
        """Do nothing, because there is no work to cancel."""

    def token_is_made(self, token: CancelationToken) -> None:
        """Do nothing, because there is no work to cancel."""

    def shorten_grace(self, grace: float) -> None:
        """Do nothing, because there is no work to cancel."""


WAITERS: Final = Listening()
"""Stands for all that wait for the client to leave."""
