"""The workloads' models as GGUF files are the same models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed: pip install -c constraints.txt -e '.[worker]'")

from bench.gguf_conversion import write_gguf
from bench.models import save_tokenizer
from engine.batch import Batch, BatchEntry
from engine.config import EngineConfig
from engine.execution.model_runner import ModelRunner
from engine.loading.gguf.file import GGUFFile
from engine.loading.tokenizer import load_tokenizer

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
_ENDS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SIZES = _ENDS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": _ENDS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": _SIZES | {"tie_word_embeddings": True, "eos_token_id": [2, 0]},
    "qwen3": _SIZES | {"head_dim": 32, "tie_word_embeddings": False},
}


@pytest.fixture(params=MODELS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **MODELS[request.param]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    save_tokenizer(512, tmp_path / "source")
    return tmp_path / "source"


def logits(path: Path) -> torch.Tensor:
    runner = ModelRunner.from_pretrained(path, EngineConfig(device="cpu", dtype="float32", num_kv_blocks=4))
    return runner.run(Batch([BatchEntry(TOKENS, 0, [0], num_logits=len(TOKENS))]))


def test_converted_model_computes_what_its_source_does(source: Path, tmp_path: Path) -> None:
    write_gguf(source, tmp_path / "model.gguf", "F32")
    torch.testing.assert_close(logits(tmp_path / "model.gguf"), logits(source))
    ours, theirs = load_tokenizer(source), load_tokenizer(tmp_path / "model.gguf")
    assert ours is not None
    assert theirs is not None
    assert theirs.decode(range(1, 512)) == ours.decode(range(1, 512))


def test_matrices_alone_are_quantized(source: Path, tmp_path: Path) -> None:
    write_gguf(source, tmp_path / "model.gguf", "Q8_0")
    tensors = GGUFFile(tmp_path / "model.gguf").tensors.values()
    is_matrix = {tensor.name: len(tensor.shape) == 2 and tensor.name != "position_embd.weight" for tensor in tensors}
    assert {tensor.name: tensor.type.name == "Q8_0" for tensor in tensors} == is_matrix
    exact, rounded = logits(source), logits(tmp_path / "model.gguf")
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.std()
