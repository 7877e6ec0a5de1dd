"""Whose operations a request may read and stop, as the application's own dependency says."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends
from fastapi.params import Depends as DependsParameter
from starlette.exceptions import HTTPException

from .names import ANYONE, Owner, checked_owner

Dependency = Callable[..., Any]
Rights = Callable[..., Any]

_ADVICE = (
    "operations_router() has to know whose operations a request may read and stop. For the users of the application: "
    "operations_router(operations, owner=current_user_id), a dependency that returns the id of the user. For its "
    "operators, who may stop everything: operations_router(operations, operator=require_admin), a dependency that raises "
    "unless the user is one. Include one router for each"
)


def rights_of(owner: Dependency | None, operator: Dependency | None) -> Rights:
    """Return a dependency that provides the owner of the operations that a request may read and stop, or ``ANYONE``.

    :raises TypeError: unless exactly one is given, and can be called.
    """
    if (owner is None) == (operator is None):
        given = "neither owner= nor operator= was" if owner is None else "both owner= and operator= were"
        raise TypeError(f"{_ADVICE}; {given} given")
    if owner is not None:
        return _rights_of_owner(_checked("owner", owner))
    return _rights_of_operator(_checked("operator", operator))


def _checked(name: str, dependency: Any) -> Dependency:
    if isinstance(dependency, DependsParameter):
        raise TypeError(f"{name} takes the dependency itself: {name}=function, not {name}=Depends(function)")
    if not callable(dependency):
        raise TypeError(f"{name} takes a dependency, such as a function, not {dependency!r}. {_ADVICE}")
    function: Dependency = dependency
    return function


def _rights_of_owner(owner: Dependency) -> Rights:
    async def rights_of_owner(value: Annotated[Any, Depends(owner)]) -> Owner:
        try:
            return checked_owner(value)
        except (TypeError, ValueError):
            # The value may be the user's, or the user itself, and is not for the response.
            raise HTTPException(
                403,
                "The application did not say whose operations these are: its dependency has to return the id of a user, "
                f"a string, a number or a UUID, and has returned {type(value).__name__}",
            ) from None

    return rights_of_owner


def _rights_of_operator(operator: Dependency) -> Rights:
    async def rights_of_operator(value: Annotated[Any, Depends(operator)]) -> Owner:
        # A dependency that only answers the question would let everybody in otherwise.
        if value is False:
            raise HTTPException(403, "Only operators may do this")
        return ANYONE

    return rights_of_operator
