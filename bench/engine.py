"""Our bare engine beside transformers, on the same prompts in one run: `python -m bench.engine`.

A GPT-2 of the usual small size with random weights, 50 prompts of 8 tokens, 50 tokens each, greedy, no end of sequence:
all make the same number of tokens. Rivals take turns with us, and only ratios within one run mean anything.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from bench.report import save
from engine import Engine, EngineConfig, SamplingParams

REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 50, 8, 50
REPEATS = 3
SEQUENTIAL = 3  # requests that the one-by-one rival really runs; its time is scaled up


def measure() -> dict[str, Any]:
    """Output tokens a second of each, and our ratio to the others."""
    torch.manual_seed(0)
    prompts = torch.randint(1, 50_000, (REQUESTS, PROMPT_TOKENS))
    with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory:
        model: Any = AutoModelForCausalLM.from_config(GPT2Config())
        model.eval()
        model.save_pretrained(directory)
        runs: dict[str, Callable[[], float]] = {
            "pagemill": _pagemill(Path(directory), prompts),
            "transformers, one padded batch": lambda: _transformers(model, prompts),
            "transformers, one by one": lambda: _one_by_one(model, prompts),
        }
        for run in runs.values():
            run()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(REPEATS):
            for name, run in runs.items():
                seconds[name].append(run())
    tokens = REQUESTS * NEW_TOKENS
    rates = {name: [tokens / each for each in spent] for name, spent in seconds.items()}
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    return {
        "model": "gpt2 (124 M), float32, random weights",
        "requests": REQUESTS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
        "output_tokens_per_second": {
            name: {"median": medians[name], "min": min(rate), "max": max(rate)} for name, rate in rates.items()
        },
        "pagemill_is_faster_by": {name: medians["pagemill"] / medians[name] for name in medians if name != "pagemill"},
    }


def _pagemill(directory: Path, prompts: torch.Tensor) -> Callable[[], float]:
    engine = Engine.from_pretrained(directory, EngineConfig(dtype="float32", device="cpu", enable_prefix_caching=False))
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)

    def run() -> float:
        began = time.perf_counter()
        outputs = engine.generate(prompts.tolist(), params)
        seconds = time.perf_counter() - began
        assert all(len(output.token_ids) == NEW_TOKENS for output in outputs)
        return seconds

    return run


def _transformers(model: Any, prompts: torch.Tensor) -> float:
    began = time.perf_counter()
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    seconds = time.perf_counter() - began
    assert output.shape == (len(prompts), PROMPT_TOKENS + NEW_TOKENS)
    return seconds


def _one_by_one(model: Any, prompts: torch.Tensor) -> float:
    return sum(_transformers(model, prompts[i : i + 1]) for i in range(SEQUENTIAL)) * len(prompts) / SEQUENTIAL


if __name__ == "__main__":
    save("engine", measure())
