"""What the size of a step brings on this CPU: `python -m bench.step_sizes`.

Prompts: engines that read a fixed number of tokens a step and one that chooses the number by what its steps took
(`engine/scheduling/prefill_budget.py`) take turns; a ratio is that of two turns of the same round. The one that
chooses knows nothing at first. Decodes: tokens a second of one engine, by how many sequences decode together.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.machine import cores
from bench.models import save_config
from bench.report import save
from bench.workload import FIRST_TOKEN, LAST_TOKEN
from engine import Engine, EngineConfig, SamplingParams
from engine.scheduling.prefill_budget import PrefillBudgetTuner, candidate_budgets

MOST = 2048
FIXED = (2048, 512, 256)
ROUNDS = 3
TOGETHER = (16, 32, 64, 128, 256)
STEPS = 8


@dataclass(frozen=True, slots=True)
class StepSizeCase:
    """A model of `bench.models`, and prompts with a new token or more for each."""

    model: str
    requests: int
    shortest: int
    longest: int
    new_tokens: int


CASES = (
    StepSizeCase("gpt2", requests=12, shortest=16, longest=512, new_tokens=16),
    StepSizeCase("tiny", requests=200, shortest=16, longest=192, new_tokens=16),
)


def measure() -> dict[str, Any]:
    torch.set_num_threads(cores())
    engines = {case.model: _engine(case.model) for case in CASES}
    return {
        "prompts": [_prompts(engines[case.model], case) for case in CASES],
        "decodes": [_decodes(engines[case.model], case.model) for case in CASES],
    }


def _engine(model: str) -> Engine:
    with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory:
        save_config(model, Path(directory))
        config = EngineConfig(
            device="cpu", dtype="float32", random_weights=True, max_num_batched_tokens=MOST, cpu_kv_cache_bytes=1 << 30
        )
        engine = Engine.from_pretrained(directory, config)
    _seconds(engine, [_tokens(random.Random(0), 100)] * 4, 4)  # what happens only once
    return engine


def _prompts(engine: Engine, case: StepSizeCase) -> dict[str, Any]:
    """Tokens a second of all contenders, prompts and new ones together, and ratios to the largest steps."""
    contenders = {str(size): PrefillBudgetTuner([size]) for size in FIXED} | {
        "chosen": PrefillBudgetTuner(candidate_budgets(MOST))
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    chosen = []
    turns = _turns(case)
    for _ in range(ROUNDS):
        for name, tuner in contenders.items():
            engine.scheduler.prefill_budget = tuner
            prompts = next(turns)
            seconds = _seconds(engine, prompts, case.new_tokens)
            rates[name].append(sum(len(prompt) + case.new_tokens for prompt in prompts) / seconds)
        chosen.append(contenders["chosen"].chosen)
    base = rates[str(MOST)]
    return {
        "model": case.model,
        "requests": f"{case.requests} × ({case.shortest}…{case.longest} + {case.new_tokens})",
        "tokens_per_second": {name: _spread(found) for name, found in rates.items()},
        f"times_as_fast_as_{MOST}": {
            name: _spread([one / other for one, other in zip(found, base, strict=True)])
            for name, found in rates.items()
        },
        "chosen_after_each_round": chosen,
    }


def _turns(case: StepSizeCase) -> Iterator[list[list[int]]]:
    """Prompts for one turn after the other: always of the same lengths, never with the same tokens."""
    lengths = [random.Random(number).randint(case.shortest, case.longest) for number in range(case.requests)]
    tokens = random.Random(case.model)
    while True:
        yield [_tokens(tokens, length) for length in lengths]


def _decodes(engine: Engine, model: str) -> dict[str, Any]:
    """Tokens a second by how many sequences decode together, from contexts of a few tokens."""
    engine.scheduler.prefill_budget = PrefillBudgetTuner([MOST])
    chance = random.Random(model)
    params = SamplingParams(temperature=0, max_tokens=STEPS + 1, ignore_eos=True)
    rates: dict[int, list[float]] = {together: [] for together in TOGETHER}
    for _ in range(ROUNDS):
        for together in TOGETHER:
            for number in range(together):
                engine.add(str(number), _tokens(chance, MOST // max(TOGETHER)), params)
            engine.step()  # all prompts, and the first token of each
            began = time.perf_counter()
            while engine.has_unfinished:
                engine.step()
            rates[together].append(together * STEPS / (time.perf_counter() - began))
    return {
        "model": model,
        "tokens_per_second": {str(together): _spread(found) for together, found in rates.items()},
    }


def _seconds(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    began = time.perf_counter()
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True))
    seconds = time.perf_counter() - began
    if any(output.error is not None for output in outputs):
        raise RuntimeError("a request failed")
    return seconds


def _tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]


def _spread(found: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    save("step_sizes", measure())
