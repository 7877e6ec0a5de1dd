"""The responses of the routes of operations."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from fastapi.encoders import jsonable_encoder
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from .errors import RETRY_AFTER_SECONDS, OperationFailed, OperationUnknown
from .schemas import CanceledOperations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import BaseModel
    from starlette.requests import Request

    from .model import Cancelation, Operation
    from .prefer import Preference

NO_STORE: Final = {"cache-control": "no-store"}
MOST_RETURNED: Final = 1000
_UNENDED: Final = frozenset({"stopping", "sent"})
_SAFE_IN_PATHS: Final = "/:@!$&'()*+,;=~"


class PlainJSONResponse(JSONResponse):
    """A JSON response in ASCII: texts of the application may hold what cannot be encoded otherwise."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def as_json(value: BaseModel, status_code: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response whose body is ``value``."""
    return PlainJSONResponse(value.model_dump(mode="json"), status_code, {**NO_STORE, **(headers or {})})


def answer_with(operation: Operation, preference: Preference) -> Response:
    """Return the response that shows an operation."""
    return as_json(operation, headers={**preference.headers, **_pace(operation)})


def answer_running(operation: Operation, request: Request, preference: Preference) -> Response:
    """Return the response to a client that wants the result of an operation that runs."""
    headers = {**preference.headers, **_pace(operation), "location": path_above(request)}
    return as_json(operation, 202, headers)


def answer_result(result: object, preference: Preference) -> Response:
    """Return the response whose body is the result of an operation."""
    return PlainJSONResponse(result, headers={**NO_STORE, **preference.headers})


def error_of_result(exc: Exception) -> HTTPException:
    """Return the error that answers a client that wants the result of an operation that has raised ``exc``."""
    if isinstance(exc, HTTPException):
        # Another one than that of the work: an error of a cancellation would be taken for that of this request.
        detail = jsonable_encoder(exc.detail)
        return HTTPException(exc.status_code, detail, headers=None if exc.headers is None else dict(exc.headers))
    return OperationFailed()


def answer_cancel(cancelation: Cancelation, request: Request, preference: Preference) -> Response:
    """Return the response to a cancel.

    :raises OperationUnknown: if nobody knows the operation.
    """
    if cancelation.outcome == "unknown":
        raise OperationUnknown
    headers = preference.headers
    if cancelation.outcome not in _UNENDED:
        return as_json(cancelation, headers=headers)
    headers = {**headers, "retry-after": str(RETRY_AFTER_SECONDS), "location": path_above(request)}
    return as_json(cancelation, 202, headers)


def answer_cancel_all(cancelations: Sequence[Cancelation]) -> Response:
    """Return the response to a cancel of several operations."""
    outcomes: Counter[str] = Counter(each.outcome for each in cancelations)
    body = CanceledOperations(
        dry_run=False,
        total=len(cancelations),
        outcomes=dict(outcomes),
        cancelations=list(cancelations[:MOST_RETURNED]),
    )
    if outcomes.keys() & _UNENDED:
        return as_json(body, 202, {"retry-after": str(RETRY_AFTER_SECONDS)})
    return as_json(body)


def path_above(request: Request) -> str:
    """Return the path of a request, as its client knows it, without the last segment."""
    scope = request.scope
    # A mounted application has a path of its own at the end of this one; a proxy may have cut it off from ``path``.
    outer = str(scope.get("app_root_path", scope.get("root_path", ""))).rstrip("/")
    path = str(scope["path"])
    whole = path if path.startswith(f"{outer}/") else outer + path
    return quote(whole.rpartition("/")[0], safe=_SAFE_IN_PATHS)


def _pace(operation: Operation) -> dict[str, str]:
    return {} if operation.state.is_final else {"retry-after": str(RETRY_AFTER_SECONDS)}
