"""The options of ``@with_cancelation``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from starlette.requests import HTTPConnection, Request

from ..hosts.starlette import receive_of
from ..kernel.cancelable import Cancelable, cancelable_of
from ..kernel.errors import CancelationError
from ..kernel.loops.current import current_loop
from ..kernel.options import checked_status, seconds, takes
from ..kernel.reasons import CancelationReason
from ..request.connection import PREDECESSORS, connection_state, new_door
from ..request.first_door import HandlerBlock, JoinedBlock, WholeDoorBlock
from ..request.lifetime import Lifetime
from ..request.policies import TimeoutPolicy, found
from ..request.state import SCOPE_KEY, RequestState

if TYPE_CHECKING:
    from datetime import timedelta

    from ..request.blocks import DoorBlock


class Unset:
    """The type of a ``timeout`` that was not given, because ``None`` switches the default off."""

    def __repr__(self) -> str:
        return "the default"


UNSET: Final = Unset()


class Options:
    """The options of one decorator, which are checked when the app is built."""

    def __init__(
        self,
        timeout: float | timedelta | Unset | None,
        status_codes: Mapping[CancelationReason, int] | None,
        on_cancel: Callable[[Cancelable], object] | None,
        cleanup_grace: float | None,
        abandon_thread: bool,
        policy: str | TimeoutPolicy | None,
    ) -> None:
        if policy is not None and not isinstance(policy, str | TimeoutPolicy):
            raise TypeError(f"policy takes the name of a policy or a TimeoutPolicy, not {policy!r}")
        if policy is not None and not isinstance(timeout, Unset):
            raise TypeError("give timeout or policy, not both: a policy has a timeout")
        self.policy = policy
        self.abandon_thread = abandon_thread
        self.replaces_default = policy is not None or not isinstance(timeout, Unset)
        self.timeout = None if timeout is None or isinstance(timeout, Unset) else seconds(timeout, "timeout")
        if status_codes is not None and not isinstance(status_codes, Mapping):
            raise TypeError(
                f"status_codes maps reasons to statuses, as {{CancelationReason.TIMEOUT: 503}}, not {status_codes!r}"
            )
        self.status_codes = {reason: _status(reason, code) for reason, code in (status_codes or {}).items()}
        if on_cancel is not None and not takes(on_cancel, 1):
            raise TypeError(f"on_cancel must be a function that takes the Cancelable, not {on_cancel!r}")
        self.on_cancel = on_cancel
        self.cleanup_grace = None if cleanup_grace is None else seconds(cleanup_grace, "cleanup_grace")
        self._sets_something = self.replaces_default or on_cancel is not None or cleanup_grace is not None

    def open_door(
        self, connection: HTTPConnection, endpoint: object
    ) -> tuple[DoorBlock, HandlerBlock | RequestState | None]:
        """Return the block for one call, and the owner of the request, if the caller has to end that."""
        scope = connection.scope
        made = SCOPE_KEY not in scope
        if made and isinstance(connection, Request) and scope.get("endpoint") is endpoint:
            receive = receive_of(connection)
            if not isinstance(getattr(receive, "__self__", None), PREDECESSORS):
                first = HandlerBlock(connection, receive, current_loop())
                if self.timeout is not None:
                    first.timeout = self.timeout
                if self.cleanup_grace is not None:
                    first.grace = self.cleanup_grace
                if self.on_cancel is not None or self.policy is not None:
                    self._equip(first, None)
                return first, first
        elif not made and not self._sets_something and scope.get("endpoint") is endpoint:
            first = scope[SCOPE_KEY]
            if isinstance(first, WholeDoorBlock) and first.can_be_joined():
                return JoinedBlock(first), None
        state = connection_state(connection, lifetime=Lifetime.HANDLER)
        if made and scope.get("endpoint") is not endpoint:
            # Perhaps a dependency, or one step of a handler: listening must go on after it.
            made = not state.close_with_handler()
        return self.make_block(state), state if made else None

    def make_block(self, state: RequestState) -> DoorBlock:
        """Return the block for one call, whose request or WebSocket has this state."""
        if self.replaces_default:
            state.lift_default()
        block = new_door(state, timeout=self.timeout, cleanup_grace=self.cleanup_grace)
        self._equip(block, state.policies)
        return block

    def _equip(self, block: DoorBlock, policies: Mapping[str, TimeoutPolicy] | None) -> None:
        if self.on_cancel is not None:
            cancelable_of(block).on_cancel(self.on_cancel)
        if self.policy is not None:
            block.use_policy(found(self.policy, policies))

    def make_lone_block(self) -> Cancelable:
        """Return the block for a call without a request."""
        timeout = self.policy.enforced_timeout if isinstance(self.policy, TimeoutPolicy) else self.timeout
        block = Cancelable(timeout=timeout, cleanup_grace=self.cleanup_grace)
        if self.on_cancel is not None:
            block.on_cancel(self.on_cancel)
        return block

    def translate(self, exc: BaseException) -> BaseException:
        """Return ``exc``; if it is an error of ours, set the status that was chosen for its reason."""
        if isinstance(exc, CancelationError):
            exc.status_code = self.status_codes.get(exc.reason, exc.status_code)
        return exc


def _status(reason: object, code: object) -> int:
    if not isinstance(reason, CancelationReason):
        raise TypeError(f"status_codes maps CancelationReason to a status, and {reason!r} is no CancelationReason")
    return checked_status(code, reason)
