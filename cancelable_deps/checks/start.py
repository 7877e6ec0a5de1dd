"""The check of an application that starts: each finding is one line of the log, once in a process."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from ..kernel.log import logger
from .stack import check_stack

if TYPE_CHECKING:
    from .findings import Finding

_TOLD_OTHERWISE: Final = frozenset({"unknown-anyio"})
"""What has a line in the log already."""

_checked: WeakSet[Any] = WeakSet()
_logged: set[Finding] = set()


def log_findings(app: Any) -> None:
    """Check an application whose lifespan runs, unless that was done before, and log what is found."""
    if app in _checked:
        return
    _checked.add(app)
    for finding in check_stack(app):
        if finding.code in _TOLD_OTHERWISE or finding in _logged:
            continue
        _logged.add(finding)
        level = logging.WARNING if finding.level == "warning" else logging.INFO
        extra = {"code": finding.code, "where": finding.where}
        logger.log(level, "%s (%s): %s", finding.code, finding.where, finding.message, extra=extra)
