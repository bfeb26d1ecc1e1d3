"""Traces by OpenTelemetry: from a submission to its webhook, as a real receiver of OTLP over HTTP sees them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest

from jobs import tracing
from tests.support.fake_worker import MODEL
from tests.support.paths import REPOSITORY
from tests.support.processes import await_condition
from tests.support.receivers import receiver
from tests.support.service import Service

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BATCH_TRACE = "5bf92f3577b34da6a3ce929d0e0e4736"
LINES = 3


@dataclass
class Collector:
    """What processes exported: each span, with the name of its service."""

    spans: list[tuple[str, Any]] = field(default_factory=list)
    url: str = ""

    def of(self, trace: str, name: str) -> list[Any]:
        """The spans of a trace, by name."""
        return [span for _, span in list(self.spans) if span.trace_id.hex() == trace and span.name == name]

    def await_one(self, trace: str, name: str) -> Any:
        await_condition(lambda: bool(self.of(trace, name)), f"a span {name!r} in {self._names(trace)}")
        (span,) = self.of(trace, name)
        return span

    def _names(self, trace: str) -> list[str]:
        return [span.name for _, span in list(self.spans) if span.trace_id.hex() == trace]


@pytest.fixture
def collector() -> Iterator[Collector]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = ExportTraceServiceRequest()
            sent.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
            for resource in sent.resource_spans:
                named = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                for scope in resource.scope_spans:
                    found.spans.extend((named["service.name"], span) for span in scope.spans)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def service(database_url: str, redis_url: str, tmp_path: Path, collector: Collector) -> Iterator[Service]:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",  # milliseconds
        # No worker is taken for dead here, however slow it is: its lines would be claimed, and traced, twice.
        "PAGEMILL_LEASE": "300",
        "PAGEMILL_FENCE_AFTER": "200",
        "PAGEMILL_WEBHOOK_ALLOW_PRIVATE": "true",
        "PAGEMILL_WEBHOOK_POLL_INTERVAL": "0.1",
    }
    with contextlib.closing(Service(database_url, redis_url, tmp_path, environment)) as service:
        yield service


def attributes(span: Any) -> dict[str, object]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}


def test_trace_leads_from_the_submission_to_the_webhook(service: Service, collector: Collector) -> None:
    with service.api() as client, service.courier(), service.worker(), receiver() as hook:
        client.headers["traceparent"] = f"00-{TRACE}-{SPAN}-01"
        answer = service.post(client, [[1, 2, 3]] * LINES, webhook={"url": hook.url})
        assert answer.status_code == 202
        accept = collector.await_one(TRACE, "POST /v1/jobs")
        assert accept.parent_span_id.hex() == SPAN
        assert attributes(accept) == {
            "http.request.method": "POST",
            "http.route": "/v1/jobs",
            "http.response.status_code": 202,
            "pagemill.request.id": answer.headers["x-request-id"],
        }
        wait = collector.await_one(TRACE, "wait for a claim")
        run = collector.await_one(TRACE, "run claimed lines")
        deliver = collector.await_one(TRACE, "deliver webhook")
        assert {span.parent_span_id for span in (wait, run, deliver)} == {accept.span_id}
        assert wait.start_time_unix_nano < wait.end_time_unix_nano
        told = attributes(run)
        assert told["pagemill.job.id"] == attributes(deliver)["pagemill.job.id"] == answer.json()["id"]
        assert (told["pagemill.lines"], told["pagemill.lines.completed"]) == (LINES, LINES)
        assert told["gen_ai.usage.input_tokens"] == 3 * LINES
        assert (attributes(deliver)["http.response.status_code"], attributes(deliver)["pagemill.attempt"]) == (204, 1)
        (received,) = hook.await_requests(1)
        assert received.headers["traceparent"] == f"00-{TRACE}-{deliver.span_id.hex()}-01"
        # A batch's lines are read in the background, long after the request that made it.
        client.headers["traceparent"] = f"00-{BATCH_TRACE}-{SPAN}-01"
        run_batch(client)
        make = collector.await_one(BATCH_TRACE, "POST /v1/batches")
        assert collector.await_one(BATCH_TRACE, "run claimed lines").parent_span_id == make.span_id
    services = {name: {span.name for of, span in collector.spans if of == name} for name, _ in collector.spans}
    assert {"wait for a claim", "run claimed lines"} <= services["pagemill-worker"]
    assert services["pagemill-courier"] == {"deliver webhook"}


def run_batch(client: Any) -> None:
    line = {
        "custom_id": "one",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 2},
    }
    made = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", orjson.dumps(line))})
    assert made.status_code == 200, made.text
    head = {"input_file_id": made.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    assert client.post("/v1/batches", json=head).status_code == 200


def test_neither_tracer_nor_exporter_is_imported_when_no_exporter_is_set() -> None:
    # redis-py imports what it finds of the SDK's metrics by itself.
    code = (
        "import sys\n"
        "from api.app import create_app\n"
        "from jobs.settings import Settings\n"
        "import worker.courier.process, worker.generation.service\n"
        "from jobs.tracing import start_tracer\n"
        "create_app(Settings(database_url='postgresql://u@127.0.0.1:1/x', redis_url='redis://127.0.0.1:1'))\n"
        "assert start_tracer('worker') is None\n"
        "ours = ('opentelemetry.sdk.trace', 'opentelemetry.exporter', 'google.protobuf', 'jobs.spans')\n"
        "print([name for name in sys.modules if name.startswith(ours)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_packages_are_named_and_cost_the_traces_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delitem(sys.modules, "jobs.spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert tracing.start_tracer("api") is None
    assert "is not installed: pip install" in caplog.text


@pytest.mark.parametrize("value", [None, "", "00-0", f"00-{TRACE}-{SPAN}-01\r\nx: y", f"00-{TRACE.upper()}-{SPAN}-01"])
def test_headers_that_are_no_trace_context_begin_a_trace_of_their_own(value: str | None) -> None:
    assert tracing.valid_traceparent(value) is None
