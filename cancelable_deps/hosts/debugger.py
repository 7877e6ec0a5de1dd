"""Whether somebody steps through this process, and would be cut off by every timeout."""

from __future__ import annotations

import sys
from typing import Any

# Coverage tools trace as well, and their users want their timeouts.
_DEBUGGERS = ("bdb", "pdb", "pydevd", "_pydevd", "debugpy")


def is_debugged() -> bool:
    """Whether a debugger traces this thread (``sys.settrace``), or is registered with ``sys.monitoring``."""
    tracer = sys.gettrace()
    if tracer is not None and _belongs_to_a_debugger(tracer):
        return True
    monitoring: Any = getattr(sys, "monitoring", None)
    return monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None


def _belongs_to_a_debugger(tracer: Any) -> bool:
    owners = (tracer, type(tracer), type(getattr(tracer, "__self__", None)))
    modules = [str(getattr(owner, "__module__", "")) for owner in owners]
    return any(module.startswith(_DEBUGGERS) for module in modules)
