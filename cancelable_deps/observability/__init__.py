"""What an operator sees: metrics and spans of OpenTelemetry, hooks for other tools, and the ids of operations in logs.

Importing this imports no package of OpenTelemetry: `CancelationTelemetry` does when it is made.
"""

from ..kernel.events import ObservedEvent as ObservedEvent
from .operation_ids import current_operation_id as current_operation_id
from .operation_ids import operation_id_filter as operation_id_filter
from .telemetry import CancelationTelemetry as CancelationTelemetry

__all__ = ["CancelationTelemetry", "ObservedEvent", "current_operation_id", "operation_id_filter"]
