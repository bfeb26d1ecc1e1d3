"""Which implementation of attention an engine uses."""

from __future__ import annotations

import torch

from engine.attention.interface import AttentionBackend
from engine.attention.plain import TorchAttention
from engine.config import EngineConfig


def make_backend(config: EngineConfig, device: torch.device) -> AttentionBackend:
    """The implementation that the configuration asks for; "auto" takes the best there is for the device.

    Raises `ModelError` when it cannot run on the device.
    """
    wanted = config.attention
    if wanted == "auto":
        wanted = "triton" if device.type == "cuda" else "torch"
    if wanted == "triton":
        # Imported here: where no kernel is wanted, Triton need not be installed.
        from engine.attention.triton import TritonAttention

        return TritonAttention(device)
    return TorchAttention()
