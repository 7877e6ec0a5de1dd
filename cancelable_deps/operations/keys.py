"""Dependencies that limit how many requests of one key run: the latest only, or a number of them."""

from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Annotated, Any, Literal, NamedTuple

import anyio
from fastapi import Depends
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import Scope

from ..hosts.starlette import route_of
from ..kernel.cancelable import cancelable_of
from ..kernel.options import checked_status, not_a_dependency, seconds
from ..request.connection import new_block
from ..request.state import RequestState
from .backend import Unavailable
from .dependencies import operation_of, operations_of
from .errors import OperationBusy, OperationsUnavailable
from .names import checked_key
from .running import RunningRequest
from .stoppable import stoppable_handler
from .turns import Turn, key_name

WhenUnavailable = Literal["run", "refuse"]
Dependency = Callable[..., Any]


class _Rule(NamedTuple):
    scope: str | None
    runs_alone: bool
    limit: int = 1
    queue: int = 0
    latest: bool = False
    patience: float | None = None
    """The seconds that a request waits for its turn; ``None`` if it does not."""

    status_code: int = 409
    retry_after: int | None = None

    def refusal(self) -> HTTPException:
        if self.retry_after is None:
            return HTTPException(self.status_code, OperationBusy().detail)
        return OperationBusy(status_code=self.status_code, retry_after=self.retry_after)


@not_a_dependency(
    "Depends(latest_only) has no key. Call it, with the dependency that returns one: latest_only(user_id)."
)
def latest_only(
    key: Dependency,
    *,
    scope: str | None = None,
    wait_for_previous: float | timedelta | None = None,
    when_unavailable: WhenUnavailable = "run",
) -> Dependency:
    """Return a dependency by which a request stops those of the same key that have come before it.

    Use it as ``dependencies=[Depends(latest_only(user_id))]``, where ``user_id`` is a dependency that returns the key: a
    string, a number or a UUID. The earlier request ends with 499 and "superseded by a newer request". Of a burst, the
    newest request is answered. A request whose response is complete is not stopped, and its background tasks go on.

    :param key: a dependency; what it raises is the response.
    :param scope: the keys of all routes with the same scope are one namespace; by default each route has its own.
    :param wait_for_previous: start only when the earlier requests have ended, their cleanup included, because both would
        use the same thing; after so many seconds the answer is 503. The default is to start at once.
    :param when_unavailable: if the store that the workers share cannot be reached, ``"run"`` by the order of this
        process, or ``"refuse"`` with 503.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if one has a wrong value.
    """
    _check(key, scope, when_unavailable)
    patience = None if wait_for_previous is None else seconds(wait_for_previous, "wait_for_previous")
    return _dependency(
        key, _Rule(scope, when_unavailable == "run", latest=True, patience=patience, status_code=503, retry_after=1)
    )


@not_a_dependency("Depends(at_most) has no limit. Call it, with a number and a dependency: at_most(2, user_id).")
def at_most(
    limit: int,
    key: Dependency,
    *,
    queue: int = 0,
    queue_timeout: float | timedelta = 30,
    scope: str | None = None,
    status_code: int = 409,
    retry_after: int | None = None,
    when_unavailable: WhenUnavailable = "run",
) -> Dependency:
    """Return a dependency that lets ``limit`` requests of a key run at the same time, and ``queue`` others wait.

    Use it as ``dependencies=[Depends(at_most(2, user_id, queue=10))]``. Those that wait start in the order in which they
    came; one whose client leaves gives its place up. Another one is refused at once.

    :param limit: how many may run.
    :param key: a dependency that returns the key: a string, a number or a UUID.
    :param queue: how many may wait.
    :param queue_timeout: the seconds that a request may wait; then it is refused.
    :param scope: the keys of all routes with the same scope are one namespace; by default each route has its own.
    :param status_code: the status of a refusal.
    :param retry_after: the seconds of its ``Retry-After`` header; by default it has none.
    :param when_unavailable: if the store that the workers share cannot be reached, ``"run"`` by the order of this
        process, or ``"refuse"`` with 503.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if one has a wrong value.
    """
    _check(key, scope, when_unavailable)
    for name, value, least in (("limit", limit, 1), ("queue", queue, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} takes a number of requests, not {value!r}")
        if value < least:
            raise ValueError(f"{name} must be {least} or more, not {value}")
    return _dependency(
        key,
        _Rule(
            scope,
            when_unavailable == "run",
            limit=limit,
            queue=queue,
            patience=seconds(queue_timeout, "queue_timeout"),
            status_code=checked_status(status_code, "a refusal"),
            retry_after=retry_after,
        ),
    )


def _check(key: Any, scope: Any, when_unavailable: Any) -> None:
    if not callable(key):
        raise TypeError(f"key is a dependency, a function that returns the key of a request, not {key!r}")
    if scope is not None and not isinstance(scope, str):
        raise TypeError(f"scope is a string that several routes share, not {scope!r}")
    if when_unavailable not in ("run", "refuse"):
        raise ValueError(f"when_unavailable is 'run' or 'refuse', not {when_unavailable!r}")


def _dependency(key: Dependency, rule: _Rule) -> Dependency:
    async def turn_of_request(connection: HTTPConnection, value: Annotated[Any, Depends(key)]) -> AsyncIterator[None]:
        running, state = operation_of(connection)
        running.key = _checked(value)
        name = key_name(_namespace(rule, connection.scope), running.key)
        turns = operations_of(connection.scope).worker.turns
        try:
            turn = await turns.enter(
                name,
                running,
                limit=rule.limit,
                queue=rule.queue,
                latest=rule.latest,
                waits=rule.latest and rule.patience is not None,
                runs_alone=rule.runs_alone,
            )
        except Unavailable:
            raise OperationsUnavailable from None
        try:
            await _wait_for(turn, running, state, rule)
            yield
        finally:
            await turns.leave(turn)

    async def stopped_handler(
        # The one after the other: only a handler whose turn has come can be superseded.
        _: Annotated[None, Depends(turn_of_request)],
        __: Annotated[None, Depends(stoppable_handler, scope="function")],
    ) -> None: ...

    return stopped_handler


async def _wait_for(turn: Turn, running: RunningRequest, state: RequestState, rule: _Rule) -> None:
    if turn.status == "refused":
        raise rule.refusal()
    if turn.status == "admitted":
        return
    running.set_waiting(True)
    try:
        # A block, because no door may be around, and the client may leave.
        async with cancelable_of(new_block(state)):
            with anyio.move_on_after(rule.patience):
                await turn.wait()
    finally:
        running.set_waiting(False)
    if turn.status != "admitted":
        raise rule.refusal()


def _checked(value: object) -> str:
    try:
        return checked_key(value)
    except ValueError as exc:
        raise HTTPException(422, str(exc)) from None
    except TypeError as exc:
        raise TypeError(
            f"the dependency for the key of latest_only() or at_most() has returned {value!r}: {exc}"
        ) from exc


def _namespace(rule: _Rule, scope: Scope) -> str:
    if rule.scope is not None:
        return f"scope {rule.scope}"
    methods = getattr(scope.get("route"), "methods", None) or ()
    return f"route {','.join(sorted(methods))} {scope.get('root_path', '')} {route_of(scope)}"
