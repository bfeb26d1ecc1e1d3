"""The whole service: API, Postgres, Valkey, courier and one worker; from the POST of a job to its last result line."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.contender import PRECISIONS, Contender, Output, Setup, WorkloadRunner
from bench.pagemill import KV_CACHE_BYTES
from bench.workload import WorkloadRequest

if TYPE_CHECKING:
    from cli.stack import RunningStack

PATIENCE = 60.0  # seconds that one look at the job may take; it is looked at until it ends


@contextlib.contextmanager
def running_service(directory: Path, model: Path | str, precision: str, compute: str) -> Iterator[RunningStack]:
    """The service with its files under `directory`; a model's directory is served by its name."""
    from cli.stack import running_stack
    from jobs.settings import Settings

    is_int8 = precision == "int8"
    settings = Settings(
        data_dir=directory / "data",
        port=0,
        device="cpu",
        dtype=compute if is_int8 else precision,
        quantization="int8" if is_int8 else None,
        kv_cache_bytes=KV_CACHE_BYTES,
    )
    with running_stack(settings, [str(model)]) as stack:
        yield stack


class _Service(WorkloadRunner):
    def __init__(self, setup: Setup) -> None:
        from cli.client import Client

        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pagemill-bench-")))
            self._stack = stack.enter_context(running_service(directory, setup.model, setup.precision, setup.compute))
            self._client = stack.enter_context(contextlib.closing(Client(self._stack.base_url, self._stack.api_key)))
            self._lines = directory / "job.jsonl"
            self._running = stack.pop_all()
        self._model = setup.model.name

    def generate(self, requests: Sequence[WorkloadRequest]) -> list[Output]:
        from cli.client import TERMINAL, Submission

        with self._lines.open("w") as file:
            for place, request in enumerate(requests):
                line = {"custom_id": str(place), "prompt": request.prompt, "max_tokens": request.max_tokens}
                file.write(json.dumps(line | {"temperature": 0, "ignore_eos": not request.stops_at_eos}) + "\n")
        job = self._client.submit(self._lines, Submission(self._model))
        while job["status"] not in TERMINAL:
            job = self._client.job(job["id"], wait=PATIENCE)
        tokens: dict[str, int] = {}
        for text in self._client.results(job["id"]):
            result = json.loads(text)
            if result["error"] is not None:
                raise RuntimeError(result["error"]["message"])
            tokens[result["custom_id"]] = result["response"]["body"]["usage"]["completion_tokens"]
        return [Output(tokens[str(place)]) for place in range(len(requests))]

    def processes(self) -> Sequence[int]:
        """The worker: what it needs is what depends on the model."""
        return [self._stack.pids()["worker"]]

    def close(self) -> None:
        self._running.close()


CONTENDERS = (
    Contender(
        name="service",
        title="Pagemill, whole service",
        precisions=PRECISIONS,
        start=_Service,
        packages=("torch", "transformers"),
        may_be_stopped=False,
    ),
)
