"""Spans of a worker: how long a job waited for its first claim, and each claim's run of its lines."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

from jobs.ids import JOB_PREFIX, WORKER_PREFIX, public_id
from jobs.queries.claiming import Claim, ClaimedRequest
from jobs.queries.settling import ClaimToken, Outcome
from jobs.queries.traces import JobTrace
from jobs.states import RequestState

if TYPE_CHECKING:
    from jobs.spans import Span, Tracer


@dataclass(slots=True)
class _Run:
    """The lines of one job in one claim."""

    span: Span
    open: set[ClaimToken] = field(default_factory=set)
    completed: int = 0
    failed: int = 0
    given_back: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def end(self) -> None:
        self.span.end(
            {
                "pagemill.lines.completed": self.completed,
                "pagemill.lines.failed": self.failed,
                "pagemill.lines.given_back": self.given_back,
                "gen_ai.usage.input_tokens": self.prompt_tokens,
                "gen_ai.usage.output_tokens": self.completion_tokens,
            }
        )


class ClaimSpans:
    """Begins a span for each traced job of a claim, and ends it with the last of these lines. Called by any thread."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._lock = threading.Lock()
        self._runs: dict[ClaimToken, _Run] = {}

    def begin(self, claim: Claim, model: str, traces: Mapping[UUID, JobTrace]) -> None:
        """A claim is committed, of whose jobs `traces` are known."""
        from jobs.spans import Kind

        lines: dict[UUID, list[ClaimedRequest]] = defaultdict(list)
        for request in claim.requests:
            lines[request.job_id].append(request)
        for job_id, trace in traces.items():
            attributes = {
                "pagemill.job.id": public_id(JOB_PREFIX, job_id),
                "pagemill.worker.id": public_id(WORKER_PREFIX, lines[job_id][0].holder),
                "gen_ai.request.model": model,
            }
            if job_id in claim.first_of:
                waited = self._tracer.start(
                    "wait for a claim",
                    Kind.INTERNAL,
                    parent=trace.traceparent,
                    attributes=attributes,
                    at=trace.published_at,
                )
                waited.end(at=trace.now)
            run = _Run(
                self._tracer.start(
                    "run claimed lines",
                    Kind.CONSUMER,
                    parent=trace.traceparent,
                    attributes={**attributes, "pagemill.lines": len(lines[job_id])},
                ),
                {request.token for request in lines[job_id]},
            )
            with self._lock:
                self._runs.update(dict.fromkeys(run.open, run))

    def end(self, outcome: Outcome) -> None:
        """A line has an outcome."""
        with self._lock:
            run = self._runs.pop(outcome.token, None)
            if run is None:
                return
            if outcome.state is RequestState.COMPLETED:
                run.completed += 1
            else:
                run.failed += 1
            run.prompt_tokens += outcome.prompt_tokens
            run.completion_tokens += outcome.completion_tokens
            self._close_line(run, outcome.token)

    def give_back(self, requests: Sequence[ClaimedRequest]) -> None:
        """Lines left this worker without an outcome."""
        with self._lock:
            for request in requests:
                run = self._runs.pop(request.token, None)
                if run is not None:
                    run.given_back += 1
                    self._close_line(run, request.token)

    def close(self) -> None:
        """End what runs, as given back, and export what is left."""
        with self._lock:
            runs = {id(run): run for run in self._runs.values()}
            self._runs.clear()
        for run in runs.values():
            run.given_back += len(run.open)
            run.end()
        self._tracer.close()

    def _close_line(self, run: _Run, token: ClaimToken) -> None:
        run.open.discard(token)
        if not run.open:
            run.end()
