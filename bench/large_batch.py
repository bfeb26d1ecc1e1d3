"""`python -m bench batch`: a batch file of a million lines, uploaded, validated, run and downloaded.

The whole service with the demo model, one token a line, so that what is measured is the service and not the model. Each
phase has its seconds, the CPU and the memory of each process; the downloaded lines are held against the file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import orjson
from sqlalchemy import text

from bench.process_samples import PhaseUsage, ProcessSamples
from bench.publish import write_section
from bench.report import save
from bench.usage import peak_memory
from cli.models import DEMO
from jobs.database import connect_unpooled

if TYPE_CHECKING:
    from cli.stack import RunningStack

NAME = "batch"
LINES = 1_000_000
LINE_BYTES = 300
ENDPOINT = "/v1/completions"
PROCESSES = ("api", "worker", "courier", "postgres")
PHASES = ("upload", "validate", "generate", "store results", "download")
LOOK = 0.25  # seconds between two looks at the batch
PARTS = 10  # of the generation, whose rates are compared
PATIENCE = 600.0  # seconds for one answer
KEPT_TABLES = ("requests", "bodies", "results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--threads", type=int, default=1, help="of the engine: in so small a model they only wait")
    parser.add_argument("--directory", type=Path, help="where the service's files go; else a temporary directory")
    parser.add_argument("--keep", action="store_true", help="write the result and its part of docs/benchmarks.md")


def run(options: argparse.Namespace) -> int:
    """Run what the parsed options ask for. Returns the exit code."""
    found = {
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        **measure(options.lines, options.threads, options.directory),
    }
    print(table(found))
    if options.keep:
        record = save(NAME, found)
        write_section(NAME, section(record))
    return 0


def measure(lines: int, threads: int, place: Path | None = None) -> dict[str, Any]:
    """What each phase took, what the service's files and tables take at the end, and the rate of each tenth."""
    with (
        # What was measured is not given up for a log that is still written to.
        tempfile.TemporaryDirectory(prefix="pagemill-bench-", dir=place, ignore_cleanup_errors=True) as directory,
        contextlib.ExitStack() as stack,
    ):
        file = Path(directory) / "batch.jsonl"
        size = _write(file, lines)
        running = stack.enter_context(_service(Path(directory), threads))
        pids = {name: running.pids()[name] for name in PROCESSES}
        client = stack.enter_context(
            httpx.Client(
                base_url=running.base_url,
                headers={"authorization": f"Bearer {running.api_key}"},
                timeout=PATIENCE,
                trust_env=False,
            )
        )
        samples = stack.enter_context(ProcessSamples(pids))
        usage: dict[str, PhaseUsage] = {}

        @contextlib.contextmanager
        def phase(name: str) -> Iterator[None]:
            with samples.phase() as usage[name]:
                yield
            print(f"  {name}: {usage[name].seconds:,.1f} s", file=sys.stderr, flush=True)

        with phase("upload"):
            file_id = _upload(client, file)
        with phase("validate"):
            batch = _create(client, file_id)
            _await(client, batch, lambda found: found["status"] != "validating")
        seen: list[tuple[float, int]] = []
        with phase("generate"):
            _await(client, batch, lambda found: found["status"] != "in_progress", seen)
        with phase("store results"):
            done = _await(client, batch, lambda found: found["status"] != "finalizing")
        _require(done["status"], "completed")
        _require(done["request_counts"], {"total": lines, "completed": lines, "failed": 0})
        output = Path(directory) / "output.jsonl"
        with phase("download"):
            _download(client, done["output_file_id"], output)
        _check(output, lines)
        return {
            "model": DEMO,
            "lines": lines,
            "engine_threads": threads,
            "file_bytes": size,
            "output_bytes": output.stat().st_size,
            "phases": {name: asdict(found) for name, found in usage.items()},
            "peak_resident_bytes": {name: peak_memory([pid]) for name, pid in pids.items() if name != "postgres"},
            "lines_per_second_by_part": _rates(seen, lines),
            "disk_bytes": {
                "database": _size(Path(directory) / "data" / "postgres"),
                "files": _size(Path(directory) / "data" / "files"),
                "tables": _table_sizes(running.database_url),
            },
        }


