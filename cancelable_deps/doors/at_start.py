"""The check of an application when it starts."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..kernel.log import logger


def check_at_start(app: Any) -> None:
    """Log what breaks or weakens cancellation in an application that starts; raise nothing."""
    try:
        # By its name, because the checks know all doors, and stand above them; and now, so that importing them costs only
        # those who start an application.
        import_module("cancelable_deps.checks.start").log_findings(app)
    except Exception as exc:
        logger.info("the start-up check has failed: %r. `check=False` of the lifespan switches it off", exc)
