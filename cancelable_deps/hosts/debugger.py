"""Detection of a debugger, under which no timeout should act: it would end what the user steps through."""

from __future__ import annotations

import sys
from typing import Any

# Not every tracer: coverage tools trace as well, and their users want timeouts.
_DEBUGGERS = ("bdb", "pdb", "pydevd", "_pydevd", "debugpy")


def is_debugged() -> bool:
    """Return whether a debugger traces this thread (``sys.settrace``), or is registered with ``sys.monitoring``."""
    tracer = sys.gettrace()
    if tracer is not None and _belongs_to_a_debugger(tracer):
        return True
    monitoring: Any = getattr(sys, "monitoring", None)
    return monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None


def _belongs_to_a_debugger(tracer: Any) -> bool:
    owners = (tracer, type(tracer), type(getattr(tracer, "__self__", None)))
    modules = [str(getattr(owner, "__module__", "")) for owner in owners]
    return any(module.startswith(_DEBUGGERS) for module in modules)
