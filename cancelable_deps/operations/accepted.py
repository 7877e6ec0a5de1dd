"""The response to a request that has started background work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from starlette.responses import JSONResponse
from starlette.routing import NoMatchFound

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

OWNERS_ROUTE: Final = "cancelable_deps.operation"
"""The name of the route by which an owner reads an operation."""

OPERATORS_ROUTE: Final = "cancelable_deps.operation_for_operators"
"""The name of the route by which an operator reads an operation."""


class AcceptedResponse(JSONResponse):
    """A 202 whose ``Location`` is found when it is sent, because only then the application is known."""

    def __init__(self, id: str, body: Any, location: str | None, retry_after: int) -> None:
        super().__init__(body, status_code=202, headers={"retry-after": str(retry_after)})
        self._id = id
        if location is not None:
            self.headers["location"] = location

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "location" not in self.headers:
            location = path_of_operation(scope, self._id)
            if location is not None:
                self.headers["location"] = location
        await super().__call__(scope, receive, send)


def path_of_operation(scope: Scope, id: str) -> str | None:
    """Return the path of an operation under `operations_router`, as this client can ask for it; ``None`` without one."""
    # A mounted application's own routes come first; the outermost application is that of the first router.
    places = [(scope.get("app"), scope.get("root_path", "")), (scope.get("router"), scope.get("app_root_path", ""))]
    for name in (OWNERS_ROUTE, OPERATORS_ROUTE):
        for place, prefix in places:
            try:
                return None if place is None else prefix.rstrip("/") + str(place.url_path_for(name, id=id))
            except NoMatchFound:
                continue
    return None
