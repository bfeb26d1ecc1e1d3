"""How a mixture of experts holds its weights."""

from __future__ import annotations

from transformers import AutoConfig

from engine.models.llama import Llama
from engine.models.moe import SparseMLP


def test_every_expert_is_loaded_into_its_place_in_one_tensor() -> None:
    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=20,
        hidden_size=16,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    model = Llama(config)
    mlp = model.layers[0].mlp
    assert isinstance(mlp, SparseMLP)
    targets = model.weights().targets
    name = "model.layers.0.block_sparse_moe.experts"
    for expert in range(3):
        for part, (weight, value) in enumerate({"w1": mlp.gate_up, "w3": mlp.gate_up, "w2": mlp.down}.items(), 1):
            place = targets[f"{name}.{expert}.{weight}.weight"].tensor
            place.fill_(10.0 * expert + part)
            assert place.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    for expert in range(3):
        assert mlp.gate_up[expert, :6].eq(10 * expert + 1).all()
        assert mlp.gate_up[expert, 6:].eq(10 * expert + 2).all()
        assert mlp.down[expert].eq(10 * expert + 3).all()
    # Nothing else holds them.
    experts = 3 * (2 * 6 * 16 + 16 * 6)
    assert sum(parameter.numel() for parameter in mlp.parameters()) == experts + 3 * 16
