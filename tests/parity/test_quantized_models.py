"""Quantized checkpoints against transformers with the same weights dequantized."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import Engine, EngineConfig
from engine.linears.quantized import QuantizedLinear
from kernels.device import interprets
from tests.parity.comparing import (
    LOGPROB_TOLERANCE,
    Reference,
    assert_same,
    greedy,
    ragged_prompts,
    reference_greedy,
)
from tests.parity.quantizing import SCHEMES, Scheme, awq, compressed_tensors, gptq
from tests.parity.tiny_models import MAX_POSITIONS, VOCAB_SIZE, TinyModel

NUM_TOKENS = 12
LAYERS = 2
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}
LLAMA = TinyModel("llama", "llama", sizes=SIZES)
OTHERS = [
    (TinyModel("phi3", "phi3", {"pad_token_id": 0}, sizes=SIZES), gptq("gptq")),
    (TinyModel("qwen2", "qwen2", sizes=SIZES), awq()),
    (TinyModel("gemma2", "gemma2", {"head_dim": 16, "tie_word_embeddings": False}, sizes=SIZES), compressed_tensors()),
    (TinyModel("mixtral", "mixtral", {"num_local_experts": 4}, sizes=SIZES), awq()),
]


def saved(model: TinyModel, scheme: Scheme, directory: Path) -> tuple[Path, list[Reference]]:
    """The quantized checkpoint, and what transformers generates with its weights in float32."""
    model.save(directory / "plain")
    scheme.write(directory / "plain", directory / "quantized", directory / "dequantized")
    reference = AutoModelForCausalLM.from_pretrained(directory / "dequantized", attn_implementation="eager").eval()
    with torch.no_grad():
        references = reference_greedy(reference, ragged_prompts(lengths=(1, 5, 17)), NUM_TOKENS)
    return directory / "quantized", references


def engine_of(directory: Path) -> Engine:
    return Engine.from_pretrained(directory, EngineConfig(device="cpu", attention="torch", num_kv_blocks=64))


def check(engine: Engine, references: list[Reference]) -> None:
    outputs = engine.generate([reference.prompt for reference in references], greedy(NUM_TOKENS))
    assert_same(outputs, references)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_dequantized_weights_are_what_the_format_says(scheme: Scheme, tmp_path: Path) -> None:
    directory, references = saved(LLAMA, scheme, tmp_path)
    engine = engine_of(directory)
    assert not any(isinstance(module, QuantizedLinear) for module in engine.runner.model.modules())
    check(engine, references)


@pytest.mark.parametrize(("model", "scheme"), OTHERS, ids=lambda value: value.name)
def test_quantized_models_give_the_tokens_of_their_dequantized_weights(
    model: TinyModel, scheme: Scheme, tmp_path: Path
) -> None:
    directory, references = saved(model, scheme, tmp_path)
    check(engine_of(directory), references)


ALWAYS = ("awq", "gptq-desc-act", "fp8-block")
"""Which the interpreter computes in the ordinary tests; it is slow."""


@pytest.mark.skipif(not interprets(), reason="the engine runs on the CPU here, where kernels need the interpreter")
@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(scheme, id=scheme.name, marks=[] if scheme.name in ALWAYS else pytest.mark.slow)
        for scheme in SCHEMES
    ],
)
def test_kernels_read_the_quantized_weights(scheme: Scheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, references = saved(LLAMA, scheme, tmp_path)
    monkeypatch.setattr("kernels.quantized_matmul.dispatch", SimpleNamespace(use_triton=lambda tensor: True))
    engine = engine_of(directory)
    packed = [module for module in engine.runner.model.modules() if isinstance(module, QuantizedLinear)]
    # Where orders differ, only what stands alone stays packed.
    alone = scheme.name == "gptq-int8-each-its-order"
    assert len(packed) == LAYERS * (2 if alone else 4)
    short = [references[0], references[-1]]
    outputs = engine.generate([reference.prompt for reference in short], greedy(2))
    for output, reference in zip(outputs, short, strict=True):
        assert output.error is None
        assert list(output.token_ids) == reference.token_ids[:2]
        for place, ours in enumerate(output.completions[0].logprobs or ()):
            for token, logprob in ours.top:
                assert abs(logprob - float(reference.logprobs[place, token])) < LOGPROB_TOLERANCE
