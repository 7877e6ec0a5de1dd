"""The conditions by which operations are listed, and stopped together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from ..hosts.starlette import route_template
from ..kernel.options import seconds
from .model import Kind, Operation, OperationState
from .names import ANYONE, checked_key, checked_labels, checked_owners, owner_as_data
from .running import Running

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import timedelta

    from ..request.state import RequestState
    from .names import Owner
    from .running import RunningBlock


class Conditions(NamedTuple):
    """What an operation has to be like. ``None`` stands for anything."""

    owner: Owner = ANYONE
    kind: str | None = None
    key: str | None = None
    route: str | None = None
    labels: Mapping[str, str] | None = None
    older_than: float | None = None
    state: str | None = None
    before: float | None = None
    """Seconds since the epoch; what has started later is left out."""

    @property
    def are_none(self) -> bool:
        """Whether everything fulfils them."""
        return self == Conditions()

    def as_data(self) -> dict[str, Any]:
        """Return them as JSON has them."""
        fields = self._asdict()
        fields["owner"] = owner_as_data(self.owner)
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Conditions:
        """Return the conditions of an entry. A newer worker may know others, which this one cannot obey.

        :raises ValueError: if there is an unknown one.
        """
        if unknown := set(data) - set(cls._fields):
            raise ValueError(f"unknown conditions: {sorted(unknown)}")
        return cls(**data)


def checked(
    *,
    owner: object = ANYONE,
    kind: str | None = None,
    key: object = None,
    route: str | None = None,
    labels: object = None,
    older_than: float | timedelta | None = None,
    state: str | None = None,
) -> Conditions:
    """Return conditions that users have given.

    :raises TypeError: if one has a wrong type.
    :raises ValueError: if one has a wrong value.
    """
    if kind is not None and kind not in get_args(Kind):
        raise ValueError(f"kind is one of {', '.join(get_args(Kind))}, not {kind!r}")
    if route is not None and not isinstance(route, str):
        raise TypeError(f"route is the path template of a route, not {route!r}")
    from_seconds = None if older_than is None else seconds(older_than, "older_than")
    return Conditions(
        owner=checked_owners(owner),
        kind=kind,
        key=None if key is None else checked_key(key),
        route=route,
        labels=None if labels is None else checked_labels(labels),
        older_than=from_seconds,
        state=None if state is None else OperationState(state),
    )


def matcher(
    conditions: Conditions, now: float, today: float = 0.0
) -> Callable[[RequestState | RunningBlock], bool] | None:
    """Return a function that tells whether something that runs fulfils the conditions; ``None`` if everything does.

    :param now: the time of the loop, from which ages count.
    :param today: the same in seconds since the epoch.
    """
    if conditions.are_none:
        return None
    youngest = now - (conditions.older_than or 0.0)
    if conditions.before is not None:
        youngest = min(youngest, now - (today - conditions.before))
    if conditions._replace(older_than=None, before=None).are_none:
        return lambda each: each.started <= youngest

    # Most of what runs are requests without an object: what is known of them all is found out once, and not for each.
    of_request = _request_matcher(conditions)

    def fulfils(each: RequestState | RunningBlock) -> bool:
        if each.started > youngest:
            return False
        running: Running | None = each if isinstance(each, Running) else each.operation
        return of_request(each) if running is None else _matches(conditions, running)

    return fulfils


def _request_matcher(conditions: Conditions) -> Callable[[Any], bool]:
    """Return a function that tells whether a request fulfils the conditions that nobody has made an object for."""
    kind, route, state = conditions.kind, conditions.route, conditions.state
    if conditions.owner is not ANYONE or conditions.key is not None or conditions.labels:
        # It has none of them.
        return lambda request: False

    def fulfils(request: Any) -> bool:
        scope = request.scope
        if route is not None and route_template(scope) != route:
            return False
        if kind is not None and ("websocket" if scope["type"] == "websocket" else "request") != kind:
            return False
        return state is None or state == (OperationState.RUNNING if request.cause is None else OperationState.STOPPING)

    return fulfils


def _matches(conditions: Conditions, running: Running) -> bool:
    if not running.belongs_to(conditions.owner):
        return False
    if conditions.key is not None and running.key != conditions.key:
        return False
    if conditions.kind is not None and running.kind != conditions.kind:
        return False
    if conditions.route is not None and running.route != conditions.route:
        return False
    if conditions.state is not None and running.state != conditions.state:
        return False
    labels = running.labels
    return all(labels.get(name) == value for name, value in (conditions.labels or {}).items())


def has_been(conditions: Conditions, operation: Operation, now: float) -> bool:
    """Return whether an operation that has ended fulfils the conditions.

    :param now: seconds since the epoch, from which ages count.
    """
    wanted = {"kind": conditions.kind, "key": conditions.key, "route": conditions.route, "state": conditions.state}
    if any(value is not None and getattr(operation, name) != value for name, value in wanted.items()):
        return False
    if conditions.older_than is not None and now - operation.started.timestamp() < conditions.older_than:
        return False
    return all(operation.labels.get(name) == value for name, value in (conditions.labels or {}).items())
