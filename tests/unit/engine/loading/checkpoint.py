"""A small published checkpoint, and ways to change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.batch import Batch, BatchEntry
from engine.config import EngineConfig
from engine.execution.model_runner import ModelRunner
from engine.loading.hub import weight_files

CPU = torch.device("cpu")
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Save all weights in one file, some of them changed or left out; `__` in a name stands for a dot."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        tensors.update(load_file(path))
        path.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(directory: Path, **options: Any) -> ModelRunner:
    return ModelRunner.from_pretrained(directory, EngineConfig(device="cpu", num_kv_blocks=4, **options))


def logits_of_transformers(directory: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([TOKENS])).logits[0]
    return logits


def assert_same_as_transformers(directory: Path) -> None:
    logits = load(directory).run(Batch([BatchEntry(TOKENS, 0, [0], num_logits=len(TOKENS))]))
    torch.testing.assert_close(logits, logits_of_transformers(directory), atol=1e-5, rtol=1e-4)
