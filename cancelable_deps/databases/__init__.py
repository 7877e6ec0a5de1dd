"""Floor 4: databases: sessions that end with their request, and a limit that the server itself keeps.

It imports no driver. `session` ends SQLAlchemy's sessions, `statements` sets PostgreSQL's ``statement_timeout``. This floor may use all floors
below, but not `testing`. Blocking drivers in threads need only the kernel: `Cancelable.interrupting`.
"""

from .session import cancelable_session as cancelable_session
from .statements import limit_statements as limit_statements

__all__ = ["cancelable_session", "limit_statements"]
