"""The values that users of operations get: `Operation`, `Cancelation`, `OperationList` and the like."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..kernel.events import WorkKind
from ..kernel.reasons import CancelationReason
from .accepted import AcceptedResponse

if TYPE_CHECKING:
    from starlette.responses import Response

Kind = WorkKind


class OperationState(StrEnum):
    """The state of an operation. The last four are final."""

    WAITING = "waiting"
    """It waits for its turn among the operations of its key."""
    RUNNING = "running"
    STOPPING = "stopping"
    """It has been cancelled, and cleans up."""
    FINISHED = "finished"
    """It has ended by itself. A request whose handler raised has finished as well."""
    FAILED = "failed"
    """Background or tracked work has raised an exception."""
    CANCELLED = "cancelled"
    """It has been stopped; `Operation.reason` says why."""
    LOST = "lost"
    """Its worker is gone, and it is not known how far it came."""

    @property
    def is_final(self) -> bool:
        """Whether an operation in this state has ended."""
        return self in _FINAL


_FINAL: Final = frozenset(
    {OperationState.FINISHED, OperationState.FAILED, OperationState.CANCELLED, OperationState.LOST}
)
_frozen: Final = ConfigDict(frozen=True)


class Progress(BaseModel):
    """The last report of ``report_progress``."""

    model_config = _frozen
    message: str | None = None
    metadata: Mapping[str, Any] = Field(default_factory=dict)


class Operation(BaseModel):
    """An operation at one moment. It does not change; ask `Operations.get` for a later view."""

    model_config = _frozen

    id: str = Field(description="Names this operation, and no other.")
    kind: Kind
    name: str | None = Field(default=None, description="The name of the route, or of the work.")
    owner: str | None = None
    key: str | None = Field(default=None, description="The group that it belongs to.")
    labels: Mapping[str, str] = Field(default_factory=dict)
    method: str | None = None
    route: str | None = Field(default=None, description="The path template of the route.")
    worker: str = Field(description="The process that it runs in, by a name that is new at each start.")
    state: OperationState
    started: datetime
    ended: datetime | None = None
    elapsed: float = Field(description="Seconds from its start until now, or until its end.")
    deadline: datetime | None = Field(default=None, description="When it times out.")
    reason: CancelationReason | None = Field(default=None, description="Why it was cancelled.")
    message: str | None = Field(default=None, description="The text of the cancellation, or of the failure.")
    progress: Progress | None = None

    def accepted(self, location: str | None = None, *, retry_after: int = 1) -> Response:
        """Return the response to a request that has started this operation: 202, with the operation as its body.

        ``Location`` is the path of the operation under `operations_router`, which the application is looked through for
        when the response is sent, owners' routers first. Without such a router, and without ``location``, there is no
        such header.

        :param location: the value of ``Location``, if the operation is to be read elsewhere.
        :param retry_after: the seconds after which the client may ask for the operation.
        """
        return AcceptedResponse(self.id, self.model_dump(mode="json"), location, retry_after)


class OperationList(BaseModel):
    """Operations that run, the oldest first."""

    model_config = _frozen
    items: list[Operation]
    total: int = Field(description="How many there are, beyond the limit too.")
    unreachable: list[str] = Field(description="The workers that did not answer; theirs are missing.")


Outcome = Literal["cancelled", "stopping", "sent", "finished", "lost", "unknown"]


class Cancelation(BaseModel):
    """What has become of a cancel."""

    model_config = _frozen
    outcome: Outcome = Field(
        description=(
            "`cancelled`: it has ended because of a cancel. `stopping`: its worker has acknowledged, and it cleans up. "
            "`sent`: stored, and not acknowledged yet. `finished`: it had ended by itself, or failed. `lost`: its worker "
            "is gone. `unknown`: no worker knows it, or it belongs to somebody else."
        )
    )
    operation: Operation | None = Field(default=None, description="The operation, if it is known.")


class OperationEvent(BaseModel):
    """A change of an operation."""

    model_config = _frozen
    kind: Literal["state", "progress", "end"]
    operation: Operation


class Worker(BaseModel):
    """A process that runs operations."""

    model_config = _frozen
    name: str
    host: str
    pid: int
    version: str
    started: datetime
    running: int | None = Field(default=None, description="How many operations it runs; unknown if it did not answer.")
    ends: Mapping[str, int] = Field(
        default_factory=dict, description="How many operations have ended since its start, by reason or final state."
    )
    is_reachable: bool = True
