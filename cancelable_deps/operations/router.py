"""`operations_router`: what runs, and stopping it, over HTTP."""

from typing import Annotated, Any, Final

import anyio
from fastapi import APIRouter, Depends, Path, Query
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..doors.route import CancelableRoute
from .accepted import OPERATORS_ROUTE, OWNERS_ROUTE
from .answers import (
    answer_cancel,
    answer_cancel_all,
    answer_result,
    answer_running,
    answer_with,
    as_json,
    error_of_result,
)
from .bodies import body_of, body_schema, refusing
from .conditions import checked
from .errors import OperationUnknown
from .events_stream import END_ID, EventsResponse, events_response
from .model import Cancelation, Kind, Operation, OperationState
from .names import ANYONE, MOST_ID, MOST_NAME, Owner, is_id
from .operations import MOST_LISTED, Operations
from .page import page_responses
from .prefer import Preference, preference_of
from .rights import Dependency, Rights, rights_of
from .schemas import CanceledOperations, CancelMany, CancelOne, ListedOperations, ListedWorkers, Problem

_CANCEL_SECONDS: Final = 2.0
"""How long a cancel waits for the end, if the client does not say."""

Answers = dict[int | str, dict[str, Any]]


def _problem(description: str) -> dict[str, Any]:
    return {"model": Problem, "description": description}


