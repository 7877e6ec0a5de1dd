"""Timeout policies: limits with a name, a status and a body, for the middleware and for single routes."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, final

from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response

from ..kernel.errors import CancelationError
from ..kernel.foreign import ThisTask, as_failure, with_own_failures
from ..kernel.log import logger
from ..kernel.options import not_a_dependency, takes
from ..kernel.settings import seconds
from ..kernel.unwrap import raise_as_it_is
from .state import route_of
from .websocket import handler_state

if TYPE_CHECKING:
    from datetime import timedelta

    from starlette.types import ASGIApp, Receive, Scope, Send

    from .blocks import DoorBlock
    from .state import RequestState

ResponseWriter = Callable[[Request, CancelationError], Response | Awaitable[Response]]

POLICY_ATTRIBUTE = "cancelable_deps_policy"
"""Under this name what chooses a policy by its name says which, so that a wrong one is found at start."""

_POLICIES_KEY = "cancelable_deps.policies"
"""Under this key of a lifespan's scope one middleware tells those further in of its policies."""


@final
class TimeoutPolicy:
    """How long a request may take, and what is answered when it takes longer. Several routes may share one.

    :param timeout: seconds, or a ``timedelta``.
    :param status_code: of the response when the time is up.
    :param response: writes that response: a function of the request and the error, which may be ``async``. It is asked
        where a door answers: the middleware, the decorator, the route class. An error that leaves a handle's block in
        the handler is answered by the application's own exception handlers, with this status.
    :param advisory: cancel nothing; log and count the requests that took longer, to see what enforcing it would do.
    :raises ValueError: for a timeout that is negative or NaN, or a status that is none of an error.
    """

    def __init__(
        self,
        timeout: float | timedelta,
        *,
        status_code: int = 504,
        response: ResponseWriter | None = None,
        advisory: bool = False,
    ) -> None:
        self.timeout = seconds(timeout, "timeout")
        self.status_code = checked_status(status_code, "a timeout")
        if response is not None and not takes(response, 2):
            raise TypeError(f"response must be a function of the request and the error, not {response!r}")
        self.response = response
        self.advisory = advisory
        self.exceeded = 0
        """How many requests of this process took longer; counted in advisory mode."""

    def __repr__(self) -> str:
        return f"<TimeoutPolicy {self.timeout:g} s{', advisory' if self.advisory else ''}>"

    @property
    def enforced_timeout(self) -> float | None:
        return None if self.advisory else self.timeout

    def judge(self, block: DoorBlock) -> None:
        """In advisory mode, when the request has ended."""
        if not self.advisory or block.elapsed <= self.timeout:
            return
        self.exceeded += 1
        state = block.known_request
        scope: Scope = {} if state is None else state.scope
        method = scope.get("method", "")
        route = route_of(scope)
        extra = {"method": method, "route": route, "limit": self.timeout, "elapsed": block.elapsed}
        logger.info(
            "%s %s took %.3f s, longer than its advisory limit of %g s",
            method,
            route,
            block.elapsed,
            self.timeout,
            extra=extra,
        )


def checked_status(code: object, what: object) -> int:
    if isinstance(code, bool) or not isinstance(code, int):
        raise TypeError(f"the status for {what} must be a number such as 503, not {code!r}")
    if not 400 <= code <= 599:
        raise ValueError(f"the status for {what} must tell of an error (400 to 599), not {code}")
    if code == 408:
        raise ValueError(f"408 for {what} makes clients send the request again (RFC 9110); use 503 or 504")
    return code


@not_a_dependency(
    "Depends(timeout_policy) would let the client choose the policy. Call it, with a name or a TimeoutPolicy: "
    'Depends(timeout_policy("report")).'
)
def timeout_policy(policy: str | TimeoutPolicy) -> Callable[[HTTPConnection], Awaitable[None]]:
    """A dependency that chooses a policy: ``dependencies=[Depends(timeout_policy("report"))]`` of a route or router.

    It replaces the default of the middleware or route class, and counts from the request's arrival there. A WebSocket
    has no default, and is left alone; give it a policy by `with_cancelation`.
    """
    if not isinstance(policy, str | TimeoutPolicy):
        raise TypeError(f"timeout_policy takes the name of a policy or a TimeoutPolicy, not {policy!r}")

    async def chosen_timeout_policy(request: HTTPConnection) -> None:
        if not isinstance(request, Request):
            return
        state = handler_state(request)
        state.replace_default(found(policy, state))

    setattr(chosen_timeout_policy, POLICY_ATTRIBUTE, policy)
    return chosen_timeout_policy


