"""Step 1: one-layer models with the heads and widths of the real ones run, so that every kernel they launch compiles.

Each runs in a process of its own, all at once: what they compile is in Triton's cache for the steps after this one.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from bench.gpu.reporting import attempt, report, step_options
from bench.models import save_config
from kernels.sampling import argmax, sample
from kernels.sampling_fallback import Filters

MODELS = ("gpt2-large", "qwen3-0.6b", "llama-3.1-8b")
BLOCK_SIZES = (16, 64)


def run_model(name: str, block_size: int, is_dry: bool) -> float:
    """Seconds of loading the model and running a prompt, decodes and mixed steps, greedy and sampled."""
    from engine import Engine, EngineConfig, SamplingParams

    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as directory:
        save_config(name, Path(directory))
        vocab_size = cut_to_one_layer(Path(directory))
        engine = Engine.from_pretrained(
            directory,
            EngineConfig(
                device="cpu" if is_dry else "cuda",
                dtype="float32" if is_dry else "bfloat16",
                random_weights=True,
                max_model_len=256,
                max_num_seqs=8,
                max_num_batched_tokens=64,
                num_kv_blocks=2048 // block_size,
                block_size=block_size,
            ),
        )
    params = (
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=1, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=1.0, top_p=0.9, top_k=50, seed=1, max_tokens=20, ignore_eos=True),
    )
    prompts = [[1000 + place] * length for place, length in enumerate((5, 90, 17))]
    for chosen in params:
        for output in engine.generate(prompts, [chosen] * len(prompts)):
            if output.error is not None:
                raise RuntimeError(output.error)
    engine.close()
    draw_for_many_rows(vocab_size, torch.device("cpu" if is_dry else "cuda"))
    return time.perf_counter() - began


def draw_for_many_rows(vocab_size: int, device: torch.device) -> None:
    """Tokens of rows that have a program each, as large batches have: other kernels than those of few rows."""
    rows = 8 if device.type == "cpu" else 256
    logits = torch.zeros(rows, vocab_size, dtype=torch.bfloat16, device=device)
    ones, whole = torch.ones(rows, device=device), torch.arange(rows, device=device)
    argmax(logits)
    for filters in (Filters(0, top_p=False, min_p=False), Filters(50, top_p=True, min_p=False)):
        top_k = whole * 0 + (filters.top_k or vocab_size)
        sample(logits, ones, top_k, ones * 0.9, ones * 0, whole, whole, whole, filters=filters)


def cut_to_one_layer(directory: Path) -> int:
    """Change a saved configuration: one layer, all widths as they are. Returns the size of its vocabulary."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    layers = next(name for name in ("n_layer", "num_hidden_layers") if name in config)
    config[layers] = 1
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:1]
    path.write_text(json.dumps(config))
    vocab_size: int = config["vocab_size"]
    return vocab_size


def main() -> None:
    options = step_options()
    if options.is_dry:
        with attempt("tiny, blocks of 16"):
            report("tiny, blocks of 16", seconds=run_model("tiny", 16, True))
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(MODELS) * len(BLOCK_SIZES), mp_context=spawn) as pool:
        waiting = {
            pool.submit(run_model, name, block_size, False): f"{name}, blocks of {block_size}"
            for name in MODELS
            for block_size in BLOCK_SIZES
        }
        for done in as_completed(waiting):
            with attempt(waiting[done]):
                report(waiting[done], seconds=done.result())


if __name__ == "__main__":
    main()
