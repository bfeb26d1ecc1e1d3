"""Stretched rotary embeddings, on sequences that begin and end on either side of the original context."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from engine import Engine, EngineConfig
from tests.parity.comparing import Reference, assert_same, generate_with_preemptions, greedy, ragged_prompts
from tests.parity.comparing import reference_greedy as reference
from tests.parity.tiny_models import ROPE_KINDS, TinyModel

NUM_TOKENS = 24
ORIGINAL = 40
# Well inside, across the border while generating, just past it, far beyond.
LENGTHS = (5, 30, 41, 90)


def stretched(kind: str) -> TinyModel:
    rope = {"rope_theta": 500.0, **ROPE_KINDS[kind]}
    if kind == "longrope":
        # Phi-3 is the one that starts anew when a sequence outgrows the original context.
        sizes = {"hidden_size": 480, "max_position_embeddings": 160, "original_max_position_embeddings": ORIGINAL}
        return TinyModel(kind, "phi3", {"rope_parameters": rope, **sizes})
    after = kind in ("llama3", "yarn")
    return TinyModel(kind, "llama", {"rope_parameters": rope, "max_position_embeddings": 160 if after else ORIGINAL})


@pytest.mark.parametrize("kind", list(ROPE_KINDS))
def test_float32_tokens_are_equal(kind: str, tmp_path: Path) -> None:
    model = stretched(kind).save(tmp_path)
    prompts = ragged_prompts(lengths=LENGTHS)
    references: list[Reference] = []
    with torch.no_grad():
        for start in range(0, len(prompts), 4):
            # transformers remembers the longest sequence that a model has seen, and turns later ones by it.
            references += reference(copy.deepcopy(model), prompts[start : start + 4], NUM_TOKENS)

    engine = Engine.from_pretrained(tmp_path, EngineConfig(device="cpu", num_kv_blocks=256, max_num_batched_tokens=32))
    assert engine.runner.max_model_len >= LENGTHS[-1] + NUM_TOKENS
    assert_same(generate_with_preemptions(engine, prompts, greedy(NUM_TOKENS)), references)
    # Prefixes that were cached while other lengths were about.
    assert_same(engine.generate(prompts, greedy(NUM_TOKENS)), references)


def test_prompts_of_two_lengths_share_nothing_where_length_counts(tmp_path: Path) -> None:
    stretched("dynamic").save(tmp_path)
    engine = Engine.from_pretrained(tmp_path, EngineConfig(device="cpu", num_kv_blocks=64))
    prompt = ragged_prompts(lengths=(90,))[0]
    cached = [engine.generate([prompt[:length]], greedy(1))[0].cached_tokens for length in (35, 40, 60, 60, 90)]
    assert cached == [0, 32, 0, 48, 0]
