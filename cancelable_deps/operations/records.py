"""The records of background operations: what is written of them, and what is read."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi import HTTPException as OwnHTTPException
from fastapi.encoders import jsonable_encoder
from starlette.exceptions import HTTPException

from ..kernel.errors import CancelationError
from ..kernel.reasons import CancelationReason
from .errors import OperationFailed, OperationLost
from .model import Operation, OperationState, Progress
from .names import ANYONE
from .running import message_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..kernel.token import Cause
    from .backend import Fields
    from .names import Owner
    from .running import RunningBlock


class Outcome(NamedTuple):
    """How work has ended."""

    state: OperationState
    fields: Fields
    """The fields of its record that say so."""

    error: BaseException | None = None
    """The exception that it has raised."""


class TooLarge(Exception):
    """A result has more bytes than are kept."""


def first_fields(running: RunningBlock, result_ttl: float) -> Fields:
    """Return the record of work that is about to start."""
    return {
        "kind": running.kind,
        "name": running.name,
        "owner": running.owner,
        "key": running.key,
        "labels": dict(running.labels),
        "worker": running.home.worker,
        "state": str(running.state),
        "created": running.started_at.timestamp(),
        "result_ttl": result_ttl,
    }


def operation_of(id: str, fields: Mapping[str, Any], now: float) -> Operation:
    """Return the operation that a record tells of.

    :param now: seconds since the epoch.
    """
    created, ended = fields["created"], fields.get("ended")
    state = OperationState(fields["state"])
    if fields.get("cancel") is not None and not state.is_final:
        state = OperationState.STOPPING
    reason, progress = fields.get("reason"), fields.get("progress")
    return Operation(
        id=id,
        kind=fields.get("kind", "background"),
        name=fields.get("name"),
        owner=fields.get("owner"),
        key=fields.get("key"),
        labels=fields.get("labels") or {},
        worker=fields["worker"],
        state=state,
        started=datetime.fromtimestamp(created, UTC),
        ended=None if ended is None else datetime.fromtimestamp(ended, UTC),
        elapsed=max(0.0, (now if ended is None else ended) - created),
        reason=None if reason is None else CancelationReason(reason),
        message=fields.get("message"),
        progress=None if progress is None else Progress.model_validate(progress),
    )


def is_of(fields: Mapping[str, Any], owner: Owner) -> bool:
    """Return whether a record belongs to ``owner``."""
    return owner is ANYONE or (fields.get("owner") is not None and fields["owner"] == owner)


def finished(result: object, most: int) -> Outcome:
    """Return the outcome of work that has returned.

    :raises TooLarge: if the result has more than ``most`` bytes as JSON.
    :raises Exception: whatever its encoding raises.
    """
    encoded = json.dumps(jsonable_encoder(result), separators=(",", ":"), allow_nan=False)
    size = len(encoded.encode())
    if size > most:
        raise TooLarge(
            f"The result has {size:,} bytes, and at most {most:,} are kept (max_result). Keep it elsewhere, and return "
            "where it is"
        )
    return Outcome(OperationState.FINISHED, {"result": encoded})


def failed(exc: BaseException) -> Outcome:
    """Return the outcome of work that has raised. Only an ``HTTPException`` tells the client more than that it failed."""
    fields: Fields = {"message": "The work failed", "status": 500}
    if isinstance(exc, HTTPException):
        fields = {
            "message": exc.detail if isinstance(exc.detail, str) else None,
            "status": exc.status_code,
            "detail": jsonable_encoder(exc.detail),
            "headers": dict(exc.headers or {}),
        }
    return Outcome(OperationState.FAILED, fields, exc)


def cancelled(error: CancelationError, cause: Cause | None = None) -> Outcome:
    """Return the outcome of work that was stopped for ``cause``."""
    fields = {"reason": str(error.reason), "message": message_of(cause), "status": error.status_code}
    return Outcome(OperationState.CANCELLED, fields, error)


def result_of(fields: Mapping[str, Any]) -> Any:
    """Return the result of work that has ended, or raise its error."""
    state = OperationState(fields["state"])
    if state is OperationState.FINISHED:
        return json.loads(fields["result"])
    raise error_of(fields, state)


def error_of(fields: Mapping[str, Any], state: OperationState) -> HTTPException:
    """Return the error of work that has not finished, as its record tells."""
    if state is OperationState.LOST:
        return OperationLost()
    if state is OperationState.CANCELLED:
        error = CancelationError.for_reason(CancelationReason(fields["reason"]), fields.get("message"))
        error.status_code = int(fields.get("status", error.status_code))
        return error
    if "detail" in fields:
        return OwnHTTPException(int(fields["status"]), fields["detail"], headers=fields.get("headers") or None)
    return OperationFailed(str(fields.get("message")), int(fields.get("status", 500)))
