"""How long does a job wait for an idle worker, with notifications and by polling alone? `python -m bench.wakeup`

Runs the whole service twice, as `pagemill up` does: with its Redis, and with a Redis URL that refuses connections. Each
job is one prompt, handed in over HTTP at a random moment of the worker's poll. The wait is from publishing to the
claim, both by Postgres' clock; a trigger notes the claim, in the claim's own transaction.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from bench.report import save
from cli.stack import RunningStack, running_stack
from jobs.database import sqlalchemy_url
from jobs.settings import Settings

POLL_INTERVAL = Settings.model_fields["poll_interval"].default
WARM_UP = 3  # jobs before the first that counts
PATIENCE = 60.0  # seconds for one job

NOTE_CLAIMS = (
    "CREATE TABLE bench_claims (job_id uuid, claimed_at timestamptz)",
    "CREATE FUNCTION bench_note_claim() RETURNS trigger LANGUAGE plpgsql AS "
    "'BEGIN INSERT INTO bench_claims VALUES (NEW.job_id, clock_timestamp()); RETURN NULL; END'",
    "CREATE TRIGGER bench_note_claim AFTER UPDATE OF state ON requests FOR EACH ROW "
    "WHEN (NEW.state = 'running') EXECUTE FUNCTION bench_note_claim()",
)
WAITS = (
    "SELECT extract(epoch FROM min(c.claimed_at) - j.in_progress_at) "
    "FROM jobs j JOIN bench_claims c ON c.job_id = j.id GROUP BY j.id ORDER BY j.id"
)


def measure(stack: RunningStack, model: str, jobs: int) -> list[float]:
    """Seconds from publishing to claim, of `jobs` jobs that each find the worker idle."""
    database = create_engine(sqlalchemy_url(stack.database_url), poolclass=NullPool)
    with database.begin() as connection:
        for statement in NOTE_CLAIMS:
            connection.execute(text(statement))
    document = {"model": model, "prompts": ["1 + 1 ="], "params": {"max_tokens": 1}}
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    with httpx.Client(base_url=stack.base_url, headers=headers, timeout=PATIENCE, trust_env=False) as client:
        for _ in range(WARM_UP + jobs):
            # Else every job would come at the same moment of the poll: right after the last one.
            time.sleep(random.uniform(0, POLL_INTERVAL))
            job = client.post("/v1/jobs", json=document).raise_for_status().json()
            job = client.get(f"/v1/jobs/{job['id']}", params={"wait": PATIENCE}).raise_for_status().json()
            if job["status"] != "completed":
                raise RuntimeError(f"{job['id']} is {job['status']}")
    with database.connect() as connection:
        return [float(wait) for wait in connection.execute(text(WAITS)).scalars()][WARM_UP:]


@contextlib.contextmanager
def _unanswered_url() -> Iterator[str]:
    """A Redis URL at which connections are refused: the port is bound, and no server listens."""
    with socket.socket() as unanswered:
        unanswered.bind(("127.0.0.1", 0))
        yield f"redis://127.0.0.1:{unanswered.getsockname()[1]}/0"


def _figures(waits: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    percentiles = statistics.quantiles(waits, n=100, method="inclusive")
    return {"p50_ms": 1e3 * percentiles[49], "p95_ms": 1e3 * percentiles[94], "longest_ms": 1e3 * max(waits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=60, help="for each of the two ways")
    parser.add_argument("--model", default="demo", help="as for `pagemill worker`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pagemill-wakeup-") as directory, _unanswered_url() as unanswered:
        found = {}
        for name, redis_url in (("with notifications", None), ("by polling alone", unanswered)):
            # Only what is measured wakes the worker: the courier's own notifications are put off.
            settings = Settings(
                data_dir=Path(directory) / name.replace(" ", "-"), port=0, redis_url=redis_url, sweep_interval=3600
            )
            with running_stack(settings, [options.model]) as stack:
                served = httpx.get(
                    f"{stack.base_url}/v1/models", headers={"Authorization": f"Bearer {stack.api_key}"}, trust_env=False
                )
                model = served.raise_for_status().json()["data"][0]["id"]
                found[name] = _figures(measure(stack, model, options.jobs))
    save("wakeup", {"jobs_each_way": options.jobs, "poll_interval": POLL_INTERVAL, "publishing_to_claim": found})


if __name__ == "__main__":
    main()
