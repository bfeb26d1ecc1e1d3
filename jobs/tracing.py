"""Traces from a submission to its webhook, by OpenTelemetry, where an exporter is set. Else no tracer is imported.

OTEL_EXPORTER_OTLP_ENDPOINT and its kin are OpenTelemetry's own variables: its SDK reads them, and this module only
looks whether they are there.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.spans import Tracer

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context

_submitting: ContextVar[str | None] = ContextVar("submitting", default=None)


def start_tracer(service: str) -> Tracer | None:
    """The tracer of this process, called `service`; None where no exporter is set, or its packages are missing."""
    if not any(os.environ.get(name) for name in ENDPOINTS) or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from jobs.spans import Tracer
    except ModuleNotFoundError as error:
        logger.warning(
            "no traces: an OTEL_EXPORTER_OTLP_ENDPOINT is set, but %s is not installed: "
            "pip install -c constraints.txt '.[traces]'",
            error.name,
        )
        return None
    return Tracer(service)


def valid_traceparent(value: str | None) -> str | None:
    """A `traceparent` header's value, if it is one."""
    return value if value is not None and _TRACEPARENT.fullmatch(value) else None


def submitting_trace() -> str | None:
    """The trace context of the request that is served now, for the rows that it makes; None without a tracer."""
    return _submitting.get()


@contextmanager
def submitted_in(traceparent: str | None) -> Iterator[None]:
    """Let jobs and batches that are made in this block, tasks and threads of it included, belong to a trace."""
    token = _submitting.set(traceparent)
    try:
        yield
    finally:
        _submitting.reset(token)
