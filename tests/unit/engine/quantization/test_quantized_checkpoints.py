"""Quantized checkpoints: what is refused, and what is overlooked. That the rest is right, tests/parity shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import InvalidWeights, UnsupportedModel
from engine.execution.model_runner import ModelRunner
from engine.linears.quantized import QuantizedLinear
from tests.parity.quantizing import Scheme, awq, compressed_tensors, fp8_block, fp8_tensor, gptq, same_order

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"
Changes = Mapping[str, Tensor | None]


@pytest.fixture
def quantized(tmp_path: Path) -> Callable[..., Path]:
    """A quantized checkpoint, some of its configuration and its tensors changed or (None) left out."""

    def make(scheme: Scheme, config: Mapping[str, Any] | None = None, tensors: Changes | None = None) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(tmp_path / "plain")
        directory = tmp_path / "quantized"
        scheme.write(tmp_path / "plain", directory, tmp_path / "dequantized")
        path = directory / "config.json"
        document = json.loads(path.read_text())
        document["quantization_config"] |= config or {}
        path.write_text(json.dumps(document))
        held = load_file(directory / "model.safetensors") | dict(tensors or {})
        save_file(
            {name: tensor for name, tensor in held.items() if tensor is not None}, directory / "model.safetensors"
        )
        return directory

    return make


def load(directory: Path, **options: Any) -> ModelRunner:
    return ModelRunner.from_pretrained(directory, EngineConfig(device="cpu", num_kv_blocks=4, **options))


def compressed(**weights: Any) -> dict[str, Any]:
    group = compressed_tensors().config["config_groups"]["group_0"]
    return {"config_groups": {"group_0": group | {"weights": group["weights"] | weights}}}


STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
REFUSED = [
    (awq(), {"quant_method": "bitsandbytes"}, "'bitsandbytes'; what is loaded: awq, compressed-tensors, fp8, gptq"),
    (awq(), {"bits": 3}, "bits = 3"),
    (awq(), {"version": "gemv"}, "version = 'gemv'"),
    (awq(), {"zero_point": False}, "zero_point = False"),
    (awq(), {"group_size": None}, "group_size is None"),
    (awq(group_size=8), {}, "groups of 8 inputs"),
    (gptq("gptq"), {"bits": 2}, "bits = 2"),
    (gptq("gptq"), {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
    (gptq("gptq"), {"dynamic": {"-:lm_head": {}}}, "dynamic"),
    (fp8_tensor(), {"activation_scheme": "static"}, "activation_scheme = 'static'"),
    (fp8_block(), {"fmt": "e5m2"}, "fmt = 'e5m2'"),
    (fp8_block(), {"weight_block_size": [128]}, r"its blocks are \[128\]"),
    (compressed_tensors(), {"format": "pack-quantized"}, "format = 'pack-quantized'"),
    (compressed_tensors(), {"config_groups": {}}, "config_groups"),
    (compressed_tensors(), {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    (compressed_tensors(), compressed(type="int"), "type = 'int'"),
    (compressed_tensors(), compressed(strategy="group"), "strategy = 'group'"),
    (
        compressed_tensors(),
        {"config_groups": {"group_0": {**compressed()["config_groups"]["group_0"], "input_activations": STATIC}}},
        "static scales of activations",
    ),
]


@pytest.mark.parametrize(
    ("scheme", "config", "reason"),
    REFUSED,
    ids=[f"{case[0].name}-{'-'.join(case[1])}-{i}" for i, case in enumerate(REFUSED)],
)
def test_quantization_config_is_refused_with_its_reason(
    scheme: Scheme, config: Mapping[str, Any], reason: str, quantized: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        load(quantized(scheme, config))


NOWHERE = torch.full((64,), 7, dtype=torch.int32)
ATTENTION = "model.layers.0.self_attn"
DAMAGED: list[tuple[Scheme, Changes, str]] = [
    (awq(), {f"{DOWN}.scales": None}, r"lacks model\.layers\.0\.mlp\.down_proj\.scales"),
    (awq(), {f"{DOWN}.qweight": None}, r"holds model\.layers\.0\.mlp\.down_proj\.q?\w+, but no qweight"),
    (awq(), {f"{DOWN}.{part}": None for part in ("qweight", "qzeros", "scales")}, r"lacks .*down_proj\.weight"),
    (
        awq(),
        {f"{DOWN}.scales": torch.ones(2, 31).half()},
        r"down_proj\.scales has the shape \[2, 31\] instead of \[2, 32\]",
    ),
    (awq(), {f"{DOWN}.qweight": torch.zeros(8, 32, dtype=torch.int32)}, r"shape \[8, 32\] instead of \[64, 4\]"),
    (awq(), {f"{DOWN}.qweight": torch.zeros(64, 4)}, r"holds torch\.float32 instead of torch\.int32"),
    (awq(), {f"{DOWN}.scales": torch.ones(2, 32, dtype=torch.int32)}, "instead of float32, bfloat16 or float16"),
    (awq(), {f"{DOWN}.weight": torch.zeros(32, 64)}, "twice"),
    (awq(), {f"{DOWN}.bias": torch.ones(32)}, r"does not know: .*down_proj\.bias"),
    (awq(), {"model.layers.0.mlp.side_proj.qweight": torch.zeros(1)}, r"does not know: .*side_proj"),
    (gptq("gptq", order=same_order), {f"{DOWN}.g_idx": None}, r"lacks .*down_proj\.g_idx"),
    (gptq("gptq", order=same_order), {f"{DOWN}.g_idx": NOWHERE}, "does not part 64 inputs into groups of 32"),
    (fp8_tensor(), {f"{DOWN}.weight_scale": None}, r"lacks .*down_proj\.weight_scale"),
    (fp8_tensor(), {f"{DOWN}.weight_scale_inv": torch.ones(1)}, "both"),
    (fp8_tensor(), {f"{DOWN}.weight": torch.zeros(32, 64)}, "but no weight"),
    (fp8_tensor(), {f"{DOWN}.weight": torch.full((32, 64), torch.nan).to(torch.float8_e4m3fn)}, "that are none"),
    (fp8_block(), {f"{DOWN}.weight_scale_inv": torch.ones(2, 1)}, r"shape \[2, 1\] instead of \[1, 1\]"),
    (compressed_tensors(), {f"{DOWN}.weight_scale": torch.ones(31, 1)}, r"shape \[31, 1\] instead of \[32, 1\]"),
    (compressed_tensors(), {f"{ATTENTION}.q_scale": torch.ones(1)}, r"does not know: .*q_scale"),
]


@pytest.mark.parametrize(
    ("scheme", "tensors", "reason"), DAMAGED, ids=[f"{case[0].name}-{i}" for i, case in enumerate(DAMAGED)]
)
def test_damaged_quantized_checkpoint_is_refused_with_its_reason(
    scheme: Scheme, tensors: Changes, reason: str, quantized: Callable[..., Path]
) -> None:
    with pytest.raises(InvalidWeights, match=reason):
        load(quantized(scheme, tensors=tensors))


@pytest.mark.parametrize(
    ("scheme", "names"),
    [
        (compressed_tensors(), ("k_scale", "v_scale")),
        (compressed_tensors(), ("k_proj.output_scale", "v_proj.output_scale")),
        (fp8_tensor(), ("k_proj.k_scale", "v_proj.v_scale")),
    ],
    ids=["compressed-tensors", "compressed-tensors-outputs", "fp8"],
)
def test_scales_of_a_kv_cache_are_ignored(
    scheme: Scheme, names: tuple[str, ...], quantized: Callable[..., Path]
) -> None:
    scales = {f"{ATTENTION}.{name}": torch.full((1,), 0.01) for name in names}
    config = {"kv_cache_scheme": STATIC} if "config_groups" in scheme.config else {}
    assert load(quantized(scheme, config, tensors=scales)).kv_dtype is torch.float32


def test_zero_biases_of_early_gptq_files_are_ignored(quantized: Callable[..., Path]) -> None:
    load(quantized(gptq("gptq"), tensors={f"{DOWN}.bias": torch.zeros(32), f"{DOWN}.g_idx": None}))


def test_unquantized_layers_are_loaded_as_they_are(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.quantized_matmul.dispatch", SimpleNamespace(use_triton=lambda tensor: True))
    dense = torch.randn(64, 32)
    alone: dict[str, Tensor | None] = {f"{UP}.{part}": None for part in ("qweight", "qzeros", "scales")}
    model = load(quantized(awq(), tensors=alone | {f"{UP}.weight": dense}), attention="torch").model
    # Half of a fused layer cannot stay packed.
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 3
    gate_up = model.layers[0].mlp.gate_up
    assert not isinstance(gate_up, QuantizedLinear)
    identity = gate_up(torch.eye(32))[:, 64:]
    torch.testing.assert_close(identity, dense.t(), rtol=1e-6, atol=1e-6)


def test_packed_layers_take_the_memory_of_the_checkpoint(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.quantized_matmul.dispatch", SimpleNamespace(use_triton=lambda tensor: True))
    model = load(quantized(gptq("gptq")), attention="torch").model
    down = model.layers[0].mlp.down
    assert isinstance(down, QuantizedLinear)
    assert not list(down.parameters())
    assert down.weight.bits.nbytes == 32 * 64 // 2
    assert down(torch.eye(64)).shape == (64, 32)


def test_random_weights_are_not_quantized(quantized: Callable[..., Path]) -> None:
    runner = load(quantized(awq(), {"quant_method": "bitsandbytes"}), random_weights=True)
    assert not any(isinstance(module, QuantizedLinear) for module in runner.model.modules())


@pytest.mark.parametrize(
    ("model_type", "sizes", "reason"),
    [
        ("gpt_neox", SIZES, "run in transformers' own code"),
        (
            "gpt2",
            {
                "n_embd": 32,
                "n_head": 2,
                "n_layer": 1,
                "n_positions": 64,
                "vocab_size": 48,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            r"stored \[out, in\]",
        ),
    ],
)
def test_quantized_weights_are_refused_when_the_model_does_not_support_them(
    model_type: str, sizes: Mapping[str, Any], reason: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(tmp_path / "plain")
    gptq("gptq").write(tmp_path / "plain", tmp_path / "quantized", tmp_path / "dequantized")
    with pytest.raises(UnsupportedModel, match=reason):
        load(tmp_path / "quantized")
