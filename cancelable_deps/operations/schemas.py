"""What the routes of operations take and return, beside the values that users of `Operations` get."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .model import Cancelation, Operation, Worker
from .names import MOST_MESSAGE


class ListedOperations(BaseModel):
    """The operations that fulfil the conditions, the oldest first; those that have ended, the newest first."""

    operations: list[Operation]
    total: int = Field(description="How many there are, beyond the limit too.")
    unreachable: list[str] = Field(description="The workers that did not answer; theirs are missing.")


class ListedWorkers(BaseModel):
    """The processes that run operations, the oldest first."""

    workers: list[Worker]


class CancelOne(BaseModel):
    """Why an operation is stopped."""

    message: str | None = Field(
        default=None, description=f"The `detail` of its response. Cut off after {MOST_MESSAGE:,} characters."
    )


class CancelMany(BaseModel):
    """The conditions of the operations that are stopped, of which at least one is needed."""

    # A condition with a typing error must not stop more than was meant.
    model_config = ConfigDict(extra="forbid")

    key: str | None = None
    owner: str | None = None
    route: str | None = Field(default=None, description="The path template of the route.")
    labels: dict[str, str] | None = None
    older_than: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Seconds that they have run at least."
    )
    message: str | None = Field(default=None, description="The `detail` of their responses.")
    dry_run: bool = Field(default=False, description="Only count them.")


class CanceledOperations(BaseModel):
    """What has become of the operations that fulfil the conditions."""

    dry_run: bool
    total: int = Field(description="How many there are; nothing was stopped if `dry_run` is true.")
    outcomes: dict[str, int] = Field(description="How many have which outcome.")
    cancelations: list[Cancelation] = Field(description="The first 1,000 of them.")
    unreachable: list[str] | None = Field(
        default=None, description="With `dry_run`, the workers that did not answer; theirs are not counted."
    )


class Problem(BaseModel):
    """An error."""

    detail: Any