_REFUSED: Final[Answers] = {403: _problem("It is not known who asks, or this is not theirs to do.")}
_UNKNOWN: Final[Answers] = {404: _problem("There is no such operation, or it belongs to somebody else.")}
_AWAY: Final[Answers] = {503: _problem("The store that the workers share cannot be reached.")}
_STILL_RUNS: Final = "It runs. `Location` is the path of the operation, `Retry-After` the seconds until the next look."
_READING: Final[Answers] = {**_UNKNOWN, **_AWAY}
_RESULT: Final[Answers] = {
    200: {"description": "Its result.", "content": {"application/json": {"schema": {}}}},
    202: {"model": Operation, "description": _STILL_RUNS},
    404: _problem("There is no such operation, it has no result, or that is forgotten."),
    410: _problem("Its worker is gone; how far it came is not known."),
    499: _problem("It was stopped by a cancel."),
    503: _problem("It was stopped by the end of the server, or the store of operations cannot be reached."),
    504: _problem("It has timed out."),
    "default": _problem("The error that the work has raised, with its own status."),
}
_BODY: Final[Answers] = {
    413: _problem("The body is too long."),
    415: _problem("The body is not JSON."),
    422: _problem("The body does not fit."),
}
_CANCEL: Final[Answers] = {
    200: {"description": "It has ended: `cancelled`, `finished` or `lost`."},
    202: {"model": Cancelation, "description": f"`stopping` or `sent`. {_STILL_RUNS}"},
    **_READING,
    **_BODY,
}
_CANCEL_ALL: Final[Answers] = {
    200: {"description": "They have ended, or were only counted."},
    202: {"model": CanceledOperations, "description": "Some of them have not ended yet."},
    **_AWAY,
    **_BODY,
}
_EVENTS: Final[Answers] = {
    200: {
        "description": "`state` and `end` with the operation as data, `progress` with `message` and `metadata`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    204: {"description": "The client has seen the `end`, and is not to connect again."},
    **_READING,
}


async def _known_id(
    id: Annotated[
        str,
        Path(
            description="The id of the operation.",
            json_schema_extra={"pattern": "^[A-Za-z0-9._~:-]+$", "maxLength": MOST_ID},
        ),
    ],
) -> str:
    # As unknown as one that nobody has: whoever guesses learns nothing from the difference.
    if not is_id(id):
        raise OperationUnknown
    return id


def operations_router(
    operations: Operations, *, owner: Dependency | None = None, operator: Dependency | None = None, page: bool = False
) -> APIRouter:
    """Return a router by which clients see operations and stop them: ``app.include_router(router, prefix="/operations")``.

    Exactly one of ``owner`` and ``operator`` is needed. Include a router for each in the same application, under two
    prefixes; `Operation.accepted` refers to that of the owners.

    :param owner: a dependency that returns the id of the user who asks: a string, a number or a UUID. The router shows and
        stops this user's operations alone; those of others are as unknown as those that do not exist. If it returns
        something else, such as ``None``, the answer is 403. What it raises is the answer.
    :param operator: a dependency that raises unless the user is an operator. The router shows and stops everything, also
        by conditions, and has the list of the workers. If it returns ``False``, the answer is 403.
    :param page: whether the operators' router has a page at ``/page``, which shows all of that in a browser.
    :raises TypeError: if neither or both are given, one is not a dependency, or ``page`` has no ``operator``.
    """
    if not isinstance(operations, Operations):
        raise TypeError(f"operations_router() takes the Operations of the application, not {operations!r}")
    rights = rights_of(owner, operator)
    if page and operator is None:
        raise TypeError(
            "the page shows the operations of everybody: page=True needs operator=, a dependency that raises unless the "
            "user is an operator"
        )
    # Requests that wait, and streams, end when their clients leave, also if no door is around the application.
    router = APIRouter(route_class=CancelableRoute, tags=["operations"], responses=_REFUSED)
    # The fixed paths before those of an id.
    if operator is not None:
        _add_listing_for_operators(router, operations, rights)
        _add_cancel_all(router, operations, rights)
        if page:
            _add_page(router, rights)
    else:
        _add_listing_for_owners(router, operations, rights)
    _add_reading(router, operations, rights, OWNERS_ROUTE if operator is None else OPERATORS_ROUTE)
    _add_result(router, operations, rights)
    _add_cancel(router, operations, rights)
    return router


class _Filters:
    """The conditions of a list, from the query."""

    def __init__(
        self,
        state: Annotated[OperationState | None, Query(description="All that have not ended by default.")] = None,
        kind: Annotated[Kind | None, Query()] = None,
        route: Annotated[str | None, Query(description="The path template of the route.")] = None,
        key: Annotated[str | None, Query(min_length=1, max_length=MOST_NAME)] = None,
        label: Annotated[list[str] | None, Query(description="`name:value`; may be repeated.")] = None,
        older_than: Annotated[
            float | None, Query(ge=0, allow_inf_nan=False, description="Seconds that they have run at least.")
        ] = None,
        limit: Annotated[int, Query(ge=0, le=MOST_LISTED)] = 100,
    ) -> None:
        self.limit = limit
        self.conditions: dict[str, Any] = {
            "state": state,
            "kind": kind,
            "route": route,
            "key": key,
            "labels": _labels_of(label),
            "older_than": older_than,
        }

    async def list(self, operations: Operations, owner: Owner) -> Response:
        """Return the operations that fulfil the conditions."""
        with refusing("query"):
            checked(**self.conditions, owner=owner)
        found = await operations.list(**self.conditions, owner=owner, limit=self.limit)
        return as_json(
            ListedOperations(operations=found.items, total=found.total, unreachable=found.unreachable),
        )


def _labels_of(values: list[str] | None) -> dict[str, str] | None:
    labels: dict[str, str] = {}
    for value in values or ():
        name, colon, text = value.partition(":")
        with refusing("query"):
            if not colon:
                raise ValueError("a label is written as name:value")
            if labels.setdefault(name, text) != text:
                raise ValueError("a label has one value, and is given with two")
    return labels or None


def _add_listing_for_owners(router: APIRouter, operations: Operations, rights: Rights) -> None:
    @router.get("/", response_model=ListedOperations, responses=_AWAY, summary="What runs")
    async def list_operations(whose: Owner = Depends(rights), filters: _Filters = Depends()) -> Response:
        """Return the operations of this user that run, the oldest first; with a final `state`, those that have ended."""
        return await filters.list(operations, whose)


def _add_listing_for_operators(router: APIRouter, operations: Operations, rights: Rights) -> None:
    @router.get("/", response_model=ListedOperations, responses=_AWAY, summary="What runs")
    async def list_operations(
        _: Owner = Depends(rights),
        filters: _Filters = Depends(),
        owner: Annotated[str | None, Query(min_length=1, max_length=MOST_NAME)] = None,
    ) -> Response:
        """Return the operations that run, the oldest first; with a final `state`, those that have ended."""
        return await filters.list(operations, ANYONE if owner is None else owner)

    @router.get("/workers", response_model=ListedWorkers, responses=_AWAY, summary="The workers")
    async def list_workers(_: Owner = Depends(rights)) -> Response:
        """Return the processes that run operations, and how many have ended there for which reason."""
        return as_json(ListedWorkers(workers=await operations.workers()))


def _add_cancel_all(router: APIRouter, operations: Operations, rights: Rights) -> None:
    @router.post(
        "/cancel",
        response_model=CanceledOperations,
        responses=_CANCEL_ALL,
        openapi_extra=body_schema(CancelMany, is_required=True),
        summary="Stop several",
    )
    async def cancel_operations(request: Request, _: Owner = Depends(rights)) -> Response:
        """Stop all operations that fulfil every condition, or only count them."""
        wanted = await body_of(request, CancelMany)
        owner: Owner = ANYONE if wanted.owner is None else wanted.owner
        conditions = wanted.model_dump(include={"key", "route", "labels", "older_than"})
        with refusing("body"):
            if checked(**conditions, owner=owner).are_none:
                raise ValueError("a condition is needed: key, owner, route, labels or older_than (0 stops everything)")
        if wanted.dry_run:
            found = await operations.list(**conditions, owner=owner, limit=0)
            return as_json(
                CanceledOperations(
                    dry_run=True, total=found.total, outcomes={}, cancelations=[], unreachable=found.unreachable
                )
            )
        stopped: list[Cancelation] = []
        # This request may be one of those that are stopped, and is to be answered.
        with anyio.CancelScope(shield=True):
            stopped = await operations.cancel_all(**conditions, owner=owner, message=wanted.message)
        return answer_cancel_all(stopped)


def _add_page(router: APIRouter, rights: Rights) -> None:
    page_response = page_responses()

    @router.get("/page", response_class=HTMLResponse, summary="The page")
    async def show_page(_: Owner = Depends(rights)) -> Response:
        """Return the page that shows what runs."""
        return page_response()


def _add_reading(router: APIRouter, operations: Operations, rights: Rights, name: str) -> None:
    @router.get("/{id}", name=name, response_model=Operation, responses=_READING, summary="One operation")
    async def read_operation(
        whose: Owner = Depends(rights),
        id: str = Depends(_known_id),
        preference: Preference = Depends(preference_of),
    ) -> Response:
        """Return the operation as it is now; with `Prefer: wait`, when it has ended, or so many seconds later."""
        return answer_with(await _found(operations, id, whose, preference), preference)

    @router.get("/{id}/events", response_class=EventsResponse, responses=_EVENTS, summary="Its changes")
    async def follow_operation(
        request: Request, whose: Owner = Depends(rights), id: str = Depends(_known_id)
    ) -> Response:
        """Stream the changes of the operation as Server-Sent Events, first its present state, until its end."""
        await _found(operations, id, whose)
        if request.headers.get("last-event-id") == END_ID:
            return Response(status_code=204)
        return events_response(operations, id, whose)


def _add_result(router: APIRouter, operations: Operations, rights: Rights) -> None:
    @router.get("/{id}/result", response_model=None, responses=_RESULT, summary="Its result")
    async def read_result(
        request: Request,
        whose: Owner = Depends(rights),
        id: str = Depends(_known_id),
        preference: Preference = Depends(preference_of),
    ) -> Response:
        """Return the result of background work, or the error that it has raised."""
        operation = await _found(operations, id, whose, preference)
        if operation.kind != "background":
            raise HTTPException(404, "Only background work has a result that is kept")
        if not operation.state.is_final:
            return answer_running(operation, request, preference)
        try:
            result = await operations.result(id, owner=whose)
        except Exception as exc:
            raise error_of_result(exc) from None
        return answer_result(result, preference)


def _add_cancel(router: APIRouter, operations: Operations, rights: Rights) -> None:
    @router.post(
        "/{id}/cancel",
        response_model=Cancelation,
        responses=_CANCEL,
        openapi_extra=body_schema(CancelOne, is_required=False),
        summary="Stop it",
    )
    async def cancel_operation(
        request: Request,
        whose: Owner = Depends(rights),
        id: str = Depends(_known_id),
        preference: Preference = Depends(preference_of),
    ) -> Response:
        """Stop the operation. May be repeated: it answers what has become of it by now."""
        message = (await body_of(request, CancelOne)).message
        wait = _CANCEL_SECONDS if preference.wait is None else preference.wait
        cancelation = await operations.cancel(id, owner=whose, message=message, wait=wait)
        return answer_cancel(cancelation, request, preference)


async def _found(operations: Operations, id: str, whose: Owner, preference: Preference | None = None) -> Operation:
    """Return an operation, when it has ended or the client does not want to wait any longer.

    :raises OperationUnknown: if there is none, or it belongs to somebody else.
    """
    if preference is not None and preference.wait:
        return await operations.wait(id, timeout=preference.wait, owner=whose)
    found = await operations.get(id, owner=whose)
    if found is None:
        raise OperationUnknown
    return found
