"""Deadlines that travel: the time that a client gives, and the rest of it for the services that a handler calls.

`ClientTimeout` is an option of the middleware and the route class. `forward_deadline` and `DeadlineTransport` are for
httpx; none of this imports it. This floor may use all below it, and nothing but the test client may use this floor.
"""

from ..request.client_timeout import ClientTimeout as ClientTimeout
from .forward import forward_deadline as forward_deadline
from .forward import no_deadline as no_deadline
from .transport import DeadlineTransport as DeadlineTransport

__all__ = ["ClientTimeout", "DeadlineTransport", "forward_deadline", "no_deadline"]
