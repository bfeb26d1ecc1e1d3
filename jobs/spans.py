"""Spans by OpenTelemetry's SDK. Imported by `jobs.tracing` alone, where an exporter is set."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from datetime import datetime
from enum import Enum

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

CLOSE_TIMEOUT = 3.0  # seconds for the last spans: a collector that hangs must not hold up the end of a process

_PROPAGATOR = TraceContextTextMapPropagator()

Value = str | bool | int | float


class Kind(Enum):
    """What a span stands for, in OpenTelemetry's words."""

    SERVER = SpanKind.SERVER
    CLIENT = SpanKind.CLIENT
    CONSUMER = SpanKind.CONSUMER
    INTERNAL = SpanKind.INTERNAL


class Span:
    """Something that was begun. It is exported once it has ended."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """Its context, as the header that tells others of it."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self._span, Context()))
        return carrier["traceparent"]

    def rename(self, name: str) -> None:
        """Give it the name that is only known later."""
        self._span.update_name(name)

    def end(
        self, attributes: Mapping[str, Value] | None = None, *, error: str | None = None, at: datetime | None = None
    ) -> None:
        """End it, now or `at` that time; `error` says why it failed."""
        self._span.set_attributes(attributes or {})
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(None if at is None else _nanoseconds(at))


class Tracer:
    """Makes spans, and exports them from a thread of its own."""

    def __init__(self, service: str) -> None:
        # OTEL_SERVICE_NAME goes before ours; a resource's own attributes would go before it.
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: f"pagemill-{service}"}
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("pagemill")

    def start(
        self,
        name: str,
        kind: Kind,
        *,
        parent: str | None,
        attributes: Mapping[str, Value] | None = None,
        at: datetime | None = None,
    ) -> Span:
        """Begin a span, now or `at` that time, under the `traceparent` of another; None: a trace of its own."""
        context = _PROPAGATOR.extract({} if parent is None else {"traceparent": parent}, Context())
        span = self._tracer.start_span(
            name,
            context,
            kind.value,
            dict(attributes or {}),
            start_time=None if at is None else _nanoseconds(at),
        )
        return Span(span)

    def close(self) -> None:
        """Export what is left, for `CLOSE_TIMEOUT` seconds at most."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT)


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000) * 1000
