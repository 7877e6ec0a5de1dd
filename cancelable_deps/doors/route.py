"""The route class: ``APIRouter(route_class=CancelableRoute)`` covers every route of one router."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from fastapi.routing import APIRoute

from ..kernel.errors import CancelationError
from ..request.limits import Limits
from ..request.response import answer
from ..request.run import end_first_door, first_door, run_in_another_door
from .decorator import cover_generator

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from starlette.types import Receive, Scope, Send

    from ..request.client_timeout import ClientTimeout
    from ..request.policies import TimeoutPolicy


class CancelableRoute(APIRoute):
    """A route whose request is stopped when its client leaves; the handler stays unchanged.

    Use it as ``APIRouter(route_class=CancelableRoute)``. A cancelled request raises its `CancelationError` into the
    application, whose exception handlers answer it. If the response has started, it is aborted: nothing more is sent, and
    the client sees that it is incomplete. For a timeout, make a class by `with_timeout`, or set the class attributes in a
    subclass. The router's WebSocket routes are not covered, because FastAPI makes them of another class: use the
    decorator, a handle or the middleware for these.
    """

    default_timeout: ClassVar[float | timedelta | None] = None
    """Seconds from the request's arrival at the route; a route's own timeout replaces it."""

    cleanup_grace: ClassVar[float | None] = None
    """Seconds that cleanup may await undisturbed; the default is that of `configure`."""

    default_policy: ClassVar[TimeoutPolicy | None] = None
    """A policy in place of `default_timeout`."""

    client_timeout: ClassVar[ClientTimeout | None] = None
    """The headers by which a client may shorten the timeout of its request; ``None`` if it may not."""

    _limits: ClassVar[Limits] = Limits(None, None)

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, cover_generator(endpoint), **options)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._limits = Limits(cls.default_timeout, cls.cleanup_grace, None, cls.default_policy, cls.client_timeout)

    @classmethod
    def with_timeout(
        cls,
        default_timeout: float | timedelta | None,
        *,
        cleanup_grace: float | None = None,
        client_timeout: ClientTimeout | None = None,
    ) -> type[CancelableRoute]:
        """Return a subclass with a timeout: ``APIRouter(route_class=CancelableRoute.with_timeout(30))``.

        :param default_timeout: seconds from the request's arrival at the route; ``None`` for no limit.
        :param cleanup_grace: the seconds that cleanup may await undisturbed; the default is that of `configure`.
        :param client_timeout: the headers by which a client may shorten the timeout of its request; the default is that
            of this class.
        :raises TypeError: if a limit is not a number, or ``client_timeout`` is not a ``ClientTimeout``.
        :raises ValueError: if a limit is negative or NaN.
        """
        return cls._with(client_timeout, default_timeout=default_timeout, cleanup_grace=cleanup_grace)

    @classmethod
    def with_policy(
        cls, policy: TimeoutPolicy, *, client_timeout: ClientTimeout | None = None
    ) -> type[CancelableRoute]:
        """Return a subclass with a policy: ``CancelableRoute.with_policy(TimeoutPolicy(30, status_code=503))``.

        :param client_timeout: the same as in `with_timeout`.
        """
        return cls._with(client_timeout, default_policy=policy)

    @classmethod
    def _with(cls, client_timeout: ClientTimeout | None, **limits: object) -> type[CancelableRoute]:
        if client_timeout is not None:
            limits["client_timeout"] = client_timeout
        return type(cls.__name__, (cls,), {**limits, "__module__": cls.__module__})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the route for one request, as Starlette calls it."""
        block = first_door(scope, receive, send, self._limits)
        if block is None:
            error = await run_in_another_door(super().handle, scope, receive, send, self._limits)
        else:
            outcome: BaseException | None = None
            try:
                block.enter()
                await super().handle(scope, block.receive, block.send)
            except BaseException as exc:
                outcome = exc
            if outcome is None and block.has_ended_undisturbed():
                return
            try:
                error = await end_first_door(block, outcome)
            finally:
                del outcome, block  # Its traceback refers to this frame: a reference cycle otherwise.
        if error is not None:
            try:
                if not isinstance(error, CancelationError) or error.policy is None:
                    raise error
                await answer(error, scope, receive, send)
            finally:
                del error  # Its traceback refers to this frame: a reference cycle otherwise.


def limits_of_route(route: CancelableRoute) -> Limits:
    """Return the limits of a route of ours."""
    return route._limits