def table(found: Mapping[str, Any]) -> str:
    """The result as Markdown: a row for each phase, and one for what each process took at most."""
    lines = found["lines"]
    rows = [
        ("", "seconds", "lines/s", *(f"{name}: CPU µs a line" for name in PROCESSES), *PROCESSES),
        ("---", *["---:"] * (2 + 2 * len(PROCESSES))),
    ]
    for name in PHASES:
        usage = found["phases"][name]
        rows.append(
            (
                name,
                f"{usage['seconds']:,.1f}",
                f"{lines / usage['seconds']:,.0f}",
                *(f"{1e6 * usage['cpu_seconds'][process] / lines:,.0f}" for process in PROCESSES),
                *(f"{usage['peak_bytes'][process] / 2**20:,.0f}" for process in PROCESSES),
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def section(record: Mapping[str, Any]) -> str:
    """What docs/benchmarks.md says of a kept result, between its markers."""
    found, measured = record["found"], record["measured"]
    disk, rates = found["disk_bytes"], found["lines_per_second_by_part"]
    tables = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in disk["tables"].items())
    peaks = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in found["peak_resident_bytes"].items())
    return "\n".join(
        [
            f"`{found['command']}` · {measured['at'][:10]} · commit {measured['commit']} · {measured['cpu']}, "
            f"{measured['cores']} threads, load {measured['load_1_min']:g} at the end · {found['lines']:,} lines, "
            f"{found['file_bytes'] / 1e6:,.0f} MB in, {found['output_bytes'] / 1e6:,.0f} MB out",
            "",
            table(found),
            "",
            "The last columns are MiB of memory at most; pages that processes share count once. Highest resident size "
            f"from start to end, MiB: {peaks}. Lines a second in each tenth of the generation: "
            f"{', '.join(f'{rate:,.0f}' for rate in rates)}. On disk at the end, MB: database "
            f"{disk['database'] / 1e6:,.0f} ({tables}, with their indexes), files {disk['files'] / 1e6:,.0f}.",
        ]
    )


@contextlib.contextmanager
def _service(directory: Path, threads: int) -> Iterator[RunningStack]:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # which the worker inherits
    from cli.stack import running_stack
    from jobs.settings import Settings

    with running_stack(Settings(data_dir=directory / "data", port=0, device="cpu"), [DEMO]) as stack:
        yield stack


def _write(file: Path, lines: int) -> int:
    """The batch's input, `LINE_BYTES` a line; returns its bytes. `user` is not stored: it makes the lines that long."""
    with file.open("w") as target:
        for number in range(lines):
            body = {"model": DEMO, "prompt": f"{number % 97} + {number % 89} =", "max_tokens": 1, "user": ""}
            line = {"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": body}
            body["user"] = "x" * max(0, LINE_BYTES - 1 - len(json.dumps(line)))
            target.write(json.dumps(line) + "\n")
    return file.stat().st_size


def _upload(client: httpx.Client, file: Path) -> str:
    with file.open("rb") as content:
        answer = client.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": (file.name, content, "application/jsonl")}
        )
    file_id: str = answer.raise_for_status().json()["id"]
    return file_id


def _create(client: httpx.Client, file_id: str) -> str:
    wanted = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"}
    batch_id: str = client.post("/v1/batches", json=wanted).raise_for_status().json()["id"]
    return batch_id


def _await(
    client: httpx.Client,
    batch_id: str,
    is_over: Callable[[Mapping[str, Any]], bool],
    seen: list[tuple[float, int]] | None = None,
) -> Mapping[str, Any]:
    """Look at the batch until `is_over`; each look's time and completed lines go into `seen`."""
    while True:
        batch: Mapping[str, Any] = client.get(f"/v1/batches/{batch_id}").raise_for_status().json()
        if seen is not None:
            seen.append((time.perf_counter(), batch["request_counts"]["completed"]))
        if is_over(batch):
            if batch["errors"]:
                raise RuntimeError(str(batch["errors"])[:1000])
            return batch
        time.sleep(LOOK)


def _download(client: httpx.Client, file_id: str, output: Path) -> None:
    with output.open("wb") as target, client.stream("GET", f"/v1/files/{file_id}/content") as answer:
        answer.raise_for_status()
        for piece in answer.iter_bytes():  # packed with gzip on the way, as clients ask for it
            target.write(piece)


def _check(output: Path, lines: int) -> None:
    """Every line is answered exactly once."""
    is_answered = bytearray(lines)
    with output.open("rb") as answers:
        for answer in answers:
            found = orjson.loads(answer)
            number = int(found["custom_id"].removeprefix("line-"))
            _require((found["response"]["status_code"], is_answered[number]), (200, 0))
            is_answered[number] = 1
    _require(sum(is_answered), lines)


def _rates(seen: Sequence[tuple[float, int]], lines: int) -> list[float]:
    """Lines a second in each of `PARTS` equal parts of the lines; between two looks the rate is taken as even."""
    marks = [_reached(seen, part * lines / PARTS) for part in range(PARTS + 1)]
    return [round(lines / PARTS / (after - before), 1) for before, after in itertools.pairwise(marks)]


def _reached(seen: Sequence[tuple[float, int]], completed: float) -> float:
    """When so many lines were completed."""
    for (earlier, fewer), (later, more) in itertools.pairwise(seen):
        if more >= completed > fewer:
            return earlier + (later - earlier) * (completed - fewer) / (more - fewer)
    return seen[0][0]


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _table_sizes(database_url: str) -> dict[str, int]:
    with connect_unpooled(database_url, "pagemill bench").connect() as connection:
        return {
            name: connection.execute(
                text("SELECT pg_total_relation_size(CAST(:name AS regclass))"), {"name": name}
            ).scalar_one()
            for name in KEPT_TABLES
        }


def _require(found: object, expected: object) -> None:
    if found != expected:
        raise RuntimeError(f"{found} instead of {expected}")