async def no_timeout(request: HTTPConnection) -> None:
    """A dependency that switches the default timeout off: ``dependencies=[Depends(no_timeout)]``."""
    handler_state(request).lift_default()


def found(policy: str | TimeoutPolicy, state: RequestState) -> TimeoutPolicy:
    """The policy of that name."""
    return named(policy, state.policies or {}) if isinstance(policy, str) else policy


def named(name: str, policies: Mapping[str, TimeoutPolicy], where: str = "") -> TimeoutPolicy:
    policy = policies.get(name)
    if policy is None:
        known = ", ".join(map(repr, policies)) or "none: give RequestCancelationMiddleware its `policies={...}`"
        raise LookupError(f"there is no timeout policy {name!r}{where}; known are {known}")
    return policy


async def answer(error: CancelationError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send the response of ``error``, as its policy writes it if it has one."""
    response = await written(error, Request(scope, receive))
    if response is None:
        response = JSONResponse({"detail": error.detail}, status_code=error.status_code, headers=error.headers)
    await with_own_failures("the response of a cancellation", response, scope, receive, send)


async def written(error: BaseException | None, request: Request) -> Response | None:
    """What the policy's own writer makes of ``error``."""
    policy: TimeoutPolicy | None = getattr(error, "policy", None)
    if policy is None or policy.response is None or not isinstance(error, CancelationError):
        return None
    this_task = ThisTask()
    try:
        response = policy.response(request, error)
        return await response if inspect.isawaitable(response) else response
    except BaseException as exc:
        if this_task.is_ended_by(exc):
            raise
        raise_as_it_is(as_failure(exc, f"the `response` of {policy!r}"))


async def check_names_at_start(
    wrapped: ASGIApp, scope: Scope, receive: Receive, send: Send, policies: Mapping[str, TimeoutPolicy]
) -> None:
    """Look through the routes of an application that starts for policies that nobody has defined."""
    # There is none in the scope yet if we stand around it.
    app = scope.get("app", wrapped)
    known = scope[_POLICIES_KEY] = {**scope.get(_POLICIES_KEY, {}), **policies, **_policies_of(app)}
    try:
        _check_names(getattr(app, "routes", ()), known)
    except LookupError as error:
        # Or servers would take an application that only raises for one that has no lifespan, and go on.
        await receive()
        await send({"type": "lifespan.startup.failed", "message": str(error)})
        raise


def _check_names(routes: Any, policies: Mapping[str, TimeoutPolicy]) -> None:
    for route in routes:
        for function in _functions_of(route):
            name = getattr(function, POLICY_ATTRIBUTE, None)
            if isinstance(name, str):
                named(name, policies, f" (route {getattr(route, 'path', '')})")
        # Since 0.137 FastAPI keeps an included router as it is, with what `include_router` was given beside it.
        router = getattr(route, "original_router", route)
        inner = getattr(router, "routes", None) or ()
        _check_names(inner, {**policies, **_policies_of(getattr(route, "app", None))})


def _policies_of(app: Any) -> dict[str, TimeoutPolicy]:
    """What the middleware of an application adds."""
    policies: dict[str, TimeoutPolicy] = {}
    for middleware in getattr(app, "user_middleware", ()):
        given = middleware.kwargs.get("policies")
        if isinstance(given, Mapping):
            policies |= {name: policy for name, policy in given.items() if isinstance(policy, TimeoutPolicy)}
    return policies


def _functions_of(route: Any) -> Iterator[Any]:
    yield getattr(route, "endpoint", None)
    yield from _dependencies(getattr(route, "dependant", None))
    for owner in (getattr(route, "original_router", None), getattr(route, "include_context", None)):
        for depends in getattr(owner, "dependencies", ()):
            yield getattr(depends, "dependency", None)


def _dependencies(dependant: Any) -> Iterator[Any]:
    for dependency in getattr(dependant, "dependencies", ()):
        yield dependency.call
        yield from _dependencies(dependency)
