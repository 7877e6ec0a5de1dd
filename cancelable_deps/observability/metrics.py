"""The metrics. Importing this file imports the API of OpenTelemetry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from opentelemetry.metrics import Observation, get_meter

from .gauges import age_of_lease, operations_by_kind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.metrics import CallbackOptions, MeterProvider

    from ..kernel.events import ObservedEvent

# Seconds. The defaults of OpenTelemetry are for milliseconds.
_BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The instruments, and what each event adds to them. No id, owner or key becomes an attribute."""

    def __init__(self, version: str, provider: MeterProvider | None) -> None:
        meter = get_meter("cancelable_deps", version, provider)
        self._cancelations = meter.create_counter(
            "cancelable_deps.cancelations", "{cancelation}", "Requests and other work that were cancelled."
        )
        self._duration = meter.create_histogram(
            "cancelable_deps.cancelation.duration",
            "s",
            "From the cancellation of work to its end.",
            explicit_bucket_boundaries_advisory=_BOUNDS,
        )
        self._cleanup = meter.create_histogram(
            "cancelable_deps.cleanup.duration",
            "s",
            "From the moment that work has received its cancellation to its end.",
            explicit_bucket_boundaries_advisory=_BOUNDS,
        )
        self._advisory = meter.create_counter(
            "cancelable_deps.timeouts.advisory", "{request}", "Requests that took longer than an advisory limit."
        )
        self._cancels = meter.create_counter(
            "cancelable_deps.cancels.sent", "{cancel}", "Cancels of operations that were asked for here, by outcome."
        )
        meter.create_observable_up_down_counter(
            "cancelable_deps.operations.active",
            [_observe_operations],
            "{operation}",
            "Operations that run: requests that have run for a moment, WebSockets, background and tracked work.",
        )
        meter.create_observable_gauge(
            "cancelable_deps.lease.age",
            [_observe_lease],
            "s",
            "Since the last sign of life of this worker that the store of its operations has acknowledged.",
        )

    def add(self, event: ObservedEvent) -> None:
        """Count an event."""
        match event.what:
            case "cancelled":
                self._cancelations.add(1, _attributes_of(event))
            case "ended" if event.reason is not None:
                attributes = _attributes_of(event)
                if event.cancel_seconds is not None:
                    self._duration.record(event.cancel_seconds, attributes)
                if event.cleanup_seconds is not None:
                    self._cleanup.record(event.cleanup_seconds, attributes)
            case "exceeded":
                self._advisory.add(1, {"http.route": event.route or "", "kind": str(event.kind)})
            case "cancel":
                self._cancels.add(1, {"outcome": str(event.outcome)})
            case _:
                pass


def _attributes_of(event: ObservedEvent) -> dict[str, str]:
    # The same keys for each point: the exporter for Prometheus before 0.52 mixes up the labels otherwise.
    return {"reason": str(event.reason), "http.route": event.route or "", "kind": str(event.kind)}


def _observe_operations(options: CallbackOptions) -> Iterable[Observation]:
    return [Observation(count, {"kind": kind}) for kind, count in operations_by_kind().items()]


def _observe_lease(options: CallbackOptions) -> Iterable[Observation]:
    age = age_of_lease()
    return [] if age is None else [Observation(age)]
