"""Rotary embeddings against transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

from engine.errors import UnsupportedModel
from engine.models.decoder import TokenInputs
from engine.models.rotary import Rotary, inverse_frequencies
from kernels.rotary import rotate
from tests.parity.tiny_models import ROPE_KINDS

MAX_POSITIONS = 64
KINDS = {
    "default": {"rope_type": "default"},
    **ROPE_KINDS,
    "yarn-mscale": {**ROPE_KINDS["yarn"], "mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 20, "truncate": False},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.4},
}


def inputs(length: int) -> TokenInputs:
    positions = torch.arange(length)
    return TokenInputs(positions, positions, torch.full_like(positions, length))


@pytest.mark.parametrize("length", [30, 40, 41, 64, 150])  # 40: the original context of yarn and longrope
@pytest.mark.parametrize("kind", list(KINDS))
def test_rotation_equals_that_of_transformers(kind: str, length: int) -> None:
    rope = {"rope_theta": 500.0, **KINDS[kind]}
    # Llama turns whole heads only; Phi-3 stretches by longrope only.
    model_type, theirs = ("phi3", Phi3RotaryEmbedding) if kind == "partial" else ("llama", LlamaRotaryEmbedding)
    config = AutoConfig.for_model(
        model_type,
        hidden_size=240,
        num_attention_heads=3,
        max_position_embeddings=MAX_POSITIONS,
        original_max_position_embeddings=rope.get("original_max_position_embeddings", MAX_POSITIONS),
        rope_parameters=rope,
        pad_token_id=0,
    )
    query = torch.randn(1, 3, length, 80)
    turned, _ = apply_rotary_pos_emb(query, query, *theirs(config)(query, torch.arange(length)[None]))

    rotary = Rotary(config.rope_parameters, 80, MAX_POSITIONS)
    ours = rotate(query[0].transpose(0, 1), *rotary(inputs(length), torch.float32))
    torch.testing.assert_close(ours.transpose(0, 1), turned[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotation_depends_on_the_length_of_each_sequence(kind: str) -> None:
    rope = {"rope_theta": 500.0, **ROPE_KINDS[kind]}
    rotary = Rotary(rope, 80, MAX_POSITIONS)
    short, long = inputs(20), inputs(150)
    both = TokenInputs(*(torch.cat(pair) for pair in zip(_fields(short), _fields(long), strict=True)))
    for mixed, *alone in zip(
        rotary(both, torch.float32), rotary(short, torch.float32), rotary(long, torch.float32), strict=True
    ):
        torch.testing.assert_close(mixed, torch.cat(alone))
    assert not torch.equal(rotary(short, torch.float32)[0], rotary(long, torch.float32)[0][:20])


def test_longrope_uses_long_factors_only_past_the_original_context() -> None:
    rope = {"rope_theta": 500.0, **ROPE_KINDS["longrope"]}
    original = rope["original_max_position_embeddings"]
    rotary = Rotary(rope, 80, MAX_POSITIONS)
    lengths = [rotary.rope_length(5, num_tokens) for num_tokens in (6, original, original + 1, original + 9)]
    assert lengths == [0, 0, original + 1, original + 1]
    short, at_the_end, past_it = (
        inverse_frequencies(rope, 80, MAX_POSITIONS, length)[0] for length in (None, original, original + 1)
    )
    assert torch.equal(at_the_end, short)
    assert torch.equal(past_it, short / 2)


def _fields(inputs: TokenInputs) -> tuple[torch.Tensor, ...]:
    return inputs.token_ids, inputs.positions, inputs.lengths


def test_rope_scaling_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="spiral"):
        inverse_frequencies({"rope_theta": 1e4, "rope_type": "spiral"}, 8, 64)
