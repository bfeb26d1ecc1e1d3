"""A span for each request, under the trace of the caller; jobs and batches that it makes belong to that trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import Scope

from jobs import tracing

if TYPE_CHECKING:
    from jobs.spans import Tracer

QUIET = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that machines ask for every few seconds."""


@dataclass(slots=True)
class Answered:
    """What is known of a request at its end."""

    route: str | None = None
    status: int | None = None


class RequestSpans:
    """Spans of an API process. Without a tracer it does nothing."""

    def __init__(self, tracer: Tracer | None) -> None:
        self._tracer = tracer

    @contextmanager
    def around(self, scope: Scope, request_id: str) -> Iterator[Answered]:
        """The span of the request that is served in this block, which fills in how it was answered."""
        answered = Answered()
        if self._tracer is None or scope["path"] in QUIET:
            yield answered
            return
        from jobs.spans import Kind

        method = scope["method"]
        span = self._tracer.start(
            method,
            Kind.SERVER,
            parent=tracing.valid_traceparent(Headers(scope=scope).get("traceparent")),
            attributes={"http.request.method": method, "pagemill.request.id": request_id},
        )
        try:
            with tracing.submitted_in(span.traceparent):
                yield answered
        finally:
            status = answered.status or 0
            if answered.route is not None:
                span.rename(f"{method} {answered.route}")
            span.end(
                {"http.route": answered.route or "other", "http.response.status_code": status},
                error="no answer" if status == 0 else str(status) if status >= 500 else None,
            )

    def close(self) -> None:
        """Export what is left."""
        if self._tracer is not None:
            self._tracer.close()
