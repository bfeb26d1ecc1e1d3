"""How fast lines come in over HTTP, and what that costs the API in memory.

    python -m bench.submission [LINES]

One NDJSON stream of lines of 1 kB for a model without a worker, so that nothing but the API, Postgres and this client
uses the machine. The first stream of 200 lines warms everything up and gives the memory to compare with.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.report import save
from bench.usage import peak_memory
from cli.client import Client, Submission
from cli.models import DEMO
from cli.stack import running_stack
from jobs.database import connect
from jobs.ids import new_id
from jobs.queries import workers
from jobs.queries.workers import WorkerIdentity
from jobs.requests import ModelLimits
from jobs.settings import Settings

MODEL = "without-a-worker"
LINE_BYTES = 1000
REPEATS = 3


def measure(lines: int) -> dict[str, Any]:
    """Lines a second of `REPEATS` streams, and the API's peak resident memory in MiB after few and after many lines."""
    with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory:
        settings = Settings(data_dir=Path(directory) / "data", port=0)
        with running_stack(settings, [DEMO]) as stack:
            _register(settings.model_copy(update={"database_url": stack.database_url}))
            with contextlib.closing(Client(stack.base_url, stack.api_key)) as client:
                few, many = Path(directory) / "few.jsonl", Path(directory) / "many.jsonl"
                _write(few, 200)
                _write(many, lines)
                client.submit(few, Submission(MODEL))
                after_few = _mib(peak_memory([stack.pids()["api"]]))
                rates = []
                for _ in range(REPEATS):
                    began = time.perf_counter()
                    client.submit(many, Submission(MODEL))
                    rates.append(lines / (time.perf_counter() - began))
                after_many = _mib(peak_memory([stack.pids()["api"]]))
    return {
        "lines": lines,
        "line_bytes": LINE_BYTES,
        "lines_per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
        "api_peak_mib_after_200_lines": after_few,
        f"api_peak_mib_after_{REPEATS}_times_{lines}_lines": after_many,
    }


def _register(settings: Settings) -> None:
    worker = WorkerIdentity(new_id(), "bench", 0, "none")
    with contextlib.closing(connect(settings, "pagemill bench").connect()) as connection, connection.begin():
        workers.register(connection, worker, ModelLimits(MODEL, 100_000, 100_000), lease=60)
        workers.end(connection, worker.id)


def _write(file: Path, lines: int) -> None:
    with file.open("w") as target:
        for line in range(lines):
            head = {"custom_id": f"line-{line}", "max_tokens": 16, "prompt": ""}
            head["prompt"] = "x" * (LINE_BYTES - len(json.dumps(head)) - 1)
            target.write(json.dumps(head) + "\n")


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


if __name__ == "__main__":
    save("submission", measure(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000))
