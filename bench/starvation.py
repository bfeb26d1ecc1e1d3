"""Does an engine ever wait for a claim while requests do? `python -m bench.starvation`

A worker's own threads (claim loop, engine, writer, heartbeat) and a Postgres of its own, with fsync. The model is tiny,
so that its requests end as fast as can be: more of them a second than any real model's. More requests wait than are
measured, so a place of the batch for which none is queued when a step begins is one that waits for a claim.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from sqlalchemy import text

from bench.claiming import stage_jobs
from bench.models import save_config
from bench.report import save
from bench.usage import CpuTime
from cli.child_logs import ChildLog
from cli.data_dir import DataDir
from cli.embedded import embedded_services
from engine import Engine, EngineConfig, RequestOutput
from jobs.database import connect
from jobs.ids import new_id
from jobs.queries import workers
from jobs.queries.workers import WorkerIdentity
from jobs.requests import ModelLimits
from jobs.settings import Settings
from migrations.run import upgrade
from worker.generation.engine_roster import ServedModel
from worker.generation.service import GenerationService

MODEL = ModelLimits("tiny", 256, 16_000)
PROMPT_TOKENS = 4
CASES = {1: 16_000, 8: 4_000, 64: 1_500}  # tokens of each answer, and requests that are measured
BEHIND = 4_000  # requests beyond those that are measured
PATIENCE = 600.0  # seconds for a case


@dataclass(frozen=True, slots=True)
class Step:
    """A step as the engine's caller sees it, in seconds of one clock."""

    began: float
    ended: float
    queued: int
    """Requests that the engine had queued when it began."""
    empty: int
    """Places of the batch beyond these."""
    finished: int
    has_more: bool
    """Whether the engine had work left when it ended."""


class WatchedEngine(Engine):
    """An engine that notes its steps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.steps: list[Step] = []
        self.num_finished = 0
        self.is_done = threading.Event()
        self.enough: int | None = None

    def step(self) -> list[RequestOutput]:
        """See `Engine.step`."""
        queued = len(self.scheduler.waiting)
        empty = max(0, self.config.max_num_seqs - len(self.scheduler.running) - queued)
        began = time.perf_counter()
        outputs = super().step()
        self.steps.append(Step(began, time.perf_counter(), queued, empty, len(outputs), self.has_unfinished))
        self.num_finished += len(outputs)
        if self.enough is not None and self.num_finished >= self.enough:
            self.is_done.set()
        return outputs


def measure(answer_tokens: int, requests: int) -> dict[str, Any]:
    """The worker's figures for answers of one length."""
    torch.set_num_threads(1)  # in so small a model a second one only waits
    with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory, contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(ChildLog(Path(directory) / "logs")))
        services = stack.enter_context(embedded_services(DataDir(Path(directory) / "data"), log, valkey=False))
        assert services.database_url is not None
        upgrade(services.database_url)
        settings = Settings(database_url=services.database_url, redis_url=None)
        database = connect(settings, "pagemill bench")
        stack.callback(database.dispose)
        with database.begin() as connection:
            workers.register(connection, WorkerIdentity(new_id(), "bench", 0, "none"), MODEL, lease=3600)
        stage_jobs(database, MODEL.name, requests + BEHIND, lambda choose: _line(choose, answer_tokens))
        save_config(MODEL.name, Path(directory))
        config = EngineConfig(device="cpu", dtype="float32", random_weights=True)
        engine = WatchedEngine.from_pretrained(directory, config)
        assert isinstance(engine, WatchedEngine)
        engine.enough = requests
        service = GenerationService(settings, [ServedModel(MODEL.name, lambda: engine)], device="cpu")
        before, began = CpuTime.now(os.getpid()), time.perf_counter()
        service.start()
        stack.callback(service.stop, drain=0)
        if not engine.is_done.wait(PATIENCE):
            raise RuntimeError(f"{engine.num_finished} of {requests} requests finished in {PATIENCE:.0f} s")
        others = CpuTime.now(os.getpid()).others_since(before) / (time.perf_counter() - began)
        with database.connect() as connection:
            # Every row of a claim has its moment.
            claims = connection.execute(
                text("SELECT count(*) FROM requests WHERE claimed_at IS NOT NULL GROUP BY claimed_at")
            ).scalars()
            claim_sizes = list(claims)
        figures = _figures(list(engine.steps), engine.config.max_num_seqs)
        return {
            "answer_tokens": answer_tokens,
            **figures,
            "claims": len(claim_sizes),
            "requests_a_claim": statistics.median(claim_sizes),
            "cores_that_others_used": round(others, 2),
        }


def _line(choose: random.Random, answer_tokens: int) -> bytes:
    prompt = [choose.randrange(MODEL.vocab_size) for _ in range(PROMPT_TOKENS)]
    return orjson.dumps({"prompt": prompt, "max_tokens": answer_tokens, "ignore_eos": True, "temperature": 0})


def _figures(steps: Sequence[Step], places: int) -> dict[str, Any]:
    """From the first step with a full batch to the last, which both had more waiting in Postgres."""
    steps = list(itertools.dropwhile(lambda step: step.empty > 0, steps))
    wall = steps[-1].began - steps[0].began
    without_work = empty = 0.0  # seconds of the engine, and of its places in batches
    for step, following in itertools.pairwise(steps):
        gap = 0.0 if step.has_more else following.began - step.ended
        without_work += gap
        empty += step.empty / places * (following.began - step.began - gap) + gap
    return {
        "seconds": round(wall, 1),
        "requests_a_second": round(sum(step.finished for step in steps[:-1]) / wall),
        "step_ms": _milliseconds([step.ended - step.began for step in steps]),
        "finished_a_step_at_most": max(step.finished for step in steps),
        "queued_for_a_step": {
            "median": statistics.median(step.queued for step in steps),
            "least": min(step.queued for step in steps),
        },
        "steps_that_began_with_an_empty_place": sum(step.empty > 0 for step in steps),
        "steps": len(steps),
        "empty_places": round(empty / wall, 4),
        "without_work": round(without_work / wall, 4),
    }


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    percentiles = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(1e3 * percentiles[49], 1), "p99": round(1e3 * percentiles[98], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answer-tokens", type=int, choices=CASES, action="append", help="of the cases; else all")
    options = parser.parse_args()
    cases = options.answer_tokens or CASES
    save("starvation", {"prompt_tokens": PROMPT_TOKENS, "cases": [measure(case, CASES[case]) for case in cases]})


if __name__ == "__main__":
    main()
