"""What `deterministic=True` costs: `python -m bench.determinism`.

A GPT-2 of the usual small size with random weights, 50 prompts of 8 tokens, 50 tokens each. Engines with the mode and
without it take turns; a ratio is that of two turns of one round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import GPT2Config

from bench.report import save
from engine import Engine, EngineConfig, SamplingParams

REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 50, 8, 50
ROUNDS = 3


def measure() -> dict[str, Any]:
    """Output tokens a second of both, and how many times slower the mode is."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 50_000, (REQUESTS, PROMPT_TOKENS), generator=generator).tolist()
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory:
        GPT2Config().save_pretrained(directory)
        engines = {
            name: Engine.from_pretrained(
                directory,
                EngineConfig(
                    dtype="float32",
                    device="cpu",
                    random_weights=True,
                    enable_prefix_caching=False,
                    deterministic=name == "deterministic",
                ),
            )
            for name in ("ordinary", "deterministic")
        }
    for engine in engines.values():
        engine.generate(prompts[:4], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            began = time.perf_counter()
            outputs = engine.generate(prompts, params)
            seconds = time.perf_counter() - began
            rates[name].append(sum(len(output.token_ids) for output in outputs) / seconds)
    slower = [plain / fixed for plain, fixed in zip(rates["ordinary"], rates["deterministic"], strict=True)]
    return {
        "model": "gpt2 (124 M), float32, random weights",
        "requests": REQUESTS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
        "output_tokens_per_second": {name: _spread(found) for name, found in rates.items()},
        "deterministic_is_slower_by": _spread(slower),
    }


def _spread(found: list[float]) -> dict[str, float]:
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    save("determinism", measure())
