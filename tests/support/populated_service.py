"""A service with a few of everything in it, for requests that are made up and need ids of things that exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from jobs.ids import WORKER_PREFIX, new_id, public_id
from jobs.queries import workers
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import Outcome, settle
from jobs.queries.workers import WorkerIdentity
from tests.support.rows import MODEL, Rows
from worker.generation.responses import Answer, Choice, completed, refused

EACH = 6  # things for each operation that takes an id: one that ends or removes them leaves some
LINES = 3
ENDED = 48  # jobs and message batches at their end, of each
LEASE = 3600.0  # seconds: workers stay alive, whatever they are asked

ASKED = {"model": MODEL.name, "max_tokens": 4, "messages": [{"role": "user", "content": "2 + 2 ="}]}
FILE_LINE = b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"demo","prompt":"2 + 2 ="}}\n'


class PopulatedService:
    """Makes things over HTTP as their owner does, and plays the worker that answers."""

    def __init__(self, client: httpx.Client, rows: Rows) -> None:
        self._client = client
        self._rows = rows
        self._endpoint()  # hears of each job's end: the deliveries
        self._ended_jobs = [self._job() for _ in range(ENDED)]
        self._ended_message_batches = [self._message_batch() for _ in range(ENDED)]
        self._answer_all()
        log = client.get("/v1/webhooks/deliveries", params={"limit": ENDED}).raise_for_status().json()
        self._deliveries = [delivery["id"] for delivery in log["data"]]

    def put_ids(self, document: dict[str, Any]) -> None:
        """Let an OpenAPI document's paths and bodies name things that exist, those of an operation for it alone."""
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                for parameter in operation.get("parameters", ()):
                    if parameter["name"] == "line":
                        parameter["schema"] = {"type": "integer", "enum": list(range(1, LINES + 1))}
                    elif parameter["name"] == "wait":
                        parameter["schema"] = {"type": "number", "minimum": 0, "maximum": 0.1}
                    elif parameter["in"] == "path":
                        make = self._maker(parameter["name"], method, path)
                        parameter["schema"] = {"type": "string", "enum": sorted({make() for _ in range(EACH)})}
        name_in_requests(document, "model", [MODEL.name])
        name_in_requests(document, "input_file_id", [self._file() for _ in range(EACH)])

    def _maker(self, name: str, method: str, path: str) -> Callable[[], str]:
        of_ended = re.search(r"/(retry|events|results|lines/\{line\})$", path) is not None or method == "delete"
        makers: Mapping[str, Callable[[], str]] = {
            "batch_id": self._batch,
            "delivery_id": self._deliveries.pop,
            "endpoint_id": self._endpoint,
            "file_id": self._file,
            "job_id": self._ended_jobs.pop if of_ended else self._job,
            "key_id": self._key,
            "message_batch_id": self._ended_message_batches.pop if of_ended else self._message_batch,
            "name": lambda: MODEL.name,
            "upload_id": self._upload,
            "worker_id": self._worker,
        }
        of_few: Mapping[str, Callable[[], str]] = {
            "/v1/jobs/{job_id}/finalize": self._open_job,
            "/v1/jobs/{job_id}/lines": self._open_job,
            "/v1/uploads/{upload_id}/complete": self._empty_upload,
        }
        return of_few.get(path, makers[name])

    def _made(self, path: str, **request: Any) -> str:
        made: str = self._client.post(path, **request).raise_for_status().json()["id"]
        return made

    def _job(self) -> str:
        return self._made("/v1/jobs", json={"model": MODEL.name, "prompts": ["2 + 2 ="] * LINES})

    def _open_job(self) -> str:
        job_id = self._made("/v1/jobs/open", json={"model": MODEL.name})
        self._client.post(f"/v1/jobs/{job_id}/lines", json={"prompts": ["2 + 2 ="]}).raise_for_status()
        return job_id

    def _message_batch(self) -> str:
        requests = [{"custom_id": f"c{line}", "params": ASKED} for line in range(LINES)]
        return self._made("/v1/messages/batches", json={"requests": requests})

    def _file(self) -> str:
        return self._made("/v1/files", files={"file": ("in.jsonl", FILE_LINE), "purpose": (None, "batch")})

    def _batch(self) -> str:
        asked = {"input_file_id": self._file(), "endpoint": "/v1/completions", "completion_window": "24h"}
        return self._made("/v1/batches", json=asked)

    def _upload(self, size: int = 3) -> str:
        asked = {"bytes": size, "filename": "in.jsonl", "mime_type": "application/jsonl", "purpose": "batch"}
        return self._made("/v1/uploads", json=asked)

    def _empty_upload(self) -> str:
        return self._upload(0)  # which is complete without a part

    def _endpoint(self) -> str:
        asked = {"name": "mine", "url": "https://example.com/hook", "event_types": ["job.completed"]}
        return self._made("/v1/webhook_endpoints", json=asked)

    def _key(self) -> str:
        return self._made("/v1/keys", json={"name": "made for a test"})

    def _worker(self) -> str:
        worker = WorkerIdentity(new_id(), host="test", pid=1, device="cpu")
        with self._rows.database.begin() as connection:
            workers.register(connection, worker, MODEL, lease=LEASE)
        return public_id(WORKER_PREFIX, worker.id)

    def _answer_all(self) -> None:
        worker_id = self._rows.worker()
        while claimed := self._rows.claim(worker_id).requests:
            with self._rows.database.begin() as connection:
                settle(connection, [_outcome(request) for request in claimed])


def name_in_requests(document: dict[str, Any], field: str, values: list[str]) -> None:
    """Let a field of queries and JSON bodies be one of these values."""
    wanted = {"type": "string", "enum": values}
    for methods in document["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "query" and parameter["name"] == field:
                    parameter["schema"] = wanted
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            for schema in [content.get("schema", {}), *content.get("schema", {}).get("anyOf", ())]:
                if field in schema.get("properties", {}):
                    schema["properties"][field] = wanted


def _outcome(request: ClaimedRequest) -> Outcome:
    """An answer, but for the last line an error: what can be retried."""
    if request.line == LINES:
        return refused(request, "it does not fit", code="context_length_exceeded")
    is_chat = b'"messages"' in request.body
    said: Any = {"role": "assistant", "content": "4", "refusal": None} if is_chat else "4"
    answer = Answer([Choice(said, "stop")], prompt_tokens=5, cached_tokens=0, completion_tokens=1)
    return completed(request, MODEL.name, answer, is_chat=is_chat)
