"""The attributes by which the doors mark what they make, for who looks through an application: the checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from .options import Options

DECORATED: Final = "__cancelable_deps_decorated__"
"""Of a decorated function: what it is made of, a `Decorated`."""

STOPS_HANDLER: Final = "__cancelable_deps_stops_handler__"
"""Of a dependency: whether it stops the handler as a decorator does."""

TIMEOUT: Final = "__cancelable_deps_timeout__"
"""Of a dependency that provides a block with a timeout: its seconds."""

GRACES: Final = "__cancelable_deps_graces__"
"""Of a lifespan: the `Graces` that it gives the requests of the application."""

OPERATIONS: Final = "__cancelable_deps_operations__"
"""Of a lifespan: the `Operations` that it opens."""


class Decorated(NamedTuple):
    """An endpoint and the options of its decorator."""

    endpoint: Any
    options: Options
