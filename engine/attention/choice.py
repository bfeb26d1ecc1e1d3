"""Which implementation of attention an engine uses."""

from __future__ import annotations

import torch

from engine.attention.interface import AttentionBackend
from engine.attention.plain import TorchAttention
from engine.config import EngineConfig


def make_backend(config: EngineConfig, device: torch.device) -> AttentionBackend:
    """The implementation that the configuration asks for; "auto" takes the best there is for the device."""
    del config, device  # one implementation serves all so far
    return TorchAttention()
