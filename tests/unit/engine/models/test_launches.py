"""How many kernels a decode step launches for a layer on a GPU: ours, and torch's.

Our launches are noted instead of run, torch's operations as they are dispatched. Without a graph each is a call of the
host, and in a graph a gap on the device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import EngineConfig
from engine.attention import CapturableAttention, DecodeMetadata
from engine.execution.model_runner import ModelRunner
from engine.models.decoder import TokenInputs
from kernels import dispatch
from kernels.launch import Launch
from tests.parity.tiny_models import NATIVE

_ALLOCATIONS = {"empty", "empty_like", "new_empty"}

_WITH_HEADS_TURNED = ["_write_kernel", "_decode_kernel", "product"]

LAYERS = {
    "llama": [*_WITH_HEADS_TURNED, "_rms_norm_kernel", "product", "_gated_activation_kernel", "product"],
    # Norms of heads are in the launch that writes keys.
    "qwen3": [*_WITH_HEADS_TURNED, "_rms_norm_kernel", "product", "_gated_activation_kernel", "product"],
    "gpt2": [*_WITH_HEADS_TURNED, "_layer_norm_kernel", "product", "gelu", "product"],
    "gptj": [*_WITH_HEADS_TURNED, "add", "product", "gelu", "product"],
    "gemma3": [
        *_WITH_HEADS_TURNED,
        "_rms_norm_kernel",
        "_rms_norm_kernel",
        "product",
        "_gated_activation_kernel",
        "product",
        "_rms_norm_kernel",
    ],
}
"""From a layer's write to the cache to its last product; the next layer's norm, which adds, and its first follow."""


class Noted(TorchDispatchMode):
    """Names of what would be launched, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _ALLOCATIONS:
            self.names.append("product" if name in ("mm", "addmm", "linear") else name)
        return func(*args, **(kwargs or {}))


def decode_launches(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a decode step of four sequences."""
    noted = Noted()
    monkeypatch.setattr(Launch, "run", lambda launch: noted.names.append(launch.kernel.fn.__name__))
    zeros = torch.zeros(4, dtype=torch.int64)
    lengths, tables = torch.ones(4, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32)
    assert isinstance(runner.backend, CapturableAttention)
    step = runner.backend.prepare_decode(DecodeMetadata(zeros, lengths, tables, zeros), runner.cache)
    with noted:
        runner.model(TokenInputs(zeros, zeros, lengths.long()), step)
    return noted.names


@pytest.mark.parametrize("name", list(LAYERS))
@torch.inference_mode()
def test_layer_of_a_decode_step_launches_no_more_than_it_needs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next(model for model in NATIVE if model.name == name).save(tmp_path)
    monkeypatch.setattr(dispatch, "use_triton", lambda tensor: True)
    # On a GPU, linear layers stay torch's own.
    monkeypatch.setattr("engine.linears.LinearReplacer.replace", lambda *_: None)
    config = EngineConfig(device="cpu", dtype="float32", attention="triton", num_kv_blocks=8, max_model_len=32)
    names = decode_launches(ModelRunner.from_pretrained(tmp_path, config), monkeypatch)
    # Plans are made once a step, for all layers of like shape.
    names = [launched for launched in names if launched != "_plan_kernel"]
    writes = [place for place, launched in enumerate(names) if launched == "_write_kernel"]
    norm = "_rms_norm_kernel" if name in ("llama", "qwen3", "gemma3") else "_layer_norm_kernel"
    assert names[writes[0] : writes[1]] == [*LAYERS[name], norm, "product"]
