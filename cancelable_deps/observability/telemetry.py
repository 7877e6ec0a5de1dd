"""`CancelationTelemetry`: the events as metrics and spans of OpenTelemetry."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from ..kernel.events import ObservedEvent


@final
class CancelationTelemetry:
    """Metrics and spans of OpenTelemetry: ``configure(on_event=CancelationTelemetry())``.

    Make one for each process. It needs ``opentelemetry-api`` (``pip install "cancelable-deps[otel]"``) and no SDK; without
    one it does nothing. Requests that are not cancelled cost nothing.

    Metrics, of this process:

    * ``cancelable_deps.cancelations``: a counter by ``reason``, ``kind`` and ``http.route``;
    * ``cancelable_deps.cancelation.duration``, ``cancelable_deps.cleanup.duration``: histograms in seconds, by the same;
    * ``cancelable_deps.timeouts.advisory``: a counter by ``http.route``;
    * ``cancelable_deps.cancels.sent``: a counter by ``outcome``;
    * ``cancelable_deps.operations.active``: an up-down counter by ``kind``, read when it is collected;
    * ``cancelable_deps.lease.age``: a gauge in seconds, while `Operations` are open.

    No id, owner, key or raw path is an attribute.

    Spans: that of a request which was cancelled, whoever makes it, gets the attributes ``cancelation.reason`` and
    ``cancelation.message`` and an event ``cancelation``; its status stays as its maker has it. Background work of
    `Operations.start` has a span of its own, which is linked to that of its request.

    :param tracer_provider: in place of the global one.
    :param meter_provider: in place of the global one.
    :raises ImportError: if ``opentelemetry-api`` is not installed.
    """

    def __init__(
        self, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        try:
            from .metrics import Metrics  # loads late: most applications have no OpenTelemetry
            from .spans import Spans  # loads late
        except ModuleNotFoundError as exc:
            raise ImportError(
                'CancelationTelemetry needs opentelemetry-api: pip install "cancelable-deps[otel]"'
            ) from exc
        version = sys.modules[__name__.partition(".")[0]].__version__
        self._metrics = Metrics(version, meter_provider)
        self._spans = Spans(version, tracer_provider)

    def __call__(self, event: ObservedEvent) -> None:
        """Take an event into account. The library calls this."""
        self._metrics.add(event)
        self._spans.add(event)
