"""Which implementation computes a model's linear layers."""

from __future__ import annotations

import torch
from torch import nn

from engine.config import EngineConfig
from engine.linears.onednn import OneDNNLinear
from engine.linears.replacing import is_tied, replace_linears


def prepare_linears(model: nn.Module, config: EngineConfig, device: torch.device) -> None:
    """Exchange the linear layers of a loaded model for the fastest that there are for the device, one by one.

    A layer's weight is freed as soon as its packed copy exists, so that no more than one is held twice.
    """
    del config
    if device.type == "cpu":
        replace_linears(
            model,
            lambda linear: OneDNNLinear(linear) if OneDNNLinear.takes(linear) and not is_tied(model, linear) else None,
        )
