"""Step 3a: tiny models with random weights give the same greedy tokens in every way of running them.

In float32 every token must be the same as one by one with plain torch attention; in bfloat16 the share is reported.
"""

from __future__ import annotations

import gc
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.gpu.reporting import attempt, report, step_options
from bench.models import save_tokenizer
from engine import Engine, EngineConfig, SamplingParams

VOCABULARY = 2000
SHAPE = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDE = SHAPE | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 512}
GROUPED = WIDE | {"num_attention_heads": 4, "num_key_value_heads": 2}

WAYS: dict[str, dict[str, Any]] = {
    "one step at a time": {"decode_steps": 1},
    "up to 16 steps at once": {"decode_steps": 16},
    "chunked prompts": {"max_num_batched_tokens": 24},
    "preempted": {"num_kv_blocks": 16},
    "blocks of 64": {"block_size": 64, "num_kv_blocks": 64},
}


def configs() -> dict[str, Any]:
    """Of models with and without grouped heads, query norms, windows and soft caps."""
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

    gemma = GROUPED | {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32}
    return {
        "llama": LlamaConfig(**GROUPED),
        "qwen3": Qwen3Config(**GROUPED, head_dim=32),
        "gpt2": GPT2Config(**SHAPE, n_embd=128, n_layer=3, n_head=4, n_positions=512),
        "gemma2": Gemma2Config(**gemma),
    }


def greedy_tokens(directory: Path, device: str, dtype: str, **options: Any) -> list[list[int]]:
    draw = random.Random(0)
    prompts = [[draw.randrange(1, VOCABULARY) for _ in range(length)] for length in (3, 17, 64, 40, 1, 90)]
    config = {"num_kv_blocks": 128, "max_num_seqs": 8, "max_model_len": 160, "random_weights": True} | options
    engine = Engine.from_pretrained(directory, EngineConfig(device=device, dtype=dtype, **config))
    try:
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        outputs = [output for _ in range(2) for output in engine.generate(prompts, [params] * len(prompts))]
    finally:
        engine.close()
        del engine
        gc.collect()
    errors = [output.error for output in outputs if output.error is not None]
    if errors:
        raise RuntimeError(str(errors[0]))
    return [list(output.token_ids) for output in outputs]


def compare(name: str, directory: Path, device: str, dtype: str, ways: dict[str, dict[str, Any]]) -> None:
    expected = greedy_tokens(directory, device, dtype, decode_steps=1, attention="torch")
    for way, options in ways.items():
        what = f"{name}, {dtype}: {way}"
        with attempt(what):
            tokens = greedy_tokens(directory, device, dtype, **options)
            pairs = [
                pair for ours, theirs in zip(tokens, expected, strict=True) for pair in zip(ours, theirs, strict=True)
            ]
            share = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
            if dtype == "float32" and share < 1:
                raise AssertionError(f"only {share:.1%} of the tokens are those of plain torch attention")
            report(what, same_tokens=share)


def main() -> None:
    options = step_options()
    torch.set_grad_enabled(False)
    models = configs()
    if options.is_dry:
        models = {"llama": models["llama"]}
    ways = dict(list(WAYS.items())[1:2]) if options.is_dry else WAYS
    for name, config in models.items():
        with tempfile.TemporaryDirectory(prefix="pagemill-bench-") as folder:
            directory = Path(folder)
            config.save_pretrained(directory)
            save_tokenizer(VOCABULARY, directory)
            for dtype in ("float32",) if options.is_dry else ("float32", "bfloat16"):
                with attempt(f"{name}, {dtype}"):
                    compare(name, directory, "cpu" if options.is_dry else "cuda", dtype, ways)


if __name__ == "__main__":
    main()
