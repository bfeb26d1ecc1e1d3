"""What queued requests cost those that run: `python -m bench.waiting`.

One engine with a small model decodes the same batch while 100, 10,000 and 100,000 requests wait behind it, in turns. A
step should take as long in each case. One thread, since it is the host's part that could grow.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.models import save_config
from bench.report import save
from engine import Engine, EngineConfig, SamplingParams

WAITING = (100, 10_000, 100_000)
RUNNING = 64
PROMPT = list(range(1_000, 1_008))
STEPS = 100
ROUNDS = 3


def measure(model: str = "tiny") -> dict[str, Any]:
    """Milliseconds of a decode step, by how many requests wait."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory:
        save_config(model, Path(directory))
        # One token a step, so that the host has its part in each and none of the running requests ends.
        config = EngineConfig(device="cpu", dtype="float32", random_weights=True, max_num_seqs=RUNNING, decode_steps=1)
        engine = Engine.from_pretrained(directory, config)
    steps: dict[int, list[float]] = {waiting: [] for waiting in WAITING}
    adding: dict[int, list[float]] = {waiting: [] for waiting in WAITING}
    for _ in range(ROUNDS):
        for waiting in WAITING:
            adding[waiting].append(_fill(engine, RUNNING + waiting))
            engine.step()  # the prompts
            steps[waiting] += _steps(engine)
            for number in range(RUNNING + waiting):
                engine.abort(str(number))
            while engine.has_unfinished:
                engine.step()
    return {
        "model": model,
        "running": RUNNING,
        "median_step_ms": {str(waiting): 1e3 * statistics.median(found) for waiting, found in steps.items()},
        "median_add_us": {str(waiting): 1e6 * statistics.median(found) for waiting, found in adding.items()},
    }


def _fill(engine: Engine, requests: int) -> float:
    """Queue them; returns the seconds for each."""
    # Long enough that none of the running ones ends, so that none of the waiting ones starts.
    params = SamplingParams(temperature=0, max_tokens=engine.max_model_len - len(PROMPT), ignore_eos=True)
    began = time.perf_counter()
    for number in range(requests):
        engine.add(str(number), PROMPT, params)
    return (time.perf_counter() - began) / requests


def _steps(engine: Engine) -> list[float]:
    """Seconds of each of some decode steps, asking for room after each as the service does."""
    found = []
    for _ in range(STEPS):
        began = time.perf_counter()
        engine.step()
        engine.num_requests_wanted()
        found.append(time.perf_counter() - began)
    if engine.stats().running != RUNNING:
        raise RuntimeError(f"{engine.stats().running} requests run instead of {RUNNING}")
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    save("waiting", measure())
